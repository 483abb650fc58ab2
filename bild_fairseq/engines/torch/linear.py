"""Matrix products for a handful of rows.

Decoding one sentence multiplies one to ten rows by every weight of the decoder, so the time goes into reading
weights, and the kernel that reads them best depends on their size. ``scripts/bench_linear.py`` measures the
choice made here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LinearFn = Callable[[Tensor], Tensor]

# Up to this many weights (256 KiB in float32) the fixed cost of a oneDNN call is larger than what it saves.
_PLAIN_UP_TO = 64 * 1024
_PACKED_DTYPES = (torch.float32, torch.bfloat16)


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's prepacked product exists in this torch build and computes what ``F.linear`` does.

    The two operators are the ones that inductor emits when it freezes a model. They are private to torch, hence
    the trial; anything that goes wrong in it means ``F.linear``.
    """
    if dtype not in _PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator).to(dtype)
    x = torch.randn(3, 16, generator=generator).to(dtype)
    bias = torch.randn(24, generator=generator).to(dtype)
    try:
        got = pack(weight, bias)(x)
    except Exception as error:
        logger.debug("no prepacked oneDNN product for %s: %s", dtype, error)
        return False
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    return torch.allclose(got.float(), F.linear(x, weight, bias).float(), atol=tolerance, rtol=tolerance)


def pack(weight: Tensor, bias: Tensor | None) -> LinearFn:
    """A product with the weight in oneDNN's own layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    linear = torch.ops.mkldnn._linear_pointwise.default

    def packed_linear(x: Tensor) -> Tensor:
        return linear(x, packed, bias, "none", [], "")

    return packed_linear


def transpose(weight: Tensor, bias: Tensor | None) -> LinearFn:
    """A product with the weight stored as (in, out), which a row of input reads front to back."""
    transposed = weight.t().contiguous()
    if bias is None:
        return lambda x: torch.mm(x, transposed)
    return lambda x: torch.addmm(bias, x, transposed)


def make_linear(weight: Tensor, bias: Tensor | None) -> LinearFn:
    """A function that computes ``x @ weight.T + bias`` for few rows, with the weight laid out for it.

    Args:
        weight: (out, in); the layouts made from it are copies, later changes to it are not seen.
        bias: (out,) or None.

    Returns:
        a function from (rows, in) to (rows, out).
    """
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if weight.device.type != "cpu":
        return lambda x: F.linear(x, weight, bias)
    if weight.numel() > _PLAIN_UP_TO and _can_pack(weight.dtype):
        return pack(weight, bias)
    return transpose(weight, bias)


def projection(module: nn.Linear) -> LinearFn:
    """:func:`make_linear` of a module."""
    return make_linear(module.weight, module.bias)


def fused_linear(*modules: nn.Linear) -> LinearFn:
    """One product that computes several projections of the same input side by side."""
    weight = torch.cat([module.weight for module in modules])
    if modules[0].bias is None:
        return make_linear(weight, None)
    return make_linear(weight, torch.cat([module.bias for module in modules]))


def make_norm(module: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """A layer norm without the overhead of calling a module; None stays None."""
    if module is None:
        return None
    shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
