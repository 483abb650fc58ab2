"""Position embeddings as a table."""

from __future__ import annotations

import torch.nn.functional as F
from fairseq.modules import SinusoidalPositionalEmbedding
from torch import Tensor, nn


def position_table(module: nn.Module, length: int) -> Tensor:
    """Position embeddings by the number of tokens before a token: (length, dim)."""
    first = module.padding_idx + 1
    if isinstance(module, SinusoidalPositionalEmbedding):
        table = module.get_embedding(first + length, module.embedding_dim, module.padding_idx)
        if module.weights is not None:  # in half precision the module's own are rounded
            known = module.weights[: len(table)]
            table[: len(known)] = known
        return table[first:]
    table = module.weight[first : first + length]
    # Only the padding of a span can lie beyond the learned positions.
    return F.pad(table, (0, 0, 0, length - table.size(0)))
