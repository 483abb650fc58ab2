"""What model calls cost, so that counts of them become time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fairseq.tasks import FairseqTask

from ..decoding.counters import Counters
from ..decoding.policies import Policy
from ..plugin.pair import Pair
from ..plugin.search import SearchOptions
from .systems import ours
from .timing import measure

TURN = 10  # sentences that a system translates before the next one's turn


class CostModel:
    """Milliseconds of a sentence: a cost for the sentence, and for each small call, each large call and each further
    token that a large call reads.

    Args:
        seconds: of sentences that were decoded one at a time.
        counters: of these sentences.

    Attributes:
        costs: (4,) in milliseconds, none below 0; see :func:`features`.
        error: mean relative error of the estimates of these sentences.
    """

    def __init__(self, seconds: Sequence[float], counters: Sequence[Counters]):
        calls, milliseconds = np.stack([features(one) for one in counters]), 1000 * np.asarray(seconds)
        self.costs = np.zeros(calls.shape[1])
        used = list(range(calls.shape[1]))
        while True:
            # Relative errors count: long sentences would drown the short ones otherwise.
            scale = 1 / milliseconds
            fitted = np.linalg.lstsq(calls[:, used] * scale[:, None], milliseconds * scale, rcond=None)[0]
            if (fitted >= 0).all() or len(used) == 1:
                self.costs[used] = np.maximum(fitted, 0)
                break
            del used[int(fitted.argmin())]
        estimated = calls @ self.costs
        self.error = float(np.abs(estimated / milliseconds - 1).mean())

    def __str__(self) -> str:
        sentence, small, large, token = self.costs
        return (
            f"{sentence:.2f} ms a sentence, {small:.2f} ms a small call, {large:.2f} ms a large call, "
            f"{token:.3f} ms a drafted token that it reads (mean error {self.error:.0%})"
        )


def features(counters: Counters) -> np.ndarray:
    """What a sentence's time is made of: (4,) sentence, small calls, large calls, drafted tokens read."""
    return np.array([1.0, counters.small_calls, counters.large_calls, counters.accepted + counters.discarded])


def fit_costs(
    pair: Pair, task: FairseqTask, search: SearchOptions, batches: Sequence[dict[str, Any]], cuda: bool
) -> CostModel:
    """Times systems that differ as much as possible in what they call, on batches of one sentence."""
    apart = [Policy(0.0, math.inf, 10), Policy(0.6, 2.0, 10), Policy(0.9, 0.0, 20, verify_end=True)]
    systems = [ours("greedy", pair.greedy(), task, search)]
    systems += [ours(str(policy), pair, task, search, policy) for policy in apart]
    measure(systems, batches, cuda=cuda, warmup=2, turn=TURN)
    seconds = [value for system in systems for value in system.seconds]
    return CostModel(seconds, [one for system in systems for one in system.counters])
