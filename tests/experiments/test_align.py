"""Alignment on a tiny task: from two models to an aligned one, interrupted and resumed, and what it must refuse.

Training runs as in use, but forked from a warm interpreter (see cli_support), which is quicker. Most tests begin with
the calibration set of the first one.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Corpus
from fairseq import checkpoint_utils
from fairseq.data import indexed_dataset
from fairseq.sequence_generator import SequenceGenerator
from script_support import refused, run_script

from bild_fairseq.errors import BildError
from bild_fairseq.experiments.align import Alignment
from bild_fairseq.experiments.align_options import AlignOptions
from bild_fairseq.plugin.generator import SearchOptions

SHORT = {"sample": 150, "part": 100, "valid_sample": 15, "epochs": 2, "lr": 0.005, "max_tokens": 300, "sentences": 6}
# Long enough to learn something whatever the rounding of a machine's sums.
LEARNS = {"epochs": 10, "distill": 0.5, "distill_top": 5, "half": True}


class Aligner:
    """Aligns the corpus's models in a folder, and keeps what was said and how often a training was started."""

    def __init__(self, corpus: Corpus, folder: Path):
        self.corpus, self.folder = corpus, folder
        self.out, self.work = folder / "aligned.pt", folder / "work"
        self.said: list[str] = []
        self.trainings = 0
        self.interrupt_training = self.kill_training = False  # before it starts, and after one epoch

    def __call__(self, **changes: Any) -> dict[str, Any]:
        """With short settings unless ``changes`` name others; returns the report."""
        self.said, self.trainings = [], 0
        models = {"large": self.corpus.large, "small": self.corpus.small, "out": self.out, "work": self.work}
        settings = {"data": self.corpus.data, "cpu": True, "search": SearchOptions(max_len_b=12), **SHORT, **models}
        flags = ("--num-workers", "0", *changes.pop("train_flags", ()))
        options = AlignOptions(**{**settings, **changes}, train_flags=flags)
        return Alignment(options, train=self._train, say=self.said.append).run()

    def _train(self, flags: Sequence[str]) -> int:
        if self.interrupt_training:
            raise KeyboardInterrupt
        self.trainings += 1
        if self.kill_training:
            self.corpus.programs("train", *flags, "--max-epoch", 1)
            return -9
        return self.corpus.programs("train", *flags, status=None).status

    def train_log(self) -> str:
        return (self.work / "training" / "train.log").read_text()


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory) -> tuple[Aligner, dict[str, Any]]:
    """An alignment that is done, and its report."""
    aligner = Aligner(corpus, tmp_path_factory.mktemp("done"))
    return aligner, aligner(**LEARNS)


@pytest.fixture
def aligner(corpus, done, tmp_path) -> Aligner:
    """One whose calibration set is there."""
    shutil.copytree(done[0].work / "calibration", tmp_path / "work" / "calibration")
    return Aligner(corpus, tmp_path)


@pytest.fixture
def fresh(corpus, tmp_path) -> Aligner:
    """One that has done nothing yet."""
    return Aligner(corpus, tmp_path)


def calibration_set(aligner: Aligner, subset: str) -> list[tuple[list[int], list[int]]]:
    sides = (str(aligner.work / "calibration" / "data-bin" / f"{subset}.x-y.{side}") for side in "xy")
    rows = (map(torch.Tensor.tolist, indexed_dataset.MMapIndexedDataset(path)) for path in sides)
    return list(zip(*rows, strict=True))


def test_the_calibration_set_is_what_fairseq_writes_greedily(done, corpus):
    task = corpus.task()
    models, _ = checkpoint_utils.load_model_ensemble([str(corpus.large)], task=task)
    fairseq = SequenceGenerator(models, task.target_dictionary, beam_size=1, max_len_b=12)
    for split, count in (("train", 150), ("valid", 15)):
        rows = calibration_set(done[0], split)
        assert 0.9 * count <= len(rows) <= count  # without those that the length limit has cut
        for source, target in rows:
            net_input = {"src_tokens": torch.tensor([source]), "src_lengths": torch.tensor([len(source)])}
            ((hypothesis,),) = fairseq.generate(models, {"net_input": net_input})
            assert hypothesis["tokens"].tolist() == target
            assert source[-1] == target[-1] == task.target_dictionary.eos()


def test_the_small_model_learns_to_agree(done, corpus):
    aligner, report = done
    assert aligner.trainings == 1
    assert report["agreement"]["after"] > report["agreement"]["before"] + 0.05
    for name in ("before", "after"):
        assert report["lossless"][name]["differ_from_greedy"] == 0
        assert report["bild"][name]["speedup_over_greedy"][0] > 0
    assert json.loads((aligner.folder / "aligned.json").read_text()) == report
    assert "| teacher_kl " in aligner.train_log()
    # The learning rate falls to 0 with the last update: all updates were counted before the training.
    assert re.findall(r"\| num_updates \d+ \| lr (\S+) ", aligner.train_log())[-1] == "0"


