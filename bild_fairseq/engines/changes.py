"""Whether a model's weights have changed since: a look that takes microseconds, and sums of all numbers.

A batch costs a look, a new generator the sums: some 65 ms of one core for 150 M weights in float32.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

Sums = tuple[tuple[str, str, torch.dtype, int], ...]

_steps = 0


def _count_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def traces(model: nn.Module) -> list[Hashable]:
    """What changes whenever weights are written to or replaced; it may change although they stay the same.

    Torch counts the changes of a tensor, except those through ``.data``. fairseq's optimizers write that way, so the
    steps of all optimizers of the process are counted, too, and the model's mode, which training changes.
    """
    seen: list[Hashable] = [_steps, model.training]
    stack = [model]
    while stack:  # half the time of model.modules()
        module = vars(stack.pop())
        for tensors in (module["_parameters"], module["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    seen.append((tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version))
        stack += [part for part in module["_modules"].values() if part is not None]
    return seen


def sums(model: nn.Module) -> Sums:
    """Name, device, precision and the sum of the bits of every weight."""
    weights = model.state_dict().items()
    return tuple((name, str(value.device), value.dtype, _sum_of_bits(value)) for name, value in weights)


def _sum_of_bits(value: Tensor) -> int:
    flat = value.detach().reshape(-1)
    if flat.storage_offset():
        flat = flat.clone()
    if flat.numel() * flat.element_size() % 8 == 0:
        return int(flat.view(torch.int64).sum())  # several times as fast as narrower sums
    narrower = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return int(flat.view(narrower[flat.element_size()]).sum(dtype=torch.int64))
