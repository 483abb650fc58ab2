"""Attention over cached keys and values, and over sources that stay the same for a whole generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .linear import projection


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Attends from new tokens to keys.

    Args:
        query: (batch, new, heads, head_dim).
        keys, values: (batch, heads, length, head_dim).
        mask: added to the scores, of a shape that expands to (batch, heads, new, length).
        scale: of the scores; None for one over the root of the head size.

    Returns:
        (batch * new, heads * head_dim)
    """
    x = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask, scale=scale)
    return x.transpose(1, 2).reshape(query.size(0) * query.size(1), -1)


@dataclass
class Source:
    """Keys and values of one batch of sources, for every decoder layer."""

    keys: Tensor  # (layers, batch, heads, source, head_dim)
    values: Tensor
    mask: Tensor | None  # (batch, 1, 1, source), added to the scores; None if no source is padded


class SourceAttention:
    """The encoder-decoder attention of every decoder layer.

    Args:
        attentions: one per layer, all with the same shapes, of fairseq's Transformer or of T5.
        scale: as of :func:`attend`.
    """

    def __init__(self, attentions: Sequence[nn.Module], scale: float | None = None):
        first = attentions[0]
        self._scale = scale
        self._layers, self._heads, self._head_dim = len(attentions), first.num_heads, first.head_dim
        self._key_value = projection(*(part for a in attentions for part in (a.k_proj, a.v_proj)))
        self._query = [projection(a.q_proj) for a in attentions]
        self._out = [projection(a.out_proj) for a in attentions]

    def start(self, encoder_out: Tensor, mask: Tensor | None) -> Source:
        """Projects a batch of sources, once.

        Args:
            encoder_out: (source, batch, encoder dim).
            mask: (batch, 1, 1, source), added to the scores; None if no source is padded.
        """
        source, batch, _ = encoder_out.shape
        kv = self._key_value(encoder_out.reshape(source * batch, -1))
        kv = kv.view(source, batch, self._layers, 2, self._heads, self._head_dim)
        keys, values = kv.permute(3, 2, 1, 4, 0, 5)  # each (layers, batch, heads, source, head_dim)
        return Source(keys.contiguous(), values.contiguous(), mask)

    def __call__(self, source: Source, layer: int, x: Tensor, new: int, rows: Tensor | None) -> Tensor:
        """Attends to the sources.

        Args:
            source: keys and values.
            layer: which decoder layer's attention.
            x: (batch * new, dim) queries before their projection.
            new: positions per row.
            rows: (batch,) rows of the batch of sources; None for all of them in order.

        Returns:
            (batch * new, dim), after the output projection.
        """
        keys, values, mask = source.keys[layer], source.values[layer], source.mask
        if rows is not None:
            keys, values, mask = keys[rows], values[rows], None if mask is None else mask[rows]
        query = self._query[layer](x).view(-1, new, self._heads, self._head_dim)
        return self._out[layer](attend(query, keys, values, mask, self._scale))
