"""The bootstrap: how much a figure could have differed with other sentences or batches of the same kind."""

from __future__ import annotations

import numpy as np


def bootstrap_weights(count: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each of some items is drawn in each resample of all of them: (resamples, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The ends of the middle 95 % of a figure.

    Args:
        resampled: (1000,) the figure in each resample.
    """
    low, high = np.sort(resampled)[[25, 974]].tolist()
    return low, high
