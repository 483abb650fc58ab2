"""scripts/sweep.py: a grid end to end, going on after an interruption, scores, bad input."""

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import support
from cli_support import Corpus
from script_support import SCRIPTS, MemoryTask, refused, run_script

from bild_fairseq.errors import BildError
from bild_fairseq.experiments.scoring import ScoreOptions, Scorer, quality_change
from bild_fairseq.experiments.settings import parse_drafts, parse_policy, parse_rollbacks


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


def test_goes_on_where_it_was_interrupted(corpus, tmp_path):
    """What is measured stays as it is, byte for byte; a wider grid adds its settings only."""
    out = tmp_path / "sweep"
    code = (
        "import runpy, sys; from bild_fairseq.experiments import timing as common\n"
        "measure, calls = common.measure, []\n"
        "def interrupted(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 3: raise KeyboardInterrupt\n"
        "    return measure(*args, **kwargs)\n"
        "common.measure = interrupted\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    stopped = corpus.programs("python", code, SCRIPTS / "sweep.py", *arguments(corpus, out, *GRID), status=1)
    assert stopped.err.splitlines()[-1].startswith("sweep: interrupted")
    first = rows_of(out)
    assert len(first) == 3
    again = run_script(corpus, "sweep", *arguments(corpus, out, *GRID))
    assert rows_of(out)[:3] == first and len(rows_of(out)) == 6
    assert "3 measured now" in again.out
    wider = [*GRID[:1], "0.3,0.6,0.9", *GRID[2:]]
    assert "2 measured now" in run_script(corpus, "sweep", *arguments(corpus, out, *wider)).out


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
        (["--small", "tiny=other.pt"], "other.pt"),
        (["--reference", "missing.txt"], "--reference missing.txt"),
        (["--early-exit", "LARGE"], "the model has no exits"),
    ],
)
def test_bad_input_gets_one_line(corpus, tmp_path, more, message):
    more = [f"exit={corpus.large}" if item == "LARGE" else item for item in more]
    assert message in refused(corpus, "sweep", *arguments(corpus, tmp_path / "sweep", *more))


def test_results_of_something_else_are_left_alone(corpus, tmp_path):
    (tmp_path / "results.json").write_text("[]")
    assert "holds no results of a sweep" in refused(corpus, "sweep", *arguments(corpus, tmp_path))
    assert (tmp_path / "results.json").read_text() == "[]"


def scorer(references: list[str], **options: object) -> Any:
    """A scorer for references in words of the dictionary."""
    words = support.symbols()
    targets = [[*(words.index(word) for word in line.split()), words.eos()] for line in references]
    chosen = ScoreOptions(**{"bpe": "none", **options})
    return Scorer(MemoryTask(targets, targets), "valid", range(len(targets)), chosen)


def sentences(dice: random.Random, count: int, near: list[str] | None = None) -> list[str]:
    """Sentences at random, or like others with some words changed."""
    if near is None:
        return [" ".join(f"w{dice.randrange(20)}" for _ in range(dice.randint(1, 12))) for _ in range(count)]
    return [" ".join(f"w{dice.randrange(20)}" if dice.random() < 0.3 else w for w in line.split()) for line in near]


@pytest.mark.parametrize("seed", range(4))
def test_statistics_add_up_to_the_corpus_score(seed):
    """Summed statistics give sacrebleu's corpus score: short corpora without long matches, and none at all, too."""
    dice = random.Random(seed)
    references = sentences(dice, 8)
    outputs = sentences(dice, 8, near=references)
    words = support.symbols()
    tokens = {i: [words.index(word) for word in line.split()] for i, line in enumerate(outputs)}
    scores = scorer(references)
    statistics = scores.statistics(tokens)
    for chosen in ([0], [1, 2], list(range(8)), [3, 3, 3, 5]):
        metric = sacrebleu.BLEU(tokenize="none", force=True)
        wanted = metric.corpus_score([outputs[i] for i in chosen], [[references[i] for i in chosen]]).score
        assert scores.from_statistics(statistics[chosen].sum(axis=0)) == pytest.approx(wanted, abs=1e-9)
    assert scores.score(tokens) == pytest.approx(float(scores.from_statistics(statistics.sum(axis=0))))
    assert scores.from_statistics(np.array([4.0, 4, 0, 0, 0, 0, 4, 3, 2, 1])) == 0


def test_rouge_is_the_mean_over_sentences():
    pytest.importorskip("rouge_score")
    scores = scorer(["w1 w2 w3 w4", "w5 w6"], metric="rougeL")
    words = support.symbols()
    tokens = {0: [words.index(w) for w in ("w1", "w2", "w3", "w4")], 1: [words.index("w7")]}
    assert scores.score(tokens) == pytest.approx(50)


def test_rouge_without_its_package_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(BildError, match="pip install rouge-score"):
        scorer(["w1"], metric="rougeLsum")


def test_change_of_quality_is_paired():
    """Equal outputs differ by nothing in every resample, however different the sentences are."""
    dice = random.Random(3)
    references = sentences(dice, 20)
    words = support.symbols()
    outputs = {i: [words.index(w) for w in line.split()] for i, line in enumerate(sentences(dice, 20, references))}
    scores = scorer(references)
    statistics = scores.statistics(outputs)
    assert quality_change(scores, statistics, statistics) == (0, 0, 0)
    better = scores.statistics({i: [words.index(w) for w in line.split()] for i, line in enumerate(references)})
    change, low, high = quality_change(scores, better, statistics)
    assert 0 < low < change < high


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
