"""One training of an alignment: a model is trained on with a calibration set, by fairseq-train."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fairseq.tasks import FairseqTask

from ..errors import BildError
from . import train_flags
from .align_options import AlignOptions
from .align_student import Student
from .calibration_set import CalibrationSet, languages, task_like
from .files import file_digest
from .processes import run_program
from .work_folder import begin

Say = Callable[[str], None]  # gets a line for the person at the terminal
Train = Callable[[Sequence[str], Say], int]  # runs fairseq-train with some flags, and returns its exit status


def fairseq_train(flags: Sequence[str], say: Say) -> int:
    """Runs fairseq-train, with this package loaded, as a program that ends with this one.

    Args:
        flags: without ``--user-dir``.
        say: gets its progress and warnings, a line each.

    Returns:
        its exit status.
    """
    # glibc would return the large arrays of every update to the system and have them zeroed anew for the next one.
    keep_memory = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    command = [sys.executable, "-m", f"{__package__}.train_program", str(os.getpid()), *flags]
    return run_program(command, say, keep_memory | os.environ)


class Training:
    """Trains what drafts; goes on from its last epoch, and does nothing once it is done.

    Args:
        options: of the alignment.
        task: of the data that the alignment began with.
        student: what is trained.
        folder: for the checkpoints and the log.
        calibration: what to train with.
        on_policy: both models have written the calibration set: ``--on-policy`` has the number of epochs, the learning
            rate is half of ``--lr``, and the large model's choice at each position is learned rather than the text.
        train: what runs fairseq-train.
        say: gets a line about each thing that is done.

    Raises:
        BildError: fairseq-train cannot train such a model, or not with these flags.
    """

    def __init__(
        self,
        options: AlignOptions,
        task: FairseqTask,
        student: Student,
        folder: Path,
        calibration: CalibrationSet,
        on_policy: bool,
        train: Train,
        say: Say,
    ):
        self.folder = folder
        self._options, self._task, self._calibration, self._on_policy = options, task, calibration, on_policy
        self._train, self._say = train, say
        self._student = student
        self._flags(options.small or options.large)

    @property
    def checkpoint(self) -> Path:
        """What came of it: the checkpoint that agrees most on validation text."""
        best = self.folder / "checkpoint_best.pt"
        return best if best.exists() else self.folder / "checkpoint_last.pt"

    def run(self, start: Path) -> None:
        """Trains on from a checkpoint.

        Raises:
            BildError: the folder's content was made with other settings, or the training fails.
        """
        options = self._options
        settings = {
            "--small" if options.small else "--large": file_digest(start),
            "calibration set": self._calibration.digest(),
        }
        names = ["distill", "distill_top", "on_policy" if self._on_policy else "epochs", "lr", "max_tokens", "dropout"]
        settings |= options.flags(*names, "seed")
        begin(self.folder, settings | {"flags after --": " ".join(options.train_flags)})
        done = self.folder / "done"
        if done.exists():
            return
        flags = self._flags(start)
        status = self._train([*flags, *self._flags_for_data(flags)], self._say)
        if status:
            raise BildError(f"fairseq-train ended with status {status}; its log is {self.folder / 'train.log'}")
        done.touch()

    def _flags_for_data(self, flags: Sequence[str]) -> list[str]:
        """The flags of fairseq-train that depend on the sentences of the calibration set: schedule and limits."""
        parsed = train_flags.parse(flags)
        plan = train_flags.plan(task_like(self._task, self._calibration.data), parsed)
        if plan.left_out:
            too_long = f"{plan.left_out} sentences have more than --max-tokens {parsed.max_tokens} tokens"
            self._say(f"calibration set: {too_long}; fairseq-train leaves them out")
        more: list[str] = []
        if parsed.max_tokens_valid is not None and plan.longest_valid > parsed.max_tokens_valid:
            more += ["--max-tokens-valid", str(plan.longest_valid)]
        if "--lr-scheduler" not in self._options.train_flags:
            more += ["--lr-scheduler", "polynomial_decay", "--total-num-update", str(plan.updates)]
            more += ["--warmup-updates", str(max(1, plan.updates // 20))]
        return more

    def _flags(self, start: Path) -> list[str]:
        """The flags of fairseq-train, but for a schedule that depends on the number of batches."""
        options = self._options
        epochs, lr = (options.on_policy, options.lr / 2) if self._on_policy else (options.epochs, options.lr)
        flags = [
            *(self._calibration.data, "--task", "translation", "-s", languages(self._task)[0]),
            *("-t", languages(self._task)[1], *train_flags.model_flags(self._student.config)),
            *("--finetune-from-model", start, "--save-dir", self.folder, "--no-epoch-checkpoints"),
            *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", 1.0, "--lr", lr),
            *("--dropout", options.dropout, "--max-tokens", options.max_tokens, "--max-epoch", epochs),
            *("--seed", options.seed, "--required-batch-size-multiple", 1, "--log-format", "simple"),
            *("--best-checkpoint-metric", self._student.greatest, "--maximize-best-checkpoint-metric"),
            *("--log-file", self.folder / "train.log", *self._student.criterion(self._on_policy)),
        ]
        flags = [*map(str, flags), *["--cpu"] * options.cpu, *options.train_flags]
        train_flags.check_model(train_flags.parse(flags), self._student.config)
        return flags
