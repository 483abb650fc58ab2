"""Counters: their sum, their rates, and how they are printed and written."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import Rules
from support import generator, model, pair, sample, source, symbols

from bild_fairseq.decoding.counters import Counters, summary, total
from bild_fairseq.decoding.policies import Policy
from bild_fairseq.plugin.generator import BildGenerator
from bild_fairseq.plugin.pair import Pair

NAMES = {
    "tokens",
    "large_calls",
    "small_calls",
    "drafted",
    "accepted",
    "unverified",
    "discarded",
    "fallbacks",
    "rollbacks",
}
RATES = {"fallback_rate", "rollback_rate", "acceptance_rate", "mean_accepted_length"}
COUNTERS = st.builds(Counters, **dict.fromkeys(NAMES, st.integers(0, 50)))


def test_rates_are_what_their_names_say():
    """Per token, per verified draft, and per large call."""
    counters = Counters(
        tokens=40, large_calls=16, small_calls=37, drafted=30, accepted=18, unverified=6, discarded=6,
        fallbacks=10, rollbacks=4,
    )  # fmt: skip
    assert counters.rates() == {
        "fallback_rate": 10 / 40,
        "rollback_rate": 4 / 40,
        "acceptance_rate": 18 / 24,
        "mean_accepted_length": 40 / 16,
    }


def test_rates_of_nothing_are_0():
    """No large call, nothing verified, no token: no division by zero."""
    assert Counters().rates() == dict.fromkeys(RATES, 0.0)


@given(COUNTERS)
def test_as_dict_has_counters_and_rates_by_name(counters):
    written = counters.as_dict()
    assert written.keys() == NAMES | RATES
    assert all(written[name] == getattr(counters, name) for name in NAMES)
    assert {name: written[name] for name in RATES} == counters.rates()


@given(st.lists(COUNTERS, max_size=4))
def test_total_is_the_sum(several):
    """Of every counter, and the terms stay as they were."""
    before = [dataclasses.replace(one) for one in several]
    for name in NAMES:
        assert getattr(total(several), name) == sum(getattr(one, name) for one in several)
    assert several == before


def test_summary_names_every_counter():
    counters = Counters(
        tokens=4011, large_calls=1601, small_calls=3701, drafted=3001, accepted=1811, unverified=611, discarded=579,
        fallbacks=1003, rollbacks=401,
    )  # fmt: skip
    text = summary(77, counters)
    for number in ("77 sentences", "4011 tokens", "1601", "3701", "3001", "1811", "611", "579"):
        assert number in text
    rates = counters.rates()
    for name in ("fallback_rate", "rollback_rate", "acceptance_rate"):
        assert f"{rates[name]:.1%}" in text
    assert f"{rates['mean_accepted_length']:.2f}" in text


def test_summary_of_one_model_says_nothing_of_a_small_one():
    assert "small" not in summary(2, Counters(tokens=9, large_calls=9))


def test_an_exit_that_decodes_alone_is_called_an_exit():
    exits = model(0, arch="early_exit_transformer", exit_layers="1")
    for layer, name in ((1, "exit 1: "), (None, "large model: ")):
        made = BildGenerator(Pair([exits], exit_layer=layer, alone=True), symbols(), Policy())
        made.generate([], sample([source([1, 2])]))
        assert made.summary().splitlines()[1].startswith(name)


@pytest.mark.parametrize("file", ["stats.json", None])
def test_finish_writes_what_stats_returns(tmp_path, file):
    """Valid JSON with the summary and every sentence in order, and no other file; nothing without a path."""
    large, small = pair("agreeing", 0)
    made = generator([large], [small], Rules(), stats_path=None if file is None else str(tmp_path / file))
    made.generate([], sample([source([1, 2]), source([3])], ids=[5, 2]))
    made.generate([], sample([source([4])], ids=[9]))
    made.finish()
    assert [path.name for path in tmp_path.iterdir()] == ([] if file is None else [file])
    if file is None:
        return
    written = json.loads((tmp_path / file).read_text(encoding="utf-8"))
    assert written == made.stats()
    assert written["summary"] == {"sentences": 3, **made.counters().as_dict()}
    assert [sentence["id"] for sentence in written["sentences"]] == [5, 2, 9]
    assert all(sentence.keys() == {"id"} | NAMES | RATES for sentence in written["sentences"])


def test_sentences_without_ids_are_numbered_in_order():
    """fairseq-interactive's batches have no ids."""
    large, small = pair("agreeing", 0)
    made = generator([large], [small], Rules(), stats_path="never written")
    for words in ([1], [2]):
        batch = sample([source(words), source([7])])
        del batch["id"]
        made.generate([], batch)
    assert [sentence["id"] for sentence in made.stats()["sentences"]] == [0, 1, 2, 3]
