"""Thresholds and draft lengths as command lines and results write them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ..decoding.policies import Policy
from ..errors import BildError

ENDS = {"off": [False], "on": [True], "both": [False, True]}  # values of --verify-end


def parse_policy(setting: str, max_draft: int) -> Policy:
    """Reads ``FALLBACK,ROLLBACK[,end]``.

    Raises:
        BildError: it reads otherwise, or a threshold is out of range.
    """
    fallback, *rest = setting.split(",")
    if len(rest) not in (1, 2) or rest[1:] not in ([], ["end"]):
        raise BildError(f"{setting}: write FALLBACK,ROLLBACK or FALLBACK,ROLLBACK,end")
    (fallback,), (rollback,) = parse_fallbacks(fallback), parse_rollbacks(rest[0])
    return Policy(fallback, rollback, max_draft, verify_end=len(rest) == 2)


def parse_fallbacks(text: str) -> list[float]:
    """Reads fallback thresholds joined by commas; see :func:`parse_policy` for errors."""
    return _numbers(text, "fallback threshold", float, lambda value: 0 <= value <= 1, "a probability, 0 to 1")


def parse_rollbacks(text: str) -> list[float]:
    """Reads rollback thresholds joined by commas; see :func:`parse_policy` for errors."""
    return _numbers(text, "rollback threshold", float, lambda value: value >= 0, "a number of nats, 0 to inf")


def parse_drafts(text: str) -> list[int]:
    """Reads maximum draft lengths joined by commas; see :func:`parse_policy` for errors."""
    return _numbers(text, "draft length", int, lambda value: value >= 1, "a number of tokens, 1 or more")


def _numbers(text: str, what: str, kind: type, holds: Callable[[Any], bool], wanted: str) -> list:
    values = []
    for item in text.split(","):
        try:
            value = kind(item)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise BildError(f"{what} {item!r}: must be {wanted}")
        values.append(value)
    return sorted(set(values))


def policy_flags(policy: Policy) -> str:
    """What sets a policy in fairseq-generate."""
    return (
        f"--bild-fallback-threshold {policy.fallback_threshold:g} --bild-rollback-threshold "
        f"{policy.rollback_threshold:g} --bild-max-draft {policy.max_draft}" + " --bild-verify-end" * policy.verify_end
    )


def thresholds_text(fallback: float, rollback: float | str, verify_end: bool) -> str:
    """Thresholds as reports and figures name them: ``0.6, 2, end``.

    Args:
        fallback: probability.
        rollback: nats, or ``"inf"``.
        verify_end: the end is verified.
    """
    return f"{fallback:g}, {float(rollback):g}" + ", end" * verify_end


def policy_of(row: dict[str, Any]) -> Policy:
    """The policy of a row of results that has all of its fields."""
    return Policy(**{field.name: row[field.name] for field in dataclasses.fields(Policy)})


def threshold_columns(policy: Policy) -> dict[str, float | str]:
    """The thresholds by name, for JSON, which has no infinity: it is written ``"inf"``."""
    rollback = policy.rollback_threshold
    return {
        "fallback_threshold": policy.fallback_threshold,
        "rollback_threshold": "inf" if rollback == math.inf else rollback,
    }
