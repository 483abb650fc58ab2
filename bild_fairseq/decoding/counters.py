"""Counters of a generation and the rates that explain them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Counters:
    """What happened while one sentence, or several, were generated."""

    tokens: int = 0  # committed, end symbol and forced prefix included
    large_calls: int = 0  # forward passes of the large model over the sentence
    small_calls: int = 0  # forward passes of the small model over the sentence
    drafted: int = 0  # appended by the small model
    accepted: int = 0  # drafted and kept after verification
    unverified: int = 0  # drafted and kept without verification
    discarded: int = 0  # drafted and removed by a rollback
    fallbacks: int = 0
    rollbacks: int = 0

    def rates(self) -> dict[str, float]:
        """Ratios of the counters; a ratio without a denominator is 0.

        Fallback and rollback rate are per committed token, as the paper reports them.
        """
        return {
            "fallback_rate": _ratio(self.fallbacks, self.tokens),
            "rollback_rate": _ratio(self.rollbacks, self.tokens),
            "acceptance_rate": _ratio(self.accepted, self.accepted + self.discarded),
            "mean_accepted_length": _ratio(self.tokens, self.large_calls),
        }

    def as_dict(self) -> dict[str, float]:
        """Counters and rates under the names that ``--bild-stats`` writes."""
        return dataclasses.asdict(self) | self.rates()


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def total(counters: Iterable[Counters]) -> Counters:
    """The sum of counters."""
    result = Counters()
    for one in counters:
        for field in dataclasses.fields(Counters):
            setattr(result, field.name, getattr(result, field.name) + getattr(one, field.name))
    return result


def summary(sentences: int, counters: Counters, model: str = "large model") -> str:
    """A few lines for the terminal.

    Args:
        sentences: how many were generated.
        counters: their sum.
        model: what to call the model that is not the small one; an exit may decode alone.
    """
    rates = counters.rates()
    lines = [
        f"{sentences} sentences, {counters.tokens} tokens",
        f"{model}: {counters.large_calls} calls, "
        f"{rates['mean_accepted_length']:.2f} tokens per {model.removesuffix(' model')} call",
    ]
    if counters.small_calls:
        lines += [
            f"small model: {counters.small_calls} calls, {counters.drafted} tokens drafted: "
            f"{counters.accepted} accepted, {counters.discarded} discarded, "
            f"{counters.unverified} never verified",
            f"acceptance rate {rates['acceptance_rate']:.1%}, fallback rate {rates['fallback_rate']:.1%}, "
            f"rollback rate {rates['rollback_rate']:.1%}",
        ]
    return "\n".join(lines)
