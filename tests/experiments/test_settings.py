"""Thresholds and draft lengths: read as they are meant, and written so that they can be read again."""

import json
import math

import pytest

from bild_fairseq.decoding.policies import Policy
from bild_fairseq.errors import BildError
from bild_fairseq.experiments.settings import (
    parse_drafts,
    parse_policy,
    parse_rollbacks,
    policy_flags,
    policy_of,
    threshold_columns,
)


def test_thresholds_are_read_as_meant():
    policy = parse_policy("0.4,inf,end", 7)
    assert (policy.fallback_threshold, policy.rollback_threshold, policy.max_draft) == (0.4, math.inf, 7)
    assert policy.verify_end and not parse_policy("0,0", 7).verify_end
    assert parse_rollbacks("4,inf,1,4") == [1, 4, math.inf]
    for bad, message in (
        ("0.4", "write FALLBACK,ROLLBACK"),
        ("0.4,2,start", "write FALLBACK,ROLLBACK"),
        ("nan,2", "fallback threshold 'nan'"),
        ("0.4,-1", "rollback threshold '-1': must be a number of nats"),
        ("0.4,x", "rollback threshold 'x'"),
    ):
        with pytest.raises(BildError, match=message):
            parse_policy(bad, 7)
    with pytest.raises(BildError, match="draft length '0': must be a number of tokens, 1 or more"):
        parse_drafts("5,0")


def test_what_is_written_can_be_read():
    """JSON has no infinity; fairseq-generate reads what Python's float reads."""
    policy = Policy(0.25, math.inf, 7, verify_end=True)
    columns = json.loads(json.dumps(threshold_columns(policy), allow_nan=False))
    assert {name: float(value) for name, value in columns.items()} == {
        "fallback_threshold": 0.25,
        "rollback_threshold": math.inf,
    }
    flags = policy_flags(policy).split()
    assert flags[1::2] == ["0.25", "inf", "7"] and flags[-1] == "--bild-verify-end"
    assert "--bild-verify-end" not in policy_flags(Policy())
    row = {"fallback_threshold": 0.25, "rollback_threshold": math.inf, "max_draft": 7, "quality": 3.0}
    assert policy_of(row | {"start_small": False, "verify_end": True}) == policy
