"""What limits and scores generated text: fairseq's generation options that greedy decoding honours."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..errors import require

# Options whose names fairseq shortens.
_OPTIONS = {"len_penalty": "lenpen", "unk_penalty": "unkpen"}


@dataclass(frozen=True)
class SearchOptions:
    """The options, with fairseq's defaults and, but for two, the names that its generators give them."""

    max_len_a: float = 0
    max_len_b: int = 200
    min_len: int = 1
    match_source_len: bool = False
    normalize_scores: bool = True
    len_penalty: float = 1.0
    unk_penalty: float = 0.0
    temperature: float = 1.0
    no_repeat_ngram_size: int = 0

    @classmethod
    def from_args(cls, args: Any) -> SearchOptions:
        """What a command line says.

        Args:
            args: fairseq's generation config, or a namespace with some of its fields; the others have their defaults.

        Raises:
            BildError: an option is out of range.
        """
        given = {field.name: getattr(args, _OPTIONS.get(field.name, field.name), None) for field in fields(cls)}
        given["normalize_scores"] = not getattr(args, "unnormalized", False)
        options = cls(**{name: value for name, value in given.items() if value is not None})
        options._check()
        return options

    def longest(self, source: int, positions: int) -> int:
        """How many tokens a hypothesis may have before its end symbol.

        Args:
            source: tokens of the source.
            positions: that the models have.
        """
        wanted = self.max_len_a * source + self.max_len_b  # any number, perhaps infinite
        return int(max(-1, min(wanted, positions - 1)))

    def _check(self) -> None:
        # Logits divided by less would not be finite.
        require(1e-30 <= self.temperature < math.inf, "temperature", self.temperature, "above 0 (1e-30 or more)")
        for name in ("max_len_a", "len_penalty", "unk_penalty"):
            value = getattr(self, name)
            require(math.isfinite(value), _OPTIONS.get(name, name), value, "a finite number")
        require(self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", self.no_repeat_ngram_size, "0 or more")
        if not self.max_len_a and not self.match_source_len:
            wanted = f"--max-len-b ({self.max_len_b}) or less"
            require(self.min_len <= self.max_len_b, "min_len", self.min_len, wanted)
