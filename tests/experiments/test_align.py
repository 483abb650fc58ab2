"""Alignment on a tiny task: from two models to an aligned one, interrupted and resumed, and what it must refuse.

The first training runs as in use; the others are forked from a warm interpreter (see cli_support), which is quicker,
and begin with the calibration set of the first one.
"""

import json
import re
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import support
import torch
from cli_support import USER_DIR, Corpus
from fairseq import checkpoint_utils
from fairseq.data import indexed_dataset
from fairseq.sequence_generator import SequenceGenerator
from script_support import refused, run_script

from bild_fairseq.errors import BildError
from bild_fairseq.experiments.align import Alignment
from bild_fairseq.experiments.align_options import AlignOptions
from bild_fairseq.experiments.align_student import exit_weights
from bild_fairseq.experiments.align_training import Say, fairseq_train
from bild_fairseq.experiments.scoring import ScoreOptions
from bild_fairseq.experiments.work_folder import locked
from bild_fairseq.models import exit_model
from bild_fairseq.plugin.search import SearchOptions

SHORT = {"sample": 150, "part": 100, "valid_sample": 15, "epochs": 2, "lr": 0.005, "max_tokens": 300, "sentences": 6}
# Long enough to learn something whatever the rounding of a machine's sums.
LEARNS = {"epochs": 10, "distill": 0.5, "distill_top": 5, "half": True}
EXITS = {"small": None, "early_exit": "1", "epochs": 20, "lr": 0.03, "fallback": 0.1, "rollback": 4.0}
ON_POLICY = {"epochs": 10, "distill_top": 5, "fallback": 0.1, "rollback": 4.0}


class Aligner:
    """Aligns the corpus's models in a folder, and keeps what was said and how often a training was started."""

    def __init__(self, corpus: Corpus, folder: Path):
        self.corpus, self.folder = corpus, folder
        self.out, self.work = folder / "aligned.pt", folder / "work"
        self.said: list[str] = []
        self.lines: list[str] = []  # that were said by the first run
        self.trainings = 0
        self.interrupt_training = self.kill_training = False  # before it starts, and after one epoch
        self.as_in_use = False  # train with a new interpreter
        self.processes = 1  # of the training

    def __call__(self, **changes: Any) -> dict[str, Any]:
        """With short settings unless ``changes`` name others; returns the report."""
        self.said, self.trainings = [], 0
        models = {"large": self.corpus.large, "small": self.corpus.small, "out": self.out, "work": self.work}
        settings = {"data": self.corpus.data, "cpu": True, "search": SearchOptions(max_len_b=12), **SHORT, **models}
        flags = ("--num-workers", "0", *changes.pop("train_flags", ()))
        options = AlignOptions(**{**settings, **changes}, train_flags=flags)
        return Alignment(options, train=self._train, say=self.said.append).run()

    def _train(self, flags: Sequence[str], say: Say) -> int:
        if self.interrupt_training:
            raise KeyboardInterrupt
        self.trainings += 1
        if self.as_in_use:
            return fairseq_train(flags, say)
        more = ["--max-epoch", 1] if self.kill_training else []
        train = partial(self.corpus.programs, "train", *flags, *more, "--user-dir", USER_DIR)
        with ThreadPoolExecutor() as threads:
            ranks = [["--distributed-rank", rank] for rank in range(self.processes)]
            ends = list(threads.map(lambda rank: train(*rank).status, ranks if len(ranks) > 1 else [[]]))
        return -9 if self.kill_training else max(ends)

    def train_log(self, training: str = "training") -> str:
        return (self.work / training / "train.log").read_text()


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory) -> tuple[Aligner, dict[str, Any]]:
    """An alignment that is done, and its report."""
    aligner = Aligner(corpus, tmp_path_factory.mktemp("done"))
    aligner.as_in_use = True
    report = aligner(**LEARNS)
    aligner.lines = list(aligner.said)
    return aligner, report


@pytest.fixture
def aligner(corpus, done, tmp_path) -> Aligner:
    """One whose calibration set is there."""
    shutil.copytree(done[0].work / "calibration", tmp_path / "work" / "calibration")
    return Aligner(corpus, tmp_path)


@pytest.fixture
def fresh(corpus, tmp_path) -> Aligner:
    """One that has done nothing yet."""
    return Aligner(corpus, tmp_path)


def calibration_set(aligner: Aligner, subset: str, name: str = "calibration") -> list[tuple[list[int], list[int]]]:
    sides = (str(aligner.work / name / "data-bin" / f"{subset}.x-y.{side}") for side in "xy")
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


