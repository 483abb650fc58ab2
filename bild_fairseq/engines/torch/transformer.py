"""The decoder of fairseq's Transformer."""

from __future__ import annotations

from fairseq.models.transformer import TransformerDecoderBase
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from ..heads import heads_of, layers_of
from ..positions import position_table
from .attention import SourceAttention, attend
from .cache import DecoderState, Span
from .decoder import CachedDecoder, Head
from .linear import norm, projection


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
        x = self.self_out(attend(qkv[:, :, 0], kv[0], kv[1], span.mask))
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


class _Head(Head):
    """Final norm, projection to the output width, vocabulary projection."""

    def __init__(self, final_norm: nn.Module | None, project_out: nn.Linear | None, output: nn.Linear):
        super().__init__(norm(final_norm), output)
        self._project_out = None if project_out is None else projection(project_out)

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        if self._project_out is not None:
            x = self._project_out(x)
        return self.vocabulary(x)


class CachedTransformer(CachedDecoder):
    """The weights of a ``TransformerDecoderBase``, laid out for reading few tokens at a time.

    Args:
        decoder: of the architectures ``transformer*``, ``bart*`` and the early-exit ones of this package.
    """

    def __init__(self, decoder: TransformerDecoderBase):
        self._embed_tokens = decoder.embed_tokens
        self._embed_scale = decoder.embed_scale
        self._embed_norm = norm(decoder.layernorm_embedding)
        self._project_in = None if decoder.project_in_dim is None else projection(decoder.project_in_dim)
        self._embed_positions = decoder.embed_positions
        source, (all_layers, _) = None, layers_of(decoder)
        if decoder.layers[0].encoder_attn is not None:
            source = SourceAttention([layer.encoder_attn for layer in all_layers])
        layers = [_Layer(layer, source) for layer in all_layers]
        heads = {
            depth: _Head(final_norm, decoder.project_out_dim, output) for depth, final_norm, output in heads_of(decoder)
        }
        super().__init__(decoder, layers, heads, source)

    def _embed(self, tokens: Tensor, span: Span) -> Tensor:
        """Token and position embeddings."""
        x = self._embed_scale * self._embed_tokens(tokens)  # (batch, new, embed dim)
        if self._project_in is not None:
            x = self._project_in(x.flatten(0, 1)).view(span.batch, span.new, -1)
        if self._embed_positions is not None:
            table = self.positions(span.end)
            x = x + (table[span.positions] if span.start is None else table[span.start : span.end])
        x = x.view(span.batch * span.new, -1)
        return x if self._embed_norm is None else self._embed_norm(x)

    def _make_positions(self, length: int) -> Tensor:
        """Position embeddings, (length, dim); row i belongs to the i-th token of the decoder's input."""
        if self._embed_positions is None:
            return self._like.new_empty(length, 0)
        return position_table(self._embed_positions, length).to(self._like)
