"""What every engine offers: forward passes over several new tokens at once, on top of what has been read before."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from ..decoding.constraints import Constraints

if TYPE_CHECKING:
    from .readers import EngineReader

# float32 logits (predictions, vocab) and their logsumexp (predictions,), which makes them log-probabilities.
Logits = tuple[Tensor, Tensor]

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(slots=True)
class Pass:
    """One forward pass of a decoder over new tokens of some sentences, through some of the layers."""

    rows: Sequence[int]  # which sentences of the batch
    starts: Sequence[int]  # for each of them, the position of its first new token
    tokens: Sequence[Sequence[int]]  # for each of them, its new tokens, one or more
    # The first layer to run and the first one not to run. The second one is the decoder's depth or an exit layer.
    # With a first one above 0 the pass goes on from the hidden states that an earlier pass kept.
    layers: tuple[int, int]
    predict: Literal["all", "last", "none"]  # after which tokens the next one is predicted: each, each row's last, none
    keep: bool = False  # keep the hidden states for a pass that goes on from here
    cut: int | None = None  # the head that predicts, from Engine.cut_head; None for the one over all types


class State(ABC):
    """What an engine remembers of one batch: keys and values of the sources and of the tokens read so far.

    It belongs to one call of ``generate``. Going back to an earlier position costs nothing: later positions are simply
    written again.
    """

    batch: int  # sentences


def timed(method: Method) -> Method:
    """Has an engine's method add its time to the engine's ``seconds``."""

    @functools.wraps(method)
    def timed_method(self: Engine, *args: Any) -> Any:
        begin = time.perf_counter()
        result = method(self, *args)
        if self.synchronizes:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - begin
        return result

    return timed_method


class Engine(ABC):
    """One model, laid out for decoding.

    Attributes:
        reader_kind: the class of its readers.
        depth: number of decoder layers.
        seconds: time spent in encoders and forward passes so far, in methods that are :func:`timed`. What a generation
            takes beyond it is the cost of the decoding loop.
        synchronizes: wait for the device after every pass, so that ``seconds`` is right on a GPU as well.
        cuts: the heads of :meth:`cut_head` that have been proved, by depth and types.
    """

    reader_kind: type[EngineReader]
    depth: int

    def __init__(self) -> None:
        self.seconds = 0.0
        self.synchronizes = False
        self.cuts: dict[tuple[int, tuple[int, ...]], int] = {}

    @abstractmethod
    def start(self, net_input: dict[str, Any]) -> State:
        """Encodes a batch and projects it for every layer's encoder-decoder attention.

        Args:
            net_input: as fairseq collates it: ``src_tokens`` (batch, source) and ``src_lengths`` (batch,).
        """

    @abstractmethod
    def run(self, state: State, step: Pass) -> Logits | None:
        """Runs one forward pass.

        Args:
            state: the new tokens' keys and values are added to it.
            step: what to read.

        Returns:
            for each selected token, in order, the next one's logits and normalizer; None if none was selected. The
            caller may change them; the next pass may overwrite them. With a cut head the other types' logits are
            -inf.
        """

    @abstractmethod
    def cut_head(self, depth: int, types: Sequence[int]) -> int:
        """Makes a head that predicts some types only, with the norm and the projection of the one over all types.

        Args:
            depth: after which layer it predicts: an exit layer, or the engine's depth.
            types: token numbers in ascending order, without padding.

        Returns:
            its number, for :attr:`Pass.cut`.
        """

    def reader(
        self,
        state: State,
        layers: tuple[int, int],
        constraints: Constraints,
        below: EngineReader | None = None,
        keep: bool = False,
        cut: int | None = None,
    ) -> EngineReader:
        """A reader over some of the layers; see :class:`~bild_fairseq.engines.readers.EngineReader`."""
        return self.reader_kind(self, state, layers, constraints, below, keep, cut)
