"""The two policies of Big Little Decoder (Kim et al., NeurIPS 2023, sections 3.2 and 3.3)."""

from __future__ import annotations

import math


def falls_back(max_lprob: float, threshold: float) -> bool:
    """Fallback: the small model is too unsure of its best token and hands over to the large one.

    Args:
        max_lprob: log-probability (nats) of the small model's best token.
        threshold: probability, 0 to 1. The comparison is strict, so 0 never falls back.
    """
    return math.exp(max_lprob) < threshold


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
