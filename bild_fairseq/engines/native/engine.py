"""The engine in C."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...decoding.constraints import Constraints
from ...decoding.reader import Prediction, Verdict
from ..base import Engine, Logits, Pass, timed
from ..heads import layers_of, spread
from . import structs
from .build import library
from .encoder import encoder_for
from .packing import PackedStack, Packer
from .reader import NativeReader
from .state import NativeState


class _CutHead(NamedTuple):
    struct: structs.Head
    types: Tensor  # (kept,) the token of each output, ascending


class NativeEngine(Engine):
    """A fairseq encoder-decoder model in C. Several threads can use one, each with states of its own.

    Args:
        model: in eval mode; :func:`~bild_fairseq.engines.native.options.missing_option` has nothing against its
            decoder. Weights are copied.
        precision: of the weights of matrix products, see :mod:`bild_fairseq.engines.precision`.
    """

    reader_kind = NativeReader

    def __init__(self, model: nn.Module, precision: str = "float32"):
        super().__init__()
        self._library = library()
        self._encoder = encoder_for(model, precision)
        packer, decoder = Packer(self._library.bild_panel(), precision), model.decoder
        self._stack = PackedStack(decoder, packer)
        self.depth = self._stack.depth
        self._decoder, self._packer, self._heads, self._cut_heads = decoder, packer, packer.heads(decoder), []
        attentions = [layer.encoder_attn for layer in layers_of(decoder)[0]]
        self._source = packer.linear(*(part for a in attentions for part in (a.k_proj, a.v_proj)))

    @timed
    def start(self, net_input: dict[str, Any]) -> NativeState:
        x, lengths = self._encoder(net_input)
        state = NativeState(self._stack, len(lengths), 32 + 2 * max(lengths), self._stack.layers)
        state.reserve_source(lengths)
        source = ctypes.addressof(self._source)
        projected = torch.empty(self._library.bild_product_room(source, len(x)))
        self._library.bild_source(
            *(self._stack.address, state.address, source),
            *(x.data_ptr(), projected.data_ptr(), torch.get_num_threads()),
        )
        return state

    @timed
    def run(self, state: NativeState, step: Pass) -> Logits | None:
        self._prepare(state, step, max(_ends(step)))
        self._call(self._library.bild_run, state)
        if step.predict == "none":
            return None
        logits, normalizers = state.buffers.logits(self._head(step).vocabulary.out)
        if step.cut is not None:
            logits = spread(logits, self._cut_heads[step.cut].types, self._heads[step.layers[1]].vocabulary.out)
        return logits, normalizers

    def cut_head(self, depth: int, types: Sequence[int]) -> int:
        kept = torch.tensor(types)
        head = self._packer.cut_head(self._heads[depth], self._decoder, depth, kept)
        self._cut_heads.append(_CutHead(head, kept))
        return len(self._cut_heads) - 1

    def _head(self, step: Pass) -> structs.Head | None:
        """What predicts in a pass; None where nothing could."""
        return self._heads.get(step.layers[1]) if step.cut is None else self._cut_heads[step.cut].struct

    @timed
    def draft(
        self, state: NativeState, step: Pass, constraints: Constraints, limit: float, threshold: float
    ) -> list[list[Prediction]]:
        """Reads new tokens of some sentences and goes on with its own best ones, in one call.

        Args:
            state, step: as for :meth:`run`; the pass begins with the lowest layer and predicts after last tokens.
            constraints: none of them depends on the text.
            limit, threshold: as for :meth:`~bild_fairseq.decoding.reader.Reader.draft`.

        Returns:
            for each sentence its predictions; see :meth:`~bild_fairseq.decoding.reader.Reader.draft`.
        """
        count, ends = len(step.rows), _ends(step)
        # At the maximum length only the end symbol is left, so no draft is longer than this.
        limit = min(limit, max(1, constraints.max_len - min(ends) + 2))
        self._prepare(state, step, min(max(ends) + limit, max(*ends, constraints.max_len + 1)))
        prefixes = array("q", constraints.prefix_lengths)
        integers, lprobs = array("q", bytes(8 * count * (2 + limit))), array("f", bytes(4 * count * limit))
        order = integers.buffer_info()[0]
        made, tokens = order + 8 * count, order + 16 * count
        types = None if step.cut is None else self._cut_heads[step.cut].types
        draft = structs.Draft(
            _constraints(constraints, prefixes, types), threshold, limit, order, made, tokens, lprobs.buffer_info()[0]
        )
        self._call(self._library.bild_draft, state, draft)
        result = []
        for row, length in enumerate(integers[count : 2 * count]):
            begin = row * limit
            words = integers[2 * count + begin : 2 * count + begin + length]
            result.append(list(map(Prediction, words, lprobs[begin : begin + length])))
        return result

    @timed
    def verify(self, state: NativeState, step: Pass, constraints: Constraints, drafted: Sequence[int]) -> list[Verdict]:
        """Reads new tokens of some sentences, and says what should follow each, in one call.

        Args:
            state, step: as for :meth:`run`; the pass predicts after every token.
            constraints: none of them depends on the text.
            drafted: for each token of the pass the one that follows it, or -1.

        Returns:
            for each token of the pass a verdict; where no token follows, ``drafted_lprob`` is not a number.
        """
        self._prepare(state, step, max(_ends(step)))
        prefixes, total = array("q", constraints.prefix_lengths), len(drafted)
        integers, lprobs = array("q", drafted), array("f", bytes(8 * total))
        integers.frombytes(bytes(8 * total))
        address, floats = integers.buffer_info()[0], lprobs.buffer_info()[0]
        verification = structs.Verification(
            _constraints(constraints, prefixes), address, address + 8 * total, floats, floats + 4 * total
        )
        self._call(self._library.bild_verify, state, verification)
        return list(map(Verdict, integers[total:], lprobs[:total], lprobs[total:]))

    def _prepare(self, state: NativeState, step: Pass, length: int) -> None:
        """Makes room for positions 0 .. length - 1, and describes the pass."""
        state.reserve(length)
        if step.keep:
            state.keep_hidden()
        state.buffers.fill(step, self._stack, self._head(step))

    def _call(self, function: Any, state: NativeState, *details: ctypes.Structure) -> None:
        addresses = map(ctypes.addressof, details)
        state.buffers.run(function, self._stack.address, state.address, state.buffers.address, *addresses)


def _ends(step: Pass) -> list[int]:
    """Of each sentence of a pass, how many tokens have been read after it."""
    return [start + len(tokens) for start, tokens in zip(step.starts, step.tokens, strict=True)]


def _constraints(constraints: Constraints, prefixes: array, types: Tensor | None = None) -> structs.Constraints:
    """The struct, which points to the lengths of the prefixes.

    Args:
        types: those that a cut head predicts, the end symbol and the unknown one among them.
    """
    pad, unk, eos = constraints.pad, constraints.unk, constraints.eos
    if types is not None:
        pad, (unk, eos) = -1, torch.searchsorted(types, torch.tensor([unk, eos])).tolist()
    return structs.Constraints(
        pad=pad,
        unk=unk,
        eos=eos,
        min_len=constraints.min_len,
        max_len=constraints.max_len,
        unk_penalty=constraints.unk_penalty,
        prefix_lengths=prefixes.buffer_info()[0] if prefixes else None,
    )
