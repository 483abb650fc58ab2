"""Whether a model's weights have changed since: a look that takes microseconds, and sums of all numbers.

A batch costs a look, a new generator the sums: some 130 ms of one core for 150 M weights in float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

Sums = tuple[tuple[str, str, torch.dtype, int], ...]

_steps = 0

_PART = 1 << 15  # numbers that are multiplied and added up while they are in the processor's cache


def _count_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def weight_versions(model: nn.Module) -> list[Hashable]:
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
    """Name, device, precision and :func:`sum_of_bits` of every weight, those that are not saved among them."""
    weights = itertools.chain(model.named_parameters(), model.named_buffers())
    return tuple((name, str(value.device), value.dtype, sum_of_bits(value)) for name, value in weights)


def sum_of_bits(value: Tensor) -> int:
    """What changes with any number of a tensor and with their order: a sum of all as integers, each times a factor."""
    flat = value.detach().reshape(-1).contiguous()
    if flat.storage_offset():
        flat = flat.clone()
    if flat.numel() * flat.element_size() % 8 == 0:
        flat = flat.view(torch.int64)  # several times as fast as narrower sums
    else:
        flat = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[flat.element_size()]).long()
    factors = _factors(flat.device)
    parts = [(part * factors[: len(part)]).sum() for part in flat.split(_PART)]
    return hash(tuple(torch.stack(parts).tolist())) if parts else 0


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """A factor for each place in a part, at random and odd, so that no bit is lost."""
    numbers = torch.randint(-(1 << 62), 1 << 62, (_PART,), generator=torch.Generator().manual_seed(1))
    return (numbers | 1).to(device)