def test_the_small_model_learns_to_agree(done):
    aligner, report = done
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


def test_a_training_tells_how_it_gets_on_and_no_more(done):
    """Its log has all that fairseq says, the model and all options among it."""
    aligner, _ = done
    (before,) = (n for n, line in enumerate(aligner.lines) if line.startswith("calibration set, train: "))
    shown = aligner.lines[before + 1 : aligner.lines.index("measuring the small model before and after")]
    assert len([line for line in shown if " | train | epoch 0" in line]) == LEARNS["epochs"]
    assert len([line for line in shown if " | valid | epoch 0" in line]) == LEARNS["epochs"]
    assert len(shown) < 4 * LEARNS["epochs"]
    assert "TransformerModel" in aligner.train_log() and "TransformerModel" not in "".join(shown)


def test_the_draft_vocabulary_is_what_the_large_model_writes_most(done, corpus):
    """With all that it takes to draft a share of the tokens; nothing else is done again."""
    aligner, report = done
    assert aligner(**LEARNS, draft_vocab=5) == report and aligner.trainings == 0
    words = corpus.task().target_dictionary
    counts = Counter(token for _, target in calibration_set(aligner, "train") for token in target)
    total = sum(counts.values())
    always = sum(counts.pop(token, 0) for token in (words.eos(), words.unk()))
    lines = (aligner.folder / "aligned.vocab.txt").read_text().splitlines()
    symbols, numbers = zip(*(line.split(" ") for line in lines), strict=True)
    assert [int(number) for number in numbers] == sorted(counts.values(), reverse=True)[:5]
    assert [counts[words.index(symbol)] for symbol in symbols] == [int(number) for number in numbers]
    covered = (always + sum(map(int, numbers))) / total
    (said,) = aligner.said
    assert f"the 5 most frequent of {len(counts)} types" in said and f"{covered:.1%} of its tokens" in said
    assert 0 < covered < 1
    path = ["--bild-draft-vocab", aligner.folder / "aligned.vocab.txt"]
    corpus.generate(*corpus.bild("--bild-small-path", aligner.out, *path))


@pytest.fixture(scope="module")
def on_policy(corpus, done, tmp_path_factory) -> tuple[Aligner, dict[str, Any]]:
    """An alignment that goes on with what both models write together, and its report."""
    aligner = Aligner(corpus, tmp_path_factory.mktemp("on-policy"))
    shutil.copytree(done[0].work / "calibration", aligner.work / "calibration")
    return aligner, aligner(on_policy=3, **ON_POLICY)


def test_on_policy_text_is_what_both_models_write_together(on_policy, corpus):
    """The same sources with the text of a plain BiLD decoder; it is not all the large model's own."""
    aligner, _ = on_policy
    task = corpus.task()
    trained = aligner.work / "training" / "checkpoint_best.pt"
    large, small = (checkpoint_utils.load_model_ensemble([str(path)], task=task)[0] for path in (corpus.large, trained))
    rules = reference.Rules(fallback_threshold=0.1, rollback_threshold=4.0, max_len=12)
    first, second = (calibration_set(aligner, "train", name) for name in ("calibration", "on-policy"))
    ended = []
    for source, _ in first:
        for model in (*large, *small):
            model.eval()
        text = reference.bild(large, small, source, task.target_dictionary, rules).tokens
        ended += [(source, text)] if len(text) <= 12 else []
    assert second == ended != first
    assert calibration_set(aligner, "valid", "on-policy") == calibration_set(aligner, "valid")


def test_on_policy_training_goes_on_and_is_kept(on_policy):
    aligner, report = on_policy
    assert aligner.trainings == 2
    logs = [aligner.train_log(name) for name in ("training", "training-on-policy")]
    assert [len(re.findall("end of epoch", log)) for log in logs] == [10, 3]
    assert re.search("teacher_choice'?[:=] ?True", logs[1]) and not re.search("teacher_choice'?[:=] ?True", logs[0])
    trained, aligned = aligner.work / "training-on-policy" / "checkpoint_best.pt", torch.load(aligner.out)
    for name, weight in torch.load(trained, weights_only=False)["model"].items():
        torch.testing.assert_close(aligned["model"][name], weight)
    assert aligner(on_policy=3, **ON_POLICY) == report and aligner.said == [] and aligner.trainings == 0
    with pytest.raises(BildError, match="on-policy was made with --rollback 4.0, not 3.0"):
        aligner(on_policy=3, **{**ON_POLICY, "rollback": 3.0})


