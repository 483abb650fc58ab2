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

from ..base import Logits, Pass, State
from .attention import Source
from .cache import DecoderState
from .decoder import CachedDecoder, pad

logger = logging.getLogger(__name__)

# New tokens of a pass: one is a draft's step, the others verify. Longer passes, over a long prefix, have no graph.
_WIDTHS = (1, 2, 4, 6, 8, 12, 16)
_SOURCE_STEP = 32
_LENGTH_STEP = 32

# Passes over more rows keep the device busy without a graph, whose logits would stay in memory.
_ROWS = 64

Run = Callable[[], Logits | None]


@dataclass
class GraphedState(State):
    """A state that serves one batch after another, and the passes over it."""

    state: DecoderState
    source: Source
    inputs: dict[int, Tensor] = field(default_factory=dict)  # by new tokens: (2, batch, new) tokens and positions
    passes: dict[tuple, Run] = field(default_factory=dict)

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

    def __init__(self, decoder: CachedDecoder, capture: bool):
        self.decoder, self.depth = decoder, decoder.depth
        self.capture = capture
        self.states: dict[tuple[int, int], GraphedState] = {}
        self._pool: Any = None
        self._tables: list[Tensor] = []  # of positions: graphs read them where they are

    def cut_head(self, depth: int, types: Sequence[int]) -> int:
        """See :meth:`CachedDecoder.cut_head`."""
        return self.decoder.cut_head(depth, types)

    def start(self, encoder_out: Tensor, padding_mask: Tensor | None, batch: int) -> GraphedState:
        """See :meth:`CachedDecoder.start`."""
        source = encoder_out.size(0)
        width = _round_up(source, _SOURCE_STEP)
        if padding_mask is None:
            padding_mask = torch.zeros(batch, source, dtype=torch.bool, device=encoder_out.device)
        padding_mask = F.pad(padding_mask, (0, width - source), value=True)
        encoder_out = F.pad(encoder_out, (0, 0, 0, 0, 0, width - source))
        projected = self.decoder.project_source(encoder_out, padding_mask)
        kept = self.states.get((batch, width))
        if kept is None:
            state = self.decoder.new_state(batch, _round_up(32 + 2 * width, _LENGTH_STEP))
            state.source = projected
            self.states[batch, width] = kept = GraphedState(state, projected)
        else:
            kept.state.clear()
            for old, new in ((kept.source.keys, projected.keys), (kept.source.values, projected.values)):
                old.copy_(new)
            kept.source.mask.copy_(projected.mask)
        return kept

    def read(self, state: GraphedState, step: Pass) -> Logits | None:
        """See :meth:`CachedDecoder.read`; the next call may overwrite what is returned."""
        longest = max(map(len, step.tokens))
        new = next((width for width in _WIDTHS if width >= longest), longest)
        state.reserve(max(step.starts) + 2 * new)
        self._fill_inputs(state, step, new)
        key = (new, step.layers, step.keep, step.predict != "none", step.cut)
        if key not in state.passes:
            run = partial(self._run, state, *key)
            useful = new in _WIDTHS and state.batch * new <= _ROWS
            state.passes[key] = self._captured(run, state.length) if self.capture and useful else run
        result = state.passes[key]()
        if result is None:
            return None
        selected = [
            row * new + position
            for row, tokens in zip(step.rows, step.tokens, strict=True)
            for position in range(len(tokens) - 1 if step.predict == "last" else 0, len(tokens))
        ]
        if len(selected) == state.batch * new and selected == sorted(selected):
            return result
        index = torch.tensor(selected, device=state.source.keys.device)
        return result[0][index], result[1][index]

    def _fill_inputs(self, state: GraphedState, step: Pass, new: int) -> None:
        """Copies the tokens and positions of a pass to where its graph reads them."""
        # Rows that take no part write to the last positions, which no sentence reaches.
        spare = state.length - new
        tokens = [[0] * new for _ in range(state.batch)]
        positions = [list(range(spare, spare + new)) for _ in range(state.batch)]
        for row, start, padded in zip(step.rows, step.starts, pad(step.tokens, new), strict=True):
            tokens[row], positions[row] = padded, list(range(start, start + new))
        if new not in state.inputs:
            device = state.source.keys.device
            state.inputs[new] = torch.zeros(2, state.batch, new, dtype=torch.long, device=device)
        state.inputs[new].copy_(torch.tensor([tokens, positions]))

    def _run(
        self, state: GraphedState, new: int, layers: tuple[int, int], keep: bool, predict: bool, cut: int | None
    ) -> Logits | None:
        tokens, positions = state.inputs[new]
        span = state.state.fixed_span(positions)
        x = self.decoder.run(state.state, span, None if layers[0] else tokens, layers, keep)
        return self.decoder.predict(x, layers[1], cut) if predict else None

    def _captured(self, run: Run, length: int) -> Run:
        """A pass over positions up to ``length`` as a graph, or as it is where a graph cannot be or is wrong."""
        try:
            # What a first run allocates or tunes has no place in a graph. Runs over the same input can be repeated.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    expected = run()
            torch.cuda.current_stream().wait_stream(stream)
            self._tables.append(self.decoder.positions(length))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = run()
            graph.replay()
            if not same_logits(result, expected):
                raise RuntimeError("the first replay gave other logits than the same pass without a graph")
        except RuntimeError as error:
            logger.warning("no CUDA graphs, decoding operator by operator, which is slower: %s", error)
            self.capture = False
            return run
        self._pool = graph.pool()

        def replay() -> Logits | None:
            graph.replay()
            return result

        return replay


def same_logits(one: Logits | None, other: Logits | None) -> bool:
    """Whether two runs of one pass predict the same, up to rounding; those that predict nothing do."""
    if one is None or other is None:
        return one is other
    tolerance = 1e-4 * float(other[0].abs().amax().nan_to_num())
    return torch.allclose(one[0], other[0], rtol=0, atol=tolerance, equal_nan=True)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
