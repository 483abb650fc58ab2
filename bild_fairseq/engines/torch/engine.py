"""The engine of PyTorch's operators: for GPUs, for machines without a C compiler, and for rare options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import BildError
from ..base import Engine, Logits, Pass, State, timed
from ..precision import rounded_copy
from ..readers import EngineReader
from ..supported import is_t5, unsupported_decoder
from .decoder import CachedDecoder
from .graphs import GraphedDecoder
from .t5 import CachedT5
from .transformer import CachedTransformer


def cached_decoder(decoder: nn.Module) -> CachedDecoder:
    """Lays out a decoder's weights.

    Raises:
        BildError: it has an option that is not implemented here; the message names it.
    """
    reason = unsupported_decoder(decoder)
    if reason is not None:
        raise BildError(f"the decoder cannot be run: {reason}")
    return CachedT5(decoder) if is_t5(decoder) else CachedTransformer(decoder)


class TorchEngine(Engine):
    """A fairseq encoder-decoder model: its own encoder, and its decoder over a key/value cache.

    Args:
        model: in eval mode, on the device to decode on.
        precision: of the weights of matrix products, see :mod:`bild_fairseq.engines.precision`.
        graphs: run passes of fixed shapes, which become CUDA graphs on a GPU; None: on a GPU only.

    Raises:
        BildError: the decoder has an option that is not implemented here.
    """

    reader_kind = EngineReader

    def __init__(self, model: nn.Module, precision: str = "float32", graphs: bool | None = None):
        super().__init__()
        model = rounded_copy(model, precision)
        self._encoder = model.encoder
        self.decoder: CachedDecoder | GraphedDecoder = cached_decoder(model.decoder)
        on_gpu = self.decoder.device.type == "cuda"
        if self.decoder.attends_to_source and (on_gpu if graphs is None else graphs):
            self.decoder = GraphedDecoder(self.decoder, capture=on_gpu)
        self.depth = self.decoder.depth

    @timed
    def start(self, net_input: dict[str, Any]) -> State:
        out = self._encoder.forward_torchscript(net_input)
        masks = out["encoder_padding_mask"]
        return self.decoder.start(out["encoder_out"][0], masks[0] if masks else None, len(net_input["src_tokens"]))

    @timed
    def run(self, state: State, step: Pass) -> Logits | None:
        return self.decoder.read(state, step)

    def cut_head(self, depth: int, types: Sequence[int]) -> int:
        return self.decoder.cut_head(depth, types)
