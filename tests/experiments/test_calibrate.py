"""scripts/calibrate.py: walks are BiLD, costs are found again, the bound holds, end to end."""

import json
import math
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from bild_fairseq.experiments.methods import Method
from cli_support import Corpus
from hypothesis import given
from hypothesis import strategies as st
from script_support import MemoryTask, refused, run_script, script

from bild_fairseq.decoding.counters import Counters
from bild_fairseq.decoding.decode import Policy
from bild_fairseq.experiments import recorded as simulate

calibrate = script("calibrate")

EOS = support.symbols().eos()


def sources(seed: int) -> list[list[int]]:
    dice = random.Random(seed)
    return [support.source(dice.choices(range(support.WORDS), k=dice.randint(0, 7))) for _ in range(5)]


def recorder(method: Any, rows: list[list[int]], **options: object) -> Any:
    """A recorder of a method over sentences in memory, with greedy outputs recorded."""
    defaults = {"subset": "valid", "cuda": False, "max_len_a": 0.0, "max_len_b": 12, "min_len": 1}
    args = Namespace(**{**defaults, "no_repeat_ngram_size": 0, **options})
    made = simulate.Recorder(MemoryTask(rows, rows), method, args, range(len(rows)), batch_size=3)
    made.record_greedy()
    return made


def walk_all(made: Any, policy: Policy) -> list[tuple[list[int], Counters]]:
    """Walks every sentence, recording what is missing, in as many passes as that takes."""
    results: dict[int, tuple[list[int], Counters]] = {}
    while len(results) < len(made.roots):
        missing = []
        for i, root in made.roots.items():
            try:
                results[i] = simulate.walk(root, policy, EOS)
            except simulate.Missing as place:
                missing.append((i, place.tokens))
        made.extend(missing, Policy(0.5, 2.0, 5))
    return [results[i] for i in range(len(results))]


def assert_walks_are_bild(method: Any, policy: Policy, seed: int, **options: object) -> None:
    made = recorder(method, sources(seed), **options)
    generator = method.generator(MemoryTask([], []), made._search)
    generator.policy = policy
    walked = walk_all(made, policy)
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
    assert_walks_are_bild(Method("two", large, "large.pt", (small,), "small.pt"), policy, seed, **limits)


@given(policy=POLICIES, seed=st.integers(0, 3))
def test_a_walk_over_an_early_exit_is_what_bild_writes(policy, seed):
    model = support.model(seed, arch="early_exit_transformer", exit_layers="1")
    assert_walks_are_bild(Method("exit", model, "exit.pt", exit_layer=1), policy, seed)


def test_an_ensemble_drafts_as_one():
    large, small = support.pair("quarrelling", 0)
    other = support.related(large, 0.2, 7)
    method = Method("ensemble", large, "large.pt", (small, other), "a.pt:b.pt")
    assert_walks_are_bild(method, Policy(0.4, 2.0, 5), 2)


def test_a_record_comes_back_from_json():
    """Restored predictions lead every walk to the same place, without a pass of the models."""
    large, small = support.pair("agreeing", 1)
    method = Method("two", large, "large.pt", (small,), "small.pt")
    made, policy = recorder(method, sources(1)), Policy(0.4, 3.0, 5)
    wanted = walk_all(made, policy)
    again = recorder(method, sources(1))
    again.restore(json.loads(json.dumps(made.dump())))
    again._record = None
    assert walk_all(again, policy) == wanted


def test_costs_are_found_again():
    """From times made of known costs and some noise; a call that costs nothing never gets a negative cost."""
    dice = np.random.default_rng(0)
    counters = [
        Counters(small_calls=int(s), large_calls=int(n), accepted=int(a), discarded=1)
        for s, n, a in dice.integers(1, 30, size=(60, 3))
    ]
    for costs in ([4.0, 1.0, 5.0, 0.5], [4.0, 1.0, 5.0, 0.0]):
        exact = np.stack([calibrate.features(one) for one in counters]) @ costs
        found = calibrate.CostModel(exact / 1000 * dice.normal(1, 0.02, len(exact)), counters)
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
    """Stopped before the settings are run, it records nothing again; another bound needs no other record."""
    record = tmp_path / "record.json"
    code = (
        "import runpy, sys; from bild_fairseq.experiments import recorded as simulate\n"
        "from bild_fairseq.experiments import timing as common\n"
        "extend, times = simulate.Recorder.extend, []\n"
        "def counted(*args): times.append(1); return extend(*args)\n"
        "simulate.Recorder.extend = counted\n"
        "stop, measure, calls = sys.argv.pop(1) == 'stop', common.measure, []\n"
        "def interrupted(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if stop and len(calls) > 1: raise KeyboardInterrupt\n"
        "    return measure(*args, **kwargs)\n"
        "common.measure = interrupted\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('extended', len(times))"
    )
    command = [Path(calibrate.__file__), "stop", *arguments(corpus, "--max-loss", 3, "--record", record)]
    stopped = corpus.programs("python", code, *command, status=1)
    assert stopped.err.splitlines()[-1].startswith("calibrate: interrupted")
    assert "extended 0" not in stopped.out
    command[1] = "go on"
    again = corpus.programs("python", code, *command)
    assert "extended 0" in again.out and "fastest within" in again.out
    other = [f"{corpus.small_halfway}" if item == corpus.small else item for item in command[2:]]
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
