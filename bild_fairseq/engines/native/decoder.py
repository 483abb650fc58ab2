"""A Transformer decoder that reads several tokens at once, run by ``transformer.c``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain
from operator import add

import torch
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor

from ...decoding.constraints import Constraints
from .stack import PackedStack
from .structs import Head, Linear, State


class NativeDecoderState:
    """What has been read of a batch: keys and values of the source and of the tokens, written by position."""

    def __init__(self, stack: PackedStack, batch: int, length: int):
        self.batch = batch
        self.struct = State(sentences=batch)
        self._hidden: Tensor | None = None  # (batch, capacity, dim), what a shallow pass has left for a deep one
        self._stack = stack
        self._source: tuple[Tensor, ...] = ()
        self.reserve(length)

    @property
    def length(self) -> int:
        """Positions that there is room for."""
        return self.struct.capacity

    def reserve(self, length: int) -> None:
        """Makes room for positions 0 .. length - 1; doubles, so that the copying amortises."""
        old = self.struct.capacity
        if length <= old:
            return
        stack = self._stack
        capacity = stack.round_up(max(length, 2 * old))
        shape = (stack.depth, self.batch, stack.heads)
        head_dim = stack.dim // stack.heads
        # The kernels read, and ignore, up to a panel beyond the last number.
        flat = [torch.empty(math.prod(shape) * head_dim * capacity + stack.panel) for _ in range(2)]
        keys = flat[0][: -stack.panel].view(*shape, head_dim, capacity)
        values = flat[1][: -stack.panel].view(*shape, capacity, head_dim)
        if old:
            keys[..., :old] = self._keys
            values[..., :old, :] = self._values
        self._keys, self._values = keys, values
        self.struct.capacity, self.struct.layer_size = capacity, self.batch * stack.dim * capacity
        self.struct.keys, self.struct.values = keys.data_ptr(), values.data_ptr()
        if self._hidden is not None:
            hidden = self._hidden
            self._make_hidden()
            self._hidden[:, :old] = hidden
        stack.reserve_positions(capacity)

    def keep_hidden(self) -> None:
        """Makes room for hidden states."""
        if self._hidden is None:
            self._make_hidden()

    def _make_hidden(self) -> None:
        self._hidden = torch.empty(self.batch, self.struct.capacity, self._stack.dim)
        self.struct.hidden = self._hidden.data_ptr()

    def set_source(self, lengths: Tensor, both: Linear, x: Tensor) -> None:
        """Projects the source.

        Args:
            lengths: (batch,) source positions.
            both: as for :meth:`PackedStack.set_source`.
            x: (batch, source, encoder dim), each sentence from 0 on.
        """
        stack, struct = self._stack, self.struct
        capacity = stack.round_up(x.size(1))
        size = stack.depth * self.batch * stack.dim * capacity
        # The kernels read, and ignore, up to a panel beyond the last number.
        keys, values = torch.empty(size + stack.panel), torch.empty(size + stack.panel)
        self._source = (lengths, keys, values)
        struct.source_capacity, struct.source_lengths = capacity, lengths.data_ptr()
        struct.source_keys, struct.source_values = keys.data_ptr(), values.data_ptr()
        stack.set_source(struct, both, x)


class NativeDecoder:
    """Does what :class:`~bild_fairseq.engines.torch.decoder.CachedDecoder` does, several times as fast.

    Args:
        decoder: one that :func:`~bild_fairseq.engines.native.stack.missing_option` has nothing against, in eval mode.
            Weights are copied.
        precision: of the weights of matrix products, see :mod:`bild_fairseq.engines.precision`.
    """

    def __init__(self, decoder: TransformerDecoderBase, precision: str = "float32"):
        self._stack = PackedStack(decoder, precision)
        arena = self._stack.arena
        vocabulary = arena.linear(decoder.output_projection)
        self._heads = {self.depth: Head(arena.norm(decoder.layer_norm), vocabulary)}
        for depth in getattr(decoder, "exit_layers", ()):
            norms, projections, key = decoder.exit_layer_norms, decoder.exit_output_projections, str(depth)
            self._heads[depth] = Head(
                arena.norm(norms[key] if key in norms else None),
                arena.linear(projections[key]) if key in projections else vocabulary,
            )
        attentions = [layer.encoder_attn for layer in decoder.layers]
        self._key_value = arena.linear(*(part for a in attentions for part in (a.k_proj, a.v_proj)))

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self._stack.depth

    def start(self, encoder_out: Tensor, padding_mask: Tensor | None, batch: int) -> NativeDecoderState:
        """See :meth:`~bild_fairseq.engines.torch.decoder.CachedDecoder.start`."""
        source = encoder_out.size(0)
        lengths = torch.full((batch,), source)
        x = encoder_out.transpose(0, 1)  # (batch, source, encoder dim)
        if padding_mask is not None and padding_mask.any():
            # fairseq pads sources on the left; here they begin at 0.
            lengths = source - padding_mask.sum(dim=1)
            order = padding_mask.int().argsort(dim=1, stable=True)
            x = x.gather(1, order[:, :, None].expand_as(x))
        state = NativeDecoderState(self._stack, batch, 32 + 2 * source)
        state.set_source(lengths, self._key_value, x)
        return state

    def read(
        self,
        state: NativeDecoderState,
        unread: Sequence[Sequence[int]],
        rows: Sequence[int],
        starts: Sequence[int],
        layers: tuple[int, int],
        select: str,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """See :meth:`~bild_fairseq.engines.torch.decoder.CachedDecoder.read`."""
        counts = self._reserve(state, unread, starts, 0, keep)
        total = sum(counts)
        if select == "last":
            selected = [end - 1 for end in accumulate(counts)]
        else:
            selected = range(total) if select == "all" else ()
        head = self._heads.get(layers[1])
        tokens = _embedded(unread, layers)
        result = self._stack.forward(state.struct, (rows, starts, counts), tokens, layers, head, selected, keep)
        return result if selected else None

    def draft(
        self,
        state: NativeDecoderState,
        unread: Sequence[Sequence[int]],
        rows: Sequence[int],
        starts: Sequence[int],
        layers: tuple[int, int],
        constraints: Constraints,
        threshold: float,
        most: Sequence[int],
        minima: Sequence[int],
        keep: bool = False,
    ) -> list[list[tuple[int, float]]]:
        """Reads tokens and goes on with its own.

        Args:
            state, unread, rows, starts, layers, keep: as for
                :meth:`~bild_fairseq.engines.torch.decoder.CachedDecoder.read`; the layers begin with the lowest.
            constraints, threshold, most, minima: where a draft ends, see :meth:`PackedStack.draft`.

        Returns:
            for each row its predictions, see :meth:`PackedStack.draft`.
        """
        counts = self._reserve(state, unread, starts, max(most), keep)
        tokens, head = _embedded(unread, layers), self._heads[layers[1]]
        return self._stack.draft(
            state.struct, (rows, starts, counts), tokens, layers, head, constraints, threshold, most, minima, keep
        )

    def judge(
        self,
        state: NativeDecoderState,
        unread: Sequence[Sequence[int]],
        rows: Sequence[int],
        starts: Sequence[int],
        layers: tuple[int, int],
        constraints: Constraints,
        standing: Sequence[int],
        may_end: Sequence[bool],
        keep: bool = False,
    ) -> list[tuple[int, float, float]]:
        """Reads tokens, and says what should follow each and how likely it is that the standing token does.

        Args:
            state, unread, rows, starts, layers, keep: as for
                :meth:`~bild_fairseq.engines.torch.decoder.CachedDecoder.read`.
            constraints, standing, may_end: see :meth:`PackedStack.judge`.

        Returns:
            for each token, see :meth:`PackedStack.judge`.
        """
        counts = self._reserve(state, unread, starts, 0, keep)
        tokens, head = _embedded(unread, layers), self._heads[layers[1]]
        return self._stack.judge(
            state.struct, (rows, starts, counts), tokens, layers, head, constraints, standing, may_end, keep
        )

    def _reserve(
        self,
        state: NativeDecoderState,
        unread: Sequence[Sequence[int]],
        starts: Sequence[int],
        more: int,
        keep: bool,
    ) -> list[int]:
        """Makes room for what is to be read and some more tokens in each row; returns how much is to be read."""
        counts = [len(tokens) for tokens in unread]
        state.reserve(max(map(add, starts, counts)) + more)
        if keep:
            state.keep_hidden()
        return counts


def _embedded(unread: Sequence[Sequence[int]], layers: tuple[int, int]) -> list[int] | None:
    """Of all rows, side by side; None for layers that go on from hidden states."""
    return None if layers[0] else [*chain.from_iterable(unread)]
