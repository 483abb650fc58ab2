"""One pass as the C code sees it, and the buffers that it computes in."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from ..base import Logits, Pass
from . import structs
from .packing import PackedStack


class PassBuffers:
    """The struct of the pass under way and what it points to. Buffers grow when a pass needs more."""

    def __init__(self) -> None:
        self.struct = structs.Pass()
        self.address = ctypes.addressof(self.struct)
        self._x = self._logits = self._normalizers = self._workspace = torch.empty(0)
        self._integers = array("q")

    def fill(self, step: Pass, stack: PackedStack, head: structs.Head | None) -> None:
        """Describes a pass.

        Args:
            stack: the layers that it runs through.
            head: predicts the next tokens, if the pass asks for any.
        """
        counts = [len(tokens) for tokens in step.tokens]
        count, total = len(counts), sum(counts)
        selected: Sequence[int] = ()
        if step.predict != "none":
            selected = range(total) if step.predict == "all" else [end - 1 for end in accumulate(counts)]
        embedded = () if step.layers[0] else chain.from_iterable(step.tokens)
        self._integers = array("q", [*step.rows, *step.starts, *counts, *selected, *embedded])
        address = self._integers.buffer_info()[0]
        self._x = grown(self._x, total * stack.dim)
        struct = self.struct
        struct.sentences, struct.tokens, struct.predictions = count, total, len(selected)
        struct.rows, struct.starts, struct.counts = address, address + 8 * count, address + 16 * count
        struct.selected = address + 24 * count
        struct.token = None if step.layers[0] else address + 24 * count + 8 * len(selected)
        struct.x = self._x.data_ptr()
        own = stack.own.get(step.layers[1], range(0))
        struct.first, struct.end, struct.own_first, struct.own_end = *step.layers, own.start, own.stop
        struct.keep = step.keep
        struct.threads = torch.get_num_threads()
        if selected:
            self._reserve_logits(len(selected), stack.round_up(head.vocabulary.out))
            struct.head = ctypes.addressof(head)

    def _reserve_logits(self, predictions: int, stride: int) -> None:
        self._logits = grown(self._logits, predictions * stride)
        self._normalizers = grown(self._normalizers, predictions)
        struct = self.struct
        struct.logits, struct.logits_stride = self._logits.data_ptr(), stride
        struct.log_normalizer = self._normalizers.data_ptr()

    def run(self, function: Callable[..., int], *arguments: Any) -> None:
        """Calls a C function that runs the pass; it returns at once if the workspace is too small for it."""
        missing = function(*arguments)
        if missing:
            self._workspace = grown(self._workspace, missing)
            self.struct.workspace, self.struct.room = self._workspace.data_ptr(), self._workspace.numel()
            function(*arguments)

    def hidden(self, dim: int) -> Tensor:
        """Where the pass has left its hidden states, (tokens, dim)."""
        return self._x[: self.struct.tokens * dim].view(-1, dim)

    def logits(self, vocabulary: int) -> Logits:
        """What the pass has predicted, (predictions, vocab) and (predictions,); the next pass overwrites it."""
        count, stride = self.struct.predictions, self.struct.logits_stride
        return self._logits[: count * stride].view(count, stride)[:, :vocabulary], self._normalizers[:count]


def grown(buffer: Tensor, size: int) -> Tensor:
    """A buffer with room for some floats: the same one, if it has; doubles, so that it seldom grows."""
    return buffer if size <= buffer.numel() else torch.empty(max(size, 2 * buffer.numel()))
