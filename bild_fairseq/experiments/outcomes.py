"""What becomes of one sentence, and under which other policies the very same would.

Policies that differ little take the same decisions, so one walk over recorded predictions often stands for many.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..decoding.counters import Counters
from ..decoding.policies import Policy
from ..decoding.sentence import Round, Sentence
from .recorded import Node


@dataclass(slots=True)
class Outcome:
    """The result of a sentence, and the policies under which every decision on the way is the same."""

    tokens: list[int]  # generated, the end symbol included
    counters: Counters
    missing: bool  # a prediction is needed that is not recorded; ``tokens`` are those that it comes after
    start_small: bool
    ends: tuple[bool, ...] = (False, True)  # values of ``verify_end``
    highest_fallback: float = -math.inf  # the fallback threshold is above it: the surest prediction that fell back
    lowest_draft: float = math.inf  # and not above it: the least sure prediction that did not
    highest_accepted: float = 0.0  # nats; the rollback threshold is not below it
    lowest_rejected: float | None = None  # nats; and below it; None: nothing was rejected
    longest_draft: float = 1  # predictions in a row; no fewer are allowed
    full_draft: float = math.inf  # and no more than this

    def holds_for(self, policy: Policy) -> bool:
        """Whether this is what becomes of the sentence under a policy."""
        return (
            self.highest_fallback < policy.fallback_threshold <= self.lowest_draft
            and self.highest_accepted <= policy.rollback_threshold
            and (self.lowest_rejected is None or policy.rollback_threshold < self.lowest_rejected)
            and self.longest_draft <= policy.max_draft <= self.full_draft
            and policy.verify_end in self.ends
            and policy.start_small == self.start_small
        )

    def narrow(self, one: Round, path: list[Node | None], max_draft: float, ended: bool) -> None:
        """Leaves only the policies under which a round is the same.

        Args:
            one: the round.
            path: what is predicted before each drafted token, and after the last one.
            max_draft: of the policy that it was decoded with.
            ended: the small model drafted the end symbol.
        """
        for node in path[: len(one.drafted)]:
            self.lowest_draft = min(self.lowest_draft, math.exp(node.prediction.lprob))
        if one.fallback:
            self.highest_fallback = max(self.highest_fallback, math.exp(path[-1].prediction.lprob))
        self.longest_draft = max(self.longest_draft, min(max_draft, len(one.drafted) + (one.fallback or self.missing)))
        if len(one.drafted) >= max_draft and not ended:
            self.full_draft = max_draft
        for number, token in enumerate(one.drafted[: one.accepted + 1] if one.verified else ()):
            verdict = path[number].verdict
            if verdict.token == token:
                continue  # accepted under every threshold
            nats = -verdict.drafted_lprob
            if number < one.accepted:
                self.highest_accepted = max(self.highest_accepted, nats)
            else:
                self.lowest_rejected = nats if self.lowest_rejected is None else min(self.lowest_rejected, nats)


def outcome_of(sentence: Sentence, root: Node, policy: Policy, eos: int) -> Outcome:
    """The outcome of a sentence that has no forced prefix.

    Args:
        sentence: as :func:`~bild_fairseq.experiments.recorded.walk` made it.
        root: its predictions.
        policy: that it was decoded with.
        eos: the end symbol.
    """
    rounds, missing = sentence.rounds, sentence.failed is not None
    outcome = Outcome(sentence.tokens[1:], sentence.counters, missing, policy.start_small)
    if missing:
        # What ``decode`` ended the sentence with is not part of it.
        outcome.tokens.pop()
        drafted = rounds[-1].drafted[:-1]
        # A full draft was verified up to the prediction that is missing; the small model lacks it in a shorter one.
        verified = len(drafted) >= policy.max_draft
        last = dataclasses.replace(rounds[-1], drafted=drafted, accepted=len(drafted), verified=verified)
        rounds = [*rounds[:-1], last]
    node: Node | None = root
    for one in rounds:
        path = [node]
        for token in one.drafted:
            path.append(path[-1].after.get(token))
        ended = bool(one.drafted) and one.drafted[-1] == eos
        if ended:
            outcome.ends = (policy.verify_end,)
        outcome.narrow(one, path, policy.max_draft, ended)
        node = path[one.accepted]
        if node is not None and one.large is not None:
            node = node.after.get(one.large)
    return outcome
