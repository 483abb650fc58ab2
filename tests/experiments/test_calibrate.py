"""calibrate: walks over recorded predictions are BiLD, costs are found again, the bound holds, end to end."""

import json
import math
import random

import numpy as np
import pytest
import support
from cli_support import Corpus
from hypothesis import given
from hypothesis import strategies as st
from script_support import MemoryTask, refused, run_script

from bild_fairseq.decoding.counters import Counters
from bild_fairseq.decoding.policies import Policy
from bild_fairseq.experiments import calibrate
from bild_fairseq.experiments.costs import CostModel, features
from bild_fairseq.experiments.outcomes import outcome_of
from bild_fairseq.experiments.recorded import dump, restore, walk
from bild_fairseq.experiments.recorder import Recorder
from bild_fairseq.plugin.generator import BildGenerator, SearchOptions
from bild_fairseq.plugin.pair import Pair

EOS = support.symbols().eos()


def sources(seed: int) -> list[list[int]]:
    dice = random.Random(seed)
    return [support.source(dice.choices(range(support.WORDS), k=dice.randint(0, 7))) for _ in range(5)]


def recorder(pair: Pair, rows: list[list[int]], search: SearchOptions) -> Recorder:
    """A recorder of a pair over sentences in memory, with greedy outputs recorded."""
    made = Recorder(MemoryTask(rows, rows), "valid", pair, search, range(len(rows)), batch_size=3)
    made.record_greedy()
    return made


def walk_all(made: Recorder, policy: Policy) -> list[tuple[list[int], Counters]]:
    """Walks every sentence, recording what is missing, in as many passes as that takes."""
    while True:
        sentences = walk([made.roots[i] for i in range(len(made.roots))], policy, EOS)
        unknown = [(i, tuple(one.tokens[1:-1])) for i, one in enumerate(sentences) if one.failed]
        if not unknown:
            return [(one.tokens[1:], one.counters) for one in sentences]
        made.extend(unknown, Policy(0.5, 2.0, 5))


def search_of(**options: float) -> SearchOptions:
    return SearchOptions(**{"max_len_b": 12, **options})


def assert_walks_are_bild(pair: Pair, policy: Policy, seed: int, **options: float) -> None:
    search = search_of(**options)
    generator = BildGenerator(pair, support.symbols(), policy, search)
    walked = walk_all(recorder(pair, sources(seed), search), policy)
    for row, (tokens, counters) in zip(sources(seed), walked, strict=True):
        ((wanted,),) = generator.generate([], support.sample([row]))
        assert tokens == wanted["tokens"].tolist()
        assert counters == wanted["counters"]


POLICIES = st.builds(
    Policy,
    st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    st.sampled_from([0.0, 1.0, 2.0, 5.0, math.inf]),
    st.sampled_from([1, 3, 10]),
    start_small=st.booleans(),
    verify_end=st.booleans(),
)
LIMITS = st.sampled_from([{}, {"max_len_b": 3, "max_len_a": 0.5}, {"min_len": 5}, {"no_repeat_ngram_size": 2}])


@given(policy=POLICIES, seed=st.integers(0, 3), kind=st.sampled_from(support.PAIRS), limits=LIMITS)
def test_a_walk_is_what_bild_writes(policy, seed, kind, limits):
    """Tokens and every counter, for any pair of models, any policy and every limit."""
    large, small = support.pair(kind, seed)
    assert_walks_are_bild(Pair([large], [small]), policy, seed, **limits)


@given(policy=POLICIES, seed=st.integers(0, 3))
def test_a_walk_over_an_early_exit_is_what_bild_writes(policy, seed):
    model = support.model(seed, arch="early_exit_transformer", exit_layers="1")
    assert_walks_are_bild(Pair([model], exit_layer=1), policy, seed)


def test_an_ensemble_drafts_as_one():
    large, small = support.pair("quarrelling", 0)
    other = support.related(large, 0.2, 7)
    assert_walks_are_bild(Pair([large], [small, other]), Policy(0.4, 2.0, 5), 2)


def test_a_record_comes_back_from_json():
    """Restored predictions lead every walk to the same place, without a pass of the models."""
    large, small = support.pair("agreeing", 1)
    made, policy = recorder(Pair([large], [small]), sources(1), search_of()), Policy(0.4, 3.0, 5)
    wanted = walk_all(made, policy)
    roots = restore(json.loads(json.dumps(dump(made.roots))))
    sentences = walk([roots[i] for i in range(len(wanted))], policy, EOS)
    assert [(one.tokens[1:], one.counters) for one in sentences] == wanted


@given(first=POLICIES, second=POLICIES, seed=st.integers(0, 3), kind=st.sampled_from(support.PAIRS))
def test_one_walk_stands_for_others_only_where_they_are_the_same(first, second, seed, kind):
    """Where an outcome is said to hold for another policy, walking that policy gives the same."""
    large, small = support.pair(kind, seed)
    made = recorder(Pair([large], [small]), sources(seed), search_of())
    walk_all(made, first)
    wanted = walk_all(made, second)
    roots = [made.roots[i] for i in range(len(made.roots))]
    for root, sentence, (tokens, counters) in zip(roots, walk(roots, first, EOS), wanted, strict=True):
        outcome = outcome_of(sentence, root, first, EOS)
        assert outcome.holds_for(first)
        if outcome.holds_for(second):
            assert (outcome.tokens, outcome.counters) == (tokens, counters)


