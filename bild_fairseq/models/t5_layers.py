"""The layers of T5 (Raffel et al., 2020): attention with relative position biases, without scaling and without biases.

Tensors have the batch first, unlike in fairseq's Transformer.
"""

import math

import torch
import torch.nn.functional as F
from fairseq.incremental_decoding_utils import FairseqIncrementalState
from fairseq.modules import FairseqDropout
from torch import Tensor, nn

from .t5_config import FEED_FORWARD, T5Config

# fairseq's incremental state: what a module remembers of the tokens so far, by the module's own key.
IncrementalState = dict[str, dict[str, Tensor | None]]


def relative_position_bucket(
    relative_position: Tensor, bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """The bucket of each relative position: exact for short distances, logarithmic up to `max_distance`.

    Args:
        relative_position: position of the key minus that of the query, of any shape.
        bidirectional: keys on both sides of a query have buckets, half of them each; otherwise only those before it,
            and all keys behind it share the bucket of distance 0.
        num_buckets: at least 4.
        max_distance: in tokens; from here on all distances share the last bucket.

    Returns:
        bucket numbers from 0, in the shape of `relative_position`.
    """
    if bidirectional:
        num_buckets //= 2
        first = (relative_position > 0).long() * num_buckets
        distance = relative_position.abs()
    else:
        first = torch.zeros_like(relative_position)
        distance = (-relative_position).clamp(min=0)
    exact = num_buckets // 2
    # In this order of operations, because a distance on the border of two buckets must be rounded as T5 does it.
    ratio = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).long()
    return first + torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


class RelativeAttentionBias(nn.Module):
    """T5's position information: one number for each bucket and head, which all layers of a stack share.

    Attributes:
        weight: (buckets, heads).
    """

    engine_kind = "t5_position_bias"

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__()
        self.bidirectional = bidirectional
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.weight = nn.Parameter(torch.empty(self.num_buckets, config.num_heads))
        nn.init.normal_(self.weight, std=config.d_model**-0.5)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """What is added to the attention scores of queries and keys at any positions.

        Args:
            query_positions: (..., queries), integers.
            key_positions: (..., keys), integers.

        Returns:
            (..., heads, queries, keys), without a mask.
        """
        relative = key_positions[..., None, :] - query_positions[..., :, None]
        bucket = relative_position_bucket(relative, self.bidirectional, self.num_buckets, self.max_distance)
        return F.embedding(bucket, self.weight).movedim(-1, -3)


