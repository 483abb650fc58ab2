"""Prediction alignment: a small model is trained on what the large model writes (Kim et al., section 3.5).

The large model translates training and validation sources greedily; sources and translations are the calibration set;
the small model is trained on with it, on request also with what both models write together (on-policy distillation:
Agarwal et al., ICLR 2024; DistillSpec: Zhou et al., ICLR 2024), and measured against what it was. All of it is kept in
the work folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..decoding.policies import Policy
from ..errors import BildError
from ..plugin.light import write_light
from ..plugin.pair import Pair
from .align_options import AlignOptions
from .align_report import WHEN, agreement, figures
from .align_student import student
from .align_training import Say, Train, Training, fairseq_train
from .calibration_set import CalibrationSet, Limits, languages, task_like
from .data import load_subset, make_batches, make_task
from .files import file_digest, write_output
from .scoring import Scorer
from .systems import Run, System, ours
from .timing import measure
from .type_counts import TypeCounts
from .work_folder import begin, locked


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
        self._student = student(options, self.task)
        self._limits = limits_of(self._untrained())
        self._calibration = self._calibration_set("calibration", "the large model", self._load_large)
        self._on_policy_set = self._calibration_set("on-policy", "the pair", self._load_trained)
        self._training = self._new_training("training", self._calibration)
        self._on_policy = self._new_training("training-on-policy", self._on_policy_set)
        self._report_ids = self._sample(options.valid_subset, options.sentences)
        self._scorer = Scorer(self.task, options.valid_subset, self._report_ids, options.score)

    def run(self) -> dict[str, Any]:
        """All steps that are not done yet; returns the report.

        Raises:
            BildError: another run has the work folder, its content was made with other settings, or the training fails.
        """
        with locked(self.options.work, "--work"):
            self.calibrate()
            checkpoint = self.train()
            if self.options.on_policy:
                checkpoint = self.train_on_policy(checkpoint)
            write_light([checkpoint], self.options.out, half=self.options.half, keep_folders=True)
            if self.options.draft_vocab:
                self.write_draft_vocabulary(self.options.draft_vocab)
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

    def train(self) -> Path:
        """Trains what drafts with the calibration set; returns the checkpoint."""
        self._training.run(self._student.start())
        return self._training.checkpoint

    def train_on_policy(self, trained: Path) -> Path:
        """Lets both models write the sources together, and trains the small one on with that; returns the checkpoint.

        Under BiLD the small model goes on after tokens of its own that the large one would not have written but lets
        stand. Text of the large model alone never shows it what the large model predicts there. Drafted tokens after
        a rejected one are no part of the text: whatever they are, a rollback removes them.

        Args:
            trained: the small model so far.
        """
        settings = {"the trained model": file_digest(trained), "calibration set": self._calibration.digest()}
        settings |= self.options.flags("fallback", "rollback", "max_draft", "verify_end", "part")
        begin(self._on_policy_set.folder, settings)
        self._on_policy_set.rewrite(self._calibration)
        self._on_policy.run(trained)
        return self._on_policy.checkpoint

    def write_draft_vocabulary(self, size: int) -> None:
        """Writes the file of the most frequent types of what the large model wrote for the training sources."""
        outputs = task_like(self.task, self._calibration.data)
        outputs.load_dataset("train")
        counts = TypeCounts(outputs.dataset("train").tgt, self.task.target_dictionary)
        write_output("--draft-vocab", self.options.vocabulary, counts.lines(size))
        self._say(f"{self.options.vocabulary}: {counts.describe(size)}")

    def measure(self) -> dict[str, Any]:
        """Agreement, rates and speed with the small model before and after; a report that is there is read back."""
        options = self.options
        names = ["sentences", "batch_size", "fallback", "rollback", "max_draft", "verify_end", "lossless_fallback"]
        start = self._student.start()
        settings = {"large": digest(options.large), "small": digest(start), "aligned": digest(options.out)}
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
        write_output("--report", options.report, json.dumps(report, indent=1) + "\n")
        return report

    def _compare(self) -> dict[str, Any]:
        """The small model before and after; see :func:`align_report.figures`."""
        options, task = self.options, self.task
        before, after = map(self._student.pair, (self._student.start(), options.out))
        pairs = dict(zip(WHEN, (before, after), strict=True))
        outputs = task_like(task, self._calibration.data)
        outputs.load_dataset("valid")
        agreements = {
            name: agreement(self._student.drafter(pair), outputs.dataset("valid"), options.cuda)
            for name, pair in pairs.items()
        }
        policies = {
            "bild": options.policy(),
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

    def _large(self) -> Pair:
        return Pair.load(str(self.options.large), task=self.task, alone=True, cuda=self.options.cuda)

    def _untrained(self) -> Pair:
        """All models that there are before anything is made."""
        return self._student.pair(self.options.small) if self.options.small else self._large()

    def _load_large(self) -> Run:
        return self._system("greedy", self._large()).run

    def _load_trained(self) -> Run:
        return self._system("bild", self._student.pair(self._training.checkpoint), self.options.policy()).run

    def _calibration_set(self, folder: str, writer: str, load_writer: Callable[[], Run]) -> CalibrationSet:
        path = self.options.work / folder
        return CalibrationSet(path, self.task, self.options, self._limits, writer, load_writer, self._say)

    def _new_training(self, folder: str, calibration: CalibrationSet) -> Training:
        on_policy, path = calibration is self._on_policy_set, self.options.work / folder
        return Training(self.options, self.task, self._student, path, calibration, on_policy, self._train, self._say)

    def _system(self, name: str, pair: Pair, policy: Policy | None = None) -> System:
        return ours(name, pair, self.task, self.options.search, policy)

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
    (large,) = pair.large
    return Limits(
        min(model.max_positions()[0] for model in (large, *pair.small)),
        # A text of the large model's greatest length would leave no room for its end symbol.
        min([large.max_positions()[1] - 1, *(model.max_positions()[1] for model in pair.small)]),
    )


def digest(*paths: Path) -> str:
    """Tells files of other contents apart."""
    return "+".join(map(file_digest, paths))
