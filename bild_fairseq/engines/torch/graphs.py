"""CUDA graphs around a cached decoder.

A step of a small decoder is over before its operators have been launched. A graph launches them all at once, but it
repeats the same shapes at the same addresses. So states are kept and used again for batches of one size, sources are
padded to a few widths, every pass goes over all rows and all keys that there is room for, and the number of new tokens
is rounded up: a handful of graphs serves a whole test set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoder import CachedDecoder, DecoderState, Select, pad
from .source_attention import Projected

logger = logging.getLogger(__name__)

# New tokens of a pass: one is a draft's step, the others verify. Longer passes, over a long prefix, have no graph.
_WIDTHS = (1, 2, 4, 6, 8, 12, 16)
_SOURCE_STEP = 32
_LENGTH_STEP = 32

Pass = Callable[[], tuple[Tensor, Tensor] | None]

# Passes over more rows keep the device busy without a graph, whose logits would stay in memory.
_ROWS = 64


@dataclass
class GraphedState:
    """A state that serves one batch after another, and the passes over it."""

    state: DecoderState
    source: Projected
    inputs: dict[int, Tensor] = field(default_factory=dict)  # by new tokens: (2, batch, new) tokens and positions
    passes: dict[tuple, Pass] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.state.batch

    @property
    def length(self) -> int:
        """Positions that there is room for."""
        return self.state.length

    def reserve(self, length: int) -> None:
        """Makes room for positions 0 .. length - 1; passes over the smaller state are forgotten."""
        if length > self.length:
            self.state.reserve(length)
            self.passes.clear()


class GraphedDecoder:
    """Does what :class:`~bild_fairseq.engines.torch.decoder.CachedDecoder` does, with one launch a pass.

    One batch at a time: :meth:`start` takes back the state of an earlier batch of the same size.

    Args:
        decoder: has encoder-decoder attention.
        capture: whether passes become graphs; without, the same passes run operator by operator, on any device. So
            they do after a capture has failed.
    """

    def __init__(self, decoder: CachedDecoder, capture: bool = True):
        self._decoder = decoder
        self._capture = capture
        self._states: dict[tuple[int, int], GraphedState] = {}
        self._pool: Any = None
        self._tables: list[Tensor] = []  # of positions: graphs read them where they are

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self._decoder.depth

    def start(self, encoder_out: Tensor, padding_mask: Tensor | None, batch: int) -> GraphedState:
        """See :meth:`CachedDecoder.start`."""
        source = encoder_out.size(0)
        width = _round_up(source, _SOURCE_STEP)
        if padding_mask is None:
            padding_mask = torch.zeros(batch, source, dtype=torch.bool, device=encoder_out.device)
        padding_mask = F.pad(padding_mask, (0, width - source), value=True)
        encoder_out = F.pad(encoder_out, (0, 0, 0, 0, 0, width - source))
        projected = self._decoder.project_source(encoder_out, padding_mask, absorb=False)
        kept = self._states.get((batch, width))
        if kept is None:
            state = self._decoder.new_state(batch, _round_up(32 + 2 * width, _LENGTH_STEP))
            state.source = projected
            self._states[batch, width] = kept = GraphedState(state, projected)
        else:
            kept.state.clear()
            for old, new in ((kept.source.keys, projected.keys), (kept.source.values, projected.values)):
                old.copy_(new)
            kept.source.mask.copy_(projected.mask)
        return kept

    def read(
        self,
        state: GraphedState,
        unread: Sequence[Sequence[int]],
        rows: Sequence[int],
        starts: Sequence[int],
        layers: tuple[int, int],
        select: Select,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """See :meth:`CachedDecoder.read`; the next call may overwrite what is returned."""
        longest = max(map(len, unread))
        new = next((width for width in _WIDTHS if width >= longest), longest)
        state.reserve(max(starts) + 2 * new)
        # Rows that take no part write to the last positions, which no sentence reaches.
        spare = state.length - new
        tokens = [[0] * new for _ in range(state.batch)]
        positions = [list(range(spare, spare + new)) for _ in range(state.batch)]
        for row, start, padded in zip(rows, starts, pad(unread, new), strict=True):
            tokens[row], positions[row] = padded, list(range(start, start + new))
        device = state.source.keys.device
        if new not in state.inputs:
            state.inputs[new] = torch.zeros(2, state.batch, new, dtype=torch.long, device=device)
        state.inputs[new].copy_(torch.tensor([tokens, positions]))
        key = (new, layers, keep, select != "none")
        if key not in state.passes:
            run = partial(self._run, state, *key)
            useful = new in _WIDTHS and state.batch * new <= _ROWS
            state.passes[key] = self._captured(run, state.length) if self._capture and useful else run
        result = state.passes[key]()
        if result is None:
            return None
        places = [
            row * new + position
            for row, some in zip(rows, unread, strict=True)
            for position in range(len(some) - 1 if select == "last" else 0, len(some))
        ]
        if len(places) == state.batch * new and places == sorted(places):
            return result
        index = torch.tensor(places, device=device)
        return result[0][index], result[1][index]

    def _run(
        self, state: GraphedState, new: int, layers: tuple[int, int], keep: bool, predict: bool
    ) -> tuple[Tensor, Tensor] | None:
        tokens, positions = state.inputs[new]
        span = state.state.fixed_span(positions)
        x = self._decoder.run(state.state, span, None if layers[0] else tokens, layers, keep)
        return self._decoder.predict(x, layers[1]) if predict else None

    def _captured(self, run: Pass, length: int) -> Pass:
        """A pass over positions up to ``length`` as a graph, or as it is where that cannot be."""
        try:
            # What a first run allocates or tunes has no place in a graph. Runs over the same input can be repeated.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            self._tables.append(self._decoder.positions(length))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = run()
        except RuntimeError as error:
            logger.warning("no CUDA graphs, decoding operator by operator, which is slower: %s", error)
            self._capture = False
            return run
        self._pool = graph.pool()

        def replay() -> tuple[Tensor, Tensor] | None:
            graph.replay()
            return result

        return replay


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
