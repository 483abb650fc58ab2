"""A tiny translation task, models trained on it, and fairseq's programs, for tests of the command line."""

import itertools
import os
import random
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fork_server
import pytest
import torch
from fairseq import tasks
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.tasks import FairseqTask

import bild_fairseq

USER_DIR = bild_fairseq.__path__[0]


@dataclass
class Run:
    """What a program left behind."""

    status: int
    out: str
    err: str

    def fields(self, kind: str) -> dict[int, list[str]]:
        """The lines ``<kind>-<number>\\t...`` as number -> the rest, split at tabs; each number occurs once."""
        found: dict[int, list[str]] = {}
        for line in self.out.splitlines():
            head, *rest = line.split("\t")
            if head.startswith(f"{kind}-") and head[2:].isdigit():
                assert int(head[2:]) not in found, f"{head} is printed twice"
                found[int(head[2:])] = rest
        return found

    def texts(self) -> dict[int, str]:
        """Hypotheses as sentence number -> words."""
        return {number: text for number, (_, text) in self.fields("H").items()}

    def scores(self) -> dict[int, float]:
        return {number: float(score) for number, (score, _) in self.fields("H").items()}

    def positional_scores(self) -> dict[int, list[float]]:
        return {number: [float(score) for score in line.split()] for number, (line,) in self.fields("P").items()}

    def error(self) -> str:
        """The one line that a refused command ends with, once it is certain that there was one and no more."""
        assert self.status != 0
        assert "Traceback" not in self.out + self.err, self.err
        assert not self.fields("H"), "sentences were translated before the error"
        lines = self.err.splitlines()
        messages = [line for line in lines if line.startswith("bild_fairseq:")]
        assert messages and messages == lines[-1:], self.err[-2000:]
        return messages[0]


def assert_same_hypotheses(run: Run, stock: Run) -> None:
    """The same words, and the same scores as far as four decimals show them."""
    assert run.texts() == stock.texts()
    assert run.scores() == pytest.approx(stock.scores(), abs=1e-4)
    positional, wanted = run.positional_scores(), stock.positional_scores()
    assert positional.keys() == wanted.keys()
    for number, scores in wanted.items():
        # Printed with four decimals: the last one may be rounded the other way.
        assert positional[number] == pytest.approx(scores, abs=1.5e-4), number


class Programs:
    """Runs fairseq's programs and Python code, without the wait for their imports (see ``fork_server``)."""

    def __init__(self, folder: Path, address: str):
        """With a folder for streams and the address of a server; ``interpreter`` is what stands in for Python."""
        self._folder, self._address = folder, address
        self._numbers = itertools.count()
        self.interpreter = self.bin(folder / "bin") / "python"

    def __call__(
        self,
        program: str,
        *arguments: object,
        text: str = "",
        status: int | None = 0,
        environment: Mapping[str, str] | None = None,
    ) -> Run:
        """Runs ``fairseq-<program>``.

        Args:
            program: ``generate``, ``interactive``, ``train``, ``preprocess``; ``python``, whose first argument is code
                and whose other ones become ``sys.argv``; or ``script``, whose first argument is a Python file.
            arguments: of the command line; anything with a ``str``.
            text: standard input.
            status: the exit status that is asserted; None for any.
            environment: variables to set.
        """
        words = [str(argument) for argument in arguments]
        if program == "script":
            program = "python"
        elif program == "python":
            words = ["-c", f"import sys; sys.argv.pop(0)\n{words[0]}", *words[1:]]
        else:
            program = f"fairseq-{program}"
        paths = [self._folder / f"{next(self._numbers)}.{name}" for name in ("in", "out", "err")]
        paths[0].write_text(text)
        with paths[0].open() as read, paths[1].open("w") as out, paths[2].open("w") as err:
            streams = {number: stream.fileno() for number, stream in enumerate((read, out, err))}
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
            ended = fork_server.request(self._address, [program, *words], variables, streams, str(self.interpreter))
        run = Run(ended, *(path.read_text() for path in paths[1:]))
        assert status is None or ended == status, f"{program} {words}\n{run.out[-2000:]}\n{run.err[-2000:]}"
        return run

    def bin(self, folder: Path) -> Path:
        """Writes ``python`` and ``fairseq-...`` that run in the same way, for shells with the folder in their PATH."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (
            "python",
            *(f"fairseq-{program}" for program in ("generate", "interactive", "preprocess", "train")),
        ):
            words = [sys.executable, "-SE", fork_server.__file__, self._address, str(folder / "python"), name]
            (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            (folder / name).chmod(0o755)
        return folder


# Stock fairseq opens its own checkpoints with torch 2.6 and later only like this.
STOCK = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
POSITIONS = 40  # of the large model, on both sides, end symbol included
SENTENCES = 37  # far from a multiple of any batch size
WORDS = ["a", "b", "c", "d@@", "e", "f", "g", "h"]


def _translate(word: str) -> str:
    """Upper case, except that two words have the same translation: the dictionaries differ in size."""
    return "G" if word == "h" else word.upper()


def _write_text(folder: Path) -> None:
    dice = random.Random(4)
    for split, count in (("train", 400), ("valid", 20), ("test", SENTENCES)):
        lines = [dice.choices(WORDS, k=1 + i % 8) for i in range(count)]
        if split == "test":
            lines[3][1] = lines[20][0] = "unseen"
        for language, convert in (("x", str), ("y", _translate)):
            text = "".join(" ".join(map(convert, line)) + "\n" for line in lines)
            (folder / f"{split}.{language}").write_text(text)


@dataclass(frozen=True)
class Corpus:
    """A tiny task with trained models; its test sentences have 1 to 8 words, two of them unknown."""

    programs: Programs
    data: Path
    large: Path
    large_halfway: Path  # the same training, stopped earlier
    small: Path
    small_halfway: Path

    def generate(self, *options: object, **kwargs: object) -> Run:
        """``fairseq-generate`` with the plugin."""
        return self.programs("generate", *self.arguments(*options), "--user-dir", USER_DIR, **kwargs)

    def interactive(self, *options: object, **kwargs: object) -> Run:
        """``fairseq-interactive`` with the plugin."""
        return self.programs("interactive", *self.arguments(*options), "--user-dir", USER_DIR, **kwargs)

    def stock(self, *options: object, program: str = "generate", **kwargs: object) -> Run:
        """A program without the plugin; greedy, and without losing sentences."""
        greedy = ["--required-batch-size-multiple", 1, "--beam", 1]
        return self.programs(program, *self.arguments(*greedy, *options), environment=STOCK, **kwargs)

    def arguments(self, *options: object) -> list[str]:
        """The data, the large model and a length limit unless the options name others, and the options."""
        defaults = [] if "--path" in options else ["--path", self.large]
        if "--max-len-b" not in options:
            defaults += ["--max-len-b", 12]
        # A run without a worker process and a progress bar is shorter, and no different.
        defaults += ["--num-workers", 0, "--no-progress-bar", "-s", "x", "-t", "y"]
        return [str(option) for option in (self.data, *defaults, *options)]

    def bild(self, *options: object) -> list[object]:
        return ["--generator", "bild", "--bild-small-path", self.small, *options]

    def lossless(self, *options: object) -> list[object]:
        return self.bild("--bild-rollback-threshold", 0, "--bild-verify-end", *options)

    def task(self, data: Path | None = None, **options: object) -> FairseqTask:
        """The translation task that the programs set up."""
        options = {"source_lang": "x", "target_lang": "y", "left_pad_source": True, **options}
        return tasks.setup_task(Namespace(task="translation", data=str(data or self.data), **options))

    def checkpoint(self, path: Path, task: FairseqTask | None = None, **changes: object) -> Path:
        """Writes the checkpoint of a model like the small one, but with other options and weights at random.

        Args:
            path: file to write.
            task: whose dictionaries the model has; this corpus's unless given.
            changes: options of the model, ``arch`` among them.
        """
        state = torch.load(self.small, weights_only=False)
        options = {**vars(state["cfg"]["model"]), **changes}
        if "arch" in changes:
            options["_name"] = changes["arch"]
        args = Namespace(**options)
        ARCH_CONFIG_REGISTRY[args.arch](args)
        state["cfg"]["model"] = args
        state["model"] = (task or self.task()).build_model(args).state_dict()
        return save(path, state)


def save(path: Path, state: object) -> Path:
    """``torch.save`` that makes the folder and returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def joined(paths: Iterable[Path]) -> str:
    """Checkpoints of an ensemble as the command line takes them."""
    return os.pathsep.join(map(str, paths))


