"""The two policies of Big Little Decoder (Kim et al., NeurIPS 2023, sections 3.2 and 3.3), as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """The thresholds and rules of a generation.

    Args:
        fallback_threshold: probability, 0 to 1; the small model hands over below it.
        rollback_threshold: nats, 0 to inf; the large model goes back to the first drafted token above it.
        max_draft: tokens that the small model drafts in a row at most, 1 to inf.
        start_small: the small model writes the first token, not the large one.
        verify_end: the large model also verifies what was drafted before the end symbol.
    """

    fallback_threshold: float = 0.6
    rollback_threshold: float = 2.0
    max_draft: float = 10
    start_small: bool = False
    verify_end: bool = False


def falls_back(max_lprob: float, threshold: float) -> bool:
    """Fallback: the small model is too unsure of its best token and hands over to the large one.

    Args:
        max_lprob: log-probability (nats) of the small model's best token; above 0 where a penalty is negative.
        threshold: probability, 0 to 1. The comparison is strict, so 0 never falls back.
    """
    return math.exp(min(max_lprob, 0.0)) < threshold


def rolls_back(token_lprob: float, is_large_argmax: bool, threshold: float) -> bool:
    """Rollback: the large model finds a drafted token too unlikely and would not have chosen it itself.

    The distance is the cross-entropy of the small model's hard prediction under the large model,
    ``-log p_L(token)``.

    Args:
        token_lprob: log-probability (nats) of the drafted token under the large model.
        is_large_argmax: whether the large model's best token is the drafted one.
        threshold: nats, 0 to inf. The comparison is strict: inf never rolls back; 0 rolls back every token that
            is not the large model's own choice.
    """
    return -token_lprob > threshold and not is_large_argmax
