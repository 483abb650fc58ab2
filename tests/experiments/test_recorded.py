"""Recorded predictions: decoding over them is decoding with the models, and an outcome holds as far as it says."""

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from script_support import MemoryTask

from bild_fairseq.decoding.policies import Policy
from bild_fairseq.experiments.outcomes import Outcome, outcome_of
from bild_fairseq.experiments.recorded import Node, dump, restore, walk
from bild_fairseq.experiments.recorder import Recorder
from bild_fairseq.plugin.generator import BildGenerator
from bild_fairseq.plugin.pair import Pair
from bild_fairseq.plugin.search import SearchOptions

EOS = support.symbols().eos()

POLICIES = st.builds(
    Policy,
    st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]) | st.floats(0, 1, width=16),
    st.sampled_from([0.0, 1.0, 2.0, 5.0, math.inf]) | st.floats(0, 8, width=16),
    st.sampled_from([1, 2, 3, 10]),
    start_small=st.booleans(),
    verify_end=st.booleans(),
)
SEVERAL = st.lists(POLICIES, min_size=3, max_size=5)
LIMITS = st.sampled_from([{}, {"max_len_b": 3, "max_len_a": 0.5}, {"min_len": 5}, {"no_repeat_ngram_size": 2}])


def sources(seed: int) -> list[list[int]]:
    dice = random.Random(seed)
    return [support.source(dice.choices(range(support.WORDS), k=dice.randint(0, 7))) for _ in range(5)]


def recorder(pair: Pair, rows: list[list[int]], **limits: Any) -> Recorder:
    """A recorder over sentences in memory, with greedy outputs recorded."""
    search = SearchOptions(**{"max_len_b": 12, **limits})
    made = Recorder(MemoryTask(rows, rows), "valid", pair, search, range(len(rows)), batch_size=3)
    made.record_greedy()
    return made


def outcomes(made: Recorder, policy: Policy) -> list[Outcome]:
    """What becomes of every sentence with what is recorded now."""
    roots = [made.roots[i] for i in sorted(made.roots)]
    return [
        outcome_of(sentence, root, policy, EOS) for sentence, root in zip(walk(roots, policy, EOS), roots, strict=True)
    ]


def walk_all(made: Recorder, policy: Policy) -> list[Outcome]:
    """Walks every sentence, recording what is missing, in as many passes as that takes."""
    while missing := [(i, tuple(one.tokens)) for i, one in enumerate(outcomes(made, policy)) if one.missing]:
        made.extend(missing, Policy(0.5, 2.0, 5))
    return outcomes(made, policy)


def assert_walks_are_bild(pair: Pair, policies: Sequence[Policy], seed: int, **limits: Any) -> None:
    rows = sources(seed)
    made = recorder(pair, rows, **limits)
    generator = BildGenerator(pair, support.symbols(), Policy(), SearchOptions(**{"max_len_b": 12, **limits}))
    for policy in policies:
        generator.policy = policy
        wanted = [generator.generate([], support.sample([row]))[0][0] for row in rows]
        for sentence, hypothesis in zip(walk_all(made, policy), wanted, strict=True):
            assert sentence.tokens == hypothesis["tokens"].tolist()
            assert sentence.counters == hypothesis["counters"]


@settings(max_examples=12)
@given(policies=SEVERAL, models=support.ANY_PAIR, seed=st.integers(0, 3), limits=LIMITS)
def test_a_walk_is_what_bild_writes(policies, models, seed, limits):
    """Tokens and every counter, for any pair of models, any policies over the same record, and every limit."""
    large, small = models
    assert_walks_are_bild(Pair([large], [small]), policies, seed, **limits)


@settings(max_examples=8)
@given(policies=SEVERAL, seed=st.integers(0, 3))
def test_a_walk_over_an_early_exit_is_what_bild_writes(policies, seed):
    model = support.model(seed, arch="early_exit_transformer", exit_layers="1")
    assert_walks_are_bild(Pair([model], exit_layer=1), policies, seed)


def test_an_ensemble_drafts_as_one():
    large, small = support.pair("quarrelling", 0)
    assert_walks_are_bild(Pair([large], [small, support.related(large, 0.2, 7)]), [Policy(0.4, 2.0, 5)], 2)


def test_a_large_ensemble_verifies_as_one():
    large, small = support.pair("quarrelling", 1)
    assert_walks_are_bild(Pair([large, support.related(large, 0.2, 7)], [small]), [Policy(0.4, 2.0, 5)], 1)


@settings(max_examples=12)
@given(policies=SEVERAL, models=support.ANY_PAIR, seed=st.integers(0, 3))
def test_an_outcome_holds_where_it_says(policies, models, seed):
    """Where an outcome claims to hold for another policy, a walk under that policy comes to the same.

    Of sentences that lack a prediction as of complete ones.
    """
    large, small = models
    made = recorder(Pair([large], [small]), sources(seed))
    for policy in policies[: len(policies) // 2]:
        walk_all(made, policy)
    found = [outcomes(made, policy) for policy in policies]
    for policy, one in zip(policies, found, strict=True):
        assert all(outcome.holds_for(policy) for outcome in one)
    for one in found:
        for policy, other in zip(policies, found, strict=True):
            for outcome, anew in zip(one, other, strict=True):
                if outcome.holds_for(policy):
                    assert same(outcome, anew)


def same(one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes are the same, or lack the same prediction."""
    fields = ("tokens", "missing") if one.missing else ("tokens", "missing", "counters")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def test_outcomes_hold_for_many_policies():
    """One that held for its own policy alone would make the search slow."""
    large, small = support.pair("agreeing", 1)
    made = recorder(Pair([large], [small]), sources(1))
    policy = Policy(0.4, 3.0, 10, verify_end=True)
    near = [dataclasses.replace(policy, fallback_threshold=0.4 + i / 1e4, rollback_threshold=3 + i) for i in range(9)]
    outcomes = walk_all(made, policy)
    held = [outcome.holds_for(other) for outcome in outcomes for other in near]
    assert sum(held) > 2 * len(outcomes)


def test_a_record_comes_back_from_json():
    """Restored predictions lead every walk to the same result, without a pass of the models."""
    large, small = support.pair("agreeing", 1)
    made, policy = recorder(Pair([large], [small]), sources(1)), Policy(0.4, 3.0, 5)
    wanted = walk_all(made, policy)
    roots = restore(json.loads(json.dumps(dump(made.roots))))
    assert roots == made.roots
    sentences = walk([roots[i] for i in sorted(roots)], policy, EOS)
    assert [(one.tokens[1:], one.counters) for one in sentences] == [(one.tokens, one.counters) for one in wanted]


def test_a_record_as_deep_as_a_long_sentence_comes_back():
    """Predictions are a chain as long as the sentence, longer than functions may call themselves."""
    large, small = support.pair("agreeing", 0)
    root = recorder(Pair([large], [small]), sources(0)[:1]).roots[0]
    long = chain = Node(root.prediction, root.verdict)
    for token in range(3000):
        chain = chain.after.setdefault(token, Node(root.prediction, root.verdict))
    (back,) = restore(json.loads(json.dumps(dump({0: long})))).values()
    depth = 0
    while back.after:
        (back,) = back.after.values()
        depth += 1
    assert depth == 3000


@pytest.mark.parametrize("policy", [Policy(0.0, math.inf, 10), Policy(1.0, 0.0, 1), Policy(0.5, 1.0, 3)])
def test_nothing_recorded_is_missing_not_wrong(policy):
    """A sentence without any prediction lacks the first one."""
    (sentence,) = walk([None], policy, EOS)
    assert sentence.failed and sentence.tokens[1:-1] == []
