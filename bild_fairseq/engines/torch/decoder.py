"""A Transformer decoder that reads several tokens at once over a key/value cache of its own.

Stock fairseq decoders read one token at a time when they keep a state, so they cannot verify a draft in one
forward pass. :class:`CachedDecoder` takes the weights of one and computes what its full forward pass computes,
for any number of new tokens at any offset in each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from fairseq.models.transformer import TransformerDecoder, TransformerDecoderBase
from fairseq.modules import SinusoidalPositionalEmbedding
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from .linear import LinearFn, fused_linear, make_norm, projection
from .source_attention import SourceAttention, SourceProjections

# After which of the tokens that are read the next one is predicted: every one, each sentence's last, none.
Select = Literal["all", "last", "none"]


class UnsupportedDecoder(ValueError):
    """A decoder with an option that the cached decoder does not implement; the message names it."""


@dataclass
class Span:
    """The positions that one forward pass reads: ``new`` tokens in each of ``batch`` rows.

    Rows that read fewer tokens than ``new`` are padded on the right. What the padding writes into the cache lies
    beyond the row's length, where the mask hides it until real tokens overwrite it.
    """

    batch: int
    new: int
    end: int  # keys at positions 0 .. end - 1 take part
    whole: bool  # whether the rows are all rows of the state, in order
    start: int | None = None  # offset of the new tokens, if whole and the same in all rows; else:
    rows: Tensor | None = None  # (batch, 1) rows of the state
    positions: Tensor | None = None  # (batch, new)
    mask: Tensor | None = None  # (batch or 1, 1, new, end), added to attention scores


class DecoderState:
    """What a decoder remembers of one batch: keys and values of the source and of the tokens read so far.

    Key/value buffers are preallocated and written by position, so going back to an earlier position costs
    nothing: later positions are simply written again.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, like: Tensor, batch: int, length: int):
        self.batch = batch
        self._like = like
        self._shape = (2, batch, heads, head_dim)
        self.self_kv = [self._buffer(length) for _ in range(layers)]  # (2, batch, heads, length, dim)
        self.source: SourceAttention | None = None  # None without encoder-decoder attention
        self._hidden: Tensor | None = None  # (batch, length, dim)

    def _buffer(self, length: int) -> Tensor:
        # Zeros, not garbage: a masked position weighs 0, and 0 x NaN would still be NaN.
        two, batch, heads, dim = self._shape
        return self._like.new_zeros(two, batch, heads, length, dim)

    @property
    def length(self) -> int:
        return self.self_kv[0].size(3)

    def reserve(self, length: int) -> None:
        """Makes room for positions 0 .. length - 1; doubles, so that the copying amortises."""
        if length <= self.length:
            return
        length = max(length, 2 * self.length)
        for layer, old in enumerate(self.self_kv):
            self.self_kv[layer] = self._buffer(length)
            self.self_kv[layer][:, :, :, : old.size(3)] = old

    def keep_hidden(self, x: Tensor, span: Span) -> None:
        """Keeps hidden states (batch * new, dim) of a shallow pass for a deep one."""
        if self._hidden is None or self._hidden.size(1) < self.length:
            grown = x.new_zeros(self.batch, self.length, x.size(-1))
            if self._hidden is not None:
                grown[:, : self._hidden.size(1)] = self._hidden
            self._hidden = grown
        x = x.view(span.batch, span.new, -1)
        if span.start is not None:
            self._hidden[:, span.start : span.end] = x
        else:
            self._hidden[span.rows, span.positions] = x

    def hidden(self, span: Span) -> Tensor:
        """Hidden states that were kept at the span's positions, (batch * new, dim)."""
        # Padding may lie beyond what has been kept; it is read, and ignored.
        if self._hidden.size(1) < span.end:
            self._hidden = F.pad(self._hidden, (0, 0, 0, self.length - self._hidden.size(1)))
        if span.start is not None:
            x = self._hidden[:, span.start : span.end]
        else:
            x = self._hidden[span.rows, span.positions]
        return x.reshape(span.batch * span.new, -1)

    def span(self, rows: Sequence[int], starts: Sequence[int], new: int) -> Span:
        """The forward pass that reads ``new`` tokens of each of ``rows``, from offset ``starts[i]`` on."""
        end = max(starts) + new
        self.reserve(end)
        device, dtype = self._like.device, self._like.dtype
        batch = len(rows)
        whole = batch == self.batch
        if whole and min(starts) == max(starts):
            mask = None
            if new > 1:
                query = torch.arange(end - new, end, device=device)[:, None]
                mask = _additive(torch.arange(end, device=device) > query, dtype)[None, None]
            return Span(batch, new, end, whole, start=starts[0], mask=mask)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(new, device=device)
        hidden = torch.arange(end, device=device) > positions[:, :, None]  # (batch, new, end)
        return Span(
            batch,
            new,
            end,
            whole,
            rows=torch.tensor(rows, device=device)[:, None],
            positions=positions,
            mask=_additive(hidden, dtype)[:, None],
        )

    def fixed_span(self, positions: Tensor) -> Span:
        """A pass of all rows over every key that there is room for, so that no shape depends on how far they are.

        Args:
            positions: (batch, new) of the new tokens, below :attr:`length`.
        """
        device = positions.device
        hidden = torch.arange(self.length, device=device) > positions[:, :, None]  # (batch, new, length)
        return Span(
            *positions.shape,
            self.length,
            whole=True,
            rows=torch.arange(self.batch, device=device)[:, None],
            positions=positions,
            mask=_additive(hidden, self._like.dtype)[:, None],
        )

    def clear(self) -> None:
        """Forgets the keys and values of all tokens, should one of them not be a number."""
        torch._foreach_zero_(self.self_kv)

    def extend_self(self, layer: int, kv: Tensor, span: Span) -> Tensor:
        """Writes the new tokens' keys and values; returns all that the span's queries may look at.

        Args:
            kv: (batch, new, 2, heads, head_dim).

        Returns:
            (2, batch, heads, span.end, head_dim)
        """
        buffer = self.self_kv[layer]
        if span.start is not None:
            buffer[:, :, :, span.start : span.end] = kv.permute(2, 0, 3, 1, 4)
            return buffer[:, :, :, : span.end]
        buffer[:, span.rows, :, span.positions] = kv
        seen = buffer[:, :, :, : span.end]
        return seen if span.whole else seen[:, span.rows.squeeze(1)]


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key may be seen, -inf where it is hidden."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


