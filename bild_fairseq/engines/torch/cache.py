"""The key/value cache of the torch engine: preallocated buffers that are written by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import State
from .attention import Source


@dataclass
class Span:
    """The positions that one forward pass reads: ``new`` tokens in each of ``batch`` rows.

    Rows that read fewer tokens than ``new`` are padded on the right. What the padding writes into the cache lies
    beyond the row's length, where the mask hides it until real tokens overwrite it.
    """

    batch: int
    new: int
    end: int  # keys at positions 0 .. end - 1 take part
    whole: bool  # whether the rows are all rows of the state, in order
    start: int | None = None  # offset of the new tokens, if whole and the same in all rows; else:
    rows: Tensor | None = None  # (batch, 1) rows of the state
    positions: Tensor | None = None  # (batch, new)
    mask: Tensor | None = None  # (batch or 1, 1 or heads, new, end), added to attention scores


class DecoderState(State):
    """What a decoder remembers of one batch: keys and values of the source and of the tokens read so far.

    Key/value buffers are preallocated and written by position, so going back to an earlier position costs
    nothing: later positions are simply written again.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, like: Tensor, batch: int, length: int):
        self.batch = batch
        self._like = like
        self._shape = (2, batch, heads, head_dim)
        self.self_kv = [self._buffer(length) for _ in range(layers)]  # (2, batch, heads, length, dim)
        self.source: Source | None = None  # None without encoder-decoder attention
        self._hidden: Tensor | None = None  # (batch, length, dim)

    def _buffer(self, length: int) -> Tensor:
        # Zeros, not garbage: a masked position weighs 0, and 0 x NaN would still be NaN.
        two, batch, heads, dim = self._shape
        return self._like.new_zeros(two, batch, heads, length, dim)

    @property
    def length(self) -> int:
        return self.self_kv[0].size(3)

    def reserve(self, length: int) -> None:
        """Makes room for positions 0 .. length - 1; doubles, so that the copying amortises."""
        if length <= self.length:
            return
        length = max(length, 2 * self.length)
        for layer, old in enumerate(self.self_kv):
            self.self_kv[layer] = self._buffer(length)
            self.self_kv[layer][:, :, :, : old.size(3)] = old

    def keep_hidden(self, x: Tensor, span: Span) -> None:
        """Keeps hidden states (batch * new, dim) of a shallow pass for a deep one."""
        if self._hidden is None or self._hidden.size(1) < self.length:
            grown = x.new_zeros(self.batch, self.length, x.size(-1))
            if self._hidden is not None:
                grown[:, : self._hidden.size(1)] = self._hidden
            self._hidden = grown
        x = x.view(span.batch, span.new, -1)
        if span.start is not None:
            self._hidden[:, span.start : span.end] = x
        else:
            self._hidden[span.rows, span.positions] = x

    def hidden(self, span: Span) -> Tensor:
        """Hidden states that were kept at the span's positions, (batch * new, dim)."""
        # Padding may lie beyond what has been kept; it is read, and ignored.
        if self._hidden.size(1) < span.end:
            self._hidden = F.pad(self._hidden, (0, 0, 0, self.length - self._hidden.size(1)))
        if span.start is not None:
            x = self._hidden[:, span.start : span.end]
        else:
            x = self._hidden[span.rows, span.positions]
        return x.reshape(span.batch * span.new, -1)

    def span(self, rows: Sequence[int], starts: Sequence[int], new: int) -> Span:
        """The forward pass that reads ``new`` tokens of each of ``rows``, from offset ``starts[i]`` on."""
        end = max(starts) + new
        self.reserve(end)
        device, dtype = self._like.device, self._like.dtype
        batch = len(rows)
        whole = batch == self.batch
        if whole and min(starts) == max(starts):
            mask = None
            if new > 1:
                query = torch.arange(end - new, end, device=device)[:, None]
                mask = additive_mask(torch.arange(end, device=device) > query, dtype)[None, None]
            return Span(batch, new, end, whole, start=starts[0], mask=mask)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(new, device=device)
        later = torch.arange(end, device=device) > positions[:, :, None]  # (batch, new, end)
        return Span(
            batch,
            new,
            end,
            whole,
            rows=torch.tensor(rows, device=device)[:, None],
            positions=positions,
            mask=additive_mask(later, dtype)[:, None],
        )

    def fixed_span(self, positions: Tensor) -> Span:
        """A pass of all rows over every key that there is room for, so that no shape depends on how far they are.

        Args:
            positions: (batch, new) of the new tokens, below :attr:`length`.
        """
        device = positions.device
        later = torch.arange(self.length, device=device) > positions[:, :, None]  # (batch, new, length)
        return Span(
            *positions.shape,
            self.length,
            whole=True,
            rows=torch.arange(self.batch, device=device)[:, None],
            positions=positions,
            mask=additive_mask(later, self._like.dtype)[:, None],
        )

    def clear(self) -> None:
        """Forgets the keys and values of all tokens, should one of them not be a number."""
        torch._foreach_zero_(self.self_kv)

    def extend_self(self, layer: int, kv: Tensor, span: Span) -> Tensor:
        """Writes the new tokens' keys and values; returns all that the span's queries may look at.

        Args:
            kv: (batch, new, 2, heads, head_dim).

        Returns:
            (2, batch, heads, span.end, head_dim)
        """
        buffer = self.self_kv[layer]
        if span.start is not None:
            buffer[:, :, :, span.start : span.end] = kv.permute(2, 0, 3, 1, 4)
            return buffer[:, :, :, : span.end]
        buffer[:, span.rows, :, span.positions] = kv
        seen = buffer[:, :, :, : span.end]
        return seen if span.whole else seen[:, span.rows.squeeze(1)]


def additive_mask(masked: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to attention scores: -inf where ``masked`` is true, else 0; in its shape."""
    return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, -torch.inf)
