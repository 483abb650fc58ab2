"""scripts/calibrate.py: costs are found again, the bound holds, end to end."""

import json
import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import Corpus
from script_support import refused, run_script, script

from bild_fairseq.decoding.counters import Counters
from bild_fairseq.decoding.policies import Policy
from bild_fairseq.errors import BildError
from bild_fairseq.experiments import calibrate
from bild_fairseq.experiments.costs import CostModel, features
from bild_fairseq.experiments.data import load, make_batches
from bild_fairseq.experiments.pairs import load_pairs
from bild_fairseq.experiments.recorder import Recorder
from bild_fairseq.plugin.generator import BildGenerator
from bild_fairseq.plugin.search import SearchOptions


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
    models = ["--large", corpus.large, "--threads", 1, "--max-len-b", 12, "--bpe", "none"]
    space = ["--fallback", "0.3,0.6,0.9", "--rollback", "1,4", "--max-draft", "5", "--timing-sentences", 4]
    sentences = [] if "--sentences" in more else ["--sentences", 16]
    return [corpus.data, *models, *space, *sentences, "--small", corpus.small, *more]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the script in this process; returns the lines that it prints."""
    main = script("calibrate")
    monkeypatch.setattr(main, "quiet", lambda: None)

    def call(*words: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["calibrate.py", *map(str, words)])
        main.main()
        return capsys.readouterr().out.splitlines()

    return call


def test_the_flags_that_it_prints_keep_the_bound(corpus, tmp_path):
    """The winner is the fastest of the settings that were run and kept the bound.

    What it prints is what a shell gives to fairseq-generate, with spaces in a name, too.
    """
    file, small = tmp_path / "result.json", tmp_path / "my small.pt"
    shutil.copy(corpus.small, small)
    words = [small if word == corpus.small else word for word in arguments(corpus, "--max-loss", 5, "--json", file)]
    printed = run_script(corpus, "calibrate", *words).out.splitlines()
    result = json.loads(file.read_text())
    best, rows = result["best"], result["verified"]
    assert best in rows and best["within_bound"] and best["loss_bound"] <= 5
    assert best["seconds"] == min(row["seconds"] for row in rows if row["within_bound"])
    flags = shlex.split(printed[-1])
    assert flags[flags.index("--bild-small-path") + 1] == str(small)
    assert flags[flags.index("--path") + 1] == str(corpus.large)
    corpus.generate(*flags, "--gen-subset", "valid")


def test_without_any_loss_there_is_still_a_winner(corpus, run, tmp_path):
    """A lossless setting, unless another one is even better than greedy decoding in nearly every resample."""
    file = tmp_path / "result.json"
    run(*arguments(corpus, "--max-loss", 0, "--json", file))
    best = json.loads(file.read_text())["best"]
    assert best["loss_bound"] <= 0 and best["quality"] >= best["quality_greedy"]
    if best["rollback_threshold"] == 0 and best["verify_end"]:
        assert best["loss_bound"] == 0 and best["quality"] == best["quality_greedy"]


def test_an_early_exit_gets_its_flags(corpus, run, tmp_path):
    exits = corpus.checkpoint(
        tmp_path / "exits.pt", arch="early_exit_transformer_tiny", exit_layers="1", decoder_layers=2
    )
    words = arguments(corpus, "--early-exit", f"exit={exits}:1", "--max-loss", 100)
    del words[words.index("--small") :][:2]
    small = words.index("--small")
    last = run(*words[:small], *words[small + 2 :])[-1]
    assert shlex.split(last)[:6] == ["--path", str(exits), "--generator", "bild", "--bild-exit-layer", "1"]


def test_too_few_sentences_for_a_bound_are_said(corpus, run):
    """No bound is promised where hardly a sentence lies beyond it; with a lower confidence as many are enough."""
    few, enough = (run(*arguments(corpus, "--max-loss", 5, "--confidence", confidence)) for confidence in (0.95, 0.5))
    said = [line for line in few if "too few for a bound with confidence 0.95" in line]
    assert len(said) == 1 and said[0].startswith("16 sentences") and "raise --sentences" in said[0]
    assert not any(", with confidence" in line for line in few)
    assert any(", with confidence 0.5 at least" in line for line in enough)
    assert not any("too few" in line for line in enough)


def test_goes_on_from_its_record(corpus, run, monkeypatch, tmp_path):
    """Stopped before the settings are run, it records nothing again; another bound needs no other record."""
    record, passes = tmp_path / "record.json", []
    record_jobs = Recorder.extend

    def counted(*args: Any) -> None:
        passes.append(1)
        record_jobs(*args)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "extend", counted)
    words = arguments(corpus, "--max-loss", 3, "--record", record)
    with monkeypatch.context() as stopped:
        stopped.setattr(calibrate, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*words)
    assert passes
    passes.clear()
    assert any(line.startswith("fastest within") for line in run(*words))
    assert not passes
    with pytest.raises(BildError, match="was recorded with another model; name another file, or delete it"):
        run(*(corpus.small_halfway if word == corpus.small else word for word in words))


def test_an_interruption_keeps_what_is_recorded(corpus, run, monkeypatch, tmp_path):
    """In the middle of recording; another run meanwhile is refused."""
    record, words = tmp_path / "record.json", arguments(corpus, "--record", tmp_path / "record.json")

    def interrupted(*_: Any) -> None:
        with pytest.raises(BildError, match="record.json: another run is at work there"):
            run(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert len(json.loads(record.read_text())["predictions"]) == 16
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


FEW = pytest.mark.parametrize("few", [False, True], ids=["all types", "few types"])
LOSSLESS = ["--lossless", "--fallback", "0.1,0.3,0.6,0.9", "--max-draft", "1,2,5"]


def few_types(corpus: Corpus, folder: Path) -> Path:
    """The file of a draft vocabulary."""
    path = folder / "few.txt"
    path.write_text("".join(f"{symbol}\n" for symbol in corpus.task().target_dictionary.symbols[4:10]))
    return path


def lossless_arguments(corpus: Corpus, *more: object) -> list[object]:
    words = arguments(corpus, *LOSSLESS, *more)
    rollback = words.index("--rollback")
    return words[:rollback] + words[rollback + 2 :]


@FEW
def test_the_lossless_setting_is_the_one_of_the_lowest_estimated_cost(corpus, monkeypatch, tmp_path, few):
    """Among all settings, each really run, for costs under which short and under which long drafts are cheap."""
    more = ["--draft-vocab", few_types(corpus, tmp_path)] if few else []
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *map(str, lossless_arguments(corpus, *more))])
    args = script("calibrate").parse_args()
    task = load(args)
    (pair,) = load_pairs(task, args).values()
    settings = calibrate.policies(args)
    assert len(settings) == 12 and all(one.rollback_threshold == 0 and one.verify_end for one in settings)
    calibration = calibrate.Calibration(task, pair, args, settings)
    batches = make_batches(task.dataset("valid"), calibration.ids, 4)
    calls = []
    for policy in settings:
        generator = BildGenerator(pair, task.target_dictionary, policy, SearchOptions.from_args(args))
        for batch in batches:
            generator.generate([], batch)
        calls.append(features(generator.counters()) + [len(calibration.ids) - 1, 0, 0, 0])
    chosen = set()
    for costs in ([1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.1, 1.0, 0.1], [1.0, 9.0, 1.0, 0.0]):
        found = calibration.cheapest(Namespace(costs=np.array(costs)))
        milliseconds = np.stack(calls) @ costs
        assert milliseconds[settings.index(found)] == pytest.approx(milliseconds.min())
        chosen.add(found)
    assert len(chosen) > 1


@FEW
def test_lossless_flags_give_the_text_of_greedy_decoding(corpus, run, tmp_path, few):
    path = few_types(corpus, tmp_path)
    printed = run(*lossless_arguments(corpus, *(["--draft-vocab", path] if few else [])))
    flags = shlex.split(printed[-1])
    assert flags[flags.index("--bild-rollback-threshold") + 1] == "0" and "--bild-verify-end" in flags
    assert ("--bild-draft-vocab" in flags) == few == (f"drafting among 8 types of {path}" in printed)
    assert printed[-2].startswith("fastest that loses nothing, found in ")
    greedy = corpus.generate("--generator", "greedy", "--gen-subset", "valid")
    assert corpus.generate(*flags, "--gen-subset", "valid").texts() == greedy.texts()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lossless"], "--rollback has no effect with --lossless"),
        (["--lossless", "--rollback", "1,1.5,2,3,4,6", "--max-loss", "1"], "--max-loss has no effect with --lossless"),
        (["--draft-vocab", "missing.txt"], "--draft-vocab missing.txt: no such file"),
        (["--max-loss", "-1"], "--max-loss -1.0: must be 0 or more"),
        (["--confidence", "1"], "--confidence 1.0"),
        (["--candidates", "0"], "--candidates 0: must be 1 or more"),
        (["--rollback", "x"], "rollback threshold 'x'"),
        (["--record", "missing/record.json"], "--record missing/record.json: cannot write there"),
        (["--json", "."], "--json .: cannot write there: that is a folder"),
        (["--small", "SMALL"], "two models are called"),
        (["--small", "other=SMALL"], "give one --small or one --early-exit"),
    ],
)
def test_bad_input_is_refused(corpus, run, more, message):
    more = [item.replace("SMALL", str(corpus.small)) for item in more]
    with pytest.raises(BildError) as error:
        run(*arguments(corpus, *more))
    assert message in str(error.value) and "\n" not in str(error.value)


OLD_RECORD = {"origin": {"models": {"small": "0"}}, "predictions": {"0": [[-1, -1, 5, 0.5, 5, 0.7]]}}


@pytest.mark.parametrize("content", [{"rows": []}, [], OLD_RECORD])
def test_a_record_of_something_else_is_left_alone(corpus, tmp_path, content):
    """The error is one line, and the file stays as it is; a record of an earlier version is none."""
    record = tmp_path / "record.json"
    record.write_text(json.dumps(content))
    line = refused(corpus, "calibrate", *arguments(corpus, "--record", record))
    assert str(record) in line and "name another file" in line
    assert json.loads(record.read_text()) == content


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
