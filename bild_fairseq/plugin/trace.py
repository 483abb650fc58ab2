"""The forward passes of a generation, recorded and repeated without the decisions between them.

Their time is the floor under the decoding loop: what is above it is the loop's own cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines.readers import EnsembleReader
from .generator import BildGenerator

Call = tuple[bool, list[list[int]], list[int], list[int], bool]


class _Recorder:
    """A reader that notes how it was called."""

    def __init__(self, reader: EnsembleReader, is_large: bool, calls: list[Call]):
        self._reader = reader
        self._is_large = is_large
        self._calls = calls

    @property
    def consumed(self) -> list[int]:
        return self._reader.consumed

    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool) -> Tensor:
        snapshot = [list(row) for row in tokens]
        self._calls.append((self._is_large, snapshot, list(rows), list(self._reader.consumed), last_only))
        return self._reader.read(tokens, rows, last_only)

    def draft(self, *args: Any) -> None:
        """One token at a time, each a call of ``read``."""

    def judge(self, *args: Any) -> None:
        """Logits of every token, a call of ``read``."""

    def rollback(self, row: int, length: int) -> None:
        self._reader.rollback(row, length)


class _Tracing(BildGenerator):
    """A generator whose readers are recorded."""

    calls: list[Call]

    def readers(self, sample: dict[str, Any]):
        large, small = super().readers(sample)
        self.calls = []
        recorded = _Recorder(small, False, self.calls) if small is not None else None
        return _Recorder(large, True, self.calls), recorded


def traced(generator: BildGenerator, sample: dict[str, Any]) -> list[Call]:
    """The forward passes that generating a batch takes, in order."""
    tracing = _Tracing.__new__(_Tracing)
    tracing.__dict__ = {**generator.__dict__, "_records": [], "_counters": []}
    tracing.generate([], sample)
    return tracing.calls


@torch.no_grad()
def replay(generator: BildGenerator, sample: dict[str, Any], calls: Sequence[Call]) -> None:
    """Runs the encoders and the recorded forward passes again, over the same tokens, and nothing else."""
    large, small = generator.readers(sample)
    for is_large, tokens, rows, consumed, last_only in calls:
        reader = large if is_large else small
        for row in rows:
            reader.rollback(row, consumed[row])
        reader.read(tokens, rows, last_only)