class T5Attention(FairseqIncrementalState, nn.Module):
    """Attention of a token over others, or over the source: not scaled, without biases, of any inner width."""

    engine_kind = "t5_attention"

    def __init__(self, config: T5Config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.d_kv
        width, inner = config.d_model, config.num_heads * config.d_kv
        # The scores are not scaled, so the queries start smaller by the root of the head size.
        self.q_proj = linear(width, inner, std=(width * config.d_kv) ** -0.5)
        self.k_proj = linear(width, inner, std=width**-0.5)
        self.v_proj = linear(width, inner, std=width**-0.5)
        self.out_proj = linear(inner, width, std=inner**-0.5)
        self.dropout_module = FairseqDropout(config.dropout, module_name=self.__class__.__name__)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        source: Tensor | None = None,
        incremental_state: IncrementalState | None = None,
    ) -> Tensor:
        """Attends from `x` to `x`, or to `source`.

        Args:
            x: (batch, new, d_model).
            bias: added to the scores, of a shape that expands to (batch, heads, new, keys); -inf hides a key.
            source: (batch, source, d_model), the encoder's output.
            incremental_state: keys and values of earlier calls; those of `x` are appended, those of `source` are
                computed once.

        Returns:
            (batch, new, d_model)
        """
        query = self._heads(self.q_proj(x))
        keys, values = self._keys_and_values(x, source, incremental_state)
        scores = query @ keys.transpose(-1, -2)  # (batch, heads, new, keys)
        if bias is not None:
            scores = scores + bias
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        attended = self.dropout_module(weights) @ values  # (batch, heads, new, head_dim)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _keys_and_values(
        self, x: Tensor, source: Tensor | None, incremental_state: IncrementalState | None
    ) -> tuple[Tensor, Tensor]:
        """Two of (batch, heads, keys, head_dim)."""
        known = self.get_incremental_state(incremental_state, "attn_state")
        if source is not None and known is not None:
            return known["keys"], known["values"]
        read = x if source is None else source
        keys, values = self._heads(self.k_proj(read)), self._heads(self.v_proj(read))
        if known is not None:
            keys = torch.cat([known["keys"], keys], dim=2)
            values = torch.cat([known["values"], values], dim=2)
        self.set_incremental_state(incremental_state, "attn_state", {"keys": keys, "values": values})
        return keys, values

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, length, heads * head_dim) -> (batch, heads, length, head_dim)"""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> IncrementalState:
        """Puts the rows of the batch into another order; rows may repeat or be left out."""
        known = self.get_incremental_state(incremental_state, "attn_state")
        if known is not None:
            reordered = {name: rows.index_select(0, new_order) for name, rows in known.items()}
            self.set_incremental_state(incremental_state, "attn_state", reordered)
        return incremental_state


class T5EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with RMS norm before it and a residual connection.

    Attributes:
        fc1: the product that the activation is applied to (T5's ``wi``, or ``wi_0`` where it is gated).
        fc1_linear: the product that the activation's output is multiplied by (``wi_1``); None if it is not gated.
        fc2: the product back to the model's width (``wo``).
    """

    engine_kind = "t5_encoder_layer"

    def __init__(self, config: T5Config):
        super().__init__()
        self.self_attn = T5Attention(config)
        self.self_attn_layer_norm = rms_norm(config)
        self.activation_fn, gated = FEED_FORWARD[config.feed_forward_proj]
        width, inner = config.d_model, config.d_ff
        self.fc1 = linear(width, inner, std=width**-0.5)
        self.fc1_linear = linear(width, inner, std=width**-0.5) if gated else None
        self.fc2 = linear(inner, width, std=inner**-0.5)
        self.final_layer_norm = rms_norm(config)
        self.dropout_module = FairseqDropout(config.dropout, module_name=self.__class__.__name__)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(batch, source, d_model) -> the same; `bias` as of `T5Attention`."""
        x = x + self.dropout_module(self.self_attn(self.self_attn_layer_norm(x), bias))
        return x + self.dropout_module(self.feed_forward(self.final_layer_norm(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> the same."""
        hidden = self.activation_fn(self.fc1(x))
        if self.fc1_linear is not None:
            hidden = hidden * self.fc1_linear(x)
        return self.fc2(self.dropout_module(hidden))


class T5DecoderLayer(T5EncoderLayer):
    """The same with encoder-decoder attention between the two."""

    engine_kind = "t5_decoder_layer"

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.encoder_attn = T5Attention(config)
        self.encoder_attn_layer_norm = rms_norm(config)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        source: Tensor,
        source_bias: Tensor | None,
        incremental_state: IncrementalState | None = None,
    ) -> Tensor:
        """Runs the layer over new tokens.

        Args:
            x: (batch, new, d_model).
            bias: of the self-attention, see `T5Attention`.
            source: (batch, source, d_model).
            source_bias: of the encoder-decoder attention: its mask, or None.
            incremental_state: as of `T5Attention`.

        Returns:
            (batch, new, d_model)
        """
        y = self.self_attn(self.self_attn_layer_norm(x), bias, incremental_state=incremental_state)
        x = x + self.dropout_module(y)
        y = self.encoder_attn(self.encoder_attn_layer_norm(x), source_bias, source, incremental_state)
        x = x + self.dropout_module(y)
        return x + self.dropout_module(self.feed_forward(self.final_layer_norm(x)))


def linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    """A product without bias, with T5's initialisation."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


def rms_norm(config: T5Config) -> nn.RMSNorm:
    """T5's layer norm: no mean is subtracted, and there is no bias."""
    return nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
