"""One sentence while it is generated, and the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .counters import Counters


@dataclass(slots=True)
class Round:
    """What happened up to one call of the large model, or from the last call to the end of the sentence."""

    drafted: list[int]  # by the small model, in order
    accepted: int  # how many of them stayed, from the first on
    fallback: bool  # the small model handed over because it was unsure
    verified: bool  # the large model has read the draft
    large: int | None  # the token that the large model put after the accepted ones, if it put one


@dataclass(slots=True)
class Sentence:
    """One sentence: its tokens, who wrote them, and what it took."""

    tokens: list[int]  # the start symbol, then what has been generated
    scores: list[float]  # log-probability (nats) of each generated token under the model that scored it last
    verified: int  # how many generated tokens the large model has written or accepted, or were forced
    finished: bool = False
    failed: str | None = None  # what went wrong, if the sentence was given up
    counters: Counters = field(default_factory=Counters)
    rounds: list[Round] = field(default_factory=list)
    fell_back: bool = False  # in the draft that waits for verification

    @classmethod
    def begin(cls, start: int, prefix: Sequence[int]) -> Sentence:
        """A sentence that starts with a forced prefix, which counts as verified."""
        return cls([start, *prefix], [-math.inf] * len(prefix), len(prefix))

    @property
    def generated(self) -> int:
        """How many tokens there are, without the start symbol."""
        return len(self.tokens) - 1

    def ends_in(self, eos: int) -> bool:
        """Whether the last generated token is the end symbol."""
        return len(self.tokens) > 1 and self.tokens[-1] == eos

    def append(self, token: int, score: float) -> None:
        """Adds a token and its log-probability (nats)."""
        self.tokens.append(token)
        self.scores.append(score)

    def truncate(self, generated: int) -> None:
        """Drops all but the first ``generated`` tokens."""
        del self.tokens[generated + 1 :]
        del self.scores[generated:]

    def close_round(self, drafted: list[int], accepted: int, large: int | None) -> None:
        """Records what the large model made of a draft. From now on all tokens of the sentence are verified.

        Args:
            drafted: the draft.
            accepted: how many tokens of it stayed, from the first on.
            large: the token that the large model put after them, if it put one.
        """
        self.counters.accepted += accepted
        self.counters.discarded += len(drafted) - accepted
        self.rounds.append(Round(drafted, accepted, self.fell_back, True, large))
        self.verified = self.generated
        self.fell_back = False

    def finish(self) -> None:
        """Ends the sentence; what was drafted last stays unverified."""
        tail = self.tokens[self.verified + 1 :]
        if tail:
            self.rounds.append(Round(tail, len(tail), self.fell_back, False, None))
        counters = self.counters
        counters.tokens = self.generated
        counters.unverified = counters.drafted - counters.accepted - counters.discarded
        self.finished = True

    def give_up(self, eos: int, reason: str) -> None:
        """Ends a sentence that cannot go on, keeping what it has; its score becomes -inf.

        Its last round then holds the end symbol behind what was drafted, though no model has written it.

        Args:
            eos: the end symbol.
            reason: what went wrong, for :attr:`failed`.
        """
        if self.ends_in(eos):
            self.truncate(self.generated - 1)
        self.append(eos, -math.inf)
        self.failed = reason
        self.finish()