class _Layer:
    """One decoder layer: the computation of ``TransformerDecoderLayerBase.forward`` on rows of tokens."""

    def __init__(self, layer: TransformerDecoderLayerBase):
        attention = layer.self_attn
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        self.pre_norm = layer.normalize_before
        self.qkv = fused_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.self_out = projection(attention.out_proj)
        self.self_norm = make_norm(layer.self_attn_layer_norm)
        self.scale_heads = None if layer.c_attn is None else layer.c_attn[:, None]
        self.attn_norm = make_norm(layer.attn_ln)
        self.has_cross = layer.encoder_attn is not None
        if self.has_cross:
            self.cross_norm = make_norm(layer.encoder_attn_layer_norm)
        self.fc1, self.fc2 = projection(layer.fc1), projection(layer.fc2)
        self.activation = layer.activation_fn
        self.ffn_norm = make_norm(layer.ffn_layernorm)
        self.scale_residual = layer.w_resid
        self.final_norm = make_norm(layer.final_layer_norm)

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

        if self.has_cross:
            residual = x
            if self.pre_norm:
                x = self.cross_norm(x)
            rows = None if span.whole else span.rows.squeeze(1)
            x = residual + state.source(index, x, span.new, rows)
            if not self.pre_norm:
                x = self.cross_norm(x)

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

    def __init__(self, norm: nn.Module | None, project_out: nn.Linear | None, vocabulary: LinearFn):
        self._norm = make_norm(norm)
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

    Matrices are copied when the object is made, the rest is shared: build a new one after training the decoder.

    Args:
        decoder: a ``TransformerDecoderBase`` (architectures ``transformer*``, ``bart*`` and the early-exit
            ones of this package), in eval mode and on the device and in the precision to decode with.

    Raises:
        UnsupportedDecoder: the decoder has an option that is not implemented here.
    """

    def __init__(self, decoder: TransformerDecoderBase):
        reason = unsupported_option(decoder)
        if reason is not None:
            raise UnsupportedDecoder(reason)
        self._embed_tokens = decoder.embed_tokens
        self._embed_scale = decoder.embed_scale
        self._embed_norm = make_norm(decoder.layernorm_embedding)
        self._project_in = None if decoder.project_in_dim is None else projection(decoder.project_in_dim)
        self._embed_positions = decoder.embed_positions
        self._like = decoder.layers[0].fc1.weight.detach()
        self._position_table = self._like.new_empty(0, self._like.size(1))

        self._layers = [_Layer(layer) for layer in decoder.layers]
        if self._layers[0].has_cross:
            self._source = SourceProjections([layer.encoder_attn for layer in decoder.layers])
        vocabulary = projection(decoder.output_projection)
        self._heads = {len(self._layers): _Head(decoder.layer_norm, decoder.project_out_dim, vocabulary)}
        for depth in getattr(decoder, "exit_layers", ()):
            norms, projections = decoder.exit_layer_norms, decoder.exit_output_projections
            key = str(depth)
            self._heads[depth] = _Head(
                norms[key] if key in norms else None,
                decoder.project_out_dim,
                projection(projections[key]) if key in projections else vocabulary,
            )

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def device(self) -> torch.device:
        return self._like.device

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

    @property
    def attends_to_source(self) -> bool:
        """Whether it has encoder-decoder attention."""
        return self._layers[0].has_cross

    def new_state(self, batch: int, length: int) -> DecoderState:
        """A state without a source, with room for some positions."""
        layer = self._layers[0]
        return DecoderState(self.depth, layer.heads, layer.head_dim, self._like, batch, length)

    def project_source(self, encoder_out: Tensor, padding_mask: Tensor | None, absorb: bool = True) -> SourceAttention:
        """Keys and values of the source; see :meth:`SourceProjections.start`."""
        mask = None if padding_mask is None else _additive(padding_mask, self._like.dtype)[:, None, None]
        return self._source.start(encoder_out, mask, absorb)

    def read(
        self,
        state: DecoderState,
        unread: Sequence[Sequence[int]],
        rows: Sequence[int],
        starts: Sequence[int],
        layers: tuple[int, int],
        select: Select,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Reads new tokens of some sentences, through some of the layers.

        Args:
            state: what has been read of the batch; the new tokens' keys and values are added.
            unread: per sentence the tokens to read, one or more.
            rows: which sentences of the batch these are.
            starts: per sentence the position of its first new token.
            layers: the first layer to run and the first one not to run. The second one is the decoder's depth or an
                exit layer; with a first one above 0 the pass goes on from hidden states that an earlier pass kept.
            select: after which tokens the next one is predicted.
            keep: whether the hidden states are kept for a pass that goes on from here.

        Returns:
            for each selected token, in order, the next one's float32 logits (predictions, vocab) and their logsumexp
            (predictions,); None if none was selected.
        """
        counts = [len(tokens) for tokens in unread]
        span = state.span(rows, starts, max(counts))
        tokens = None if layers[0] else torch.tensor(pad(unread, span.new), device=self.device)
        x = self.run(state, span, tokens, layers, keep)
        if select == "none":
            return None
        return self.predict(_select(x, counts, span.new, select == "last"), layers[1])

    def run(
        self, state: DecoderState, span: Span, tokens: Tensor | None, layers: tuple[int, int], keep: bool
    ) -> Tensor:
        """Some layers over a span: tokens (batch, new) to hidden states (batch * new, dim).

        Args:
            tokens: None to go on from hidden states that an earlier pass kept.
            state, layers, keep: as for :meth:`read`.
        """
        x = state.hidden(span) if tokens is None else self._embed(tokens, span)
        for index in range(*layers):
            x = self._layers[index](index, x, state, span)
        if keep:
            state.keep_hidden(x, span)
        return x

    def predict(self, x: Tensor, depth: int) -> tuple[Tensor, Tensor]:
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


