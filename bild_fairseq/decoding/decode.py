"""Big Little Decoder over a batch (Kim et al., NeurIPS 2023, Algorithm 1).

The small model drafts tokens until it is unsure (fallback) or has drafted enough. The large model then reads the whole
draft in one forward pass, accepts it up to the first token that it finds too unlikely (rollback), and adds one token
of its own. Every sentence has its own length and counters, so its output does not depend on the other sentences of
its batch: they share forward passes, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .policies import Policy, falls_back, rolls_back
from .reader import Prediction, Reader, Verdict
from .sentence import Sentence


def decode(
    large: Reader,
    small: Reader | None,
    start: int,
    prefixes: Sequence[Sequence[int]],
    policy: Policy,
    eos: int,
    max_batch: float = math.inf,
) -> list[Sentence]:
    """Generates a batch.

    Args:
        large: verifies; its best token is what a rollback puts in place.
        small: drafts; None for plain greedy decoding with the large model.
        start: the symbol that every sentence starts from.
        prefixes: per sentence, tokens to start with; they count as verified.
        policy: thresholds and rules.
        eos: the end symbol.
        max_batch: while more sentences than this are unfinished, nothing is drafted, and the large model writes alone.

    Returns:
        a finished sentence per prefix, in order.
    """
    sentences = [Sentence.begin(start, prefix) for prefix in prefixes]
    tokens = [sentence.tokens for sentence in sentences]
    drafting = small is not None and policy.start_small
    if drafting:
        score_prefixes(sentences, small, eos)
    while rows := [row for row, sentence in enumerate(sentences) if not sentence.finished]:
        if drafting and len(rows) <= max_batch:
            drafts = small.draft(tokens, rows, policy.max_draft, policy.fallback_threshold)
            for row, predictions in zip(rows, drafts, strict=True):
                draft(sentences[row], predictions, policy, eos)
            rows = [row for row in rows if not sentences[row].finished]
        if rows:
            for row, verdicts in zip(rows, large.verify(tokens, rows), strict=True):
                verify(sentences[row], verdicts, policy, eos)
                # Neither model has read the large model's own token yet. What they have read before it stays.
                for reader in (large, small) if small is not None else (large,):
                    reader.rollback(row, len(tokens[row]) - 1)
        drafting = small is not None
    return sentences


def draft(sentence: Sentence, predictions: Sequence[Prediction], policy: Policy, eos: int) -> None:
    """The small model's turn: appends its tokens, up to one that falls back."""
    for token, lprob in predictions:
        sentence.counters.small_calls += 1
        if math.isnan(lprob):
            return sentence.give_up(eos, "the small model's logits are not numbers")
        if falls_back(lprob, policy.fallback_threshold):
            sentence.counters.fallbacks += 1
            sentence.fell_back = True
            return
        sentence.append(token, lprob)
        sentence.counters.drafted += 1
    if sentence.ends_in(eos) and not policy.verify_end:
        sentence.finish()


def verify(sentence: Sentence, verdicts: Sequence[Verdict], policy: Policy, eos: int) -> None:
    """The large model's turn: accepts the draft or rolls back, and adds one token.

    Args:
        verdicts: after each token that the large model had not read, in order.
    """
    sentence.counters.large_calls += 1
    drafted = sentence.tokens[sentence.verified + 1 :]
    added = None
    # A position is the number of generated tokens before a token; the last verdict is on one that is not there yet.
    for position, verdict in enumerate(verdicts, start=len(sentence.tokens) - len(verdicts)):
        if math.isnan(verdict.lprob):
            return sentence.give_up(eos, "the large model's logits are not numbers")
        if position < sentence.generated:
            token = sentence.tokens[position + 1]
            accepted = position < sentence.verified or not rolls_back(
                verdict.drafted_lprob, verdict.token == token, policy.rollback_threshold
            )
            if accepted:
                sentence.scores[position] = verdict.drafted_lprob
                continue
            sentence.counters.rollbacks += 1
            sentence.truncate(position)
        if not sentence.ends_in(eos):
            added = verdict.token
            sentence.append(added, verdict.lprob)
        break
    kept = sentence.generated - sentence.verified - (added is not None)
    sentence.close_round(drafted, kept, added)
    if sentence.ends_in(eos):
        sentence.finish()


def score_prefixes(sentences: Sequence[Sentence], small: Reader, eos: int) -> None:
    """Scores forced tokens with the small model, whose turn comes first; a prefix may already end its sentence."""
    rows = [row for row, sentence in enumerate(sentences) if sentence.generated]
    tokens = [sentence.tokens for sentence in sentences]
    if not rows:
        return
    for row, verdicts in zip(rows, small.verify(tokens, rows), strict=True):
        sentence = sentences[row]
        if any(math.isnan(verdict.lprob) for verdict in verdicts):
            sentence.give_up(eos, "the small model's logits are not numbers")
            continue
        sentence.scores = [verdict.drafted_lprob for verdict in verdicts[:-1]]
        small.rollback(row, len(tokens[row]) - 1)
        if sentence.ends_in(eos):
            sentence.counters.small_calls += 1
            sentence.finish()