@pytest.fixture(scope="module")
def exits(corpus, done, tmp_path_factory) -> tuple[Aligner, dict[str, Any]]:
    """An alignment of an exit of the large model, and its report."""
    aligner = Aligner(corpus, tmp_path_factory.mktemp("exits"))
    aligner.work.mkdir()
    shutil.copytree(done[0].work / "calibration", aligner.work / "calibration")
    return aligner, aligner(**EXITS)


def test_an_exit_learns_to_agree_and_the_model_stays_as_it_is(exits, corpus):
    aligner, report = exits
    assert report["agreement"]["after"] > report["agreement"]["before"] + 0.02
    assert report["lossless"]["after"]["differ_from_greedy"] == 0
    trained, large = (torch.load(path, weights_only=False)["model"] for path in (aligner.out, corpus.large))
    assert {name for name in trained if name not in large and "exit_" not in name} == set()
    # fairseq 0.12.2 also stores a tensor that it has never written to, and copies of weights that it makes on loading.
    kept = [name for name in large if not name.endswith(("_float_tensor", "_weight", "_bias"))]
    assert all(torch.equal(trained[name], large[name]) for name in kept) and len(kept) > len(large) // 2
    assert aligner(**EXITS) == report and aligner.said == []


def test_exits_learn_what_they_write_together_with_the_model(exits, corpus):
    """Its text is that of a plain BiLD decoder whose small model is the exit as a model of its own."""
    aligner, _ = exits
    report = aligner(**EXITS, on_policy=2)
    assert aligner.trainings == 1 and report["lossless"]["after"]["differ_from_greedy"] == 0
    task = corpus.task()
    trained = aligner.work / "training" / "checkpoint_best.pt"
    (large,), _ = checkpoint_utils.load_model_ensemble([str(trained)], task=task)
    rules = reference.Rules(fallback_threshold=0.1, rollback_threshold=4.0, max_len=12)
    small = exit_model(large.eval(), 1)
    texts = [
        (source, reference.bild([large], [small], source, task.target_dictionary, rules).tokens)
        for source, _ in calibration_set(aligner, "train")
    ]
    assert calibration_set(aligner, "train", "on-policy") == [(s, text) for s, text in texts if len(text) <= 12]


def test_exits_of_an_early_exit_model_are_kept_or_left_out():
    """Heads of layers that are not named, and layers too many, are no part of the new model."""
    options = {"exit_layers": "1,2", "exit_own_layers": 2, "decoder_layers": 3}
    made = support.model(1, arch="early_exit_transformer", **options).state_dict()
    kept = exit_weights(made, [2], 1)
    exits = {name for name in kept if ".exit_" in name}
    assert exits == {name for name in made if ".exit_own_layers.2.0." in name} != set()
    assert {name for name in made if ".exit_" not in name} <= kept.keys()


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
    assert run.out.splitlines()[-2].startswith("Look at the tokens per large call (more is faster) and at BLEU")
    assert run.err.splitlines()[-1] == f"written: {aligner.out}, {aligner.folder / 'aligned.json'}"
    assert "measuring" not in run.err


