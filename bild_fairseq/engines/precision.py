"""The precision of matrix products: what ``--bild-precision`` asks for.

Of a model's weights only matrices are rounded. In int8 a product's inputs are rounded as well, so that it multiplies
integers. Norms, attention and probabilities are computed in float32.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from ..errors import BildError

PRECISIONS = ("float32", "float16", "bfloat16", "int8")


def quantize(weight: Tensor, precision: str) -> tuple[Tensor, Tensor | None]:
    """Rounds a matrix.

    Args:
        weight: (out, in), float32.
        precision: one of :data:`PRECISIONS`; int8 is symmetric with one scale per output. float16 changes nothing
            where the weights come from a checkpoint in half precision.

    Returns:
        (out, in) numbers of the wanted type, and for int8 the scales (out,) that they are to be multiplied with.

    Raises:
        BildError: a weight is beyond float16's range.
    """
    if precision != "int8":
        values = weight.to(getattr(torch, precision))
        if precision == "float16" and not values.isfinite().all():
            raise BildError("--bild-precision float16: some of the model's weights are too large for it; use bfloat16")
        return values, None
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def loses_nothing(module: nn.Module, precision: str) -> bool:
    """Whether every matrix of a model's products is the same in a floating-point precision."""
    weights = (part.weight.detach() for part in module.modules() if isinstance(part, nn.Linear))
    return all(torch.equal(weight.to(getattr(torch, precision)).to(weight.dtype), weight) for weight in weights)


def rounded(weight: Tensor, precision: str) -> Tensor:
    """The matrix that :func:`quantize` stands for, in float32."""
    values, scale = quantize(weight.float(), precision)
    return values.float() if scale is None else values.float() * scale[:, None]


def rounded_rows(x: Tensor) -> Tensor:
    """Inputs as an int8 product multiplies them: each row a scale times integers within 127.

    Args:
        x: (..., in).
    """
    largest = x.detach().float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    return ((x * (127 / largest)).round() * (largest / 127)).to(x.dtype)


class IntegerLinear(nn.Linear):
    """A product whose inputs are rounded; its weight is a rounded one, in floating point."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded_rows(x), self.weight, self.bias)


def rounded_copy(module: nn.Module, precision: str) -> nn.Module:
    """A model with every matrix product rounded; embeddings that share their weight with one keep it.

    In float32 there is nothing to round, and the model itself is returned.
    """
    if precision == "float32":
        return module
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(rounded(part.weight.detach(), precision).to(part.weight.dtype), False)
            if precision == "int8":
                part.__class__ = IntegerLinear
        elif precision == "int8":
            _call_products(part)
    return module


def _call_products(part: nn.Module) -> None:
    """Keeps a module of fairseq's from fused operators, which take the products' weights and do not round inputs."""
    if isinstance(part, MultiheadAttention):
        part.skip_embed_dim_check = True
    if hasattr(part, "can_use_fastpath"):
        part.can_use_fastpath = False
