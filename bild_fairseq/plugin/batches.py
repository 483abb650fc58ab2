"""Batches of a data set: every sentence is in one, and no more is remembered than can be used again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def complete(batch_by_size: Callable[..., Sequence[np.ndarray]]) -> Callable[..., list[np.ndarray]]:
    """Wraps fairseq's ``batch_by_size`` so that the last batch is kept.

    From 0.12.3 on fairseq drops a last batch whose size is no multiple of ``required_batch_size_multiple``, 8 unless
    the user says otherwise, and fails where there is no sentence at all. The wrapped function returns what that of
    0.12.2 does.
    """

    @functools.wraps(batch_by_size)
    def batches_of(indices: Iterable[int], *args: Any, **kwargs: Any) -> list[np.ndarray]:
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter(indices, dtype=np.int64, count=-1)
        if not len(indices):
            return []
        batches = list(batch_by_size(indices, *args, **kwargs))
        # Batches are neighbouring parts of the indices, so what is missing is one batch, the last.
        missing = indices[sum(map(len, batches)) :]
        if len(missing) and _fixed_shapes(args, kwargs) is None:
            _say_once()
            batches.append(missing)
        return batches

    return batches_of


def forgetting(get_batch_iterator: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a task's ``get_batch_iterator`` so that only data sets that the task keeps are remembered.

    fairseq remembers each data set that it has made batches of, in case it comes again in the next epoch. What
    fairseq-interactive and the hub interface make of each input never comes again, and memory grows with the input.
    """

    @functools.wraps(get_batch_iterator)
    def batch_iterator(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        iterator = get_batch_iterator(self, dataset, *args, **kwargs)
        if not any(kept is dataset for kept in self.datasets.values()):
            self.dataset_to_epoch_iter.pop(dataset, None)
        return iterator

    return batch_iterator


def _fixed_shapes(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The option with which batches are no neighbouring parts; after the indices it is the sixth argument."""
    return args[5] if len(args) > 5 else kwargs.get("fixed_shapes")


@functools.cache
def _say_once() -> None:
    logger.info(
        "the last batch is kept: this version of fairseq drops one whose size is no multiple of "
        "--required-batch-size-multiple, and its sentences with it"
    )
