"""What both models must respect at every position, the way fairseq's ``SequenceGenerator`` applies it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constraints:
    """Limits on a generated sentence; lengths are in tokens without the end symbol.

    Positions inside a forced prefix are exempt from ``min_len`` and from n-gram blocking.
    """

    pad: int
    unk: int
    eos: int
    max_len: int
    min_len: int = 1
    exact_lengths: Sequence[int] | None = None  # per row, for --match-source-len
    unk_penalty: float = 0.0
    no_repeat_ngram_size: int = 0  # 0: off

    def apply(
        self,
        lprobs: Tensor,
        places: Sequence[tuple[int, int]],
        tokens: Sequence[Sequence[int]],
        prefix_lengths: Sequence[int],
    ) -> None:
        """Changes log-probabilities in place; what is left is not renormalised.

        Args:
            lprobs: (predictions, vocab).
            places: for each prediction the row and the position (0: the first generated token) it is for.
            tokens: every row of the batch, the start symbol first.
            prefix_lengths: per row, the number of forced tokens.
        """
        lprobs[:, self.pad] = -math.inf
        if self.unk_penalty:
            lprobs[:, self.unk] -= self.unk_penalty
        for index, (row, position) in enumerate(places):
            if position >= self.max_len:
                self._only_end(lprobs[index])
            elif position >= prefix_lengths[row]:
                if position < self.min_len:
                    lprobs[index, self.eos] = -math.inf
                if self.no_repeat_ngram_size:
                    banned = _repeats(tokens[row][: position + 1], self.no_repeat_ngram_size)
                    lprobs[index, torch.tensor(banned, dtype=torch.long, device=lprobs.device)] = -math.inf
            if self.exact_lengths is not None:
                # fairseq's LengthConstrainedBeamSearch makes the end certain at the source's length.
                ended = position >= self.exact_lengths[row]
                lprobs[index, self.eos] = 0.0 if ended else -math.inf

    def _only_end(self, lprobs: Tensor) -> None:
        end = lprobs[self.eos].clone()
        lprobs.fill_(-math.inf)
        lprobs[self.eos] = end


def _repeats(history: Sequence[int], size: int) -> list[int]:
    """Tokens that would complete an n-gram which the history, start symbol included, already contains."""
    if len(history) < size:
        return []
    context = list(history[len(history) - size + 1 :])
    return [
        history[start + size - 1]
        for start in range(len(history) - size + 1)
        if list(history[start : start + size - 1]) == context
    ]