def test_the_aligned_model_is_a_light_checkpoint_that_fairseq_reads(done, corpus):
    aligner, _ = done
    state = torch.load(aligner.out, weights_only=True)
    assert state["last_optimizer_state"] is None
    names = torch.load(corpus.small, weights_only=False)["model"].keys()
    trained = aligner.work / "training" / "checkpoint_last.pt"
    assert state["model"].keys() == torch.load(trained, weights_only=False)["model"].keys() == names
    assert {weight.dtype for weight in state["model"].values() if weight.is_floating_point()} == {torch.float16}
    assert aligner.out.stat().st_size < trained.stat().st_size / 3
    lossless = ["--bild-small-path", aligner.out, "--bild-rollback-threshold", 0, "--bild-verify-end"]
    run = corpus.generate("--generator", "bild", *lossless, "--gen-subset", "valid")
    words = corpus.task().target_dictionary
    wanted = {words.string(torch.tensor(target)) for _, target in calibration_set(aligner, "valid")}
    assert wanted <= set(run.texts().values())


def test_done_is_done(done, corpus):
    """The same command starts nothing and measures nothing anew; the script prints the figures."""
    aligner, report = done
    assert aligner(**LEARNS) == report
    assert aligner.trainings == 0 and aligner.said == []
    settings = {**SHORT, **LEARNS, "half": None, "max-len-b": 12}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value]
    words += ["--cpu", "--half", "--large", corpus.large, "--small", corpus.small, "--out", aligner.out]
    words += ["--work", aligner.work, "--", "--num-workers", 0]
    run = run_script(corpus, "align", corpus.data, *words)
    agreement = [f"{report['agreement'][when]:.1%}" for when in ("before", "after")]
    assert run.out.splitlines()[1].split()[-2:] == agreement
    assert run.err.splitlines()[-1] == f"written: {aligner.out}, {aligner.folder / 'aligned.json'}"
    assert "measuring" not in run.err


def test_a_killed_training_goes_on_from_its_last_epoch(aligner):
    aligner.kill_training = True
    with pytest.raises(BildError, match=r"fairseq-train ended with status -9; its log is .*train\.log"):
        aligner()
    assert not aligner.out.exists()
    aligner.kill_training = False
    report = aligner()
    assert aligner.trainings == 1 and "teacher" not in aligner.train_log()
    assert aligner.train_log().count("end of epoch 1 ") == aligner.train_log().count("end of epoch 2 ") == 1
    assert report["agreement"]["after"] > report["agreement"]["before"]


def test_changed_settings_are_noticed(aligner, corpus):
    aligner.interrupt_training = True
    with pytest.raises(KeyboardInterrupt):
        aligner()
    for changes, message in (
        ({"sample": 140}, "calibration was made with --sample 150, not 140: remove it"),
        ({"search": SearchOptions(max_len_b=13)}, "calibration was made with --max-len-b 12, not 13"),
        ({"large": corpus.large_halfway}, "calibration was made with --large"),
        ({"lr": 0.1}, "training was made with --lr 0.005, not 0.1: remove it"),
        ({"small": corpus.small_halfway}, "training was made with --small"),
    ):
        with pytest.raises(BildError, match=message):
            aligner(**changes)


def test_flags_after_the_dashes_win(aligner):
    aligner(train_flags=["--lr-scheduler", "fixed", "--max-update", "3"])
    assert "| num_updates 3 " in aligner.train_log()
    with pytest.raises(BildError, match="training was made with flags after -- "):
        aligner(train_flags=["--max-update", "3"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"large": Path("missing.pt")}, "--large missing.pt: no such file"),
        ({"small": Path("missing.pt")}, "--small missing.pt: no such file"),
        ({"data": Path("missing")}, "missing: no such folder"),
        ({"distill": 1.5}, "--distill 1.5: give a number from 0 to 1"),
        ({"sample": 0}, "--sample 0: give a number above 0"),
        ({"splice": -1}, "--splice -1: give a number of sources"),
        ({"subset": "nothing"}, "cannot load nothing"),
        ({"train_flags": ["--no-such-flag"]}, "fairseq-train: .*--no-such-flag"),
    ],
)
def test_bad_input_is_refused_before_the_work_starts(fresh, changes, message):
    with pytest.raises(BildError, match=message):
        fresh(**changes)
    assert fresh.said == [] and not fresh.work.exists()


def test_unfit_models_are_refused_before_the_work_starts(fresh, corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for language in "xy":
        (other / f"dict.{language}.txt").write_text("one 1\ntwo 1\n")
    strange = corpus.checkpoint(tmp_path / "strange" / "model.pt", corpus.task(other))
    text = tmp_path / "text.pt"
    text.write_text("nothing")
    (tmp_path / "empty").mkdir()
    for changes, message in (
        ({"small": strange}, "another source dictionary"),
        ({"large": strange}, "another source dictionary"),
        ({"small": text}, "it is damaged, or no checkpoint at all"),
        ({"out": corpus.small}, "is one of the models that are read"),
        ({"data": tmp_path / "empty"}, "no binarized data of two languages"),
    ):
        with pytest.raises(BildError, match=message):
            fresh(**changes)
    assert fresh.said == [] and not fresh.work.exists()


def test_the_script_refuses_in_one_line(corpus, tmp_path):
    models = ["--large", corpus.large, "--small", corpus.small, "--out", tmp_path / "out.pt"]
    assert "--reference missing.txt: cannot read it" in refused(
        corpus, "align", corpus.data, *models, "--cpu", "--reference", "missing.txt"
    )
