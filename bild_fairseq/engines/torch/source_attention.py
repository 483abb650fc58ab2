"""Encoder-decoder attention of all decoder layers over a source that stays the same for a whole generation.

Keys and values of the source are projected once. For few and short sources the query and output projections are
absorbed into them as well: with ``q = W_q x`` and ``o = W_o sum_s p_s v_s``, the scores are ``x (W_q^T k_s)`` and
the output is ``sum_s p_s (W_o v_s)``, so a step reads the source's absorbed keys and values instead of two weight
matrices per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor

from .linear import fused_linear, projection


class SourceAttention(Protocol):
    """Encoder-decoder attention over one batch of sources."""

    def __call__(self, layer: int, x: Tensor, new: int, rows: Tensor | None) -> Tensor:
        """Attends to the source.

        Args:
            layer: which decoder layer's attention.
            x: (batch * new, dim) queries before their projection.
            new: positions per row.
            rows: (batch,) rows of the batch of sources; None for all of them in order.

        Returns:
            (batch * new, dim), after the output projection.
        """
        ...


class SourceProjections:
    """The weights of every decoder layer's encoder-decoder attention.

    Args:
        attentions: one per layer, all with the same shapes.
    """

    def __init__(self, attentions: Sequence[MultiheadAttention]):
        first = attentions[0]
        self.layers, self.heads, self.head_dim = len(attentions), first.num_heads, first.head_dim
        self.dim = first.embed_dim
        self._key_value = fused_linear(*(part for a in attentions for part in (a.k_proj, a.v_proj)))
        self.query = [projection(a.q_proj) for a in attentions]
        self.out = [projection(a.out_proj) for a in attentions]
        by_head = (self.layers, 1, self.heads, self.head_dim)
        query_weight = torch.stack([a.q_proj.weight for a in attentions]).detach()
        query_bias = torch.stack([a.q_proj.bias for a in attentions]).detach()
        out_weight = torch.stack([a.out_proj.weight.t() for a in attentions]).detach()
        self._query_weight = query_weight.view(*by_head, self.dim)
        self._query_bias = query_bias.view(*by_head, 1)
        self._out_weight = out_weight.reshape(*by_head, self.dim)
        self._out_bias = torch.stack([a.out_proj.bias for a in attentions]).detach()

    def start(self, encoder_out: Tensor, mask: Tensor | None, absorb: bool = True) -> SourceAttention:
        """Projects a batch of sources.

        Args:
            encoder_out: (source, batch, encoder dim).
            mask: (batch, 1, 1, source), added to the scores; None if no source is padded.
            absorb: absorb query and output projections where that reads less; else :class:`Projected`.
        """
        source, batch, _ = encoder_out.shape
        kv = self._key_value(encoder_out.reshape(source * batch, -1))
        kv = kv.view(source, batch, self.layers, 2, self.heads, self.head_dim)
        keys, values = kv.permute(3, 2, 1, 4, 0, 5)  # each (layers, batch, heads, source, head_dim)
        # Half-precision products of products lose too much; large sources weigh more than the weights they replace.
        if absorb and encoder_out.dtype is torch.float32 and batch * self.heads * source <= 2 * self.dim:
            return self._absorb(keys, values, mask)
        return Projected(self, keys.contiguous(), values.contiguous(), mask)

    def _absorb(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> SourceAttention:
        layers, batch, heads, source, _ = keys.shape
        flat = (layers, batch, heads * source, self.dim)
        keys = keys * self.head_dim**-0.5
        bias = (keys @ self._query_bias).squeeze(-1)  # (layers, batch, heads, source)
        if mask is not None:
            bias = bias + mask.view(batch, 1, source)
        keys = (keys @ self._query_weight).view(flat)
        # The weights of a head sum to one, so each head carries its share of the output bias.
        values = (values @ self._out_weight).view(flat) + self._out_bias[:, None, None] / heads
        return _Absorbed(heads, keys.transpose(2, 3), bias.reshape(layers, batch, 1, heads * source), values)


class Projected:
    """Attention with the layer's own query and output projections."""

    def __init__(self, projections: SourceProjections, keys: Tensor, values: Tensor, mask: Tensor | None):
        self._projections = projections
        self.keys = keys  # (layers, batch, heads, source, head_dim)
        self.values = values
        self.mask = mask  # (batch, 1, 1, source) or None

    def __call__(self, layer: int, x: Tensor, new: int, rows: Tensor | None) -> Tensor:
        keys, values, mask = self.keys[layer], self.values[layer], self.mask
        if rows is not None:
            keys, values, mask = keys[rows], values[rows], None if mask is None else mask[rows]
        projections = self._projections
        query = projections.query[layer](x).view(-1, new, projections.heads, projections.head_dim)
        y = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask)
        return projections.out[layer](y.transpose(1, 2).reshape(x.size(0), -1))


class _Absorbed:
    """Attention with the projections absorbed into keys and values."""

    def __init__(self, heads: int, keys: Tensor, bias: Tensor, values: Tensor):
        self._heads = heads
        self._keys = keys  # (layers, batch, dim, heads * source)
        self._bias = bias  # (layers, batch, 1, heads * source), the padding mask included
        self._values = values  # (layers, batch, heads * source, dim)

    def __call__(self, layer: int, x: Tensor, new: int, rows: Tensor | None) -> Tensor:
        keys, bias, values = self._keys[layer], self._bias[layer], self._values[layer]
        if rows is not None:
            keys, bias, values = keys[rows], bias[rows], values[rows]
        scores = torch.baddbmm(bias, x.view(keys.size(0), new, -1), keys)  # (batch, new, heads * source)
        weights = torch.softmax(scores.view(*scores.shape[:2], self._heads, -1), dim=-1).view_as(scores)
        return torch.bmm(weights, values).view_as(x)
