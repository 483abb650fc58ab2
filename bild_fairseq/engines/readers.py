"""Models reading along: how far each row of a batch has been consumed, and what comes next.

The decoding loop sees a small and a large model only as two readers. Whether a reader is a model of its own, an
ensemble, or one end of an early-exit decoder is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from ..decoding.constraints import Constraints
from ..decoding.decode import Judgement, Prediction, Reader
from .native import NativeDecoder
from .torch.decoder import Select


class Decoder(Protocol):
    """A decoder that reads several tokens at once: ``CachedDecoder``, ``GraphedDecoder`` or ``NativeDecoder``."""

    depth: int

    def read(
        self,
        state: Any,
        unread: Sequence[Sequence[int]],
        rows: Sequence[int],
        starts: Sequence[int],
        layers: tuple[int, int],
        select: Select,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """See ``CachedDecoder.read``."""
        ...


class _Cursor:
    """Reads some layers of a decoder, and remembers how much of each row has been consumed."""

    def __init__(self, decoder: Decoder, state: Any, layers: tuple[int, int], keep: bool = False):
        self.consumed = [0] * state.batch
        self.decoder = decoder
        self.state = state
        self.layers = layers
        self._keep = keep

    def rollback(self, row: int, length: int) -> None:
        self.consumed[row] = min(self.consumed[row], length)

    def draft(
        self,
        tokens: Sequence[Sequence[int]],
        rows: Sequence[int],
        limits: Sequence[int],
        threshold: float,
        constraints: Constraints,
    ) -> list[list[Prediction]] | None:
        if not isinstance(self.decoder, NativeDecoder) or constraints.depend_on_text:
            return None
        starts, unread = self._unread(tokens, rows)
        minima = [max(0, constraints.min_len - len(tokens[row]) + 1) for row in rows]
        drafts = self.decoder.draft(
            self.state, unread, rows, starts, self.layers, constraints, threshold, limits, minima, self._keep
        )
        for row, predictions in zip(rows, drafts, strict=True):
            self.consumed[row] = len(tokens[row]) + len(predictions) - 1
        return drafts

    def judge(
        self, tokens: Sequence[Sequence[int]], rows: Sequence[int], constraints: Constraints
    ) -> list[list[Judgement]] | None:
        if not isinstance(self.decoder, NativeDecoder) or constraints.depend_on_text:
            return None
        starts, unread = self._unread(tokens, rows)
        # The token that stands after each one that is read; after a row's last one none does, and eos fills in.
        standing = [
            token
            for row, start in zip(rows, starts, strict=True)
            for token in (*tokens[row][start + 1 :], constraints.eos)
        ]
        may_end = [
            position >= constraints.min_len
            for row, start in zip(rows, starts, strict=True)
            for position in range(start, len(tokens[row]))
        ]
        judged = iter(
            self.decoder.judge(
                self.state, unread, rows, starts, self.layers, constraints, standing, may_end, self._keep
            )
        )
        for row in rows:
            self.consumed[row] = len(tokens[row])
        return [list(islice(judged, len(part))) for part in unread]

    def _unread(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[list[int], list[Sequence[int]]]:
        starts = [self.consumed[row] for row in rows]
        return starts, [tokens[row][start:] for row, start in zip(rows, starts, strict=True)]

    def _read(
        self, tokens: Sequence[Sequence[int]], rows: Sequence[int], select: Select
    ) -> tuple[Tensor, Tensor] | None:
        starts, unread = self._unread(tokens, rows)
        result = self.decoder.read(self.state, unread, rows, starts, self.layers, select, self._keep)
        for row in rows:
            self.consumed[row] = len(tokens[row])
        return result


class ModelReader(_Cursor):
    """A decoder reading from its first layer to ``depth``: a model of its own, or an exit used alone."""

    def __init__(self, decoder: Decoder, state: Any, depth: int | None = None):
        super().__init__(decoder, state, (0, decoder.depth if depth is None else depth))

    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool) -> tuple[Tensor, Tensor]:
        return self._read(tokens, rows, "last" if last_only else "all")


class EnsembleReader:
    """Several readers as one: the mean of their probabilities, as in fairseq's ``EnsembleModel``.

    Each member's logits are divided by the temperature before the mean, so its logits are log-probabilities of
    the tempered ensemble.
    """

    def __init__(self, readers: Sequence[Reader], temperature: float = 1.0):
        self._readers = list(readers)
        self._temperature = temperature

    @property
    def consumed(self) -> list[int]:
        return self._readers[0].consumed

    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool) -> tuple[Tensor, Tensor]:
        results = [reader.read(tokens, rows, last_only) for reader in self._readers]
        if self._temperature != 1.0:
            tempered = [logits / self._temperature for logits, _ in results]
            results = [(logits, torch.logsumexp(logits, dim=-1)) for logits in tempered]
        if len(results) == 1:
            return results[0]
        lprobs = torch.stack([logits - normalizer[:, None] for logits, normalizer in results])
        mean = torch.logsumexp(lprobs, dim=0) - math.log(len(results))
        return mean, mean.new_zeros(mean.size(0))

    def draft(
        self,
        tokens: Sequence[Sequence[int]],
        rows: Sequence[int],
        limits: Sequence[int],
        threshold: float,
        constraints: Constraints,
    ) -> list[list[Prediction]] | None:
        if len(self._readers) > 1 or self._temperature != 1.0:
            return None
        return self._readers[0].draft(tokens, rows, limits, threshold, constraints)

    def judge(
        self, tokens: Sequence[Sequence[int]], rows: Sequence[int], constraints: Constraints
    ) -> list[list[Judgement]] | None:
        if len(self._readers) > 1 or self._temperature != 1.0:
            return None
        return self._readers[0].judge(tokens, rows, constraints)

    def rollback(self, row: int, length: int) -> None:
        for reader in self._readers:
            reader.rollback(row, length)


class ExitReader(_Cursor):
    """The shallow end of an early-exit decoder: drafts from the exit and keeps the hidden states there."""

    def __init__(self, decoder: Decoder, state: Any, exit_layer: int):
        super().__init__(decoder, state, (0, exit_layer), keep=True)

    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool) -> tuple[Tensor, Tensor]:
        return self._read(tokens, rows, "last" if last_only else "all")

    def catch_up(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Reads what is unread of some rows without predicting anything."""
        behind = [row for row in rows if self.consumed[row] < len(tokens[row])]
        if behind:
            self._read(tokens, behind, "none")


class ResumeReader(_Cursor):
    """The deep end of an early-exit decoder: goes on from the hidden states that the exit has left.

    The shallow layers run only over tokens that the exit has not read yet.
    """

    def __init__(self, shallow: ExitReader):
        super().__init__(shallow.decoder, shallow.state, (shallow.layers[1], shallow.decoder.depth))
        self._shallow = shallow

    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool) -> tuple[Tensor, Tensor]:
        self._shallow.catch_up(tokens, rows)
        return self._read(tokens, rows, "last" if last_only else "all")

    def judge(
        self, tokens: Sequence[Sequence[int]], rows: Sequence[int], constraints: Constraints
    ) -> list[list[Judgement]] | None:
        self._shallow.catch_up(tokens, rows)
        return super().judge(tokens, rows, constraints)
