"""T5's decoder: relative positions in the scores of self-attention, no scaling, no biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..heads import heads_of
from .attention import SourceAttention, attend
from .cache import DecoderState, Span
from .decoder import CachedDecoder, Head
from .linear import norm, projection

# T5 starts with smaller queries instead.
_SCALE = 1.0


class _Layer:
    """One decoder layer: the computation of ``T5DecoderLayer.forward`` on rows of tokens."""

    def __init__(self, layer: nn.Module, source_attention: SourceAttention):
        attention = layer.self_attn
        self.source_attention = source_attention
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        self.qkv = projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.self_out = projection(attention.out_proj)
        self.self_norm, self.source_norm = norm(layer.self_attn_layer_norm), norm(layer.encoder_attn_layer_norm)
        self.fc1, self.fc2 = projection(layer.fc1), projection(layer.fc2)
        self.fc1_linear = None if layer.fc1_linear is None else projection(layer.fc1_linear)
        self.activation = layer.activation_fn
        self.final_norm = norm(layer.final_layer_norm)

    def __call__(self, index: int, x: Tensor, state: DecoderState, span: Span) -> Tensor:
        # x: (batch * new, dim)
        qkv = self.qkv(self.self_norm(x)).view(span.batch, span.new, 3, self.heads, self.head_dim)
        keys, values = state.extend_self(index, qkv[:, :, 1:], span)
        x = x + self.self_out(attend(qkv[:, :, 0], keys, values, span.mask, _SCALE))

        rows = None if span.whole else span.rows.squeeze(1)
        x = x + self.source_attention(state.source, index, self.source_norm(x), span.new, rows)

        y = self.final_norm(x)
        hidden = self.activation(self.fc1(y))
        if self.fc1_linear is not None:
            hidden = hidden * self.fc1_linear(y)
        return x + self.fc2(hidden)


class _Head(Head):
    """``T5Decoder.project_to_vocabulary`` after a final norm."""

    def __init__(self, decoder: nn.Module, final_norm: nn.Module, output: nn.Linear):
        super().__init__(norm(final_norm), output)
        self._scale = decoder.output_scale
        self._padding, self._start = decoder.padding_idx, decoder.start_row
        # On the device: a CUDA graph cannot copy from a list.
        self._missing = torch.tensor(decoder.missing_rows, device=output.weight.device)
        self._missing_logit = decoder.missing_logit

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.vocabulary(self.norm(x) * self._scale)
        if self.types is None:  # padding is in no draft vocabulary
            logits[:, self._padding] = logits[:, self._start]
        return logits.index_fill_(1, self._missing, self._missing_logit)

    def cut(self, types: Sequence[int]) -> _Head:
        made = super().cut(types)
        made._missing = torch.isin(made.types, self._missing).nonzero().squeeze(1)
        return made


class CachedT5(CachedDecoder):
    """The weights of this package's ``T5Decoder``, with exits or without, laid out for reading few tokens at a time."""

    def __init__(self, decoder: nn.Module):
        self._embed_tokens, self._start_row = decoder.embed_tokens, decoder.start_row
        self._position_bias = decoder.position_bias
        source = SourceAttention([layer.encoder_attn for layer in decoder.layers], _SCALE)
        layers = [_Layer(layer, source) for layer in decoder.layers]
        heads = {depth: _Head(decoder, final_norm, output) for depth, final_norm, output in heads_of(decoder)}
        super().__init__(decoder, layers, heads, source)

    def _embed(self, tokens: Tensor, span: Span) -> Tensor:
        """Token embeddings; at position 0 the start row's, whatever token fairseq puts there."""
        if span.start is None:
            tokens = tokens.masked_fill(span.positions == 0, self._start_row)
        elif span.start == 0:
            tokens[:, 0] = self._start_row
        return self._embed_tokens(tokens).view(span.batch * span.new, -1)

    def _make_positions(self, length: int) -> Tensor:
        """The bias of a key by its distance before the query, (length, heads)."""
        distances = torch.arange(length, device=self.device)
        return self._position_bias(distances, distances[:1])[..., 0].t().contiguous()

    def _with_position_bias(self, span: Span) -> Span:
        """Adds the position biases, which all layers share, to the mask once for all layers."""
        queries = torch.arange(span.start, span.end, device=self.device) if span.positions is None else span.positions
        keys = torch.arange(span.end, device=self.device)
        # Keys behind a query have the bias of distance 0, and the mask hides them.
        distance = (queries[..., None] - keys).clamp_(min=0)  # (new, end) or (batch, new, end)
        bias = self.positions(span.end)[distance].movedim(-1, -3)  # (heads, new, end) or (batch, heads, new, end)
        if span.positions is None:
            bias = bias[None]
        return dataclasses.replace(span, mask=bias if span.mask is None else bias + span.mask)
