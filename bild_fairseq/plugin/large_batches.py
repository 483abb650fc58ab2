"""Where drafting does not pay: a pass over many sentences is bound by its arithmetic, no longer by reading weights."""

from __future__ import annotations

import logging
import math

from ..decoding.policies import Policy
from .pair import Pair

logger = logging.getLogger(__name__)

# On a processor of two cores a pass over so many sentences with drafts of usual length costs as much as the passes that
# it saves (examples/RESULTS.md).
FEW_SENTENCES = 6
# Fewer weights lie in the processor's cache, and passes cost little in any case.
MANY_WEIGHTS = 20_000_000


def useful_batch(pair: Pair, policy: Policy) -> float:
    """How many unfinished sentences a batch may have for drafting to pay, as far as the text does not depend on it.

    Lossless decoding reads most for what it accepts, and its text is the large model's own with drafts and without.
    Other decoding gains more from a draft, and its text would change with the size of the batch.

    Returns:
        a number of sentences; infinity where drafting pays or has to be left as it is.
    """
    lossless = policy.rollback_threshold == 0 and policy.verify_end
    weights = [weight for model in pair.large for weight in model.decoder.parameters()]
    if pair.alone or not lossless or weights[0].is_cuda or sum(weight.numel() for weight in weights) < MANY_WEIGHTS:
        return math.inf
    logger.info(
        "lossless decoding: while more than %d sentences of a batch are unfinished, nothing is drafted; "
        "--bild-max-batch sets another number",
        FEW_SENTENCES,
    )
    return FEW_SENTENCES
