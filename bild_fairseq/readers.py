"""Models reading along: how far each row of a batch has been consumed, and what comes next.

The decoding loop sees a small and a large model only as two readers. Whether a reader is a model of its own, an
ensemble, or one end of an early-exit decoder is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .cached_decoder import CachedDecoder, DecoderState, Span
from .decode import Reader


class _Cursor:
    """The bookkeeping that readers share: per row, how much has been consumed."""

    def __init__(self, batch: int):
        self.consumed = [0] * batch

    def rollback(self, row: int, length: int) -> None:
        self.consumed[row] = min(self.consumed[row], length)

    def unread(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Offsets of the first unread token of each row, and how many there are."""
        starts = [self.consumed[row] for row in rows]
        return starts, [len(tokens[row]) - start for row, start in zip(rows, starts, strict=True)]

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        for row, count in zip(rows, counts, strict=True):
            self.consumed[row] += count


def _batch(
    tokens: Sequence[Sequence[int]],
    rows: Sequence[int],
    starts: Sequence[int],
    new: int,
    device: torch.device,
) -> Tensor:
    """The unread tokens of some rows, padded on the right with their last token: (rows, new)."""
    batch = []
    for row, start in zip(rows, starts, strict=True):
        unread = list(tokens[row][start:])
        batch.append(unread + unread[-1:] * (new - len(unread)))
    return torch.tensor(batch, device=device)


def _select(x: Tensor, counts: Sequence[int], new: int, last_only: bool) -> Tensor:
    """Drops padding, and all but the last position of each row if only that is wanted.

    Args:
        x: (rows * new, dim); row i has ``counts[i]`` real positions.
    """
    if min(counts) == new:
        return x[new - 1 :: new] if last_only else x
    index = [
        row * new + position
        for row, count in enumerate(counts)
        for position in range(count - 1 if last_only else 0, count)
    ]
    return x[torch.tensor(index, device=x.device)]


class ModelReader(_Cursor):
    """A decoder reading from its first layer to ``depth``: a model of its own, or an exit used alone."""

    def __init__(self, decoder: CachedDecoder, state: DecoderState, depth: int | None = None):
        super().__init__(state.batch)
        self._decoder = decoder
        self._state = state
        self._depth = decoder.depth if depth is None else depth

    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool) -> Tensor:
        starts, counts = self.unread(tokens, rows)
        new = max(counts)
        span = self._state.span(rows, starts, new)
        x = self._decoder.embed(_batch(tokens, rows, starts, new, self._decoder.device), span)
        x = self._decoder.run(x, self._state, span, 0, self._depth)
        self.advance(rows, counts)
        return self._decoder.logits(_select(x, counts, new, last_only), self._depth)


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

    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool) -> Tensor:
        logits = [reader.read(tokens, rows, last_only) for reader in self._readers]
        if self._temperature != 1.0:
            logits = [member / self._temperature for member in logits]
        if len(logits) == 1:
            return logits[0]
        mean = torch.logsumexp(torch.stack([torch.log_softmax(member, dim=-1) for member in logits]), dim=0)
        return mean - math.log(len(logits))

    def rollback(self, row: int, length: int) -> None:
        for reader in self._readers:
            reader.rollback(row, length)


class ExitReader(_Cursor):
    """The shallow end of an early-exit decoder: drafts from the exit and keeps the hidden states there."""

    def __init__(self, decoder: CachedDecoder, state: DecoderState, exit_layer: int):
        super().__init__(state.batch)
        self.decoder = decoder
        self.state = state
        self.exit_layer = exit_layer
        self._hidden: Tensor | None = None  # (batch, length, dim)

    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool) -> Tensor:
        x, counts, new = self._extend(tokens, rows)
        return self.decoder.logits(_select(x, counts, new, last_only), self.exit_layer)

    def catch_up(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Reads what is unread of some rows without predicting anything."""
        behind = [row for row in rows if self.consumed[row] < len(tokens[row])]
        if behind:
            self._extend(tokens, behind)

    def hidden(self, span: Span) -> Tensor:
        """Hidden states at the exit of the span's positions, (batch * new, dim)."""
        self._reserve(self._hidden)
        if span.start is not None:
            x = self._hidden[:, span.start : span.end]
        else:
            x = self._hidden[span.rows, span.positions]
        return x.reshape(span.batch * span.new, -1)

    def _extend(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[Tensor, list[int], int]:
        starts, counts = self.unread(tokens, rows)
        new = max(counts)
        span = self.state.span(rows, starts, new)
        x = self.decoder.embed(_batch(tokens, rows, starts, new, self.decoder.device), span)
        x = self.decoder.run(x, self.state, span, 0, self.exit_layer)
        self._keep(x, span)
        self.advance(rows, counts)
        return x, counts, new

    def _keep(self, x: Tensor, span: Span) -> None:
        self._reserve(x)
        x = x.view(span.batch, span.new, -1)
        if span.start is not None:
            self._hidden[:, span.start : span.end] = x
        else:
            self._hidden[span.rows, span.positions] = x

    def _reserve(self, like: Tensor) -> None:
        """Keeps room for as many positions as the cache has."""
        length = 0 if self._hidden is None else self._hidden.size(1)
        if length < self.state.length:
            grown = like.new_zeros(self.state.batch, self.state.length, like.size(-1))
            if length:
                grown[:, :length] = self._hidden
            self._hidden = grown


class ResumeReader(_Cursor):
    """The deep end of an early-exit decoder: goes on from the hidden states that the exit has left.

    The shallow layers run only over tokens that the exit has not read yet.
    """

    def __init__(self, shallow: ExitReader):
        super().__init__(len(shallow.consumed))
        self._shallow = shallow

    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool) -> Tensor:
        self._shallow.catch_up(tokens, rows)
        decoder, state = self._shallow.decoder, self._shallow.state
        starts, counts = self.unread(tokens, rows)
        new = max(counts)
        span = state.span(rows, starts, new)
        x = decoder.run(self._shallow.hidden(span), state, span, self._shallow.exit_layer, decoder.depth)
        self.advance(rows, counts)
        return decoder.logits(_select(x, counts, new, last_only))