def test_costs_are_found_again():
    """From times made of known costs and some noise; a call that costs nothing never gets a negative cost."""
    dice = np.random.default_rng(0)
    counters = [
        Counters(small_calls=int(s), large_calls=int(n), accepted=int(a), discarded=1)
        for s, n, a in dice.integers(1, 30, size=(60, 3))
    ]
    for costs in ([4.0, 1.0, 5.0, 0.5], [4.0, 1.0, 5.0, 0.0]):
        exact = np.stack([features(one) for one in counters]) @ costs
        found = CostModel(exact / 1000 * dice.normal(1, 0.02, len(exact)), counters)
        assert found.costs == pytest.approx(costs, abs=0.35) and (found.costs >= 0).all()
        assert found.error < 0.03


def arguments(corpus: Corpus, *more: object) -> list[object]:
    models = ["--large", corpus.large, "--small", corpus.small, "--threads", 1, "--max-len-b", 12, "--bpe", "none"]
    space = ["--fallback", "0.3,0.6,0.9", "--rollback", "1,4", "--max-draft", "5", "--timing-sentences", 4]
    return [corpus.data, *models, *space, *([] if "--sentences" in more else ["--sentences", 16]), *more]


def test_the_flags_that_it_prints_keep_the_bound(corpus, tmp_path):
    """The winner is among the settings that were run and kept the bound, and is the fastest of them."""
    file = tmp_path / "result.json"
    run = run_script(corpus, "calibrate", *arguments(corpus, "--max-loss", 5, "--json", file))
    result = json.loads(file.read_text())
    best, rows = result["best"], result["verified"]
    assert best in rows and best["within_bound"] and best["loss_bound"] <= 5
    assert best["seconds"] == min(row["seconds"] for row in rows if row["within_bound"])
    last = run.out.splitlines()[-1]
    assert f"--bild-small-path {corpus.small}" in last
    flags = last.split()[2:]
    # What it prints is what fairseq-generate takes.
    assert corpus.generate(*flags, "--path", corpus.large, "--gen-subset", "valid").status == 0


def test_without_any_loss_there_is_still_a_winner(corpus, tmp_path):
    """A lossless setting, unless another one is even better than greedy decoding in nearly every resample."""
    file = tmp_path / "result.json"
    run_script(corpus, "calibrate", *arguments(corpus, "--max-loss", 0, "--json", file))
    best = json.loads(file.read_text())["best"]
    assert best["loss_bound"] <= 0 and best["quality"] >= best["quality_greedy"]
    if best["rollback_threshold"] == 0 and best["verify_end"]:
        assert best["loss_bound"] == 0 and best["quality"] == best["quality_greedy"]


def test_goes_on_from_its_record(corpus, tmp_path):
    """What is recorded is taken from the file, which stays as it is; predictions of another model are refused."""
    record = tmp_path / "record.json"
    command = arguments(corpus, "--max-loss", 3, "--record", record)
    run_script(corpus, "calibrate", *command)
    before = json.loads(record.read_text())
    run_script(corpus, "calibrate", *arguments(corpus, "--max-loss", 2, "--record", record))
    after = json.loads(record.read_text())
    assert after["origin"] == before["origin"]
    for sentence, rows in before["predictions"].items():
        assert len(after["predictions"][sentence]) >= len(rows)
    other = [f"{corpus.small_halfway}" if item == corpus.small else item for item in command]
    assert "was recorded with another" in refused(corpus, "calibrate", *other)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-loss", "-1"], "--max-loss -1.0: must be 0 or more"),
        (["--confidence", "1"], "--confidence 1.0"),
        (["--record", "missing/record.json"], "missing/record.json: cannot write there"),
        (["--small", "SMALL"], "two models are called"),
        (["--small", "other=SMALL"], "give one --small or one --early-exit"),
    ],
)
def test_bad_input_gets_one_line(corpus, more, message):
    more = [item.replace("SMALL", str(corpus.small)) for item in more]
    assert message in refused(corpus, "calibrate", *arguments(corpus, *more))


def test_a_record_of_something_else_is_left_alone(corpus, tmp_path):
    record = tmp_path / "record.json"
    record.write_text('{"rows": []}')
    assert "holds no recorded predictions" in refused(corpus, "calibrate", *arguments(corpus, "--record", record))
    assert record.read_text() == '{"rows": []}'


def test_looser_settings_come_after_stricter_ones():
    ends = (False, True)
    settings = [Policy(f, r, 5, verify_end=end) for f in (0.2, 0.6, 0.4) for r in (1.0, 3.0) for end in ends]
    settings.append(Policy(0.4, 0.0, 5, verify_end=True))
    waves = calibrate.loosening(settings)
    seen: set[int] = set()
    for wave in waves:
        for number, stricter in wave:
            assert seen.issuperset(stricter)
            for other in (settings[s] for s in stricter):
                assert other.verify_end == settings[number].verify_end
                assert other.fallback_threshold >= settings[number].fallback_threshold
                assert other.rollback_threshold <= settings[number].rollback_threshold
        seen.update(number for number, _ in wave)
    assert seen == set(range(len(settings)))
    assert [settings[number] for number, _ in waves[0]] == []  # nothing at (0.6, 0)
    assert {len(stricter) for wave in waves for _, stricter in wave} == {0, 1, 2}
