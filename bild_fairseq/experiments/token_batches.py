"""Batches by their number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from fairseq.data import FairseqDataset


def token_batches(dataset: FairseqDataset, ids: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups of sentences of like length; one that is longer than a batch may be is a batch of its own.

    Args:
        dataset: has the sentences.
        ids: which of them.
        max_tokens: of a batch, padding included.
    """
    ids = sorted(ids, key=lambda i: dataset.src_sizes[i])
    fitting = [i for i in ids if dataset.num_tokens(i) <= max_tokens]
    batches = [[i] for i in ids if dataset.num_tokens(i) > max_tokens]
    if fitting:
        groups = dataset.batch_by_size(np.array(fitting), max_tokens=max_tokens, required_batch_size_multiple=1)
        batches += [[int(i) for i in group] for group in groups]
    return batches
