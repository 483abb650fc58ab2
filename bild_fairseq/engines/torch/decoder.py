"""A decoder that reads several tokens at once over a key/value cache of its own.

Decoders of fairseq read one token at a time when they keep a state, so they cannot verify a draft in one forward
pass. A :class:`CachedDecoder` takes the weights of one and computes what its full forward pass computes, for any
number of new tokens at any offset in each row.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..base import Logits, Pass
from ..heads import layers_of, spread
from .attention import Source, SourceAttention
from .cache import DecoderState, Span, additive_mask
from .linear import RowFn, cut_output, projection

# A layer's number from 0, hidden states (batch * new, dim), cache and span -> hidden states.
LayerFn = Callable[[int, Tensor, DecoderState, Span], Tensor]


class Head(ABC):
    """From hidden states (rows, dim) to logits (rows, vocab).

    Args:
        norm: the final norm, if there is one.
        output: the output projection.
    """

    def __init__(self, norm: RowFn | None, output: nn.Linear):
        self.norm, self.output, self.vocabulary = norm, output, projection(output)
        self.types: Tensor | None = None  # those that it predicts, on the device; None for all

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    def cut(self, types: Sequence[int]) -> Head:
        """The same head over some types only: its logits are (rows, kept)."""
        made = copy.copy(self)
        made.types = torch.tensor(types, device=self.output.weight.device)
        made.output = cut_output(self.output, made.types)
        made.vocabulary = projection(made.output)
        return made


class CachedDecoder(ABC):
    """The weights of a decoder, laid out for reading few tokens at a time. One subclass for each kind of decoder.

    Args:
        decoder: supported, in eval mode, on the device and in the precision to decode with.
        layers: what its layers compute, in the order of ``layers_of``.
        heads: by depth.
        source: its encoder-decoder attention, if it has any.

    Attributes:
        depth: number of layers, without those that only an exit has.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[LayerFn],
        heads: Mapping[int, Head],
        source: SourceAttention | None,
    ):
        first = decoder.layers[0]
        self._layers, self._heads, self._source = layers, heads, source
        self.depth, self._own = len(decoder.layers), layers_of(decoder)[1]
        self._cut_heads: list[Head] = []
        self._attention_shape = first.self_attn.num_heads, first.self_attn.head_dim
        self._like = first.fc1.weight.detach()
        self._position_table = self._like.new_empty(0, 0)

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def attends_to_source(self) -> bool:
        """Whether it has encoder-decoder attention."""
        return self._source is not None

    def start(self, encoder_out: Tensor | None, padding_mask: Tensor | None, batch: int) -> DecoderState:
        """Prepares a batch: projects the source to every layer's encoder-decoder attention keys and values.

        Args:
            encoder_out: (source, batch, encoder dim), or None for a decoder without encoder-decoder attention.
            padding_mask: (batch, source), true at padding; None if there is none.
            batch: number of sentences.
        """
        state = self.new_state(batch, 32 if encoder_out is None else 32 + 2 * encoder_out.size(0))
        if self.attends_to_source:
            padded = padding_mask is not None and padding_mask.any()
            state.source = self.project_source(encoder_out, padding_mask if padded else None)
        return state

    def new_state(self, batch: int, length: int) -> DecoderState:
        """A state without a source, with room for some positions."""
        return DecoderState(len(self._layers), *self._attention_shape, self._like, batch, length)

    def project_source(self, encoder_out: Tensor, padding_mask: Tensor | None) -> Source:
        """Keys and values of the source; see :meth:`SourceAttention.start`."""
        mask = None if padding_mask is None else additive_mask(padding_mask, self._like.dtype)[:, None, None]
        return self._source.start(encoder_out, mask)

    def read(self, state: DecoderState, step: Pass) -> Logits | None:
        """One forward pass; see :meth:`~bild_fairseq.engines.base.Engine.run`."""
        counts = [len(tokens) for tokens in step.tokens]
        span = state.span(step.rows, step.starts, max(counts))
        tokens = None if step.layers[0] else torch.tensor(pad(step.tokens, span.new), device=self.device)
        x = self.run(state, span, tokens, step.layers, step.keep)
        if step.predict == "none":
            return None
        return self.predict(_select(x, counts, span.new, step.predict == "last"), step.layers[1], step.cut)

    def cut_head(self, depth: int, types: Sequence[int]) -> int:
        """See :meth:`~bild_fairseq.engines.base.Engine.cut_head`."""
        self._cut_heads.append(self._heads[depth].cut(types))
        return len(self._cut_heads) - 1

    def run(
        self, state: DecoderState, span: Span, tokens: Tensor | None, layers: tuple[int, int], keep: bool
    ) -> Tensor:
        """Some layers over a span, and an exit's own ones: tokens (batch, new) to hidden states (batch * new, dim).

        Args:
            tokens: None to go on from hidden states that an earlier pass kept.
            state, layers, keep: as in a :class:`~bild_fairseq.engines.base.Pass`.
        """
        x = state.hidden(span) if tokens is None else self._embed(tokens, span)
        span = self._with_position_bias(span)
        for index in range(*layers):
            x = self._layers[index](index, x, state, span)
        if keep:
            state.keep_hidden(x, span)
        for index in self._own.get(layers[1], ()):
            x = self._layers[index](index, x, state, span)
        return x

    def predict(self, x: Tensor, depth: int, cut: int | None) -> Logits:
        """float32 logits (rows, vocab) and their logsumexp (rows,) from hidden states (rows, dim) after a layer.

        Args:
            cut: the number of the head that predicts; None for the layer's own, over all types.
        """
        head = self._heads[depth] if cut is None else self._cut_heads[cut]
        logits = head(x).float()
        normalizers = torch.logsumexp(logits, dim=-1)
        if head.types is not None:
            logits = spread(logits, head.types, self._heads[depth].output.out_features)
        return logits, normalizers

    @abstractmethod
    def _embed(self, tokens: Tensor, span: Span) -> Tensor:
        """What the first layer reads: tokens (batch, new) -> (batch * new, dim)."""

    @abstractmethod
    def _make_positions(self, length: int) -> Tensor:
        """What :meth:`positions` gives, (length, any width)."""

    def _with_position_bias(self, span: Span) -> Span:
        """The span with position biases, if the decoder has any, added to its mask."""
        return span

    def positions(self, length: int) -> Tensor:
        """What the decoder knows of positions, as a table of at least ``length`` rows."""
        known = self._position_table.size(0)
        if length > known:
            self._position_table = self._make_positions(max(length, 2 * known, 256))
        return self._position_table


def pad(unread: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Tokens of sentences, padded on the right with each one's last: (sentences, new)."""
    return [[*tokens, *([tokens[-1]] * (new - len(tokens)))] for tokens in unread]


def _select(x: Tensor, counts: Sequence[int], new: int, last_only: bool) -> Tensor:
    """Drops padding, and all but the last position of each sentence if only that is wanted.

    Args:
        x: (sentences * new, dim); sentence i has ``counts[i]`` real positions.
    """
    if min(counts) == new:
        return x[new - 1 :: new] if last_only else x
    index = [
        sentence * new + position
        for sentence, count in enumerate(counts)
        for position in range(count - 1 if last_only else 0, count)
    ]
    return x[torch.tensor(index, device=x.device)]
