#!/usr/bin/env python3
"""Aligns a small model with a large one: trains it on what the large model writes (Kim et al., NeurIPS 2023).

    python scripts/align.py DATA-BIN --large large.pt --small small.pt --out aligned.pt [-- FAIRSEQ-TRAIN FLAGS]

The large model translates training and validation sources greedily; sources and translations become a calibration
set; the small model is trained on with it, and measured against what it was. All of it is kept in the work folder,
so that the same command goes on after an interruption and repeats nothing that is done.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from fairseq import options, tasks, utils
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from fairseq.data import FairseqDataset, LanguagePairDataset, ListDataset, indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.tasks import FairseqTask

import bild_fairseq
from bild_fairseq.decoding.counters import total
from bild_fairseq.decoding.decode import Policy
from bild_fairseq.errors import BildError
from bild_fairseq.experiments.arguments import add_score_arguments, add_search_arguments, score_options, search_options
from bild_fairseq.experiments.commandline import quiet, run
from bild_fairseq.experiments.data import load_model, make_batches
from bild_fairseq.experiments.files import file_digest, write_atomically
from bild_fairseq.experiments.scoring import Scorer
from bild_fairseq.experiments.systems import System, ours
from bild_fairseq.experiments.timing import measure, ratio
from bild_fairseq.plugin.checkpoints import load_small

USER_DIR = bild_fairseq.__path__[0]

# A small model's options that are chosen anew for its training, or that its weights make pointless.
NOT_TAKEN_OVER = {
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "encoder_embed_path",
    "decoder_embed_path",
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what follows ``--`` is left as it is, in ``train_flags``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args = _parser().parse_args(arguments[:end])
    args.train_flags = arguments[end + 1 :]
    args.work = args.work or args.out.with_suffix(".work")
    args.report = args.report or args.out.with_suffix(".json")
    args.cuda = torch.cuda.is_available() and not args.cpu
    args.fp16 = False
    check(args)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Flags after -- go to fairseq-train and win over the ones here: -- --fp16 --update-freq 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data", type=Path, help="binarized data (fairseq-preprocess)")
    parser.add_argument("--large", type=Path, required=True, help="checkpoint of the large model")
    parser.add_argument("--small", type=Path, required=True, help="checkpoint of the small model")
    parser.add_argument("--out", type=Path, required=True, help="where the aligned small model is written")
    parser.add_argument("--half", action="store_true", help="write it in half precision")
    parser.add_argument("--work", type=Path, help="folder for all else (default: OUT with the suffix .work)")
    parser.add_argument("--report", type=Path, help="JSON file for the figures (default: OUT with the suffix .json)")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--seed", type=int, default=1, help="of the samples and of the training (default: 1)")

    calibration = parser.add_argument_group("calibration set: what the large model writes")
    calibration.add_argument("--subset", default="train", help="the sources to learn from (default: train)")
    calibration.add_argument("--sample", type=int, metavar="N", help="only N of them, drawn at random")
    calibration.add_argument(
        "--splice",
        type=int,
        default=0,
        metavar="N",
        help="N more sources, each spliced from two that have two tokens in a row in common; a small corpus is soon "
        "learned by heart, and what the large model makes of these is as good to learn from (default: 0)",
    )
    calibration.add_argument("--valid-subset", default="valid", help="the sources to validate with (default: valid)")
    calibration.add_argument(
        "--valid-sample", type=int, default=2000, metavar="N", help="at most N of them, drawn at random (default: 2000)"
    )
    calibration.add_argument(
        "--truncate-source", type=int, metavar="TOKENS", help="cut longer sources, as fairseq does for summarization"
    )
    calibration.add_argument(
        "--part",
        type=int,
        default=5000,
        help="sentences that are written in one go; an interruption costs so many at most (default: 5000)",
    )
    calibration.add_argument("--generate-tokens", type=int, default=8000, help="tokens a batch (default: 8000)")
    add_search_arguments(calibration)

    training = parser.add_argument_group("training")
    training.add_argument(
        "--distill",
        type=float,
        default=0.0,
        metavar="W",
        help="0 to 1: how much is learned from the large model's distribution at each position rather than from its "
        "text; above 0 the large model runs during training as well (default: 0)",
    )
    training.add_argument(
        "--distill-top",
        type=int,
        default=0,
        metavar="K",
        help="with --distill: only the large model's K most probable words, which stay in memory (6 K bytes a token), "
        "so that it runs in the first epoch only; 32 loses little (default: 0, all words in every epoch)",
    )
    training.add_argument("--epochs", type=int, default=10, help="passes over the calibration set (default: 10)")
    training.add_argument("--lr", type=float, default=1e-3, help="learning rate, which falls to 0 (default: 1e-3)")
    training.add_argument("--max-tokens", type=int, default=4000, help="tokens a batch (default: 4000)")
    training.add_argument("--dropout", type=float, default=0.0, help="of the small model (default: 0)")

    report = parser.add_argument_group("report, on validation sentences drawn at random")
    report.add_argument("--sentences", type=int, default=100, help="how many are generated and timed (default: 100)")
    report.add_argument("--batch-size", type=int, default=1)
    report.add_argument("--fallback", type=float, default=Policy.fallback_threshold, help="threshold (default: 0.6)")
    report.add_argument("--rollback", type=float, default=Policy.rollback_threshold, help="threshold (default: 2)")
    report.add_argument("--max-draft", type=int, default=Policy.max_draft, help="tokens a draft (default: 10)")
    report.add_argument("--verify-end", action="store_true", help="also verify what is drafted before the end")
    report.add_argument(
        "--lossless-fallback", type=float, default=0.25, help="fallback threshold of lossless runs (default: 0.25)"
    )
    add_score_arguments(report)
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks all that the command line alone can tell.

    Raises:
        BildError: a file that is missing, or a number out of range.
    """
    for name in ("large", "small"):
        if not getattr(args, name).is_file():
            raise BildError(f"--{name} {getattr(args, name)}: no such file")
    if not args.data.is_dir():
        raise BildError(f"{args.data}: no such folder; give what fairseq-preprocess wrote with --destdir")
    for name in ("distill", "fallback", "lossless_fallback"):
        if not 0 <= getattr(args, name) <= 1:
            raise BildError(f"{_flag(name)} {getattr(args, name)}: give a number from 0 to 1")
    positive = ("sample", "valid_sample", "part", "generate_tokens", "epochs", "max_tokens", "lr", "sentences")
    for name in (*positive, "batch_size", "max_draft", "truncate_source"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise BildError(f"{_flag(name)} {getattr(args, name)}: give a number above 0")
    if args.distill_top < 0:
        raise BildError(f"--distill-top {args.distill_top}: give a number of words, 0 for all")
    if args.splice < 0:
        raise BildError(f"--splice {args.splice}: give a number of sources, 0 for none")
    if args.out.resolve() in (args.small.resolve(), args.large.resolve()):
        raise BildError(f"--out {args.out}: is one of the models that are read; name another file")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Limits:
    """What both models can read and the small one can be trained on, in tokens, end symbol included."""

    source: int
    target: int


class Alignment:
    """The files of one run, and the steps that make them.

    Args:
        args: as of :func:`parse_args`.

    Raises:
        BildError: the data or a model cannot be used.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.task = make_task(args.data, args.truncate_source)
        for subset in (args.subset, args.valid_subset):
            try:
                self.task.load_dataset(subset)
            except FileNotFoundError as error:
                raise BildError(f"{args.data}: has no {subset}; see --subset and --valid-subset") from error
        self.source, self.target = self.task.cfg.source_lang, self.task.cfg.target_lang
        self.calibration = args.work / "calibration"
        self.training = args.work / "training"
        self.data = self.calibration / "data-bin"
        self._writer: System | None = None
        try:
            large = load_model(str(args.large), self.task, cuda=args.cuda)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise BildError(f"--large {args.large}: does not fit {args.data}: {reason}") from error
        (small,) = load_small([str(args.small)], self.task, large)
        self.limits = Limits(
            min(model.max_positions()[0] for model in (large, small)),
            min(large.max_positions()[1] - 1, small.max_positions()[1]),
        )
        self.small_config = load_checkpoint_to_cpu(str(args.small))["cfg"]["model"]
        self.model_flags = model_flags(self.small_config)
        self.train_flags()
        self.report_ids = self._sample(args.valid_subset, args.sentences)
        self.scorer = Scorer(self.task, args.valid_subset, self.report_ids, score_options(args))

    def run(self) -> dict[str, Any]:
        """All steps that are not done yet; returns the report."""
        self.calibrate()
        self.train()
        export(self._best_checkpoint(), self.args.out, self.args.half)
        return self.measure()

    def file(self, folder: Path, subset: str, language: str) -> Path:
        """A binarized text, without suffix, as fairseq names it."""
        return folder / f"{subset}.{self.source}-{self.target}.{language}"

    def calibrate(self) -> None:
        """Makes the calibration set: a data folder with the large model's outputs as targets."""
        args = self.args
        settings = {"--large": digest(args.large), "DATA-BIN": digest(*self._sources())}
        names = ["subset", "sample", "splice", "valid_subset", "valid_sample", "truncate_source", "part", "seed"]
        names += ["max_len_a", "max_len_b", "min_len", "no_repeat_ngram_size"]
        begin(self.calibration, settings | {_flag(name): getattr(args, name) for name in names})
        if self.data.exists():
            return
        subsets = {"valid": (args.valid_subset, args.valid_sample), "train": (args.subset, args.sample)}
        pairs = {
            name: self.translate(subset, self.task.dataset(subset), self._sample(subset, count))
            for name, (subset, count) in subsets.items()
        }
        if args.splice:
            sources = splices([source for source, _ in pairs["train"]], args.splice, self.limits.source, args.seed)
            say(f"{len(sources)} more sources spliced from those of {args.subset}")
            dataset = LanguagePairDataset(ListDataset(sources), list(map(len, sources)), self.task.source_dictionary)
            pairs["train"] += self.translate("spliced", dataset, range(len(sources)))
        making = self.data.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        self._make_folder(making)
        for subset, rows in pairs.items():
            kept = [(source, target) for source, target in rows if self._usable(source, target)]
            if not kept:
                raise BildError(f"the large model ended none of the {len(rows)} {subset} sentences; raise --max-len-b")
            write_tokens(self.file(making, subset, self.source), [source for source, _ in kept])
            write_tokens(self.file(making, subset, self.target), [target for _, target in kept])
            say(f"calibration set, {subset}: {len(kept)} sentences, {len(rows) - len(kept)} without an end left out")
        os.replace(making, self.data)
        self._writer = None  # training needs the memory

    def translate(
        self, name: str, dataset: LanguagePairDataset, ids: Sequence[int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Sources of a dataset, and what the large model makes of them; parts that are done are read back.

        Args:
            name: of the parts' files.
            dataset: has the sources.
            ids: which of them.
        """
        if too_long := int((dataset.src_sizes > self.limits.source).sum()):
            say(f"{name}: {too_long} sources have more than {self.limits.source} tokens and are left out")
        parts = [ids[i : i + self.args.part] for i in range(0, len(ids), self.args.part)]
        rows = []
        for number, part in enumerate(parts):
            path = self.calibration / "parts" / f"{name}-{number:05d}.json"
            if not path.exists():
                say(f"the large model writes {name}, part {number + 1} of {len(parts)}")
                path.parent.mkdir(parents=True, exist_ok=True)
                self._translate_part(path, dataset, part)
            targets = json.loads(path.read_text(encoding="utf-8"))
            rows += zip([dataset.src[i] for i in part], map(torch.tensor, targets), strict=True)
        return rows

    def train(self) -> None:
        """Trains the small model on with the calibration set; goes on from its last epoch."""
        args = self.args
        names = ["distill", "distill_top", "epochs", "lr", "max_tokens", "dropout", "seed"]
        calibration = [Path(f"{self.file(self.data, 'train', side)}.bin") for side in (self.source, self.target)]
        settings = {"--small": digest(args.small), "calibration set": digest(*calibration)}
        settings |= {_flag(name): getattr(args, name) for name in names}
        begin(self.training, settings | {"flags after --": " ".join(args.train_flags)})
        done = self.training / "done"
        if done.exists():
            return
        flags = self.train_flags()
        if "--lr-scheduler" not in args.train_flags:
            updates = count_updates(task_like(self.task, self.data), parse_train_flags(flags))
            flags += ["--lr-scheduler", "polynomial_decay", "--total-num-update", str(updates)]
            flags += ["--warmup-updates", str(max(1, updates // 20))]
        # glibc would return the large arrays of every update to the system and have them zeroed anew for the next one.
        keep_memory = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
        status = subprocess.run(program("train", *flags), env=keep_memory | os.environ).returncode
        if status:
            raise BildError(f"fairseq-train ended with status {status}; its log is {self.training / 'train.log'}")
        done.touch()

    def train_flags(self) -> list[str]:
        """The flags of fairseq-train, but for a schedule that depends on the number of batches.

        Raises:
            BildError: fairseq-train would refuse them, or they do not build the small model.
        """
        args = self.args
        flags = [
            *(self.data, "--task", "translation", "-s", self.source, "-t", self.target),
            *self.model_flags,
            *("--finetune-from-model", args.small, "--save-dir", self.training, "--no-epoch-checkpoints"),
            *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", 1.0, "--lr", args.lr),
            *("--dropout", args.dropout, "--max-tokens", args.max_tokens, "--max-epoch", args.epochs),
            *("--seed", args.seed, "--required-batch-size-multiple", 1, "--log-format", "simple"),
            # The target is the large model's own choice, so accuracy is agreement.
            *("--best-checkpoint-metric", "accuracy", "--maximize-best-checkpoint-metric"),
            *("--log-file", self.training / "train.log"),
        ]
        if args.distill:
            flags += ["--criterion", "word_distillation_cross_entropy"]
            flags += ["--teacher-path", args.large, "--teacher-weight", args.distill]
            flags += ["--teacher-top", args.distill_top]
        else:
            flags += ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0, "--report-accuracy"]
        flags = [*map(str, flags), *["--cpu"] * args.cpu, *args.train_flags]
        check_model(parse_train_flags(flags), self.small_config)
        return flags

    def measure(self) -> dict[str, Any]:
        """Agreement, rates and speed with the small model before and after; a report that is there is read back."""
        args = self.args
        names = ["sentences", "batch_size", "fallback", "rollback", "max_draft", "verify_end", "lossless_fallback"]
        names += ["metric", "bpe", "reference", "cuda"]
        settings = {"large": digest(args.large), "small": digest(args.small), "aligned": digest(args.out)}
        settings |= {name: getattr(args, name) for name in names}
        settings |= {"data": digest(*self._sources()), "seed": args.seed, "threads": torch.get_num_threads()}
        if args.report.exists():
            report = json.loads(args.report.read_text(encoding="utf-8"))
            if report.get("settings") == settings:
                return report
        say("measuring the small model before and after")
        report = {"settings": settings} | self.compare()
        args.report.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.report, json.dumps(report, indent=1) + "\n")
        return report

    def compare(self) -> dict[str, Any]:
        """The small model before and after.

        Returns:
            ``agreement``, 0 to 1, and for the setting of the flags and the lossless one: counters, rates, quality,
            seconds, and how much faster than lean greedy, with a 95 % interval.
        """
        args, task = self.args, self.task
        large = load_model(str(args.large), task, cuda=args.cuda)
        paths = {"before": args.small, "after": args.out}
        small = {name: load_small([str(path)], task, large) for name, path in paths.items()}
        outputs = task_like(task, self.data)
        outputs.load_dataset("valid")
        agreements = {name: agreement(model, outputs.dataset("valid"), args.cuda) for name, (model,) in small.items()}

        search = search_options(args)
        policies = {
            "bild": Policy(args.fallback, args.rollback, args.max_draft, verify_end=args.verify_end),
            "lossless": Policy(args.lossless_fallback, 0.0, args.max_draft, verify_end=True),
        }
        greedy = ours("greedy", [large], task, search, alone=True)
        systems = {
            (setting, name): ours(f"{setting} {name}", [large], task, search, policy=policy, small_models=models)
            for setting, policy in policies.items()
            for name, models in small.items()
        }
        dataset = task.dataset(args.valid_subset)
        batches = make_batches(dataset, self.report_ids, args.batch_size, cuda=args.cuda)
        measure([greedy, *systems.values()], batches, cuda=args.cuda, warmup=2)
        report: dict[str, Any] = {
            "quality": self.scorer.name,
            "agreement": agreements,
            "greedy": {"quality": self.scorer.score(greedy.outputs), "seconds": sum(greedy.seconds)},
            "bild": {},
            "lossless": {},
        }
        for (setting, name), system in systems.items():
            report[setting][name] = total(system.counters).as_dict() | {
                "quality": self.scorer.score(system.outputs),
                "seconds": sum(system.seconds),
                "speedup_over_greedy": list(ratio(system.seconds, greedy.seconds)),
                "differ_from_greedy": sum(system.outputs[i] != greedy.outputs[i] for i in greedy.outputs),
            }
        return report

    def _sources(self) -> list[Path]:
        found = []
        for subset in (self.args.subset, self.args.valid_subset):
            found += self.args.data.glob(f"{subset}.*-*.{self.source}.bin")
        return sorted(found)

    def _sample(self, subset: str, count: int | None) -> list[int]:
        """Sentences that both models can read, in order: all of them, or ``count`` drawn at random."""
        sizes = self.task.dataset(subset).src_sizes
        ids = [i for i, size in enumerate(sizes) if size <= self.limits.source]
        if not ids:
            raise BildError(f"{subset}: no source has {self.limits.source} tokens or less; give --truncate-source")
        return ids if count is None or count >= len(ids) else sorted(random.Random(self.args.seed).sample(ids, count))

    def _usable(self, source: torch.Tensor, target: torch.Tensor) -> bool:
        """False for an output that the length limit cut: its end is not the large model's choice."""
        limit = min(int(self.args.max_len_a * len(source) + self.args.max_len_b), self.limits.target)
        return len(target) <= limit

    def _make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for language in (self.source, self.target):
            shutil.copy(self.args.data / f"dict.{language}.txt", folder)

    def _translate_part(self, path: Path, dataset: LanguagePairDataset, ids: Sequence[int]) -> None:
        """Has the large model write its outputs for some sources: a JSON list of token numbers for each."""
        args = self.args
        if self._writer is None:
            large = load_model(str(args.large), self.task, cuda=args.cuda)
            self._writer = ours("greedy", [large], self.task, search_options(args), alone=True)
        by_size = numpy.array(sorted(ids, key=lambda i: dataset.src_sizes[i]))
        outputs: dict[int, list[int]] = {}
        for group in dataset.batch_by_size(by_size, max_tokens=args.generate_tokens, required_batch_size_multiple=1):
            batch = dataset.collater([dataset[i] for i in group])
            batch = utils.move_to_cuda(batch) if args.cuda else batch
            outputs |= zip(batch["id"].tolist(), self._writer.run(batch), strict=True)
        write_atomically(path, json.dumps([outputs[i] for i in ids]))

    def _best_checkpoint(self) -> Path:
        best = self.training / "checkpoint_best.pt"
        return best if best.exists() else self.training / "checkpoint_last.pt"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make_task(data: Path, truncate_source: int | None = None) -> FairseqTask:
    """The translation task of a data folder, in the languages of its files."""
    flags = [str(data), "--path", "-"]
    if truncate_source:
        flags += ["--truncate-source", "--max-source-positions", str(truncate_source)]
    parsed = options.parse_args_and_arch(options.get_generation_parser(), flags)
    try:
        return tasks.setup_task(convert_namespace_to_omegaconf(parsed).task)
    except Exception as error:
        # fairseq raises Exception itself for files that name no languages.
        raise BildError(f"{data}: no binarized data of two languages: {error}") from error


def task_like(task: FairseqTask, data: Path) -> FairseqTask:
    """The same task with another data folder."""
    config = copy.deepcopy(task.cfg)
    config.data = str(data)
    return tasks.setup_task(config)


def program(name: str, *arguments: Any) -> list[str]:
    return [sys.executable, "-m", f"fairseq_cli.{name}", *map(str, arguments), "--user-dir", USER_DIR]


def digest(*paths: Path) -> str:
    """Tells files of other contents apart."""
    return "+".join(file_digest(str(path)) for path in paths)


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of a step, or makes sure that what is in it was made with these settings.

    Raises:
        BildError: it was not.
    """
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} {before.get(name)}, not {new}" for name, new in settings.items() if before.get(name) != new]
        if changed:
            raise BildError(
                f"{folder} was made with {'; '.join(changed)}: remove it to make it anew, or give another --work"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(settings, indent=1) + "\n")


def splices(sources: Sequence[torch.Tensor], count: int, longest: int, seed: int) -> list[torch.Tensor]:
    """New sources: the beginning of one and the end of another, joined where both have the same two tokens.

    Args:
        sources: token numbers with the end symbol.
        count: how many to make; fewer come out if there are not so many.
        longest: tokens of a new source at most, end symbol included.
        seed: of the choice.
    """
    generator = random.Random(seed)
    rows = [source.tolist() for source in generator.sample(list(sources), min(len(sources), 100_000))]
    ends: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, row in enumerate(rows):
        for position in range(2, len(row)):
            ends[row[position - 2], row[position - 1]].append((number, position))
    made: dict[tuple[int, ...], None] = {}
    old = set(map(tuple, rows))
    for _ in range(20 * count):
        if len(made) == count:
            break
        row = generator.choice(rows)
        if len(row) < 3:
            continue
        position = generator.randrange(2, len(row))
        other, start = generator.choice(ends[row[position - 2], row[position - 1]])
        spliced = (*row[:position], *rows[other][start:])
        if len(spliced) <= longest and spliced not in old:
            made[spliced] = None
    return list(map(torch.tensor, made))


def write_tokens(prefix: Path, rows: Sequence[torch.Tensor]) -> None:
    """Writes PREFIX.bin and PREFIX.idx, fairseq's indexed format, from token numbers with the end symbol."""
    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=None)
    for row in rows:
        builder.add_item(row)
    builder.finalize(f"{prefix}.idx")


def model_flags(config: argparse.Namespace) -> list[str]:
    """The flags of fairseq-train that build a model like that of a checkpoint.

    Args:
        config: the checkpoint's ``cfg["model"]``.

    Raises:
        BildError: not one of fairseq's Transformer or BART models.
    """
    arch = getattr(config, "arch", None)
    if arch not in ARCH_MODEL_REGISTRY or not arch.startswith(("transformer", "bart")):
        raise BildError(f"--small: its architecture is {arch}; it must be one of transformer* or bart*")
    parser = _model_parser(arch)
    flags: list[str] = []
    for action in _model_options(parser):
        # Parsed anew for each option, because the default of one may be the value of another.
        built = parser.parse_args(flags)
        ARCH_CONFIG_REGISTRY[arch](built)
        wanted = getattr(config, action.dest, None)
        if wanted is None or wanted == getattr(built, action.dest, False if action.nargs == 0 else None):
            continue
        if action.nargs != 0:
            flags += [action.option_strings[0], str(wanted)]
        elif wanted == action.const:
            flags.append(action.option_strings[0])
    return ["--arch", arch, *flags]


def _same(given: Any, wanted: Any) -> bool:
    """Whether two values of an option build the same model: fairseq leaves switches out, and some numbers as text."""
    if given is None:
        return wanted is False
    try:
        return float(given) == float(wanted)
    except (TypeError, ValueError):
        return str(given) == str(wanted)


def check_model(parsed: argparse.Namespace, config: argparse.Namespace) -> None:
    """Refuses flags that build another model than a checkpoint's.

    Args:
        parsed: of fairseq-train.
        config: the checkpoint's ``cfg["model"]``.
    """
    for action in _model_options(_model_parser(parsed.arch)):
        wanted = getattr(config, action.dest, None)
        if wanted is not None and not _same(getattr(parsed, action.dest, None), wanted):
            raise BildError(
                f"--small: has {action.option_strings[0]} {wanted}, which fairseq-train cannot be told with "
                f"--arch {parsed.arch} and these flags"
            )


def _model_parser(arch: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    ARCH_MODEL_REGISTRY[arch].add_args(parser)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest not in NOT_TAKEN_OVER]


def parse_train_flags(flags: Sequence[str]) -> argparse.Namespace:
    """What fairseq-train makes of its flags.

    Raises:
        BildError: it refuses them.
    """

    def refuse(message: str) -> None:
        raise BildError(f"fairseq-train: {message}; see the flags after --")

    parser = options.get_training_parser()
    parser.error = refuse
    return options.parse_args_and_arch(parser, list(flags))


def count_updates(task: FairseqTask, parsed: argparse.Namespace) -> int:
    """How many updates a run of fairseq-train makes.

    Args:
        task: of its data folder.
        parsed: its flags.
    """
    task.load_dataset("train")
    dataset = task.dataset("train")
    batches = dataset.batch_by_size(
        dataset.ordered_indices(),
        max_tokens=parsed.max_tokens,
        max_sentences=parsed.batch_size,
        required_batch_size_multiple=parsed.required_batch_size_multiple,
    )
    updates = math.ceil(len(batches) / (parsed.distributed_world_size * parsed.update_freq[0])) * parsed.max_epoch
    return min(updates, parsed.max_update) if parsed.max_update else updates


def export(checkpoint: Path, out: Path, half: bool) -> None:
    """Writes what inference needs of a training checkpoint.

    Args:
        checkpoint: as fairseq-train saved it.
        out: file to write.
        half: in half precision.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    shared: dict[tuple, torch.Tensor] = {}
    weights = {}
    for name, tensor in state["model"].items():
        if half and tensor.is_floating_point():
            # Tied weights lie in one place, in the file as well.
            tensor = shared.setdefault((tensor.data_ptr(), tensor.shape), tensor.half())
        weights[name] = tensor
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    torch.save(
        {
            "args": None,
            "cfg": state["cfg"],
            "model": weights,
            "criterion": None,
            "optimizer_history": [{**state["optimizer_history"][-1], "lr_scheduler_state": {}}],
            "task_state": {},
            "extra_state": {"epoch": state["extra_state"]["train_iterator"]["epoch"]},
            "last_optimizer_state": None,
        },
        temporary,
    )
    os.replace(temporary, out)


@torch.no_grad()
def agreement(model: torch.nn.Module, dataset: FairseqDataset, cuda: bool) -> float:
    """The share of target tokens that are a model's first choice, given the source and the tokens before."""
    right = count = 0
    for ids in dataset.batch_by_size(dataset.ordered_indices(), max_tokens=4000, required_batch_size_multiple=1):
        batch = dataset.collater([dataset[i] for i in ids])
        batch = utils.move_to_cuda(batch) if cuda else batch
        choice = model(**batch["net_input"])[0].argmax(-1)
        real = batch["target"].ne(dataset.tgt_dict.pad())
        right += int((choice.eq(batch["target"]) & real).sum())
        count += int(real.sum())
    return right / count


def print_report(report: dict[str, Any]) -> None:
    """A table of before and after."""
    settings = report["settings"]
    end = ", verified end" if settings["verify_end"] else ""
    rate: Callable[[float], str] = "{:.1%}".format
    plain: Callable[[float], str] = "{:.2f}".format

    def speed(value: Sequence[float]) -> str:
        return "{:.2f} [{:.2f}, {:.2f}]".format(*value)

    def rows(setting: str, *columns: tuple[str, str, Callable[[Any], str]]) -> None:
        for title, name, show in columns:
            row(title, *(show(report[setting][when][name]) for when in ("before", "after")))

    def row(title: str, before: str, after: str) -> None:
        print(f"{title:<48} {before:>18} {after:>18}")

    quality = report["quality"]
    row("", "before", "after")
    row("agreement with the large model", *(rate(report["agreement"][when]) for when in ("before", "after")))
    print(f"fallback {settings['fallback']}, rollback {settings['rollback']}{end}:")
    rows(
        "bild",
        ("  acceptance rate", "acceptance_rate", rate),
        ("  fallback rate", "fallback_rate", rate),
        ("  rollback rate", "rollback_rate", rate),
        ("  mean accepted length, tokens per large call", "mean_accepted_length", plain),
        (f"  {quality} (greedy: {report['greedy']['quality']:.2f})", "quality", plain),
        ("  times faster than greedy", "speedup_over_greedy", speed),
    )
    print(f"lossless, fallback {settings['lossless_fallback']}:")
    rows(
        "lossless",
        ("  mean accepted length, tokens per large call", "mean_accepted_length", plain),
        ("  times faster than greedy", "speedup_over_greedy", speed),
    )


def main() -> None:
    quiet()
    args = parse_args()
    report = Alignment(args).run()
    print_report(report)
    say(f"written: {args.out}, {args.report}")


if __name__ == "__main__":
    run("align", main, "interrupted; the same command goes on from here")