def _train(programs: Programs, data: Path, folder: Path, updates: int, *options: object) -> None:
    """Trains with the plugin loaded; saves a checkpoint halfway and one at the end."""
    size = [("--embed-dim", 32), ("--ffn-embed-dim", 48), ("--attention-heads", 2)]
    programs(
        "train",
        *(data, "--user-dir", USER_DIR, "--save-dir", folder, "--cpu", "-s", "x", "-t", "y"),
        *("--arch", "transformer_tiny", "--encoder-layers", 1, "--share-decoder-input-output-embed", *options),
        *(part for name, value in size for side in ("encoder", "decoder") for part in (f"--{side}{name[1:]}", value)),
        *("--optimizer", "adam", "--lr", 0.005, "--batch-size", 32, "--dropout", 0, "--num-workers", 0),
        *("--max-update", updates, "--save-interval-updates", updates // 2, "--no-epoch-checkpoints"),
        *("--save-interval", updates, "--validate-interval", updates),  # counted in epochs: only at the end
        *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1, "--log-format", "none"),
    )


def corpus_in(folder: Path, programs: Programs) -> Corpus:
    """The corpus in a folder, made there if there is none."""
    if not (folder / "complete").exists():
        folder.mkdir()
        _make_corpus(folder, programs)
        (folder / "complete").touch()
    trained = []
    for name in ("large", "small"):
        halfway = min((folder / name).glob("checkpoint_*_*.pt"), key=lambda path: int(path.stem.split("_")[-1]))
        trained += [folder / name / "checkpoint_last.pt", halfway]
    return Corpus(programs, folder / "data", *trained)


def _make_corpus(folder: Path, programs: Programs) -> None:
    """Writes the text, preprocesses it, and trains both models at the same time."""
    _write_text(folder)
    data = folder / "data"
    splits = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    programs("preprocess", "-s", "x", "-t", "y", "--padding-factor", 1, "--destdir", data, *splits)
    # fairseq 0.12.2 alone cannot run a post-norm encoder over a padded batch with the torch of today.
    kind = [
        "--encoder-normalize-before",
        "--decoder-normalize-before",
        "--encoder-learned-pos",
        "--decoder-learned-pos",
    ]
    limits = ["--max-source-positions", POSITIONS, "--max-target-positions", POSITIONS]
    trainings = [
        ("large", 240, ["--decoder-layers", 2, *kind, *limits]),
        ("small", 100, ["--decoder-layers", 1, "--seed", 2]),
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda each: _train(programs, data, folder / each[0], each[1], *each[2]), trainings))
