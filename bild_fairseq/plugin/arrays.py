"""Numbers of NumPy in checkpoints, read without calling NumPy's own unpickling functions.

fairseq keeps NumPy scalars and arrays in a training's meters. Those functions would build arrays of any objects, and
believe whatever a pickle says of a type. What is read here in their place is numbers or refused.
"""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import numpy as np


def stand_ins() -> list[tuple[Any, str]]:
    """What the safe unpickler is to use, and the name in the pickle that it is used for."""
    functions = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")  # NumPy 2 renamed it; checkpoints name what their NumPy had
        for name, function in (("scalar", _scalar), ("_reconstruct", _begin_array))
    ]
    return [(_NumberType, "numpy.dtype"), (NumberArray, "numpy.ndarray"), (_no_bytes, "builtins.bytes"), *functions]


class _NumberType:
    """Stands for ``numpy.dtype``: a type of numbers, and nothing else."""

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r})")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        """Takes the byte order; all else in a state is for types that are no plain numbers."""
        self.dtype = self.dtype.newbyteorder({"<": "<", ">": ">"}.get(state[1], "="))


def _scalar(kind: _NumberType, data: bytes) -> np.generic:
    return np.frombuffer(_as_bytes(data), kind.dtype, count=1)[0]


class NumberArray(np.ndarray):
    """Stands for ``numpy.ndarray`` while a checkpoint is read; it is saved as an ordinary array."""

    def __new__(cls, *_: Any) -> NumberArray:
        return super().__new__(cls, 0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        if not all(type(size) is int and size >= 0 for size in shape) or type(kind) is not _NumberType:
            raise pickle.UnpicklingError("an array without a shape and a type of numbers")
        data = _as_bytes(data)
        if math.prod(shape) * kind.dtype.itemsize != len(data):
            raise pickle.UnpicklingError("an array of another size than its data")
        super().__setstate__((1, tuple(shape), kind.dtype, fortran is True, data))

    def __reduce__(self) -> tuple:
        return self.view(np.ndarray).__reduce__()


def _begin_array(*_: Any) -> NumberArray:
    return NumberArray()


def _no_bytes() -> bytes:
    """The data of an empty array, which pickles call by this name."""
    return b""


def _as_bytes(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("numbers that are no bytes")
    return data
