"""What the C code remembers of a batch.

All that a pass writes to belongs to one batch, so that several threads can decode with one model.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import State
from . import structs
from .packing import PackedStack
from .passes import PassBuffers


class NativeState(State):
    """Keys and values of the source and of the tokens read so far, written by position.

    Args:
        stack: the layers that read.
        batch: sentences.
        length: positions to make room for.
        layers: how many layers keep their keys and values. With 1 all layers write to the same buffers.
    """

    def __init__(self, stack: PackedStack, batch: int, length: int, layers: int):
        self.batch = batch
        self.buffers = PassBuffers()
        self.struct = structs.State(sentences=batch)
        self.address = ctypes.addressof(self.struct)
        self._stack, self._layers = stack, layers
        self._hidden: Tensor | None = None  # (batch, capacity, dim)
        self._source: tuple[object, ...] = ()
        self.reserve(length)

    @property
    def length(self) -> int:
        """Positions that there is room for."""
        return self.struct.capacity

    def reserve(self, length: int) -> None:
        """Makes room for positions 0 .. length - 1; doubles, so that the copying amortises."""
        old, stack, struct = self.struct.capacity, self._stack, self.struct
        if length <= old:
            return
        capacity = stack.round_up(max(length, 2 * old))
        shape, head_dim = (self._layers, self.batch, stack.heads), stack.head_dim
        # The kernels read, and ignore, up to a panel beyond the last number.
        flat = [torch.empty(math.prod(shape) * head_dim * capacity + stack.panel) for _ in range(2)]
        keys = flat[0][: -stack.panel].view(*shape, head_dim, capacity)
        values = flat[1][: -stack.panel].view(*shape, capacity, head_dim)
        if old:
            keys[..., :old] = self._keys
            values[..., :old, :] = self._values
        self._keys, self._values = keys, values
        struct.capacity = capacity
        struct.layer_size = self.batch * stack.heads * head_dim * capacity if self._layers > 1 else 0
        struct.keys, struct.values = keys.data_ptr(), values.data_ptr()
        self._positions, self._biases = stack.positions(capacity), stack.biases(capacity)
        if self._positions is not None:
            struct.positions = self._positions.data_ptr()
        if self._biases is not None:
            struct.biases, struct.reach = self._biases.data_ptr(), self._biases.size(1) // 2
        if self._hidden is not None:
            hidden = self._hidden
            self._make_hidden()
            self._hidden[:, :old] = hidden

    def keep_hidden(self) -> None:
        """Makes room for hidden states."""
        if self._hidden is None:
            self._make_hidden()

    def _make_hidden(self) -> None:
        self._hidden = torch.empty(self.batch, self.struct.capacity, self._stack.dim)
        self.struct.hidden = self._hidden.data_ptr()

    def reserve_source(self, lengths: Sequence[int]) -> None:
        """Makes room for the keys and values of sources, given the positions of each."""
        stack, struct = self._stack, self.struct
        capacity = stack.round_up(max(lengths))
        size = stack.layers * self.batch * stack.heads * stack.head_dim * capacity
        # The kernels read, and ignore, up to a panel beyond the last number.
        keys, values, counts = torch.empty(size + stack.panel), torch.empty(size + stack.panel), array("q", lengths)
        self._source = (keys, values, counts)
        struct.source_capacity, struct.source_lengths = capacity, counts.buffer_info()[0]
        struct.source_keys, struct.source_values = keys.data_ptr(), values.data_ptr()
