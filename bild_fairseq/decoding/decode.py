"""Big Little Decoder over a batch (Kim et al., NeurIPS 2023, Algorithm 1).

The small model drafts token by token until it is unsure (fallback) or has drafted enough; the large model then
reads the whole draft in one forward pass, keeps it up to the first token that it finds too unlikely (rollback),
and adds one token of its own. Every sentence has its own turn, length and counters, so what it becomes does not
depend on the other sentences of its batch; only the forward passes are shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .constraints import Array, Constraints
from .counters import Counters
from .policies import falls_back, rolls_back

Prediction = tuple[int, float]  # the best token and its log-probability (nats)
Judgement = tuple[int, float, float]  # the same, and the log-probability of the token that stands there


class Reader(Protocol):
    """One side of the decoding: reads tokens, predicts the next ones, and can go back."""

    consumed: list[int]  # per row: tokens read so far, the start symbol included

    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool) -> tuple[Tensor, Tensor]:
        """Reads all that it has not consumed of some rows.

        Args:
            tokens: every row of the batch, the start symbol first.
            rows: the rows to read; each has at least one unread token.
            last_only: predictions after the last token of each row only, instead of after every token read.

        Returns:
            float32 logits (predictions, vocab), for each row in order, one prediction after each token read; and
            their logsumexp (predictions,), which makes them log-probabilities. The caller may change the logits.
        """
        ...

    def draft(
        self,
        tokens: Sequence[Sequence[int]],
        rows: Sequence[int],
        limits: Sequence[int],
        threshold: float,
        constraints: Constraints,
    ) -> list[list[Prediction]] | None:
        """Reads all that it has not consumed of some rows, then each time its own best token, which saves the way back.

        Args:
            tokens, rows: as for ``read``; the rows are past their prefixes and below the maximum length.
            limits: for each row, so many predictions at most.
            threshold: probability; a draft ends with the first token that is less likely.
            constraints: hold for every prediction.

        Returns:
            for each row its predictions, up to the first one that is the end symbol, less likely than the threshold,
            not a number or the last one allowed; all but the last have been read. None if the reader reads one token
            at a time only.
        """
        ...

    def judge(
        self, tokens: Sequence[Sequence[int]], rows: Sequence[int], constraints: Constraints
    ) -> list[list[Judgement]] | None:
        """Reads all that it has not consumed of some rows and judges what stands there, which saves the logits' way.

        Args:
            tokens, rows: as for ``read``; the rows are past their prefixes and below the maximum length.
            constraints: hold for every prediction.

        Returns:
            for each row a judgement after each token read; after the last one there is no standing token, and its
            log-probability is of no use. None if the reader gives logits only.
        """
        ...

    def rollback(self, row: int, length: int) -> None:
        """Forgets all but the first ``length`` tokens of a row; later tokens are read anew."""
        ...


@dataclass(frozen=True)
class Policy:
    """The thresholds and rules of a generation.

    Args:
        fallback_threshold: probability, 0 to 1; the small model hands over below it.
        rollback_threshold: nats, 0 to inf; the large model goes back to the first draft token above it.
        max_draft: tokens the small model may draft in a row.
        start_small: the small model writes the first token, not the large one.
        verify_end: the large model also verifies what was drafted before the end symbol.
    """

    fallback_threshold: float = 0.6
    rollback_threshold: float = 2.0
    max_draft: int = 10
    start_small: bool = False
    verify_end: bool = False


@dataclass
class Sentence:
    """One sentence while it is generated, and the result."""

    tokens: list[int]  # the start symbol, then what has been generated
    prefix: int  # how many generated tokens were forced
    scores: list[float] = field(default_factory=list)  # log-probability (nats) of each generated token
    verified: int = 0  # generated tokens that the large model has produced or accepted
    drafting: bool = False  # whose turn it is: the small model's if true
    finished: bool = False
    failed: str | None = None  # what went wrong, if the sentence was given up
    counters: Counters = field(default_factory=Counters)

    @property
    def generated(self) -> int:
        return len(self.tokens) - 1

    def append(self, token: int, score: float) -> None:
        self.tokens.append(token)
        self.scores.append(score)

    def truncate(self, generated: int) -> None:
        del self.tokens[generated + 1 :]
        del self.scores[generated:]


def decode(
    large: Reader,
    small: Reader | None,
    start: int,
    prefixes: Sequence[Sequence[int]],
    policy: Policy,
    constraints: Constraints,
) -> list[Sentence]:
    """Generates a batch.

    Args:
        large: reads and judges; its argmax is what a rollback puts in place.
        small: drafts; None for plain greedy decoding with the large model.
        start: the symbol that every sentence starts from.
        prefixes: per sentence, generated tokens to start with; they count as verified.
        policy: thresholds and rules.
        constraints: limits that hold for both models at every position.

    Returns:
        a finished sentence per prefix, in order.
    """
    sentences = [_begin(start, prefix, policy, small is not None, constraints) for prefix in prefixes]
    batch = _Batch(sentences, constraints)
    while True:
        while drafting := [row for row, sentence in enumerate(sentences) if sentence.drafting]:
            _draft(batch, drafting, small, policy)
        waiting = [row for row, sentence in enumerate(sentences) if not sentence.finished]
        if not waiting:
            return sentences
        _verify(batch, waiting, large, small, policy)


def _begin(start: int, prefix: Sequence[int], policy: Policy, has_small: bool, constraints: Constraints) -> Sentence:
    prefix = list(prefix[: constraints.max_len])
    return Sentence(
        tokens=[start, *prefix],
        prefix=len(prefix),
        scores=[-math.inf] * len(prefix),  # until the model whose turn comes first has read them
        verified=len(prefix),
        drafting=has_small and policy.start_small,
    )


@dataclass
class _Batch:
    sentences: list[Sentence]
    constraints: Constraints

    def __post_init__(self) -> None:
        self.tokens = [sentence.tokens for sentence in self.sentences]
        self.prefixes = [sentence.prefix for sentence in self.sentences]

    def predict(
        self, reader: Reader, rows: Sequence[int], last_only: bool
    ) -> tuple[Array, Array, list[tuple[int, int]]]:
        """Logits (predictions, vocab), their normalizers (predictions,), and the row and position of each prediction.

        Position i is that of the i-th generated token: i tokens precede it. Constraints hold in the logits, which
        minus the normalizers are log-probabilities. On a CPU the arrays are NumPy's, which is quicker about small
        things.
        """
        starts = [len(self.tokens[row]) - 1 if last_only else reader.consumed[row] for row in rows]
        places = [
            (row, position)
            for row, first in zip(rows, starts, strict=True)
            for position in range(first, len(self.tokens[row]))
        ]
        logits, normalizers = reader.read(self.tokens, rows, last_only)
        if logits.device.type == "cpu":
            logits, normalizers = logits.numpy(), normalizers.numpy()
        self.constraints.apply(logits, normalizers, places, self.tokens, self.prefixes)
        return logits, normalizers, places


def _draft(batch: _Batch, rows: Sequence[int], small: Reader, policy: Policy) -> None:
    """The small model's turn, or one step of it: each sentence gets tokens, and may hand over to the large model."""
    for row, predictions in zip(rows, _predictions(batch, rows, small, policy), strict=True):
        sentence = batch.sentences[row]
        for token, lprob in predictions:
            if sentence.drafting:
                _take(sentence, token, lprob, policy, batch.constraints.eos)


