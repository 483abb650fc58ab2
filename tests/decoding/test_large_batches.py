"""``--bild-max-batch``: while many sentences of a batch are unfinished, the large model writes alone."""

import dataclasses
import math
from typing import Any

from hypothesis import given, settings
from reference import SMALL, bild
from support import ANY_PAIR, LIMITS, POLICY, SOURCES, any_rules, assert_same_hypothesis, generator, model, sample
from support import symbols as dictionary

from bild_fairseq.decoding.policies import Policy
from bild_fairseq.plugin import large_batches
from bild_fairseq.plugin.large_batches import FEW_SENTENCES, useful_batch
from bild_fairseq.plugin.pair import Pair

COUNTED = ("small_calls", "drafted", "accepted", "unverified", "discarded", "fallbacks", "rollbacks")


def hypotheses(made: Any, batch: dict) -> list[dict[str, Any]]:
    return [one for (one,) in made.generate([], batch)]


@settings(max_examples=40)
@given(ANY_PAIR, any_rules(**POLICY, **LIMITS), SOURCES)
def test_drafting_begins_when_few_enough_are_unfinished(models, rules, sources):
    """With room for all but one: the greedy text until the first sentence ends, then what BiLD makes of it."""
    large, small = models
    batch = sample(sources)
    greedy = hypotheses(generator([large], [], rules, alone=True), batch)
    first = min(len(one["tokens"]) for one in greedy)
    found = hypotheses(generator([large], [small], rules, max_batch=max(1, len(sources) - 1)), batch)
    for source, alone, hypothesis in zip(sources, greedy, found, strict=True):
        if len(sources) > 1 and len(alone["tokens"]) == first:
            assert_same_hypothesis(hypothesis, alone)
            continue
        begun = tuple(alone["tokens"][:first].tolist()) if len(sources) > 1 else ()
        start = SMALL if begun else rules.start
        wanted = bild([large], [small], source, dictionary(), dataclasses.replace(rules, prefix=begun, start=start))
        counters = hypothesis["counters"]
        assert hypothesis["tokens"].tolist() == wanted.tokens
        assert {name: getattr(counters, name) for name in COUNTED} == {name: wanted.counters[name] for name in COUNTED}
        assert counters.large_calls == len(begun) + wanted.counters["large_calls"]


LOSSLESS = Policy(0.3, 0.0, verify_end=True)


def test_lossless_decoding_of_many_weights_has_a_limit_of_its_own(monkeypatch):
    large, small = model(0), model(1)
    drafted, alone = Pair([large], [small]), Pair([large], alone=True)
    assert useful_batch(drafted, LOSSLESS) == math.inf, "few weights"
    monkeypatch.setattr(large_batches, "MANY_WEIGHTS", 1)
    assert useful_batch(drafted, LOSSLESS) == FEW_SENTENCES
    for policy in (Policy(0.3, 0.1, verify_end=True), Policy(0.3, 0.0)):
        assert useful_batch(drafted, policy) == math.inf, "its text would change"
    assert useful_batch(alone, LOSSLESS) == math.inf
