"""scripts/align.py end to end on a tiny task, interrupted and resumed, and with input that it must refuse.

Training runs as in use, but forked from a warm interpreter (see cli_support), which is quicker.
"""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from cli_support import Corpus
from fairseq.data import indexed_dataset
from fairseq.models import ARCH_CONFIG_REGISTRY
from script_support import script

from bild_fairseq.errors import BildError

align = script("align")

# Long enough to learn something whatever the rounding of a machine's sums.
LEARNS = ["--epochs", 10]


class Aligner:
    """Runs the script on a corpus and writes down what it did: "part" (of the calibration set), "train"."""

    def __init__(self, corpus: Corpus, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.corpus, self.folder = corpus, folder
        self.out, self.work = folder / "aligned.pt", folder / "work"
        self.started: list[str] = []
        self.break_off = lambda step, count: False  # instead of a step, as if it was interrupted
        self.kill_training = False  # after one epoch
        monkeypatch.setattr(align.subprocess, "run", self._run)
        translate_part = align.Alignment._translate_part

        def counted(*args: object) -> None:
            self._begin("part")
            translate_part(*args)

        monkeypatch.setattr(align.Alignment, "_translate_part", counted)

    def __call__(self, *options: object, **named: object) -> dict:
        """The script with short settings; options come after them and win."""
        self.started = []
        words = [self.corpus.data, "--cpu", "--large", self.corpus.large, "--small", self.corpus.small]
        words += ["--out", self.out, "--work", self.work, "--sample", 150, "--part", 100, "--valid-sample", 15]
        words += ["--epochs", 2, "--lr", 0.005, "--max-tokens", 300, "--sentences", 6, "--max-len-b", 12]
        args = align.parse_args([str(word) for word in (*words, *options)] + ["--", "--num-workers", "0"])
        args.train_flags += [str(word) for word in named.get("train", ())]
        return align.Alignment(args).run()

    def _begin(self, step: str) -> None:
        if self.break_off(step, self.started.count(step)):
            raise KeyboardInterrupt
        self.started.append(step)

    def _run(self, command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        assert env.items() >= os.environ.items()
        python, module, program, *arguments = command
        assert (python, module, program) == (sys.executable, "-m", "fairseq_cli.train")
        self._begin("train")
        if self.kill_training:
            self.corpus.programs("train", *arguments, "--max-epoch", 1)
            return subprocess.CompletedProcess(command, -9)
        return subprocess.CompletedProcess(command, self.corpus.programs("train", *arguments, status=None).status)

    def calibration_set(self, subset: str = "train") -> list[tuple[list[int], list[int]]]:
        sides = (str(self.work / "calibration" / "data-bin" / f"{subset}.x-y.{side}") for side in "xy")
        rows = (map(torch.Tensor.tolist, indexed_dataset.MMapIndexedDataset(path)) for path in sides)
        return list(zip(*rows, strict=True))


@pytest.fixture
def aligner(corpus, tmp_path, monkeypatch):
    return Aligner(corpus, tmp_path, monkeypatch)


def greedy_outputs(corpus: Corpus, split: str) -> dict[tuple[str, ...], str]:
    """Source words -> what the large model writes greedily, as fairseq's own generator prints it."""
    run = corpus.stock("--gen-subset", split, "--max-len-b", 12)
    sources = run.fields("S")
    return {tuple(sources[number][0].split()): text for number, text in run.texts().items()}


def test_from_two_models_to_an_aligned_one(aligner, corpus, capsys):
    report = aligner(*LEARNS)
    assert aligner.started == ["part", "part", "part", "train"]
    task = corpus.task()
    for split, count in (("train", 150), ("valid", 15)):
        wanted = greedy_outputs(corpus, split)
        rows = aligner.calibration_set(split)
        assert 0.9 * count <= len(rows) <= count  # without those that the length limit has cut
        for source, target in rows:
            words = task.source_dictionary.string(torch.tensor(source)).split()
            assert task.target_dictionary.string(torch.tensor(target)) == wanted[tuple(words)]
            assert source[-1] == target[-1] == task.target_dictionary.eos()

    assert report["agreement"]["after"] > report["agreement"]["before"] + 0.05
    for name in ("before", "after"):
        assert report["lossless"][name]["differ_from_greedy"] == 0
        assert report["bild"][name]["speedup_over_greedy"][0] > 0
    assert json.loads((aligner.folder / "aligned.json").read_text()) == report
    align.print_report(report)
    assert f"{report['agreement']['after']:.1%}" in capsys.readouterr().out

    # Done is done: the same command starts nothing, and measures nothing anew.
    assert aligner(*LEARNS) == report
    assert aligner.started == []

    state = torch.load(aligner.out, weights_only=True)
    assert state["last_optimizer_state"] is None
    assert state["model"].keys() == torch.load(corpus.small, weights_only=False)["model"].keys()
    lossless = ["--bild-rollback-threshold", 0, "--bild-verify-end"]
    run = corpus.generate("--generator", "bild", "--bild-small-path", aligner.out, *lossless)
    assert run.texts() == corpus.generate("--generator", "greedy").texts()


def test_an_interruption_costs_one_part_and_one_epoch(aligner):
    aligner.break_off = lambda step, count: step == "part" and count == 2
    with pytest.raises(KeyboardInterrupt):
        aligner()
    aligner.break_off = lambda step, count: step == "train"
    with pytest.raises(KeyboardInterrupt):
        aligner()
    assert aligner.started == ["part"]  # the third part alone
    aligner.break_off = lambda step, count: False
    aligner.kill_training = True
    with pytest.raises(BildError, match="fairseq-train ended with status -9"):
        aligner()
    assert aligner.started == ["train"] and not aligner.out.exists()
    aligner.kill_training = False
    aligner()
    log = (aligner.work / "training" / "train.log").read_text()
    assert aligner.started == ["train"]
    assert log.count("end of epoch 1 ") == log.count("end of epoch 2 ") == 1


def test_changed_settings_are_noticed(aligner, corpus):
    aligner.break_off = lambda step, count: step == "train"
    with pytest.raises(KeyboardInterrupt):
        aligner()
    for options_, message in (
        (["--sample", 140], "calibration was made with --sample 150, not 140: remove it"),
        (["--large", corpus.large_halfway], "calibration was made with --large"),
        (["--lr", 0.1], "training was made with --lr 0.005, not 0.1: remove it"),
        (["--small", corpus.small_halfway], "training was made with --small"),
    ):
        with pytest.raises(BildError, match=message):
            aligner(*options_)
        assert aligner.started == []


@pytest.mark.parametrize("top", [0, 5])
def test_distillation_from_the_large_model(aligner, corpus, top):
    report = aligner(*LEARNS, "--distill", 0.5, "--distill-top", top, "--half")
    assert report["agreement"]["after"] > report["agreement"]["before"] + 0.05
    log = (aligner.work / "training" / "train.log").read_text()
    assert "| teacher_kl " in log
    trained = torch.load(aligner.work / "training" / "checkpoint_last.pt", weights_only=False)
    assert trained["model"].keys() == torch.load(corpus.small, weights_only=False)["model"].keys()
    assert trained["criterion"] is None
    weights = torch.load(aligner.out, weights_only=True)["model"].values()
    assert {weight.dtype for weight in weights if weight.is_floating_point()} == {torch.float16}
    assert aligner.out.stat().st_size < (aligner.work / "training" / "checkpoint_last.pt").stat().st_size / 3


def test_spliced_sources_join_the_calibration_set(aligner):
    """They come after the corpus's own, and the large model translates them like any others."""
    aligner.break_off = lambda step, count: step == "train"
    with pytest.raises(KeyboardInterrupt):
        aligner()
    plain = aligner.calibration_set()
    aligner.work = aligner.folder / "spliced"
    with pytest.raises(KeyboardInterrupt):
        aligner("--splice", 40)
    assert aligner.started == ["part"] * 4
    rows = aligner.calibration_set()
    assert rows[: len(plain)] == plain
    sources = {tuple(source) for source, _ in plain}
    more = [tuple(source) for source, _ in rows[len(plain) :]]
    assert 30 < len(more) <= 40 and sources.isdisjoint(more)


def test_splices_join_where_two_tokens_are_the_same():
    rows = [torch.tensor(row) for row in ([5, 6, 7, 8, 2], [9, 6, 7, 10, 11, 2], [4, 2], [2])]
    made = [tuple(row.tolist()) for row in align.splices(rows, 10, longest=99, seed=1)]
    assert sorted(made) == [(5, 6, 7, 10, 11, 2), (9, 6, 7, 8, 2)]
    assert [tuple(row.tolist()) for row in align.splices(rows, 1, longest=99, seed=1)] == made[:1]
    assert [tuple(row.tolist()) for row in align.splices(rows, 10, longest=5, seed=1)] == [(9, 6, 7, 8, 2)]
    assert align.splices(rows[2:], 10, longest=99, seed=1) == []


def test_outputs_without_an_end_are_left_out(aligner):
    """With room for three words, longer outputs are cut; the end that fairseq puts there is nothing to learn."""
    aligner.break_off = lambda step, count: step == "train"
    with pytest.raises(KeyboardInterrupt):
        aligner("--max-len-b", 3)
    rows = aligner.calibration_set()
    assert 0 < len(rows) < 150
    assert max(len(target) for _, target in rows) == 3


def test_flags_after_the_dashes_win(aligner):
    with pytest.raises(BildError, match="fairseq-train: .*--no-such-flag"):
        aligner(train=["--no-such-flag"])
    aligner(train=["--lr-scheduler", "fixed", "--max-update", 3])
    log = (aligner.work / "training" / "train.log").read_text()
    assert "| num_updates 3 " in log


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("transformer", {}),
        ("transformer", {"encoder_layers": 2, "decoder_embed_dim": 64, "decoder_output_dim": 64}),
        ("transformer_iwslt_de_en", {"share_all_embeddings": True, "encoder_normalize_before": True}),
        (
            "transformer_wmt_en_de_big",
            {"activation_fn": "gelu", "decoder_learned_pos": True, "no_scale_embedding": True},
        ),
        ("bart_base", {"decoder_layers": 1, "max_target_positions": 512}),
    ],
)
def test_the_small_model_is_built_again_from_flags(arch, changes):
    """What fairseq-train makes of the flags has every option of the model."""
    config = Namespace(arch=arch, dropout=0.3, max_source_positions=1024, max_target_positions=1024, **{})
    vars(config).update(changes)
    ARCH_CONFIG_REGISTRY[arch](config)
    parsed = align.parse_train_flags(["data", "--task", "translation", *align.model_flags(config), "--dropout", "0"])
    align.check_model(parsed, config)
    for name, value in {**vars(config), "dropout": 0.0}.items():
        assert getattr(parsed, name) == value, name


