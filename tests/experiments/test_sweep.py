"""scripts/sweep.py: a grid end to end, going on after an interruption, bad input."""

import contextlib
import csv
import json
import math
from pathlib import Path

import pytest
from cli_support import Corpus
from script_support import refused, run_script

from bild_fairseq.decoding.policies import Policy
from bild_fairseq.experiments.data import load_subset, make_batches, make_task
from bild_fairseq.experiments.scoring import ScoreOptions, Scorer
from bild_fairseq.experiments.sweep import Results, measure_all, settings_of
from bild_fairseq.experiments.work_folder import locked
from bild_fairseq.plugin.pair import Pair
from bild_fairseq.plugin.search import SearchOptions


def arguments(corpus: Corpus, out: Path, *more: object) -> list[object]:
    sentences = [] if "--sentences" in more else ["--sentences", 6]
    models = ["--large", corpus.large, "--threads", 1, "--max-len-b", 12, "--bpe", "none"]
    return [corpus.data, *models, *sentences, "--small", f"tiny={corpus.small}", "--out", out, *more]


def rows_of(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["rows"]


GRID = ["--fallback", "0.3,0.9", "--rollback", "0,inf", "--max-draft", "4", "--verify-end", "on"]


def test_every_setting_is_measured_against_greedy(corpus, tmp_path):
    """The grid, its ablations and the baselines come out once each; the lossless settings are greedy's equals."""
    out = tmp_path / "sweep"
    run_script(corpus, "sweep", *arguments(corpus, out, *GRID, "--ablations", "--windows", "2", "--fairseq"))
    rows = rows_of(out)
    kinds = [row["kind"] for row in rows]
    assert kinds[:3] == ["greedy", "fairseq --beam 1", "small alone"]
    assert {kind: kinds.count(kind) for kind in ("bild", "no rollback", "no fallback")} == {
        "bild": 4,
        "no rollback": 2,
        "no fallback": 2,
    }
    greedy, stock, small = rows[:3]
    assert greedy["speedup"] == 1 and greedy["large_calls"] == greedy["tokens"]
    assert stock["quality"] == greedy["quality"] and stock["differ_from_greedy"] == 0
    assert small["small_calls"] == small["tokens"]
    for row in rows:
        assert row["sentences"] == 6
        assert row["ms_median"] <= row["ms_p90"] and row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["quality_change"] == pytest.approx(row["quality"] - greedy["quality"])
        if row["kind"] != "bild":
            continue
        assert row["accepted"] + row["discarded"] + row["unverified"] == row["drafted"]
        assert row["mean_accepted_length"] == row["tokens"] / row["large_calls"]
        if row["rollback_threshold"] == 0:
            assert row["differ_from_greedy"] == row["quality_change"] == 0
    ablations = [row for row in rows if row["kind"].startswith("no ")]
    assert all(row["rollbacks"] == 0 for row in ablations if row["kind"] == "no rollback")
    assert all(row["fallbacks"] == 0 and row["max_draft"] == 2 for row in ablations if row["kind"] == "no fallback")
    with open(out / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["kind"] for line in table] == kinds
    assert {line["rollback_threshold"] for line in table} == {"", "0.0", "inf"}


def test_early_exit_next_to_two_models(corpus, tmp_path):
    """An early-exit model in a file of its own brings its own greedy baseline."""
    exits = corpus.checkpoint(
        tmp_path / "exits.pt", arch="early_exit_transformer_tiny", exit_layers="1", decoder_layers=2
    )
    out = tmp_path / "sweep"
    setting = ["--setting", "0.6,2", "--setting", "0.5,0,end"]
    run_script(corpus, "sweep", *arguments(corpus, out, *setting, "--early-exit", f"exit={exits}:1"))
    found = [(row["method"], row["kind"]) for row in rows_of(out)]
    two, exit_ = ("tiny", "bild"), ("exit", "bild")
    assert found == [
        ("large model", "greedy"),
        ("tiny", "small alone"),
        *(two, two),
        ("exit, full depth", "greedy"),
        ("exit", "small alone"),
        *(exit_, exit_),
    ]
    lossless = [row for row in rows_of(out) if row["kind"] == "bild" and row["rollback_threshold"] == 0]
    assert len(lossless) == 2 and all(row["differ_from_greedy"] == 0 for row in lossless)


class Bar:
    """Counts, and stops the work like Ctrl-C once it has counted far enough."""

    def __init__(self, end: float = math.inf):
        self.n, self._end, self.lines = 0, end, []

    def update(self, count: int) -> None:
        self.n += count
        if self.n >= self._end:
            raise KeyboardInterrupt

    def set_description(self, text: str) -> None:
        pass

    def write(self, line: str) -> None:
        self.lines.append(line)


def test_goes_on_where_it_was_interrupted(corpus, tmp_path):
    """What is measured stays as it is, byte for byte; a wider grid adds its settings only."""
    task = make_task(corpus.data)
    load_subset(task, "valid")
    pairs = {"tiny": Pair.load(str(corpus.large), str(corpus.small), task=task)}
    batches = make_batches(task.dataset("valid"), range(4), 1)
    scorer = Scorer(task, "valid", range(4), ScoreOptions(bpe="none"))

    def go_on(grid: list[tuple[str, Policy]], bar: Bar) -> list[dict]:
        results = Results(tmp_path, {"models": {}})
        before = list(results.rows)
        groups = [
            (pair, [setting for setting in settings if not results.has(setting)])
            for pair, settings in settings_of(pairs, str(corpus.large), grid, fairseq=False)
        ]
        with contextlib.suppress(KeyboardInterrupt):
            measure_all(groups, results, task, SearchOptions(max_len_b=12), batches, scorer, bar, cuda=False, warmup=0)
        assert rows_of(tmp_path) == results.rows and results.rows[: len(before)] == before
        return results.rows

    grid = [("bild", Policy(fallback, 0.0, 4, verify_end=True)) for fallback in (0.3, 0.9)]
    assert len(go_on(grid, Bar(end=3 * len(batches)))) == 2, "the third is measured, and interrupted before it counts"
    bar = Bar()
    assert len(go_on(grid, bar)) == 4 and bar.n == 2 * len(batches) and len(bar.lines) == 2
    bar = Bar()
    assert len(go_on([*grid, ("bild", Policy(0.6, 1.0, 4))], bar)) == 5 and bar.n == len(batches)
    assert len(go_on(grid, Bar(end=0))) == 5, "nothing is left to be done"


def test_other_data_or_models_are_noticed(corpus, tmp_path):
    out = tmp_path / "sweep"
    one = ["--setting", "0.6,2"]
    run_script(corpus, "sweep", *arguments(corpus, out, *one))
    assert "another number of sentences" in refused(corpus, "sweep", *arguments(corpus, out, *one, "--sentences", 5))
    assert "another subset" in refused(corpus, "sweep", *arguments(corpus, out, *one, "--subset", "test"))
    other = [f"tiny={corpus.small_halfway}" if str(a).startswith("tiny=") else a for a in arguments(corpus, out, *one)]
    assert "another tiny" in refused(corpus, "sweep", *other)
    # A model under a name of its own joins the others.
    run_script(corpus, "sweep", *arguments(corpus, out, *one, "--small", f"halfway={corpus.small_halfway}"))
    assert [row["method"] for row in rows_of(out)] == ["large model", "tiny", "tiny", "halfway", "halfway"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fallback", "1.5"], "fallback threshold '1.5': must be a probability"),
        (["--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["--sentences", "0"], "--sentences 0: must be 1 or more"),
        (["--subset", "dev"], "cannot load dev"),
        (["--large", "missing.pt"], "--large missing.pt: no such file"),
        (["--small", "other=other.pt"], "other.pt"),
        (["--reference", "missing.txt"], "--reference missing.txt"),
        (["--early-exit", "LARGE"], "the model has no exits"),
    ],
)
def test_bad_input_gets_one_line(corpus, tmp_path, more, message):
    more = [f"exit={corpus.large}" if item == "LARGE" else item for item in more]
    assert message in refused(corpus, "sweep", *arguments(corpus, tmp_path / "sweep", *more))


def test_a_folder_of_another_run(corpus, tmp_path):
    with locked(tmp_path, "--out"):
        assert "another run is at work there" in refused(corpus, "sweep", *arguments(corpus, tmp_path))
    assert not list(tmp_path.iterdir())


def test_results_of_something_else_are_left_alone(corpus, tmp_path):
    (tmp_path / "results.json").write_text("[]")
    assert "holds no results of a sweep" in refused(corpus, "sweep", *arguments(corpus, tmp_path))
    assert (tmp_path / "results.json").read_text() == "[]"
