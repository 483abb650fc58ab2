"""A proof of int8 products. What a whole model computes in int8 cannot be foreseen: rounding may go either way.

One product can be: its inputs are chosen far from where rounding could go either way.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...errors import BildError
from . import structs
from .build import library

_ROWS = (1, 2, 5)  # of inputs that are multiplied side by side
_SCALES = (1.0, 0.01, 3000.0, 1e-4, 50.0)  # of each row's integers
_TOLERANCE = 1e-5  # as a share of the norms of inputs and weights; one of 10,000 inputs left out makes more


def prove_product(product: structs.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Compares a product in int8 with what it stands for. Outputs that are not numbers are left out.

    Args:
        product: packed.
        weight: (out, in), rounded, in float32.
        bias: (out,), or None.

    Raises:
        BildError: they differ by more than float32's rounding.
    """
    inputs, integers = _inputs(weight.size(1))
    expected = integers @ weight.T
    allowed = _TOLERANCE * torch.linalg.vector_norm(integers, dim=1)[:, None] * torch.linalg.vector_norm(weight, dim=1)
    if bias is not None:
        expected, allowed = expected + bias, allowed + _TOLERANCE * bias.abs()
    for rows in _ROWS:
        near = (_multiplied(product, inputs[:rows]) - expected[:rows]).abs() <= allowed[:rows]
        if not (near | ~expected[:rows].isfinite()).all():
            raise BildError(
                f"int8 products go wrong on this machine ({product.out} outputs of {product.in_} inputs, {rows} at "
                "once); use another precision, or PyTorch's operators (BILD_NATIVE=0)"
            )


def _inputs(width: int) -> tuple[Tensor, Tensor]:
    """Inputs (rows, width), the same ones every time, and what they are rounded to."""
    generator = torch.Generator().manual_seed(width)
    integers = torch.randint(-126, 127, (max(_ROWS), width), generator=generator).float()
    beyond = torch.rand(integers.shape, generator=generator) * 0.8 - 0.4  # 0.1 short of halfway to the next integer
    largest = torch.arange(len(integers)) % width
    integers[torch.arange(len(integers)), largest] = 127.0
    beyond[torch.arange(len(integers)), largest] = 0.0
    scales = torch.tensor(_SCALES)[:, None]
    return (integers + beyond) * scales, integers * scales


def _multiplied(product: structs.Linear, inputs: Tensor) -> Tensor:
    address, rows = ctypes.addressof(product), len(inputs)
    room = torch.empty(library().bild_product_room(address, rows))
    library().bild_product(address, inputs.data_ptr(), rows, room.data_ptr(), torch.get_num_threads())
    return room[: rows * product.out].view(rows, product.out)
