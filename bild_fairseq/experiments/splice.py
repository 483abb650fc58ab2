"""New sources from old ones, for a corpus that is too small to be trained on for long."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor, tensor

# More sources than these add nothing but time.
LARGEST_SAMPLE = 100_000
# Random choices for each source that is wanted; many of them give a source that is too long or not new.
ATTEMPTS = 20


def splices(sources: Sequence[Tensor], count: int, longest: int, seed: int) -> list[Tensor]:
    """New sources: the beginning of one and the end of another, joined where both have the same two tokens.

    Args:
        sources: token numbers with the end symbol, (length,) each.
        count: how many to make; fewer come out if there are not so many.
        longest: tokens of the longest new source, end symbol included.
        seed: of the choice.
    """
    generator = random.Random(seed)
    rows = [source.tolist() for source in generator.sample(list(sources), min(len(sources), LARGEST_SAMPLE))]
    ends: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, row in enumerate(rows):
        for position in range(2, len(row)):
            ends[row[position - 2], row[position - 1]].append((number, position))
    made: dict[tuple[int, ...], None] = {}
    old = set(map(tuple, rows))
    for _ in range(ATTEMPTS * count):
        if len(made) == count:
            break
        row = generator.choice(rows)
        if len(row) < 3:
            continue
        position = generator.randrange(2, len(row))
        other, start = generator.choice(ends[row[position - 2], row[position - 1]])
        spliced = (*row[:position], *rows[other][start:])
        if len(spliced) <= longest and spliced not in old:
            made[spliced] = None
    return list(map(tensor, made))