def test_a_model_that_flags_cannot_build_is_refused():
    config = Namespace(arch="bart_base", share_all_embeddings=False)
    ARCH_CONFIG_REGISTRY["bart_base"](config)
    parsed = align.parse_train_flags(["data", "--task", "translation", *align.model_flags(config)])
    with pytest.raises(BildError, match="--share-all-embeddings False, which fairseq-train cannot be told"):
        align.check_model(parsed, config)
    with pytest.raises(BildError, match="its architecture is lstm"):
        align.model_flags(Namespace(arch="lstm"))


@pytest.mark.parametrize(
    ("options_", "message"),
    [
        (["--large", "missing.pt"], "--large missing.pt: no such file"),
        (["--small", "missing.pt"], "--small missing.pt: no such file"),
        (["--distill", 1.5], "--distill 1.5: give a number from 0 to 1"),
        (["--sample", 0], "--sample 0: give a number above 0"),
        (["--splice", -1], "--splice -1: give a number of sources"),
        (["--subset", "nothing"], "has no nothing; see --subset"),
        (["--reference", "missing.txt"], "--reference missing.txt: cannot read it"),
    ],
)
def test_bad_input_is_refused_before_the_work_starts(aligner, options_, message):
    with pytest.raises(BildError, match=message):
        aligner(*options_)
    assert aligner.started == [] and not aligner.work.exists()