def test_a_killed_training_goes_on_from_its_last_epoch(aligner):
    """With two processes, as on two GPUs: both begin with the small model, and both go on from what was saved."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    gloo = "--distributed-world-size 2 --distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp"
    flags = [*gloo.split(), "--distributed-init-method", f"tcp://localhost:{port}"]
    aligner.processes, aligner.kill_training = 2, True
    with pytest.raises(BildError, match=r"fairseq-train ended with status -9; its log is .*train\.log"):
        aligner(epochs=10, train_flags=flags)
    assert not aligner.out.exists()
    aligner.kill_training = False
    report = aligner(epochs=10, train_flags=flags)
    log = aligner.train_log()
    assert aligner.trainings == 1 and "teacher" not in log
    assert re.findall(r"end of epoch (\d+) ", log) == [str(epoch) for epoch in range(1, 11)]
    assert re.findall(r"\| num_updates \d+ \| lr (\S+) ", log)[-1] == "0", "updates of two processes were counted"
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
    """With few tokens a batch, too: longer sentences are no part of the training, but of the validation."""
    aligner(max_tokens=6, train_flags=["--lr-scheduler", "fixed", "--max-update", "3"])
    sizes = [max(len(source), len(target)) for source, target in calibration_set(aligner, "train")]
    too_long = sum(size > 6 for size in sizes)
    assert 0 < too_long < len(sizes) and max(map(len, sum(map(list, calibration_set(aligner, "valid")), []))) > 6
    said = f"{too_long} sentences have more than --max-tokens 6 tokens; fairseq-train leaves them out"
    assert f"calibration set: {said}" in aligner.said
    assert "| num_updates 3 " in aligner.train_log()
    with pytest.raises(BildError, match="training was made with flags after -- "):
        aligner(max_tokens=6, train_flags=["--max-update", "3"])


def test_sources_that_the_small_model_cannot_read_are_left_out(fresh, corpus, tmp_path):
    small = corpus.checkpoint(tmp_path / "short" / "model.pt", max_source_positions=6)
    fresh.interrupt_training = True
    with pytest.raises(KeyboardInterrupt):
        fresh(small=small)
    assert re.search("train: [1-9][0-9]* sources have more than 6 tokens and are left out", "\n".join(fresh.said))
    assert max(len(source) for source, _ in calibration_set(fresh, "train")) == 6


def test_a_model_of_which_only_the_exits_can_be_trained_is_no_small_model(fresh, corpus):
    exits = {
        "arch": "early_exit_transformer_tiny",
        "decoder_layers": 2,
        "exit_freeze_model": True,
        "exit_own_layers": 1,
    }
    small = corpus.checkpoint(fresh.folder / "exits.pt", **exits)
    with pytest.raises(BildError, match="only the exits of this model can be trained .* swapped"):
        fresh(small=small)
    assert fresh.said == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"large": Path("missing.pt")}, "--large missing.pt: no such file"),
        ({"small": Path("missing.pt")}, "--small missing.pt: no such file"),
        ({"data": Path("missing")}, "missing: no such folder"),
        ({"distill": 1.5}, "--distill 1.5: give a number from 0 to 1"),
        ({"sample": 0}, "--sample 0: give a number above 0"),
        ({"small": None}, "give --small, or --early-exit for exits of the large model"),
        ({"early_exit": "1"}, "--small and --early-exit both say what is trained; give one of them"),
        (
            {"small": None, "early_exit": "9"},
            "--exit-layers 9: with the model's --decoder-layers 2 the highest exit is 1",
        ),
        ({"large": Path(".")}, "--large .: that is a folder; name a file in it"),
        ({"small": None, "early_exit": "2,1"}, "--exit-layers 2,1: give decoder layers"),
        ({"small": None, "early_exit": "1", "distill_top": 4}, "--distill-top is for a small model"),
        ({"exit_own_layers": 1}, "--exit-own-layers are of exits: give --early-exit, too"),
        ({"small": None, "early_exit": "1", "exit_own_layers": -1}, "--exit-own-layers -1: give a number of layers"),
        ({"on_policy": -1}, "--on-policy -1: give a number of epochs"),
        ({"splice": -1}, "--splice -1: give a number of sources"),
        ({"subset": "nothing"}, "cannot load nothing"),
        ({"score": ScoreOptions(reference="missing.txt")}, "--reference missing.txt: cannot read it"),
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
        ({"out": corpus.small}, "would be written over .*, which is read"),
        ({"data": tmp_path / "empty"}, "no binarized data of two languages"),
    ):
        with pytest.raises(BildError, match=message):
            fresh(**changes)
    assert fresh.said == [] and not fresh.work.exists()


def test_files_to_write_are_tried_before_the_work_starts(fresh, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for changes, message in (
        ({"out": file / "aligned.pt"}, f"--out {file}: cannot write there"),
        ({"out": tmp_path}, f"--out {tmp_path}: cannot write there, that is a folder; name a file"),
        ({"report": tmp_path}, f"--report {tmp_path}: cannot write there, that is a folder"),
        ({"report": file / "report.json"}, f"--report {file}: cannot write there"),
        ({"work": file}, f"--work {file}: cannot write there"),
        ({"report": fresh.out}, f"--out {fresh.out}: --work and --report must have other names"),
    ):
        with pytest.raises(BildError, match=f"^{message}"):
            fresh(**changes)
    assert fresh.said == [] and list(tmp_path.iterdir()) == [file]


def test_one_run_at_a_time_in_a_work_folder(fresh):
    with locked(fresh.work, "--work"), pytest.raises(BildError, match="--work .*: another run is at work there"):
        fresh()
    assert fresh.said == []


def test_a_model_of_the_other_direction_is_refused(fresh):
    with pytest.raises(BildError, match="source language is x, this data's is y"):
        fresh(source_lang="y", target_lang="x")
    with pytest.raises(BildError, match="give both -s and -t"):
        fresh(source_lang="y")


def test_the_script_refuses_in_one_line(corpus, tmp_path):
    words = ["--large", corpus.large, "--small", corpus.small, "--out", tmp_path / "out.pt", "--epochs", 0]
    assert refused(corpus, "align", corpus.data, *words) == "align: --epochs 0: give a number above 0"