def position_table(module: nn.Module, length: int) -> Tensor:
    """Position embeddings by the number of tokens before a token: (length, dim)."""
    first = module.padding_idx + 1
    if isinstance(module, SinusoidalPositionalEmbedding):
        return module.get_embedding(first + length, module.embedding_dim, module.padding_idx)[first:]
    table = module.weight[first : first + length]
    # Only the padding of a span can lie beyond the learned positions.
    return F.pad(table, (0, 0, 0, length - table.size(0)))


def unsupported_option(decoder: nn.Module) -> str | None:
    """Why :class:`CachedDecoder` cannot run a decoder, naming the option; None if it can."""
    if not isinstance(decoder, TransformerDecoderBase):
        return f"its decoder is a {type(decoder).__name__}, not a fairseq Transformer decoder"
    for name in ("extract_features", "extract_features_scriptable", "output_layer"):
        implementation = getattr(type(decoder), name)
        if implementation not in (
            getattr(TransformerDecoderBase, name),
            getattr(TransformerDecoder, name),
        ):
            return f"{type(decoder).__name__} computes {name} in its own way"
    checks = {
        "--adaptive-softmax-cutoff": decoder.adaptive_softmax is not None,
        "--cross-self-attention": decoder.cross_self_attention,
        "--quant-noise-pq": decoder.quant_noise is not None,
        "--decoder-xformers-att-config": any(
            getattr(layer.self_attn, "use_xformers", False) for layer in decoder.layers if hasattr(layer, "self_attn")
        ),
    }
    for option, present in checks.items():
        if present:
            return f"it was trained with {option}"
    for layer in decoder.layers:
        if not isinstance(layer, TransformerDecoderLayerBase):
            return f"it has a layer of type {type(layer).__name__} (--base-layers or a custom architecture)"
        if type(layer).forward is not TransformerDecoderLayerBase.forward:
            return f"{type(layer).__name__} computes its forward pass in its own way"
        for attention in (layer.self_attn, layer.encoder_attn):
            if attention is not None and (attention.bias_k is not None or attention.add_zero_attn):
                return "its attention has an extra key (add_bias_kv or add_zero_attn)"
    return None
