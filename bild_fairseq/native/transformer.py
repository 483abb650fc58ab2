"""The layers of a fairseq encoder or decoder, packed for ``transformer.c``."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor, nn

from ..cached_decoder import position_table
from .library import library
from .structs import Arena, Call, Head, Linear, Stack, State

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
        self._workspace = torch.empty(0)
        self._logits, self._log_normalizer = torch.empty(0, 0), torch.empty(0)

    def reserve_positions(self, length: int) -> None:
        """Makes room for positions 0 .. length - 1."""
        if self._embed_positions is not None and length > self._positions:
            self._positions = max(length, 256)
            self._struct.positions = self.arena.pointer(position_table(self._embed_positions, self._positions))

    def forward(
        self,
        state: State,
        x: Tensor,
        sentences: tuple[Sequence[int], Sequence[int], Sequence[int]],
        tokens: Sequence[int] | None,
        layers: tuple[int, int],
        head: Head | None = None,
        selected: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """One forward pass.

        Args:
            state: where keys and values are kept.
            x: (tokens, dim) hidden states, read (unless ``tokens`` are given) and overwritten.
            sentences: three numbers per sentence: its row in the state, its first new position, its new tokens.
            tokens: what to embed; None to go on from ``x``.
            layers: the first layer to run, and the first one not to run.
            head: predicts the next tokens, if ``selected`` asks for any.
            selected: rows of ``x`` to predict after.

        Returns:
            logits (selected, vocab) and their logsumexp (selected,), in buffers that the next pass overwrites.
        """
        rows, starts, counts = sentences
        predictions, count = len(selected), len(rows)
        integers = array("q", [*rows, *starts, *counts, *selected, *(tokens or ())])
        address = integers.buffer_info()[0]
        call = self._call
        call.sentences = count
        call.rows, call.starts, call.counts = address, address + 8 * count, address + 16 * count
        call.selected = address + 24 * count
        call.token = None if tokens is None else address + 24 * count + 8 * predictions
        call.tokens, call.x = x.size(0), x.data_ptr()
        call.first, call.last = layers
        call.head = ctypes.addressof(head) if predictions else None
        call.predictions = predictions
        call.threads = torch.get_num_threads()
        if predictions:
            self._reserve_logits(predictions, head.vocabulary.out)
        state_address, call_address = ctypes.addressof(state), ctypes.addressof(call)
        size = self._library.bild_workspace(self._address, state_address, call_address)
        if size > self._workspace.numel():
            self._workspace = torch.empty(2 * size)
            call.workspace = self._workspace.data_ptr()
        self._library.bild_forward(self._address, state_address, call_address)
        if not predictions:
            return self._logits[:0], self._log_normalizer[:0]
        return self._logits[:predictions, : head.vocabulary.out], self._log_normalizer[:predictions]

    def _reserve_logits(self, predictions: int, vocabulary: int) -> None:
        stride = self.round_up(vocabulary)
        if predictions > self._logits.size(0) or stride != self._logits.size(1):
            self._logits = torch.empty(max(predictions, 2 * self._logits.size(0)), stride)
            self._log_normalizer = torch.empty(self._logits.size(0))
            self._call.logits, self._call.logits_stride = self._logits.data_ptr(), stride
            self._call.log_normalizer = self._log_normalizer.data_ptr()

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """A product with a packed weight: (rows, in) -> (rows, out)."""
        y = torch.empty(x.size(0), linear.out)
        threads = torch.get_num_threads()
        self._library.bild_linear(ctypes.addressof(linear), x.data_ptr(), x.size(0), y.data_ptr(), threads)
        return y

    def round_up(self, length: int) -> int:
        """The next multiple of what the kernels compute side by side."""
        return -(-length // self.panel) * self.panel