def _take(sentence: Sentence, token: int, lprob: float, policy: Policy, eos: int) -> None:
    """What becomes of a prediction of the small model."""
    sentence.counters.small_calls += 1
    if math.isnan(lprob):
        _give_up(sentence, eos, "the small model's logits are not numbers")
    elif sentence.prefix and sentence.tokens[-1] == eos:
        _finish(sentence)
    elif falls_back(lprob, policy.fallback_threshold):
        sentence.counters.fallbacks += 1
        sentence.drafting = False
    else:
        sentence.append(token, lprob)
        sentence.counters.drafted += 1
        if token == eos and not policy.verify_end:
            _finish(sentence)
        elif token == eos or sentence.generated - sentence.verified >= policy.max_draft:
            sentence.drafting = False


def _predictions(batch: _Batch, rows: Sequence[int], small: Reader, policy: Policy) -> list[list[Prediction]]:
    """What the small model would write next in each row: as much as it can say in one go, at least one token."""
    # A forced prefix that no model has read yet gets its scores from the small model.
    unscored = policy.start_small and any(batch.prefixes[row] and not small.consumed[row] for row in rows)
    sentences = [batch.sentences[row] for row in rows]
    room = [batch.constraints.max_len - sentence.generated for sentence in sentences]
    if not unscored and min(room) > 0:
        left = [policy.max_draft - sentence.generated + sentence.verified for sentence in sentences]
        limits = list(map(min, left, room))
        drafts = small.draft(batch.tokens, rows, limits, policy.fallback_threshold, batch.constraints)
        if drafts is not None:
            return drafts
    logits, normalizers, places = batch.predict(small, rows, last_only=not unscored)
    if unscored:
        last = _score_prefixes(batch, logits, normalizers, places)
        logits, normalizers = logits[last], normalizers[last]
    return [[prediction] for prediction in zip(*_best(logits, normalizers), strict=True)]


def _score_prefixes(batch: _Batch, logits: Array, normalizers: Array, places: Sequence[tuple[int, int]]) -> list[int]:
    """Scores forced tokens; returns which predictions are those after each row's last token."""
    last = []
    for index, (row, position) in enumerate(places):
        sentence = batch.sentences[row]
        if position < sentence.generated:
            sentence.scores[position] = float(logits[index, sentence.tokens[position + 1]] - normalizers[index])
        else:
            last.append(index)
    return last


