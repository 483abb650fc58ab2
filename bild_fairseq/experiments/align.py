"""Prediction alignment: a small model is trained on what the large model writes (Kim et al., section 3.5).

The large model translates training and validation sources greedily; sources and translations are the calibration set;
the small model is trained on with it, and measured against what it was. All of it is kept in the work folder.
"""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import tasks
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from fairseq.tasks import FairseqTask

from ..decoding.policies import Policy
from ..errors import BildError
from ..plugin.checkpoints import load_large, load_small
from ..plugin.files import write_text
from ..plugin.light import write_light
from ..plugin.pair import Pair
from . import train_flags
from .align_options import AlignOptions
from .align_report import WHEN, agreement, figures
from .calibration_set import CalibrationSet, Limits, data_file, languages
from .data import load_subset, make_batches, make_task
from .files import file_digest
from .processes import run_program
from .scoring import Scorer
from .systems import Run, System, ours
from .timing import measure
from .work_folder import begin, locked

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


class Alignment:
    """The steps of an alignment; each is done once, and what is done is read back.

    Args:
        options: all that it is told.
        train: what runs fairseq-train.
        say: gets a line about each thing that is done.

    Raises:
        BildError: the data or a model cannot be used.
    """

    def __init__(self, options: AlignOptions, train: Train = fairseq_train, say: Say = print):
        self.options = options
        self._train, self._say = train, say
        options.try_outputs()
        self.task = make_task(options.data, options.source_lang, options.target_lang, options.truncate_source)
        for subset in (options.subset, options.valid_subset):
            load_subset(self.task, subset)
        self._training = options.work / "training"
        pair = self._pair(options.small)
        self._limits = limits_of(pair)
        self._small_config = load_checkpoint_to_cpu(str(options.small))["cfg"]["model"]
        self._calibration = CalibrationSet(
            options.work / "calibration", self.task, options, self._limits, self._load_large, say
        )
        self._train_flags()
        self._report_ids = self._sample(options.valid_subset, options.sentences)
        self._scorer = Scorer(self.task, options.valid_subset, self._report_ids, options.score)

    def run(self) -> dict[str, Any]:
        """All steps that are not done yet; returns the report.

        Raises:
            BildError: another run has the work folder, its content was made with other settings, or the training fails.
        """
        with locked(self.options.work, "--work"):
            self.calibrate()
            self.train()
            best = self._training / "checkpoint_best.pt"
            checkpoint = best if best.exists() else self._training / "checkpoint_last.pt"
            write_light([checkpoint], self.options.out, half=self.options.half, keep_folders=True)
            return self.measure()

    def calibrate(self) -> None:
        """Makes the calibration set: a data folder with the large model's outputs as targets."""
        options = self.options
        settings = {"--large": file_digest(options.large), "DATA-BIN": self._sources_digest()}
        names = ["subset", "sample", "splice", "valid_subset", "valid_sample", "truncate_source", "part", "seed"]
        names += ["max_len_a", "max_len_b", "min_len", "no_repeat_ngram_size"]
        begin(self._calibration.folder, settings | options.flags(*names))
        self._calibration.make(
            {
                "valid": self._sample(options.valid_subset, options.valid_sample),
                "train": self._sample(options.subset, options.sample),
            }
        )

    def train(self) -> None:
        """Trains the small model on with the calibration set; goes on from its last epoch."""
        options = self.options
        calibration = [data_file(self._calibration.data, self.task, "train", side) for side in languages(self.task)]
        settings = {"--small": file_digest(options.small), "calibration set": digest(*map(binary, calibration))}
        settings |= options.flags("distill", "distill_top", "epochs", "lr", "max_tokens", "dropout", "seed")
        begin(self._training, settings | {"flags after --": " ".join(options.train_flags)})
        done = self._training / "done"
        if done.exists():
            return
        flags = self._train_flags()
        status = self._train([*flags, *self._flags_for_data(flags)], self._say)
        if status:
            raise BildError(f"fairseq-train ended with status {status}; its log is {self._training / 'train.log'}")
        done.touch()

    def _flags_for_data(self, flags: Sequence[str]) -> list[str]:
        """The flags of fairseq-train that depend on the sentences of the calibration set: schedule and limits."""
        parsed = train_flags.parse(flags)
        plan = train_flags.plan(task_like(self.task, self._calibration.data), parsed)
        if plan.left_out:
            too_long = f"{plan.left_out} sentences have more than --max-tokens {parsed.max_tokens} tokens"
            self._say(f"calibration set: {too_long}; fairseq-train leaves them out")
        more: list[str] = []
        if parsed.max_tokens_valid is not None and plan.longest_valid > parsed.max_tokens_valid:
            more += ["--max-tokens-valid", str(plan.longest_valid)]
        if "--lr-scheduler" not in self.options.train_flags:
            more += ["--lr-scheduler", "polynomial_decay", "--total-num-update", str(plan.updates)]
            more += ["--warmup-updates", str(max(1, plan.updates // 20))]
        return more

    def measure(self) -> dict[str, Any]:
        """Agreement, rates and speed with the small model before and after; a report that is there is read back."""
        options = self.options
        names = ["sentences", "batch_size", "fallback", "rollback", "max_draft", "verify_end", "lossless_fallback"]
        settings = {"large": digest(options.large), "small": digest(options.small), "aligned": digest(options.out)}
        settings |= {name: getattr(options, name) for name in names}
        settings |= {name: getattr(options.score, name) for name in ("metric", "bpe", "reference")}
        settings |= {"cuda": options.cuda, "data": self._sources_digest(), "seed": options.seed}
        settings |= {"threads": torch.get_num_threads()}
        if options.report.exists():
            report = json.loads(options.report.read_text(encoding="utf-8"))
            if report.get("settings") == settings:
                return report
        self._say("measuring the small model before and after")
        report = {"settings": settings} | self._compare()
        options.report.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.report, json.dumps(report, indent=1) + "\n")
        return report

    def _compare(self) -> dict[str, Any]:
        """The small model before and after; see :func:`align_report.figures`."""
        options, task = self.options, self.task
        before = self._pair(options.small)
        after = Pair(before.large, load_small([str(options.out)], task, before.large[0]))
        pairs = dict(zip(WHEN, (before, after), strict=True))
        outputs = task_like(task, self._calibration.data)
        outputs.load_dataset("valid")
        agreements = {
            name: agreement(pair.small[0], outputs.dataset("valid"), options.cuda) for name, pair in pairs.items()
        }
        policies = {
            "bild": Policy(options.fallback, options.rollback, options.max_draft, verify_end=options.verify_end),
            "lossless": Policy(options.lossless_fallback, 0.0, options.max_draft, verify_end=True),
        }
        greedy = self._system("greedy", before.greedy())
        systems = {
            (setting, name): self._system(f"{setting} {name}", pair, policy)
            for setting, policy in policies.items()
            for name, pair in pairs.items()
        }
        dataset = task.dataset(options.valid_subset)
        batches = make_batches(dataset, self._report_ids, options.batch_size, cuda=options.cuda)
        measure([greedy, *systems.values()], batches, cuda=options.cuda, warmup=2)
        return figures(greedy, systems, agreements, self._scorer)

    def _pair(self, small: Path) -> Pair:
        """The large model with a small one, which may read fewer tokens: longer sources are left out."""
        large = load_large([str(self.options.large)], self.task, cuda=self.options.cuda)
        return Pair(large, load_small([str(small)], self.task, large[0]))

    def _load_large(self) -> Run:
        pair = Pair.load(str(self.options.large), task=self.task, alone=True, cuda=self.options.cuda)
        return self._system("greedy", pair).run

    def _system(self, name: str, pair: Pair, policy: Policy | None = None) -> System:
        return ours(name, pair, self.task, self.options.search, policy)

    def _train_flags(self) -> list[str]:
        """The flags of fairseq-train, but for a schedule that depends on the number of batches."""
        options = self.options
        flags = [
            *(self._calibration.data, "--task", "translation", "-s", languages(self.task)[0]),
            *("-t", languages(self.task)[1], *train_flags.model_flags(self._small_config)),
            *("--finetune-from-model", options.small, "--save-dir", self._training, "--no-epoch-checkpoints"),
            *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", 1.0, "--lr", options.lr),
            *("--dropout", options.dropout, "--max-tokens", options.max_tokens, "--max-epoch", options.epochs),
            *("--seed", options.seed, "--required-batch-size-multiple", 1, "--log-format", "simple"),
            # The target is the large model's own choice, so accuracy is agreement.
            *("--best-checkpoint-metric", "accuracy", "--maximize-best-checkpoint-metric"),
            *("--log-file", self._training / "train.log"),
        ]
        if options.distill:
            flags += ["--criterion", "word_distillation_cross_entropy"]
            flags += ["--teacher-path", options.large, "--teacher-weight", options.distill]
            flags += ["--teacher-top", options.distill_top]
        else:
            flags += ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0, "--report-accuracy"]
        flags = [*map(str, flags), *["--cpu"] * options.cpu, *options.train_flags]
        train_flags.check_model(train_flags.parse(flags), self._small_config)
        return flags

    def _sample(self, subset: str, count: int | None) -> list[int]:
        """Sentences that both models can read, in order: all of them, or ``count`` drawn at random."""
        sizes = self.task.dataset(subset).src_sizes
        ids = [i for i, size in enumerate(sizes) if size <= self._limits.source]
        if not ids:
            raise BildError(f"{subset}: no source has {self._limits.source} tokens or less; give --truncate-source")
        if count is None or count >= len(ids):
            return ids
        return sorted(random.Random(self.options.seed).sample(ids, count))

    def _sources_digest(self) -> str:
        source = languages(self.task)[0]
        found = []
        for subset in (self.options.subset, self.options.valid_subset):
            found += self.options.data.glob(f"{subset}.*-*.{source}.bin")
        return digest(*sorted(found))


def limits_of(pair: Pair) -> Limits:
    """What both models of a pair can read, and the small one can be trained on."""
    (large,), (small,) = pair.large, pair.small
    return Limits(
        min(model.max_positions()[0] for model in (large, small)),
        # A text of the large model's greatest length would leave no room for its end symbol.
        min(large.max_positions()[1] - 1, small.max_positions()[1]),
    )


def task_like(task: FairseqTask, data: Path) -> FairseqTask:
    """The same task with another data folder."""
    config = copy.deepcopy(task.cfg)
    config.data = str(data)
    return tasks.setup_task(config)


def binary(prefix: Path) -> Path:
    """The file with the tokens of one side of a subset."""
    return Path(f"{prefix}.bin")


def digest(*paths: Path) -> str:
    """Tells files of other contents apart."""
    return "+".join(map(file_digest, paths))
