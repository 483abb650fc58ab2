"""The precision of the weights: what ``--bild-precision`` asks for.

Only matrices are rounded; sums, norms, attention and probabilities are computed in float32.
"""

from __future__ import annotations

import copy

import torch
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


def rounded(weight: Tensor, precision: str) -> Tensor:
    """The matrix that :func:`quantize` stands for, in float32."""
    values, scale = quantize(weight.float(), precision)
    return values.float() if scale is None else values.float() * scale[:, None]


def rounded_copy(module: nn.Module, precision: str) -> nn.Module:
    """A model with every matrix product's weight rounded; embeddings that share theirs with one keep it.

    In float32 there is nothing to round, and the model itself is returned.
    """
    if precision == "float32":
        return module
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(rounded(part.weight.detach(), precision).to(part.weight.dtype), False)
    return module
