"""A Transformer encoder, run by ``transformer.c``."""

from __future__ import annotations

import torch
from fairseq.models.transformer import TransformerEncoderBase
from torch import Tensor

from .stack import PackedStack
from .structs import State


class NativeEncoder:
    """Does what :class:`~bild_fairseq.engines.torch.lean_encoder.LeanEncoder` does, without computing on padding.

    Args:
        encoder: one that :func:`~bild_fairseq.engines.native.stack.missing_option` has nothing against, in eval mode.
            Weights are copied.
        precision: of the weights of matrix products, see :mod:`bild_fairseq.engines.precision`.
    """

    def __init__(self, encoder: TransformerEncoderBase, precision: str = "float32"):
        self._stack = PackedStack(encoder, precision)
        self._padding = encoder.padding_idx

    def __call__(self, src_tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encodes a batch.

        Args:
            src_tokens: (batch, source), padded on either side.

        Returns:
            hidden states (source, batch, dim), each sentence's from 0 on, and the padding mask (batch, source), None
            if nothing is padded.
        """
        stack = self._stack
        sources = [[token for token in row if token != self._padding] for row in src_tokens.tolist()]
        counts = [len(source) for source in sources]
        batch, longest = len(counts), max(counts)
        capacity = stack.round_up(longest)
        stack.reserve_positions(capacity)
        # All layers use the same buffers: what one layer has attended to is of no use to the next.
        buffers = [torch.empty(batch * stack.dim * capacity + stack.panel) for _ in range(2)]
        state = State(capacity=capacity, sentences=batch)
        state.keys, state.values = (buffer.data_ptr() for buffer in buffers)
        x = torch.empty(sum(counts), stack.dim)
        tokens = [token for source in sources for token in source]
        stack.forward(state, (range(batch), [0] * batch, counts), tokens, (0, stack.depth), x=x)
        if min(counts) == longest:
            return x.view(batch, longest, -1).transpose(0, 1), None
        padding = torch.arange(longest) >= torch.tensor(counts)[:, None]
        padded = x.new_zeros(batch, longest, stack.dim)
        padded[~padding] = x
        return padded.transpose(0, 1), padding
