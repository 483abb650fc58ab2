"""How often a text has each type of a dictionary, for the draft vocabulary that ``scripts/align.py`` writes."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from fairseq.data import Dictionary
from torch import Tensor


class TypeCounts:
    """The types of some sentences, the most frequent first, those equally frequent in the dictionary's order.

    Args:
        sentences: token numbers (length,) of each, the end symbol included.
        dictionary: names the types.
    """

    def __init__(self, sentences: Iterable[Tensor], dictionary: Dictionary):
        self._dictionary = dictionary
        counts = collections.Counter(token for sentence in sentences for token in sentence.tolist())
        self.tokens = sum(counts.values())
        # What every draft vocabulary has need not be written.
        self._always = sum(counts.pop(token, 0) for token in (dictionary.eos(), dictionary.unk()))
        self.types = sorted(counts.items(), key=lambda item: (-item[1], item[0]))

    def lines(self, size: int) -> str:
        """A file with the first types, as in dict.txt."""
        return "".join(f"{self._dictionary[token]} {count}\n" for token, count in self.types[:size])

    def coverage(self, size: int) -> float:
        """The share of all tokens, end symbols included, that a draft vocabulary of the first types covers: 0 to 1."""
        return (self._always + sum(count for _, count in self.types[:size])) / self.tokens

    def describe(self, size: int) -> str:
        """One line about the first types."""
        return (
            f"the {min(size, len(self.types))} most frequent of {len(self.types)} types that the large model wrote, "
            f"{self.coverage(size):.1%} of its tokens"
        )
