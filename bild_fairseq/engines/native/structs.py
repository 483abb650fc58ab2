"""The structs of ``transformer.c``, field by field, and the tensors that they point to."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..precision import quantize

_HUGE_PAGE = 1 << 21
_BLOCK = 4 * _HUGE_PAGE

_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}


def _huge_pages(size: int) -> Tensor:
    """Memory for at least so many bytes, in pages of 2 MB where the system has them.

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


def _fields(integers: str = "", pointers: str = "", doubles: str = "") -> list[tuple[str, type]]:
    return [
        *((name, ctypes.c_int64) for name in integers.split()),
        *((name, ctypes.c_double) for name in doubles.split()),
        *((name, ctypes.c_void_p) for name in pointers.split()),
    ]


class Linear(ctypes.Structure):
    _fields_ = _fields("in_ out type", "weight scale bias")


class Norm(ctypes.Structure):
    _fields_ = [*_fields("", "weight bias"), ("eps", ctypes.c_double)]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Linear) for name in ("qkv", "self_out", "source_query", "source_out", "fc1", "fc2")),
        *((name, Norm) for name in ("self_norm", "source_norm", "final_norm")),
    ]


class Stack(ctypes.Structure):
    _fields_ = [
        *_fields("dim heads ffn pre_norm activation causal attends_to_source", "embedding positions", "embed_scale"),
        ("embed_norm", Norm),
        ("output_norm", Norm),
        *_fields("", "layers"),
    ]


class Head(ctypes.Structure):
    _fields_ = [("norm", Norm), ("vocabulary", Linear)]


class State(ctypes.Structure):
    _fields_ = [
        *_fields("capacity layer_size", "keys values hidden"),
        *_fields("sentences source_capacity", "source_lengths source_keys source_values"),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        *_fields("sentences", "rows starts counts"),
        *_fields("tokens", "token x"),
        *_fields("first last keep", "head"),
        *_fields("predictions", "selected logits"),
        *_fields("logits_stride", "log_normalizer workspace"),
        *_fields("threads"),
    ]


class Limits(ctypes.Structure):
    _fields_ = _fields("pad unk eos", doubles="unk_penalty")


class Draft(ctypes.Structure):
    _fields_ = [
        ("limits", Limits),
        ("threshold", ctypes.c_double),
        *_fields("steps", "most minima order made tokens lprobs"),
    ]


class Judgement(ctypes.Structure):
    _fields_ = [("limits", Limits), *_fields("", "standing may_end best best_lprob standing_lprob")]


class Arena:
    """Keeps alive the numbers that structs point to."""

    def __init__(self, panel: int, precision: str):
        self._panel = panel
        self._precision = precision
        self._tensors: list[Tensor] = []
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def pointer(self, tensor: Tensor) -> int:
        """Address of a float32 tensor's numbers, row-major."""
        tensor = tensor.detach().float().contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()

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

    def linear(self, *modules: nn.Linear) -> Linear:
        """One product that computes several projections of the same input side by side."""
        weight = torch.cat([module.weight.detach().float() for module in modules])
        out, width = weight.shape
        panels = -(-out // self._panel)
        values, scale = quantize(weight, self._precision)
        packed = values.new_zeros(panels * self._panel, width)
        packed[:out] = values
        packed = packed.view(panels, self._panel, width).transpose(1, 2).contiguous()  # (panels, in, panel)
        bias = None
        if modules[0].bias is not None:
            bias = self._padded(torch.cat([module.bias.detach().float() for module in modules]), panels)
        return Linear(
            in_=width,
            out=out,
            type=_TYPES[self._precision],
            weight=self._packed_pointer(packed),
            scale=None if scale is None else self._padded(scale, panels),
            bias=bias,
        )

    def _padded(self, vector: Tensor, panels: int) -> int:
        padded = vector.new_zeros(panels * self._panel)
        padded[: vector.numel()] = vector
        return self.pointer(padded)

    def norm(self, module: nn.LayerNorm | None) -> Norm:
        if module is None:
            return Norm()
        return Norm(weight=self.pointer(module.weight), bias=self.pointer(module.bias), eps=module.eps)

    def layers(self, layers: Sequence[nn.Module]) -> ctypes.Array:
        """The layers of a fairseq encoder or decoder."""
        return (Layer * len(layers))(*(self._layer(layer) for layer in layers))

    def _layer(self, module: nn.Module) -> Layer:
        attention, source = module.self_attn, getattr(module, "encoder_attn", None)
        layer = Layer(
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
