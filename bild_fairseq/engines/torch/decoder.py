"""A Transformer decoder that reads several tokens at once over a key/value cache of its own.

Stock fairseq decoders read one token at a time when they keep a state, so they cannot verify a draft in one
forward pass. :class:`CachedDecoder` takes the weights of one and computes what its full forward pass computes,
for any number of new tokens at any offset in each row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fairseq.models.transformer import TransformerDecoderBase
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from ..base import Logits, Pass
from ..positions import position_table
from ..supported import UnsupportedModel, unsupported_decoder
from .attention import Source, SourceAttention
from .cache import DecoderState, Span, additive_mask
from .linear import RowFn, norm, projection


class _Layer:
    """One decoder layer: the computation of ``TransformerDecoderLayerBase.forward`` on rows of tokens."""

    def __init__(self, layer: TransformerDecoderLayerBase, source_attention: SourceAttention | None):
        attention = layer.self_attn
        self.source_attention = source_attention
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        self.pre_norm = layer.normalize_before
        self.qkv = projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.self_out = projection(attention.out_proj)
        self.self_norm = norm(layer.self_attn_layer_norm)
        self.scale_heads = None if layer.c_attn is None else layer.c_attn[:, None]
        self.attn_norm = norm(layer.attn_ln)
        if source_attention is not None:
            self.source_norm = norm(layer.encoder_attn_layer_norm)
        self.fc1, self.fc2 = projection(layer.fc1), projection(layer.fc2)
        self.activation = layer.activation_fn
        self.ffn_norm = norm(layer.ffn_layernorm)
        self.scale_residual = layer.w_resid
        self.final_norm = norm(layer.final_layer_norm)

    def __call__(self, index: int, x: Tensor, state: DecoderState, span: Span) -> Tensor:
        # x: (batch * new, dim)
        residual = x
        if self.pre_norm:
            x = self.self_norm(x)
        qkv = self.qkv(x).view(span.batch, span.new, 3, self.heads, self.head_dim)
        kv = state.extend_self(index, qkv[:, :, 1:], span)
        x = self.self_out(self._attend(qkv[:, :, 0], kv[0], kv[1], span.mask))
        if self.scale_heads is not None:
            x = (x.view(-1, self.heads, self.head_dim) * self.scale_heads).view_as(residual)
        if self.attn_norm is not None:
            x = self.attn_norm(x)
        x = residual + x
        if not self.pre_norm:
            x = self.self_norm(x)

        if self.source_attention is not None:
            residual = x
            if self.pre_norm:
                x = self.source_norm(x)
            rows = None if span.whole else span.rows.squeeze(1)
            x = residual + self.source_attention(state.source, index, x, span.new, rows)
            if not self.pre_norm:
                x = self.source_norm(x)

        residual = x
        if self.pre_norm:
            x = self.final_norm(x)
        x = self.activation(self.fc1(x))
        if self.ffn_norm is not None:
            x = self.ffn_norm(x)
        x = self.fc2(x)
        if self.scale_residual is not None:
            residual = self.scale_residual * residual
        x = residual + x
        return x if self.pre_norm else self.final_norm(x)

    @staticmethod
    def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        # query: (batch, new, heads, dim); keys, values: (batch, heads, length, dim)
        x = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask)
        return x.transpose(1, 2).reshape(query.size(0) * query.size(1), -1)


class _Head:
    """From hidden states to logits: final norm, projection to the output width, vocabulary projection."""

    def __init__(self, final_norm: nn.Module | None, project_out: nn.Linear | None, vocabulary: RowFn):
        self._norm = norm(final_norm)
        self._project_out = None if project_out is None else projection(project_out)
        self._vocabulary = vocabulary

    def __call__(self, x: Tensor) -> Tensor:
        if self._norm is not None:
            x = self._norm(x)
        if self._project_out is not None:
            x = self._project_out(x)
        return self._vocabulary(x)


class CachedDecoder:
    """The weights of a fairseq Transformer decoder, laid out for reading few tokens at a time.

    Args:
        decoder: a ``TransformerDecoderBase`` (architectures ``transformer*``, ``bart*`` and the early-exit
            ones of this package), in eval mode and on the device and in the precision to decode with.

    Raises:
        UnsupportedModel: the decoder has an option that is not implemented here.
    """

    def __init__(self, decoder: TransformerDecoderBase):
        reason = unsupported_decoder(decoder)
        if reason is not None:
            raise UnsupportedModel(reason)
        self._embed_tokens = decoder.embed_tokens
        self._embed_scale = decoder.embed_scale
        self._embed_norm = norm(decoder.layernorm_embedding)
        self._project_in = None if decoder.project_in_dim is None else projection(decoder.project_in_dim)
        self._embed_positions = decoder.embed_positions
        self._like = decoder.layers[0].fc1.weight.detach()
        self._position_table = self._like.new_empty(0, self._like.size(1))

        attention = decoder.layers[0].self_attn
        self._head_shape = attention.num_heads, attention.head_dim
        self._source = None
        if decoder.layers[0].encoder_attn is not None:
            self._source = SourceAttention([layer.encoder_attn for layer in decoder.layers])
        self._layers = [_Layer(layer, self._source) for layer in decoder.layers]
        vocabulary = projection(decoder.output_projection)
        self._heads = {len(self._layers): _Head(decoder.layer_norm, decoder.project_out_dim, vocabulary)}
        for depth in getattr(decoder, "exit_layers", ()):
            self._heads[depth] = _Head(
                decoder.exit_layer_norm(depth),
                decoder.project_out_dim,
                projection(decoder.exit_output_projection(depth)),
            )

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._layers)

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
        return DecoderState(self.depth, *self._head_shape, self._like, batch, length)

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
        return self.predict(_select(x, counts, span.new, step.predict == "last"), step.layers[1])

    def run(
        self, state: DecoderState, span: Span, tokens: Tensor | None, layers: tuple[int, int], keep: bool
    ) -> Tensor:
        """Some layers over a span: tokens (batch, new) to hidden states (batch * new, dim).

        Args:
            tokens: None to go on from hidden states that an earlier pass kept.
            state, layers, keep: as in a :class:`~bild_fairseq.engines.base.Pass`.
        """
        x = state.hidden(span) if tokens is None else self._embed(tokens, span)
        for index in range(*layers):
            x = self._layers[index](index, x, state, span)
        if keep:
            state.keep_hidden(x, span)
        return x

    def predict(self, x: Tensor, depth: int) -> Logits:
        """float32 logits (rows, vocab) and their logsumexp (rows,) from hidden states (rows, dim) after a layer."""
        logits = self._heads[depth](x).float()
        return logits, torch.logsumexp(logits, dim=-1)

    def _embed(self, tokens: Tensor, span: Span) -> Tensor:
        """Token and position embeddings, (batch, new) -> (batch * new, dim)."""
        x = self._embed_scale * self._embed_tokens(tokens)  # (batch, new, embed dim)
        if self._project_in is not None:
            x = self._project_in(x.flatten(0, 1)).view(span.batch, span.new, -1)
        if self._embed_positions is not None:
            table = self.positions(span.end)
            x = x + (table[span.positions] if span.start is None else table[span.start : span.end])
        x = x.view(span.batch * span.new, -1)
        return x if self._embed_norm is None else self._embed_norm(x)

    def positions(self, length: int) -> Tensor:
        """(at least length, dim) position embeddings; row i belongs to the i-th token of the decoder's input."""
        if length > self._position_table.size(0):
            self._position_table = position_table(self._embed_positions, max(length, 256)).to(self._like)
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
