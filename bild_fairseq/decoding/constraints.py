"""What both models must respect at every position, the way fairseq's ``SequenceGenerator`` applies it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

# NumPy's on a CPU, torch's on other devices: the operations used here are written the same way for both.
Array = np.ndarray | Tensor


@dataclass(frozen=True)
class Constraints:
    """Limits on the sentences of a batch; lengths are in tokens without the end symbol.

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
    prefix_lengths: Sequence[int] = ()  # per row, how many tokens are forced; () for none anywhere

    @property
    def depend_on_sentence(self) -> bool:
        """Whether a sentence's text or its source's length forbids tokens, not only position and forced prefix."""
        return bool(self.no_repeat_ngram_size) or self.exact_lengths is not None

    def prefix_length(self, row: int) -> int:
        """How many tokens of a row are forced."""
        return self.prefix_lengths[row] if self.prefix_lengths else 0

    def apply(
        self,
        logits: Array,
        normalizers: Array,
        positions: Sequence[tuple[int, int]],
        tokens: Sequence[Sequence[int]],
    ) -> None:
        """Changes logits in place; what is left is not renormalised.

        Args:
            logits: (predictions, vocab).
            normalizers: (predictions,) logsumexp of the logits before any change.
            positions: for each prediction the row and the position (0: the first generated token) it is for.
            tokens: every row of the batch, the start symbol first.
        """
        logits[:, self.pad] = -math.inf
        if self.unk_penalty:
            logits[:, self.unk] -= self.unk_penalty
        for index, (row, position) in enumerate(positions):
            if position >= self.max_len:
                end = float(logits[index, self.eos])
                logits[index] = -math.inf
                logits[index, self.eos] = end
            elif position >= self.prefix_length(row):
                if position < self.min_len:
                    logits[index, self.eos] = -math.inf
                if self.no_repeat_ngram_size:
                    banned = _repeats(tokens[row][: position + 1], self.no_repeat_ngram_size)
                    if banned:
                        logits[index, banned] = -math.inf
            if self.exact_lengths is not None:
                # fairseq's LengthConstrainedBeamSearch makes the end certain at the source's length.
                ended = position >= self.exact_lengths[row]
                logits[index, self.eos] = normalizers[index] if ended else -math.inf


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
