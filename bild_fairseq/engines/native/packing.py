"""A model's weights in the layout of ``transformer.c``. Nothing here changes once it is made."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..heads import heads_of, layers_of
from ..positions import position_table
from ..precision import quantize, rounded
from ..supported import is_t5
from . import structs
from .integers import prove_product
from .options import activation, decodes

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
        bias = None
        if any(module.bias is not None for module in modules):
            none = [weight.new_zeros(module.out_features) for module in modules]
            biases = [
                zeros if module.bias is None else module.bias for module, zeros in zip(modules, none, strict=True)
            ]
            bias = torch.cat(biases).detach().float()
        return self._product(weight, bias)

    def _product(self, weight: Tensor, bias: Tensor | None) -> structs.Linear:
        """A product with a matrix (out, in), and a bias (out,) or none; proved if it is in int8."""
        out, width = weight.shape
        panels = -(-out // self.panel)
        values, scale = quantize(weight, self._precision)
        together = 4 if self._precision == "int8" else 1  # inputs
        groups = -(-width // together)
        packed = values.new_zeros(panels * self.panel, groups * together)
        packed[:out, :width] = values
        # (panels, in, panel); for int8 (panels, inputs in fours, panel, 4)
        packed = packed.view(panels, self.panel, groups, together).transpose(1, 2).contiguous()
        product = structs.Linear(
            in_=width,
            out=out,
            type=_TYPES[self._precision],
            weight=self._packed_pointer(packed),
            scale=None if scale is None else self._padded(scale, panels),
            bias=None if bias is None else self._padded(bias, panels),
        )
        if self._precision == "int8":
            prove_product(product, rounded(weight, "int8"), bias)
        return product

    def norm(self, module: nn.LayerNorm | nn.RMSNorm | None, scale: float = 1.0) -> structs.Norm:
        """A norm whose output is multiplied by something."""
        if module is None:
            return structs.Norm()
        bias = getattr(module, "bias", None)
        return structs.Norm(
            weight=self.pointer(module.weight if scale == 1.0 else module.weight * scale),
            bias=None if bias is None else self.pointer(bias * scale),
            eps=module.eps,
        )

    def layer(self, module: nn.Module) -> structs.Layer:
        """A layer of a fairseq encoder or decoder."""
        attention, source = module.self_attn, getattr(module, "encoder_attn", None)
        factor = getattr(module, "fc1_linear", None)
        layer = structs.Layer(
            qkv=self.linear(attention.q_proj, attention.k_proj, attention.v_proj),
            self_out=self.linear(attention.out_proj),
            fc1=self.linear(*((module.fc1,) if factor is None else (module.fc1, factor))),
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
        packed: dict[nn.Module, structs.Linear] = {}
        heads = {}
        for depth, norm, projection in heads_of(decoder):
            if projection not in packed:
                packed[projection] = self._vocabulary(decoder, projection)
            # T5 scales what it projects to the vocabulary.
            heads[depth] = structs.Head(self.norm(norm, getattr(decoder, "output_scale", 1.0)), packed[projection])
        return heads

    def cut_head(self, head: structs.Head, decoder: nn.Module, depth: int, types: Tensor) -> structs.Head:
        """A head over some types only.

        Args:
            head: the one over all types.
            depth: after which layer it predicts.
            types: (kept,) token numbers in ascending order.
        """
        projection = next(projection for one, _, projection in heads_of(decoder) if one == depth)
        self._tensors.append(types)
        return structs.Head(head.norm, self._vocabulary(decoder, projection, types), types.data_ptr())

    def _vocabulary(self, decoder: nn.Module, projection: nn.Linear, types: Tensor | None = None) -> structs.Linear:
        """The projection to the vocabulary, or to some types only; see ``T5Decoder.project_to_vocabulary``."""
        weight = projection.weight.detach().float()
        bias = None if projection.bias is None else projection.bias.detach().float()
        if is_t5(decoder):
            weight, bias = weight.clone(), weight.new_zeros(len(weight))
            weight[decoder.padding_idx] = weight[decoder.start_row]
            weight[decoder.missing_rows] = 0.0
            bias[decoder.missing_rows] = decoder.missing_logit
        if types is not None:
            weight, bias = weight[types], None if bias is None else bias[types]
        return self._product(weight, bias)

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
    """The embeddings and layers of a fairseq encoder or decoder, those that only an exit has among them.

    Args:
        module: one that :func:`~bild_fairseq.engines.native.options.missing_option` has nothing against, in eval mode.
        packer: keeps the weights.
    """

    def __init__(self, module: nn.Module, packer: Packer):
        first, t5 = module.layers[0], is_t5(module)
        self.depth, self.dim = len(module.layers), module.embed_tokens.embedding_dim
        self.heads, self.head_dim = first.self_attn.num_heads, first.self_attn.head_dim
        layers, self.own = layers_of(module)
        self.layers = len(layers)
        self.panel = packer.panel
        self._embed_positions = None if t5 else module.embed_positions
        self._position_table = torch.empty(0, self.dim)
        self._position_bias = module.relative_attention_bias if t5 else None
        self._bias_table = torch.empty(self.heads, 0)
        self._layers = (structs.Layer * self.layers)(*map(packer.layer, layers))
        self._struct = structs.Stack(
            dim=self.dim,
            heads=self.heads,
            head_dim=self.head_dim,
            ffn=first.fc1.out_features,
            pre_norm=t5 or first.normalize_before,
            causal=decodes(module),
            attends_to_source=decodes(module),
            activation=activation(first),
            gated=getattr(first, "fc1_linear", None) is not None,
            start_row=getattr(module, "start_row", -1),
            embed_scale=1.0 if t5 else module.embed_scale,
            score_scale=1.0 if t5 else self.head_dim**-0.5,
            embedding=packer.pointer(module.embed_tokens.weight),
            embed_norm=packer.norm(None if t5 else module.layernorm_embedding),
            output_norm=packer.norm(None if decodes(module) else module.layer_norm),
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

    def biases(self, length: int) -> Tensor | None:
        """What is added to the scores of self-attention, (heads, 2 * reach), by the key's position less the query's.

        The reach is at least the length; it is added to the difference of positions. None for a model without biases.
        """
        if self._position_bias is None:
            return None
        table = self._bias_table
        if table.size(1) < 2 * length:
            reach = max(length, 256)
            bias = self._position_bias(torch.tensor([reach]), torch.arange(2 * reach))
            table = bias.detach().float().view(self.heads, 2 * reach).contiguous()
            self._bias_table = table
        return table

    def round_up(self, length: int) -> int:
        """The next multiple of what the kernels compute side by side."""
        return -(-length // self.panel) * self.panel
