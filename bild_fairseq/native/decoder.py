"""A Transformer decoder that reads several tokens at once, run by ``transformer.c``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor

from ..cached_decoder import Select
from .structs import Head, State
from .transformer import PackedStack


class NativeDecoderState:
    """What has been read of a batch: keys and values of the source and of the tokens, written by position."""

    def __init__(self, stack: PackedStack, batch: int, length: int):
        self.batch = batch
        self.struct = State(sentences=batch)
        self.hidden: Tensor | None = None  # (batch, capacity, dim), what a shallow pass has left for a deep one
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
        if self.hidden is not None:
            hidden, self.hidden = self.hidden, torch.empty(self.batch, capacity, stack.dim)
            self.hidden[:, :old] = hidden
        stack.reserve_positions(capacity)

    def keep_hidden(self, x: Tensor, places: Sequence[Tensor]) -> None:
        if self.hidden is None:
            self.hidden = torch.empty(self.batch, self.struct.capacity, self._stack.dim)
        self.hidden[tuple(places)] = x

    def set_source(self, lengths: Tensor, keys: Tensor, values: Tensor) -> None:
        """Sets the source.

        Args:
            lengths: (batch,) source positions.
            keys: (layers, batch, heads, head_dim, capacity).
            values: (layers, batch, heads, capacity, head_dim), and a panel of anything.
        """
        self._source = (lengths, keys, values)
        self.struct.source_capacity = keys.size(-1)
        self.struct.source_lengths = lengths.data_ptr()
        self.struct.source_keys, self.struct.source_values = keys.data_ptr(), values.data_ptr()


class NativeDecoder:
    """Does what :class:`~bild_fairseq.cached_decoder.CachedDecoder` does, several times as fast.

    Args:
        decoder: one that :func:`~bild_fairseq.native.transformer.missing_option` has nothing against, in eval mode.
            Weights are copied.
        precision: of the weights of matrix products, see :mod:`bild_fairseq.precision`.
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
        """See :meth:`~bild_fairseq.cached_decoder.CachedDecoder.start`."""
        stack = self._stack
        source = encoder_out.size(0)
        capacity = stack.round_up(source)
        lengths = torch.full((batch,), source)
        x = encoder_out.transpose(0, 1)  # (batch, source, encoder dim)
        if padding_mask is not None and padding_mask.any():
            # fairseq pads sources on the left; here they begin at 0.
            lengths = source - padding_mask.sum(dim=1)
            order = padding_mask.int().argsort(dim=1, stable=True)
            x = x.gather(1, order[:, :, None].expand_as(x))
        kv = stack.linear(self._key_value, x.reshape(batch * source, -1))
        by_head = (stack.depth, batch, stack.heads)
        head_dim = stack.dim // stack.heads
        kv = kv.view(batch, source, stack.depth, 2, stack.heads, head_dim).permute(3, 2, 0, 4, 1, 5)
        keys = torch.empty(*by_head, head_dim, capacity)
        keys[..., :source] = kv[0].transpose(3, 4)
        # The kernels read, and ignore, up to a panel beyond the last number.
        values = torch.empty(math.prod(by_head) * head_dim * capacity + stack.panel)
        values[: -stack.panel].view(*by_head, capacity, head_dim)[..., :source, :] = kv[1]
        state = NativeDecoderState(stack, batch, 32 + 2 * source)
        state.set_source(lengths, keys, values)
        return state

    def read(
        self,
        state: NativeDecoderState,
        unread: Sequence[Sequence[int]],
        rows: Sequence[int],
        starts: Sequence[int],
        layers: tuple[int, int],
        select: Select,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """See :meth:`~bild_fairseq.cached_decoder.CachedDecoder.read`."""
        first, last = layers
        counts = [len(tokens) for tokens in unread]
        state.reserve(max(start + count for start, count in zip(starts, counts, strict=True)))
        tokens = [token for sentence in unread for token in sentence]
        places = _places(rows, starts, counts) if first or keep else ()
        x = state.hidden[places] if first else torch.empty(len(tokens), self._stack.dim)
        if select == "last":
            selected = [end - 1 for end in accumulate(counts)]
        else:
            selected = range(len(tokens)) if select == "all" else ()
        result = self._stack.forward(
            state.struct,
            x,
            (rows, starts, counts),
            None if first else tokens,
            layers,
            self._heads.get(last),
            selected,
        )
        if keep:
            state.keep_hidden(x, places)
        return result if selected else None


def _places(rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row and position of every token."""
    pairs = [
        (row, position)
        for row, start, count in zip(rows, starts, counts, strict=True)
        for position in range(start, start + count)
    ]
    rows, positions = zip(*pairs, strict=True)
    return torch.tensor(rows), torch.tensor(positions)
