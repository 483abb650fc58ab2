"""A Transformer encoder with the decoder's products for few rows.

A short sentence spends about a tenth of its time in fairseq's encoder once the decoder is fast, most of it outside
the matrix products. This computes the same from the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fairseq.models.transformer import TransformerEncoder, TransformerEncoderBase
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor, nn

from .linear import fused_linear, make_norm, projection


class LeanEncoder:
    """The weights of a fairseq Transformer encoder, laid out for few sentences.

    Args:
        encoder: in eval mode; :func:`is_stock` tells whether it can be used. Matrices are copied.
    """

    def __init__(self, encoder: TransformerEncoderBase):
        self._encoder = encoder
        self._layers = [_Layer(layer) for layer in encoder.layers]
        self._norm = make_norm(encoder.layer_norm)

    def __call__(self, src_tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encodes a batch.

        Args:
            src_tokens: (batch, source), padded on either side.

        Returns:
            hidden states (source, batch, dim) and the padding mask (batch, source), None if nothing is padded.
        """
        batch, source = src_tokens.shape
        padding = src_tokens.eq(self._encoder.padding_idx)
        x, _ = self._encoder.forward_embedding(src_tokens)  # (batch, source, dim)
        mask = None
        if padding.any():
            x = x * ~padding[:, :, None]
            mask = torch.zeros_like(padding, dtype=x.dtype).masked_fill_(padding, -torch.inf)[:, None, None]
        x = x.reshape(batch * source, -1)
        for layer in self._layers:
            x = layer(x, batch, mask)
        if self._norm is not None:
            x = self._norm(x)
        return x.view(batch, source, -1).transpose(0, 1), None if mask is None else padding


class _Layer:
    """``TransformerEncoderLayerBase.forward`` on rows of tokens."""

    def __init__(self, layer: TransformerEncoderLayerBase):
        attention = layer.self_attn
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        self.pre_norm = layer.normalize_before
        self.qkv = fused_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = projection(attention.out_proj)
        self.attention_norm = make_norm(layer.self_attn_layer_norm)
        self.fc1 = projection(layer.fc1)
        self.fc2 = projection(layer.fc2)
        self.activation = layer.activation_fn
        self.final_norm = make_norm(layer.final_layer_norm)

    def __call__(self, x: Tensor, batch: int, mask: Tensor | None) -> Tensor:
        # x: (batch * source, dim)
        y = self.attention_norm(x) if self.pre_norm else x
        qkv = self.qkv(y).view(batch, -1, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)  # (batch, heads, source, dim)
        x = x + self.out(y.transpose(1, 2).reshape(x.size(0), -1))
        x = x if self.pre_norm else self.attention_norm(x)
        y = self.final_norm(x) if self.pre_norm else x
        x = x + self.fc2(self.activation(self.fc1(y)))
        return x if self.pre_norm else self.final_norm(x)


def is_stock(encoder: nn.Module) -> bool:
    """Whether an encoder computes what :class:`LeanEncoder` does."""
    if not isinstance(encoder, TransformerEncoderBase):
        return False
    for name in ("forward", "forward_scriptable", "forward_embedding"):
        stock = (getattr(TransformerEncoderBase, name), getattr(TransformerEncoder, name))
        if getattr(type(encoder), name) not in stock:
            return False
    return all(_is_stock_layer(layer) for layer in encoder.layers)


def _is_stock_layer(layer: Any) -> bool:
    return (
        isinstance(layer, TransformerEncoderLayerBase)
        and type(layer).forward is TransformerEncoderLayerBase.forward
        and not getattr(layer.self_attn, "use_xformers", False)
        and layer.self_attn.bias_k is None
        and not layer.self_attn.add_zero_attn
    )
