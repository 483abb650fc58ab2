"""Calibration sets: sources, and what a model or a pair writes for them, as a data folder for fairseq-train."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fairseq import tasks, utils
from fairseq.data import LanguagePairDataset, ListDataset, indexed_dataset
from fairseq.tasks import FairseqTask
from torch import Tensor

from ..errors import BildError
from ..plugin.files import write_text
from .align_options import AlignOptions
from .files import file_digest
from .splice import splices
from .systems import Run
from .token_batches import token_batches

Example = tuple[Tensor, Tensor]  # a source and what is written for it, (length,) each, end symbol included


@dataclass(frozen=True)
class Limits:
    """What both models can read and the small one can be trained on, in tokens, end symbol included."""

    source: int
    target: int


class CalibrationSet:
    """Makes a calibration set, part by part; parts that are there are read back.

    Args:
        folder: for the parts and, once it is complete, the data folder.
        task: with both subsets loaded.
        options: of the alignment.
        limits: of sources and of what is written for them.
        writer: who writes, for messages.
        load_writer: makes what writes: for one of fairseq's batches the tokens of each sentence. Called at most once.
        say: gets a line about each thing that is done.
    """

    def __init__(
        self,
        folder: Path,
        task: FairseqTask,
        options: AlignOptions,
        limits: Limits,
        writer: str,
        load_writer: Callable[[], Run],
        say: Callable[[str], None],
    ):
        self.folder = folder
        self.data = folder / "data-bin"
        self._task, self._options, self._limits, self._say = task, options, limits, say
        self._name, self._writer = writer, functools.cache(load_writer)

    def make(self, sources: dict[str, Sequence[int]]) -> None:
        """Makes the data folder, unless it is there.

        Args:
            sources: for ``valid`` and ``train``, the subset's sentences whose sources are used.

        Raises:
            BildError: none of the outputs has an end.
        """
        if self.data.exists():
            return
        options, task = self._options, self._task
        subsets = {"valid": options.valid_subset, "train": options.subset}
        pairs = {name: self.translate(subset, task.dataset(subset), sources[name]) for name, subset in subsets.items()}
        if options.splice:
            old = [source for source, _ in pairs["train"]]
            spliced = splices(old, options.splice, self._limits.source, options.seed)
            self._say(f"{len(spliced)} more sources spliced from those of {options.subset}")
            dataset = LanguagePairDataset(ListDataset(spliced), list(map(len, spliced)), task.source_dictionary)
            pairs["train"] += self.translate("spliced", dataset, range(len(spliced)))
        self._write(pairs)

    def rewrite(self, other: CalibrationSet) -> None:
        """Makes the data folder, unless it is there: another set's training sources, written anew, and its validation.

        Raises:
            BildError: none of the outputs has an end.
        """
        if self.data.exists():
            return
        loaded = task_like(self._task, other.data)
        for name in ("train", "valid"):
            loaded.load_dataset(name)
        train, valid = loaded.dataset("train"), loaded.dataset("valid")
        pairs = {"train": self.translate("train", train, range(len(train)))}
        pairs["valid"] = [(valid.src[i], valid.tgt[i]) for i in range(len(valid))]
        self._write(pairs)

    def digest(self) -> str:
        """Tells its training sentences from others."""
        sides = (data_file(self.data, self._task, "train", side) for side in languages(self._task))
        return "+".join(file_digest(Path(f"{side}.bin")) for side in sides)

    def _write(self, pairs: dict[str, Sequence[Example]]) -> None:
        """Writes the data folder, all of it or nothing."""
        making = self.data.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        for language in languages(self._task):
            shutil.copy(self._options.data / f"dict.{language}.txt", making)
        for name, rows in pairs.items():
            self._write_subset(making, name, rows)
        os.replace(making, self.data)

    def translate(self, name: str, dataset: LanguagePairDataset, ids: Sequence[int]) -> list[Example]:
        """Sources of a dataset, and what is written for them.

        Args:
            name: of the parts' files.
            dataset: has the sources.
            ids: which of them.
        """
        if too_long := int((dataset.src_sizes > self._limits.source).sum()):
            self._say(f"{name}: {too_long} sources have more than {self._limits.source} tokens and are left out")
        size = self._options.part
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        rows: list[Example] = []
        for number, part in enumerate(parts):
            path = self.folder / "parts" / f"{name}-{number:05d}.json"
            if not path.exists():
                self._say(f"{self._name} writes {name}, part {number + 1} of {len(parts)}")
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(self._generate(dataset, part)))
            targets = json.loads(path.read_text(encoding="utf-8"))
            rows += zip([dataset.src[i] for i in part], map(torch.tensor, targets), strict=True)
        return rows

    def _generate(self, dataset: LanguagePairDataset, ids: Sequence[int]) -> list[list[int]]:
        """What is written for some sources: token numbers."""
        write = self._writer()
        outputs: dict[int, list[int]] = {}
        for group in token_batches(dataset, ids, self._options.generate_tokens):
            batch = dataset.collater([dataset[i] for i in group])
            batch = utils.move_to_cuda(batch) if self._options.cuda else batch
            outputs |= zip(batch["id"].tolist(), write(batch), strict=True)
        return [outputs[i] for i in ids]

    def _write_subset(self, folder: Path, name: str, rows: Sequence[Example]) -> None:
        kept = [(source, target) for source, target in rows if self._has_end(source, target)]
        if not kept:
            raise BildError(f"{self._name} ended none of the {len(rows)} {name} sentences; raise --max-len-b")
        for language, side in zip(languages(self._task), zip(*kept, strict=True), strict=True):
            write_tokens(data_file(folder, self._task, name, language), side)
        self._say(f"calibration set, {name}: {len(kept)} sentences, {len(rows) - len(kept)} without an end left out")

    def _has_end(self, source: Tensor, target: Tensor) -> bool:
        """False for an output that the length limit cut: its end is nobody's choice."""
        return len(target) <= self._options.search.longest(len(source), self._limits.target + 1)


def task_like(task: FairseqTask, data: Path) -> FairseqTask:
    """The same task with another data folder."""
    config = copy.deepcopy(task.cfg)
    config.data = str(data)
    return tasks.setup_task(config)


def languages(task: FairseqTask) -> tuple[str, str]:
    """A task's source and target language."""
    return task.cfg.source_lang, task.cfg.target_lang


def data_file(folder: Path, task: FairseqTask, subset: str, language: str) -> Path:
    """One side of a subset in a data folder, without suffix, as fairseq names it."""
    return folder / f"{subset}.{'-'.join(languages(task))}.{language}"


def write_tokens(prefix: Path, rows: Sequence[Tensor]) -> None:
    """Writes PREFIX.bin and PREFIX.idx, fairseq's indexed format, from token numbers with the end symbol."""
    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=None)
    for row in rows:
        builder.add_item(row)
    builder.finalize(f"{prefix}.idx")
