"""Plain products and norms over rows, without the overhead of calling a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import IntegerLinear, rounded_rows

RowFn = Callable[[Tensor], Tensor]  # (rows, in) -> (rows, out)


def projection(*modules: nn.Linear) -> RowFn:
    """One product that computes several projections of the same input side by side.

    The weights of several are copied; a single one's are shared with the module.
    """
    if len(modules) == 1:
        weight, bias = modules[0].weight, modules[0].bias
    else:
        weight = torch.cat([module.weight for module in modules]).detach()
        bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules]).detach()
    if isinstance(modules[0], IntegerLinear):
        return lambda x: F.linear(rounded_rows(x), weight, bias)
    return lambda x: F.linear(x, weight, bias)


def cut_output(output: nn.Linear, types: Tensor) -> nn.Linear:
    """An output projection of the same kind, with a copy of some types' rows only.

    Args:
        output: (vocab, dim).
        types: (kept,) token numbers, on its device.
    """
    made = type(output)(output.in_features, len(types), output.bias is not None, device="meta")
    made.weight = nn.Parameter(output.weight.detach()[types], requires_grad=False)
    if output.bias is not None:
        made.bias = nn.Parameter(output.bias.detach()[types], requires_grad=False)
    return made


def norm(module: nn.Module | None) -> RowFn | None:
    """A layer norm or an RMS norm; None stays None."""
    if module is None:
        return None
    shape, weight, eps = module.normalized_shape, module.weight, module.eps
    if isinstance(module, nn.RMSNorm):
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    bias = module.bias
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
