"""Readers: an engine, an ensemble of engines, or the two ends of an early-exit decoder, as the algorithm wants them.

Draft and verification are written once, over logits and constraints. An engine that can do one of them in a single call
of its own overrides it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from ..decoding.constraints import Array, Constraints
from ..decoding.policies import falls_back
from ..decoding.reader import Prediction, Reader, Tokens, Verdict
from .base import Engine, Logits, Pass, State


class LogitsReader(ABC, Reader):
    """Drafts and verifies with the logits of a model, under the constraints of the batch."""

    consumed: list[int]  # per row: tokens read so far, the start symbol included

    def __init__(self, constraints: Constraints):
        self.constraints = constraints

    @abstractmethod
    def logits(self, tokens: Tokens, rows: Sequence[int], last_only: bool, drafting: bool) -> Logits:
        """Reads all that it has not read of some rows.

        Args:
            tokens, rows: as for :meth:`draft`.
            last_only: predict after each row's last token only.
            drafting: predict what a draft is made of: among the types of the draft vocabulary, if there is one.

        Returns:
            what follows each token that was read, row by row, or only each row's last one.
        """

    def draft(self, tokens: Tokens, rows: Sequence[int], limit: float, threshold: float) -> list[list[Prediction]]:
        texts = list(tokens)
        for row in rows:
            texts[row] = list(tokens[row])
        drafts: dict[int, list[Prediction]] = {row: [] for row in rows}
        going = list(rows)
        while going:
            positions = [(row, len(texts[row]) - 1) for row in going]
            logits, normalizers = self._constrained(texts, going, positions, drafting=True)
            best, lprobs = best_tokens(logits, normalizers)
            for row, token, lprob in zip(list(going), best, lprobs, strict=True):
                drafts[row].append(Prediction(token, lprob))
                ended = token == self.constraints.eos or math.isnan(lprob) or falls_back(lprob, threshold)
                if ended or len(drafts[row]) >= limit:
                    going.remove(row)
                else:
                    texts[row].append(token)
        return list(drafts.values())

    def verify(self, tokens: Tokens, rows: Sequence[int]) -> list[list[Verdict]]:
        firsts = [self.consumed[row] for row in rows]
        positions = [
            (row, position)
            for row, first in zip(rows, firsts, strict=True)
            for position in range(first, len(tokens[row]))
        ]
        # The token that follows each token read; none follows a row's last one, and the end symbol fills in.
        drafted = [(*tokens[row], self.constraints.eos)[position + 1] for row, position in positions]
        logits, normalizers = self._constrained(tokens, rows, positions, drafting=False)
        verdicts = [Verdict(*values) for values in zip(*best_tokens(logits, normalizers, drafted), strict=True)]
        ends = [0]
        for row, first in zip(rows, firsts, strict=True):
            ends.append(ends[-1] + len(tokens[row]) - first)
        return [verdicts[begin:end] for begin, end in pairwise(ends)]

    def _constrained(
        self, tokens: Tokens, rows: Sequence[int], positions: Sequence[tuple[int, int]], drafting: bool
    ) -> tuple[Array, Array]:
        """Logits (predictions, vocab) under the constraints, and their normalizers from before (predictions,).

        Args:
            positions: row and position of each prediction. Position i is that of the i-th generated token.
            drafting: predict what a draft is made of, after each row's last token.
        """
        logits, normalizers = self.logits(tokens, rows, last_only=drafting, drafting=drafting)
        if logits.device.type == "cpu":  # NumPy is quicker about small things
            logits, normalizers = logits.numpy(), normalizers.numpy()
        self.constraints.apply(logits, normalizers, positions, tokens)
        return logits, normalizers


class EngineReader(LogitsReader):
    """Some layers of an engine's decoder.

    Args:
        engine, state: the model, and what it remembers of the batch.
        layers: the first layer to run and the first one not to run. From layer 0 to the engine's depth it is the whole
            decoder, up to an exit layer it is the small model of an early-exit decoder.
        constraints: of the batch.
        below: for the layers above an exit, the reader of the layers below, whose hidden states they go on from.
        keep: keep hidden states for a reader of the layers above.
        cut: the head that it drafts with, from :meth:`Engine.cut_head`; None for the one over all types.
    """

    def __init__(
        self,
        engine: Engine,
        state: State,
        layers: tuple[int, int],
        constraints: Constraints,
        below: EngineReader | None = None,
        keep: bool = False,
        cut: int | None = None,
    ):
        super().__init__(constraints)
        self.engine, self.state, self.layers = engine, state, layers
        self.consumed = [0] * state.batch
        self._below, self._keep, self._cut = below, keep, cut

    def logits(self, tokens: Tokens, rows: Sequence[int], last_only: bool, drafting: bool) -> Logits:
        return self.engine.run(self.state, self.next_pass(tokens, rows, "last" if last_only else "all", drafting))

    def next_pass(self, tokens: Tokens, rows: Sequence[int], predict: str, drafting: bool = False) -> Pass:
        """The pass over all that has not been read of some rows, which then counts as read."""
        if self._below is not None:
            self._below.catch_up(tokens, rows)
        starts = [self.consumed[row] for row in rows]
        unread = [tokens[row][start:] for row, start in zip(rows, starts, strict=True)]
        for row in rows:
            self.consumed[row] = len(tokens[row])
        return Pass(rows, starts, unread, self.layers, predict, self._keep, self._cut if drafting else None)

    def catch_up(self, tokens: Tokens, rows: Sequence[int]) -> None:
        """Reads what is unread of some rows without predicting anything."""
        behind = [row for row in rows if self.consumed[row] < len(tokens[row])]
        if behind:
            self.engine.run(self.state, self.next_pass(tokens, behind, "none"))

    def rollback(self, row: int, length: int) -> None:
        self.consumed[row] = min(self.consumed[row], length)


class EnsembleReader(LogitsReader):
    """Several readers as one, or one at another temperature: the mean of their probabilities, as fairseq's ensemble.

    Each member's logits are divided by the temperature before the mean, so its logits are log-probabilities of
    the tempered ensemble.
    """

    def __init__(self, readers: Sequence[LogitsReader], constraints: Constraints, temperature: float = 1.0):
        super().__init__(constraints)
        self._readers = list(readers)
        self._temperature = temperature

    @property
    def consumed(self) -> list[int]:
        return self._readers[0].consumed

    def logits(self, tokens: Tokens, rows: Sequence[int], last_only: bool, drafting: bool) -> Logits:
        members = [reader.logits(tokens, rows, last_only, drafting) for reader in self._readers]
        if self._temperature != 1.0:
            tempered = [logits / self._temperature for logits, _ in members]
            members = [(logits, torch.logsumexp(logits, dim=-1)) for logits in tempered]
        if len(members) == 1:
            return members[0]
        lprobs = torch.stack([logits - normalizers[:, None] for logits, normalizers in members])
        mean = torch.logsumexp(lprobs, dim=0) - math.log(len(members))
        return mean, mean.new_zeros(mean.size(0))

    def rollback(self, row: int, length: int) -> None:
        for reader in self._readers:
            reader.rollback(row, length)


def combined(readers: Sequence[LogitsReader], constraints: Constraints, temperature: float) -> LogitsReader:
    """The readers of an ensemble as one; a single one at temperature 1 as it is."""
    if len(readers) == 1 and temperature == 1.0:
        return readers[0]
    return EnsembleReader(readers, constraints, temperature)


def best_tokens(logits: Array, normalizers: Array, drafted: Sequence[int] | None = None) -> tuple[list, ...]:
    """Per prediction the best token and its log-probability, and the log-probability of the drafted token.

    If one of a prediction's logits is not a number, neither is its log-probability.

    Args:
        logits: (predictions, vocab).
        normalizers: (predictions,).
        drafted: a token for each prediction.

    Returns:
        a list each, as long as there are predictions: best tokens, their log-probabilities (nats), and with
        ``drafted`` those of the drafted tokens.
    """
    if isinstance(logits, np.ndarray):
        best = logits.argmax(1).tolist()
        chosen = [best] if drafted is None else [best, drafted]
        return best, *(
            [float(logits[i, token] - normalizers[i]) for i, token in enumerate(tokens)] for tokens in chosen
        )
    chosen = [logits.argmax(1)]
    if drafted is not None:
        chosen.append(torch.tensor(drafted, device=logits.device))
    lprobs = [logits.gather(1, tokens[:, None]).squeeze(1) - normalizers for tokens in chosen]
    # One transfer; token numbers are exact in double precision.
    best, *lprobs = torch.stack([chosen[0].double(), *(lprob.double() for lprob in lprobs)]).tolist()
    return [int(token) for token in best], *lprobs
