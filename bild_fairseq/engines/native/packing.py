"""A model's weights in the layout of ``transformer.c``. Nothing here changes once it is made."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor, nn

from ..positions import position_table
from ..precision import quantize
from . import structs
from .options import activation

_HUGE_PAGE = 1 << 21
_BLOCK = 4 * _HUGE_PAGE

_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}


class Packer:
    """Turns modules into structs, and keeps alive the numbers that these point to.

    Args:
        panel: outputs that a product computes together.
        precision: of the weights of matrix products, see :mod:`bild_fairseq.engines.precision`.
    """

    def __init__(self, panel: int, precision: str):
        self.panel = panel
        self._precision = precision
        self._tensors: list[Tensor] = []
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def pointer(self, tensor: Tensor) -> int:
        """Address of a float32 tensor's numbers, row-major."""
        tensor = tensor.detach().float().contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def linear(self, *modules: nn.Linear) -> structs.Linear:
        """One product that computes several projections of the same input side by side."""
        weight = torch.cat([module.weight.detach().float() for module in modules])
        out, width = weight.shape
        panels = -(-out // self.panel)
        values, scale = quantize(weight, self._precision)
        together = 4 if self._precision == "int8" else 1  # inputs
        groups = -(-width // together)
        packed = values.new_zeros(panels * self.panel, groups * together)
        packed[:out, :width] = values
        # (panels, in, panel); for int8 (panels, inputs in fours, panel, 4)
        packed = packed.view(panels, self.panel, groups, together).transpose(1, 2).contiguous()
        bias = None
        if modules[0].bias is not None:
            bias = self._padded(torch.cat([module.bias.detach().float() for module in modules]), panels)
        return structs.Linear(
            in_=width,
            out=out,
            type=_TYPES[self._precision],
            weight=self._packed_pointer(packed),
            scale=None if scale is None else self._padded(scale, panels),
            bias=bias,
        )

    def norm(self, module: nn.LayerNorm | None) -> structs.Norm:
        if module is None:
            return structs.Norm()
        return structs.Norm(weight=self.pointer(module.weight), bias=self.pointer(module.bias), eps=module.eps)

    def layer(self, module: nn.Module) -> structs.Layer:
        """A layer of a fairseq encoder or decoder."""
        attention, source = module.self_attn, getattr(module, "encoder_attn", None)
        layer = structs.Layer(
            qkv=self.linear(attention.q_proj, attention.k_proj, attention.v_proj),
            self_out=self.linear(attention.out_proj),
            fc1=self.linear(module.fc1),
            fc2=self.linear(module.fc2),
            self_norm=self.norm(module.self_attn_layer_norm),
            final_norm=self.norm(module.final_layer_norm),
        )
        if source is not None:
            layer.source_query = self.linear(source.q_proj)
            layer.source_out = self.linear(source.out_proj)
            layer.source_norm = self.norm(module.encoder_attn_layer_norm)
        return layer

    def heads(self, decoder: nn.Module) -> dict[int, structs.Head]:
        """What predicts after the last layer, and after each exit layer."""
        vocabulary = self.linear(decoder.output_projection)
        heads = {len(decoder.layers): structs.Head(self.norm(decoder.layer_norm), vocabulary)}
        for depth in getattr(decoder, "exit_layers", ()):
            norms, projections, key = decoder.exit_layer_norms, decoder.exit_output_projections, str(depth)
            heads[depth] = structs.Head(
                self.norm(norms[key] if key in norms else None),
                self.linear(projections[key]) if key in projections else vocabulary,
            )
        return heads

    def _packed_pointer(self, weights: Tensor) -> int:
        """Address of a copy of some weights, next to those packed before, in the order that a pass reads them in."""
        size = weights.numel() * weights.element_size()
        if self._used + size > self._block.numel():
            self._block, self._used = _huge_pages(max(size, _BLOCK)), 0
            self._tensors.append(self._block)
        copy = self._block[self._used : self._used + size]
        copy.copy_(weights.reshape(-1).view(torch.uint8))
        self._used += -(-size // 64) * 64
        return copy.data_ptr()

    def _padded(self, vector: Tensor, panels: int) -> int:
        padded = vector.new_zeros(panels * self.panel)
        padded[: vector.numel()] = vector
        return self.pointer(padded)


def _huge_pages(size: int) -> Tensor:
    """Memory for at least this many bytes, in pages of 2 MB where the system has them.

    A pass streams all weights; with pages of 4 KB it waits for addresses as well.
    """
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    start = -block.data_ptr() % _HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, size)
    return block[start : start + size]


class PackedStack:
    """The embeddings and layers of a fairseq encoder or decoder.

    Args:
        module: one that :func:`~bild_fairseq.engines.native.options.missing_option` has nothing against, in eval mode.
        packer: keeps the weights.
    """

    def __init__(self, module: nn.Module, packer: Packer):
        first = module.layers[0]
        self.depth, self.dim, self.heads = len(module.layers), first.embed_dim, first.self_attn.num_heads
        self.panel = packer.panel
        self._embed_positions = module.embed_positions
        self._position_table = torch.empty(0, self.dim)
        decodes = isinstance(module, TransformerDecoderBase)
        self._layers = (structs.Layer * self.depth)(*map(packer.layer, module.layers))
        self._struct = structs.Stack(
            dim=self.dim,
            heads=self.heads,
            ffn=first.fc1.out_features,
            pre_norm=first.normalize_before,
            activation=activation(first),
            causal=decodes,
            attends_to_source=decodes,
            embed_scale=module.embed_scale,
            embedding=packer.pointer(module.embed_tokens.weight),
            embed_norm=packer.norm(module.layernorm_embedding),
            output_norm=packer.norm(None if decodes else module.layer_norm),
            layers=ctypes.addressof(self._layers),
        )
        self._keeps_alive: Sequence[object] = (packer,)
        self.address = ctypes.addressof(self._struct)

    def positions(self, length: int) -> Tensor | None:
        """Position embeddings, (length or more, dim); None for a model without them."""
        if self._embed_positions is None:
            return None
        table = self._position_table
        if len(table) < length:
            table = position_table(self._embed_positions, max(length, 256)).detach().float().contiguous()
            self._position_table = table
        return table

    def round_up(self, length: int) -> int:
        """The next multiple of what the kernels compute side by side."""
        return -(-length // self.panel) * self.panel