def _verify(batch: _Batch, rows: Sequence[int], large: Reader, small: Reader | None, policy: Policy) -> None:
    """One large step: judges every waiting sentence's draft in one forward pass and adds one token."""
    firsts = [large.consumed[row] for row in rows]
    for row, first, judgements in zip(rows, firsts, _judgements(batch, rows, large), strict=True):
        sentence = batch.sentences[row]
        _judge(sentence, first, judgements, policy, batch.constraints.eos)
        # Whatever stood after the token that the large model put last is void.
        large.rollback(row, len(sentence.tokens) - 1)
        if small is not None and not sentence.finished:
            small.rollback(row, len(sentence.tokens) - 1)
            sentence.drafting = True


def _judgements(batch: _Batch, rows: Sequence[int], large: Reader) -> list[Sequence[Judgement]]:
    """What the large model says of every token that it has not consumed, and of what should follow."""
    sentences = [batch.sentences[row] for row in rows]
    scored = all(sentence.prefix <= large.consumed[row] for row, sentence in zip(rows, sentences, strict=True))
    if scored and all(sentence.generated < batch.constraints.max_len for sentence in sentences):
        judgements = large.judge(batch.tokens, rows, batch.constraints)
        if judgements is not None:
            return judgements
    logits, normalizers, places = batch.predict(large, rows, last_only=False)
    # The token that stands at each place; none does at the last one of a row, and eos fills in.
    standing = [
        tokens[position + 1] if position + 1 < len(tokens) else batch.constraints.eos
        for tokens, position in ((batch.tokens[row], position) for row, position in places)
    ]
    judged = list(zip(*_best(logits, normalizers, standing), strict=True))
    ends = [index + 1 for index, (row, position) in enumerate(places) if position == batch.sentences[row].generated]
    return [judged[begin:end] for begin, end in pairwise([0, *ends])]


def _judge(sentence: Sentence, first: int, judgements: Sequence[Judgement], policy: Policy, eos: int) -> None:
    """The large model's verdict on one sentence.

    Args:
        first: position of the first judgement; the last one is for the token after the draft.
        judgements: of each position from there on.
    """
    counters = sentence.counters
    counters.large_calls += 1
    drafted = sentence.generated - sentence.verified
    accepted = drafted
    for position, (best, best_lprob, lprob) in enumerate(judgements, start=first):
        if math.isnan(best_lprob):
            _give_up(sentence, eos, "the large model's logits are not numbers")
            return
        if position == sentence.generated:
            if not (sentence.generated and sentence.tokens[-1] == eos):
                sentence.append(best, best_lprob)
            break
        standing = sentence.tokens[position + 1]
        if position >= sentence.verified and rolls_back(lprob, best == standing, policy.rollback_threshold):
            counters.rollbacks += 1
            accepted = position - sentence.verified
            sentence.truncate(position)
            sentence.append(best, best_lprob)
            break
        sentence.scores[position] = lprob
    counters.accepted += accepted
    counters.discarded += drafted - accepted
    sentence.verified = sentence.generated
    if sentence.tokens[-1] == eos:
        _finish(sentence)


def _finish(sentence: Sentence) -> None:
    counters = sentence.counters
    counters.tokens = sentence.generated
    counters.unverified = counters.drafted - counters.accepted - counters.discarded
    sentence.drafting = False
    sentence.finished = True


def _give_up(sentence: Sentence, eos: int, reason: str) -> None:
    """Ends a sentence that cannot go on, keeping what it has; its score says that something is wrong."""
    if sentence.generated and sentence.tokens[-1] == eos:
        sentence.truncate(sentence.generated - 1)
    sentence.append(eos, -math.inf)
    sentence.failed = reason
    _finish(sentence)


def _best(logits: Array, normalizers: Array, standing: Sequence[int] | None = None) -> tuple[list, ...]:
    """Per prediction the best token and its log-probability, and the log-probability of the ``standing`` token.

    A prediction with NaN in it gives NaN.
    """
    if isinstance(logits, np.ndarray):
        best = logits.argmax(1).tolist()
        chosen = [best] if standing is None else [best, standing]
        return best, *(
            [float(logits[i, token] - normalizers[i]) for i, token in enumerate(tokens)] for tokens in chosen
        )
    chosen = [logits.argmax(1)]
    if standing is not None:
        chosen.append(torch.tensor(standing, device=logits.device))
    lprobs = [logits.gather(1, tokens[:, None]).squeeze(1) - normalizers for tokens in chosen]
    # One transfer; token numbers are exact in double precision.
    best, *lprobs = torch.stack([chosen[0].double(), *(lprob.double() for lprob in lprobs)]).tolist()
    return [int(token) for token in best], *lprobs
