"""The layers of a fairseq encoder or decoder, packed for ``transformer.c``."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor, nn

from ...decoding.constraints import Constraints
from ..positions import position_table
from .build import library
from .structs import Arena, Call, Draft, Head, Judgement, Limits, Linear, Stack, State

_ACTIVATIONS = {"relu": 1, "gelu": 2}


def missing_option(module: nn.Module) -> str | None:
    """Why an encoder or a decoder that the package supports cannot be run here; None if it can."""
    layers = list(module.layers)
    if not layers:
        return "no layers"
    dim = layers[0].embed_dim
    checks = {
        "no C kernels": library() is None,
        "not on a CPU in float32": any(
            p.device.type != "cpu" or p.dtype is not torch.float32 for p in module.parameters()
        ),
        "an activation other than relu and gelu": any(_activation(layer) is None for layer in layers),
        "another width of the embeddings": module.embed_tokens.embedding_dim != dim
        or getattr(module, "project_in_dim", None) is not None
        or getattr(module, "project_out_dim", None) is not None,
        "no bias": any(
            part.bias is None for layer in layers for part in layer.modules() if isinstance(part, nn.Linear)
        ),
        "a norm without weights": any(
            part.weight is None for part in module.modules() if isinstance(part, nn.LayerNorm)
        ),
        "layers that differ": len({(layer.self_attn.num_heads, layer.fc1.out_features) for layer in layers}) != 1,
        "NormFormer scales": any(
            getattr(layer, name, None) is not None
            for layer in layers
            for name in ("c_attn", "attn_ln", "ffn_layernorm", "w_resid")
        ),
        "no encoder-decoder attention": isinstance(module, TransformerDecoderBase)
        and any(layer.encoder_attn is None for layer in layers),
    }
    return next((reason for reason, present in checks.items() if present), None)


def _activation(layer: nn.Module) -> int | None:
    function = layer.activation_fn
    names = {torch.relu: "relu", F.relu: "relu"}
    return _ACTIVATIONS.get(names.get(function, getattr(function, "__name__", "")))


def _limits(constraints: Constraints) -> Limits:
    return Limits(constraints.pad, constraints.unk, constraints.eos, constraints.unk_penalty)


class PackedStack:
    """The weights of an encoder's or a decoder's layers, packed."""

    def __init__(self, module: nn.Module, precision: str):
        self._library = library()
        self.panel = self._library.bild_panel()
        self.arena = Arena(self.panel, precision)
        first = module.layers[0]
        self.depth, self.dim, self.heads = len(module.layers), first.embed_dim, first.self_attn.num_heads
        self._embed_positions = module.embed_positions
        self._positions = 0
        decodes = isinstance(module, TransformerDecoderBase)
        self._layers = self.arena.layers(module.layers)
        self._struct = Stack(
            dim=self.dim,
            heads=self.heads,
            ffn=first.fc1.out_features,
            pre_norm=first.normalize_before,
            activation=_activation(first),
            causal=decodes,
            attends_to_source=decodes,
            embed_scale=module.embed_scale,
            embedding=self.arena.pointer(module.embed_tokens.weight),
            embed_norm=self.arena.norm(module.layernorm_embedding),
            output_norm=self.arena.norm(None if decodes else module.layer_norm),
            layers=ctypes.addressof(self._layers),
        )
        self._address = ctypes.addressof(self._struct)
        self._call = Call()
        self._x = self._workspace = torch.empty(0)
        self._fitting: set[tuple[int, ...]] = set()  # sizes of calls that the workspace is large enough for
        self._logits, self._log_normalizer = torch.empty(0, 0), torch.empty(0)

    def reserve_positions(self, length: int) -> None:
        """Makes room for positions 0 .. length - 1."""
        if self._embed_positions is not None and length > self._positions:
            self._positions = max(length, 256)
            self._struct.positions = self.arena.pointer(position_table(self._embed_positions, self._positions))

    def forward(
        self,
        state: State,
        sentences: tuple[Sequence[int], Sequence[int], Sequence[int]],
        tokens: Sequence[int] | None,
        layers: tuple[int, int],
        head: Head | None = None,
        selected: Sequence[int] = (),
        keep: bool = False,
        x: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass through some layers.

        Args:
            state: what has been read; room is made by the caller.
            sentences: three numbers per sentence: its row in the state, its first new position, its new tokens.
            tokens: what to embed; None to go on from the state's hidden states.
            layers: the first layer to run, and the first one not to run.
            head: predicts the next tokens, if ``selected`` asks for any.
            selected: tokens of this pass to predict after.
            keep: leave the hidden states in the state.
            x: (tokens, dim), where the hidden states are computed, if they are of use to the caller.

        Returns:
            logits (selected, vocab) and their logsumexp (selected,), in buffers that the next pass overwrites.
        """
        call = self._prepare(state, sentences, tokens, layers, head, selected, keep, x)
        self._library.bild_forward(self._address, ctypes.addressof(state), call)
        if not selected:
            return self._logits[:0], self._log_normalizer[:0]
        count = len(selected)
        return self._logits[:count, : head.vocabulary.out], self._log_normalizer[:count]

    def draft(
        self,
        state: State,
        sentences: tuple[Sequence[int], Sequence[int], Sequence[int]],
        tokens: Sequence[int],
        layers: tuple[int, int],
        head: Head,
        constraints: Constraints,
        threshold: float,
        most: Sequence[int],
        minima: Sequence[int],
        keep: bool = False,
    ) -> list[list[tuple[int, float]]]:
        """Passes through some layers that each read what the one before has predicted.

        Args:
            state, sentences, tokens, layers, head, keep: as for :meth:`forward`; there is room in the state for what
                is drafted.
            constraints: the symbols, and the penalty.
            threshold: probability; a draft ends with the first token that is less likely.
            most: per sentence, so many predictions at most.
            minima: per sentence, in so many first predictions the end symbol is impossible.

        Returns:
            for each sentence its predictions: the best token and its log-probability (nats). The last one ends the
            draft and has not been read.
        """
        count, steps = len(sentences[0]), max(most)
        integers = array("q", [*most, *minima])
        integers.frombytes(bytes(8 * count * (2 + steps)))
        lprobs = array("f", bytes(4 * count * steps))
        first = integers.buffer_info()[0]
        draft = Draft(
            _limits(constraints), threshold, steps, *(first + 8 * count * i for i in range(5)), lprobs.buffer_info()[0]
        )
        last = [end - 1 for end in accumulate(sentences[2])]
        call = self._prepare(state, sentences, tokens, layers, head, last, keep)
        self._library.bild_draft(self._address, ctypes.addressof(state), call, ctypes.addressof(draft))
        result = []
        for row, length in enumerate(integers[3 * count : 4 * count]):
            begin = row * steps
            words = integers[4 * count + begin : 4 * count + begin + length]
            result.append(list(zip(words, lprobs[begin : begin + length], strict=True)))
        return result

    def judge(
        self,
        state: State,
        sentences: tuple[Sequence[int], Sequence[int], Sequence[int]],
        tokens: Sequence[int] | None,
        layers: tuple[int, int],
        head: Head,
        constraints: Constraints,
        standing: Sequence[int],
        may_end: Sequence[bool],
        keep: bool = False,
    ) -> list[tuple[int, float, float]]:
        """One pass through some layers, and what it says of the tokens that stand in the sentences.

        Args:
            state, sentences, tokens, layers, head, keep: as for :meth:`forward`.
            constraints: the symbols, and the penalty.
            standing: after each token of the pass, the one that stands there.
            may_end: after each token of the pass, whether the end symbol is possible.

        Returns:
            for each token of the pass the best token after it, its log-probability (nats), and the log-probability of
            the standing one.
        """
        total = len(standing)
        integers = array("q", [*standing, *may_end])
        integers.frombytes(bytes(8 * total))
        lprobs = array("f", bytes(8 * total))
        first, floats = integers.buffer_info()[0], lprobs.buffer_info()[0]
        judgement = Judgement(
            _limits(constraints), *(first + 8 * total * i for i in range(3)), floats, floats + 4 * total
        )
        call = self._prepare(state, sentences, tokens, layers, head, range(total), keep)
        self._library.bild_judge(self._address, ctypes.addressof(state), call, ctypes.addressof(judgement))
        return list(zip(integers[2 * total :], lprobs[:total], lprobs[total:], strict=True))

    def _prepare(
        self,
        state: State,
        sentences: tuple[Sequence[int], Sequence[int], Sequence[int]],
        tokens: Sequence[int] | None,
        layers: tuple[int, int],
        head: Head | None,
        selected: Sequence[int],
        keep: bool,
        x: Tensor | None = None,
    ) -> int:
        """Address of a call's struct; what it points to lives until the next call."""
        rows, starts, counts = sentences
        predictions, count, total = len(selected), len(rows), sum(counts)
        integers = array("q", [*rows, *starts, *counts, *selected, *(tokens or ())])
        address = integers.buffer_info()[0]
        if x is None:
            if total * self.dim > self._x.numel():
                self._x = torch.empty(2 * total * self.dim)
            x = self._x
        call = self._call
        call.sentences = count
        call.rows, call.starts, call.counts = address, address + 8 * count, address + 16 * count
        call.selected = address + 24 * count
        call.token = None if tokens is None else address + 24 * count + 8 * predictions
        call.tokens, call.x = total, x.data_ptr()
        call.first, call.last = layers
        call.keep = keep
        call.head = ctypes.addressof(head) if predictions else None
        call.predictions = predictions
        call.threads = torch.get_num_threads()
        if predictions:
            self._reserve_logits(predictions, head.vocabulary.out)
        sizes = (total, predictions, state.capacity, state.source_capacity, call.threads)
        if sizes not in self._fitting:
            size = self._library.bild_workspace(self._address, ctypes.addressof(state), ctypes.addressof(call))
            if size > self._workspace.numel():
                self._workspace = torch.empty(2 * size)
                call.workspace = self._workspace.data_ptr()
            self._fitting.add(sizes)
        self._alive = integers, x
        return ctypes.addressof(call)

    def _reserve_logits(self, predictions: int, vocabulary: int) -> None:
        stride = self.round_up(vocabulary)
        if predictions > self._logits.size(0) or stride != self._logits.size(1):
            self._logits = torch.empty(max(predictions, 2 * self._logits.size(0)), stride)
            self._log_normalizer = torch.empty(self._logits.size(0))
            self._call.logits, self._call.logits_stride = self._logits.data_ptr(), stride
            self._call.log_normalizer = self._log_normalizer.data_ptr()

    def set_source(self, state: State, both: Linear, x: Tensor) -> None:
        """Fills the state's keys and values of the source.

        Args:
            state: has its ``source_`` fields set.
            both: projects to keys and values of layer 0, keys and values of layer 1, and so on.
            x: (batch, source, encoder dim), each sentence from 0 on.
        """
        batch, source, _ = x.shape
        x = x.contiguous()
        y = torch.empty(batch * source, both.out)
        self._library.bild_source(
            self._address,
            ctypes.addressof(state),
            ctypes.addressof(both),
            x.data_ptr(),
            source,
            y.data_ptr(),
            torch.get_num_threads(),
        )

    def round_up(self, length: int) -> int:
        """The next multiple of what the kernels compute side by side."""
        return -(-length // self.panel) * self.panel
