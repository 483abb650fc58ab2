"""Encoders: in C, or the model's own. Both return what the decoder's layers project, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..base import Pass
from ..precision import rounded_copy
from .build import library
from .options import missing_option
from .packing import PackedStack, Packer
from .state import NativeState

# Hidden states (sum of lengths, dim), sentence after sentence, and the lengths.
Encoded = tuple[Tensor, list[int]]


def encoder_for(model: nn.Module, precision: str) -> NativeEncoder | ModelEncoder:
    """The encoder of a model: in C, where that can run it."""
    if missing_option(model.encoder) is None:
        return NativeEncoder(model.encoder, precision)
    return ModelEncoder(rounded_copy(model, precision).encoder)


class NativeEncoder:
    """A stock encoder, run by ``transformer.c``.

    Args:
        encoder: one that :func:`~bild_fairseq.engines.native.options.missing_option` has nothing against, in eval mode.
            Weights are copied.
        precision: of the weights of matrix products, see :mod:`bild_fairseq.engines.precision`.
    """

    def __init__(self, encoder: nn.Module, precision: str = "float32"):
        self._library = library()
        self._stack = PackedStack(encoder, Packer(self._library.bild_panel(), precision))
        self._padding = encoder.padding_idx

    def __call__(self, net_input: dict[str, Any]) -> Encoded:
        """Encodes a batch as fairseq collates it; ``src_tokens`` (batch, source) may be padded on either side."""
        stack = self._stack
        sources = [[token for token in row if token != self._padding] for row in net_input["src_tokens"].tolist()]
        lengths = [len(source) for source in sources]
        # One layer's keys and values are enough: what a layer has attended to is of no use to the next.
        state = NativeState(stack, len(sources), max(lengths), layers=1)
        state.buffers.fill(
            Pass(range(len(sources)), [0] * len(sources), sources, (0, stack.depth), "none"), stack, None
        )
        state.buffers.run(self._library.bild_run, stack.address, state.address, state.buffers.address)
        return state.buffers.hidden(stack.dim), lengths


class ModelEncoder:
    """An encoder that computes in its own way."""

    def __init__(self, encoder: nn.Module):
        self._encoder = encoder

    def __call__(self, net_input: dict[str, Any]) -> Encoded:
        """See :class:`NativeEncoder`."""
        out = self._encoder.forward_torchscript(net_input)
        x, masks = out["encoder_out"][0].transpose(0, 1), out["encoder_padding_mask"]  # (batch, source, dim)
        if masks and masks[0].any():
            real = ~masks[0]
            return x[real], real.sum(dim=1).tolist()
        batch, source, dim = x.shape
        return torch.reshape(x, (batch * source, dim)).contiguous(), [source] * batch