def test_unfit_models_are_refused_before_the_work_starts(aligner, corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for language in "xy":
        (other / f"dict.{language}.txt").write_text("one 1\ntwo 1\n")
    strange = corpus.checkpoint(tmp_path / "strange" / "model.pt", corpus.task(other))
    for role, message in (("--small", "another source dictionary"), ("--large", "does not fit")):
        with pytest.raises(BildError, match=message):
            aligner(role, strange)
    text = tmp_path / "text.pt"
    text.write_text("nothing")
    with pytest.raises(BildError, match="cannot load this checkpoint"):
        aligner("--small", text)
    with pytest.raises(BildError, match="is one of the models that are read"):
        aligner("--out", corpus.small)
    empty = tmp_path / "empty"
    empty.mkdir()
    args = ["--large", str(corpus.large), "--small", str(corpus.small), "--out", str(aligner.out)]
    with pytest.raises(BildError, match="no binarized data of two languages"):
        align.Alignment(align.parse_args([str(empty), *args]))
    assert aligner.started == [] and not aligner.work.exists()


def test_a_failing_program_is_named_with_its_log(aligner, monkeypatch):
    monkeypatch.setattr(align, "USER_DIR", "/nowhere")
    with pytest.raises(BildError, match=r"fairseq-train ended with status .*train\.log"):
        aligner()
