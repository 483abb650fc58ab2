"""The systems that ``scripts/benchmark.py`` compares."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fairseq.tasks import FairseqTask

from ..decoding.policies import Policy
from ..errors import BildError
from ..plugin.draft_vocabulary import DraftVocabulary
from ..plugin.pair import Pair
from ..plugin.search import SearchOptions
from .arguments import check_positive
from .ctranslate2_system import ctranslate2_system
from .pairs import check_names, named, parse_precision, with_exit
from .settings import parse_policy
from .systems import System, ours, stock

DEFAULT_SETTING = "0.6,2"
FOREIGN = ("ctranslate2-float32", "ctranslate2-int8")


def add_system_arguments(parser: argparse.ArgumentParser) -> None:
    """Which systems are compared, and their settings."""
    parser.add_argument(
        "--systems",
        help="which, joined by commas: fairseq, fairseq-beam5, greedy, small, bild, lossless, exit-full, exit-alone, "
        "exit, exit-lossless, ctranslate2-float32, ctranslate2-int8 (default: all that the models allow, without "
        "ctranslate2)",
    )
    parser.add_argument(
        "--bild",
        action="append",
        metavar="FALLBACK,ROLLBACK[,end]",
        help="thresholds of the bild system, with ',end' for --bild-verify-end; repeat for several (default: 0.6,2)",
    )
    parser.add_argument(
        "--exit", action="append", metavar="FALLBACK,ROLLBACK[,end]", help="the same for the exit system"
    )
    parser.add_argument(
        "--lossless-fallback", type=float, default=0.6, help="fallback threshold of the lossless system (default: 0.6)"
    )
    parser.add_argument("--max-draft", type=int, default=10)
    parser.add_argument("--max-batch", type=int, help="as --bild-max-batch")
    parser.add_argument(
        "--draft-vocab",
        action="append",
        default=[],
        metavar="FILE",
        help="whatever drafts does so among the target types of FILE as well, as with --bild-draft-vocab; repeat for "
        "several",
    )
    _add_precision_arguments(parser)
    parser.add_argument(
        "--ctranslate2-threads",
        type=int,
        help="CTranslate2's threads, where another number suits it better (default: as --threads); it also reads "
        "environment variables of its own, CT2_USE_MKL=0 for one",
    )


def _add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        default="float32",
        help="weights of this package's systems: float32, float16, bfloat16, int8, or two of them joined by +, for the "
        "large model and for what drafts; several, joined by commas, are compared (default: float32)",
    )


def check(args: argparse.Namespace) -> None:
    """Refuses what the flags of systems alone can tell.

    Raises:
        BildError: a threshold, precision or draft length is none, or a system is unknown or lacks its model.
    """
    chosen_systems(args)
    precisions(args.precision)
    check_names([named(item, "--small")[0] for item in args.small])
    check_positive(args, "max_draft", "max_batch", "ctranslate2_threads")
    policies([*(args.bild or ()), *(args.exit or ()), f"{args.lossless_fallback},0"], args.max_draft)


def chosen_systems(args: argparse.Namespace) -> list[str]:
    """The names of the systems that were asked for, or of all that the models allow.

    Raises:
        BildError: one is unknown, or its model was not given.
    """
    names = ["fairseq", "fairseq-beam5", "greedy"]
    names += ["small", "bild", "lossless"] if args.small else []
    names += ["exit-full", "exit-lossless", "exit-alone", "exit"] if args.early_exit else []
    if not args.systems:
        return names
    names += FOREIGN
    chosen = args.systems.split(",")
    for name in chosen:
        if name not in names:
            raise BildError(f"--systems {name}: unknown, or its model was not given; there are {', '.join(names)}")
    return chosen


def policies(settings: Sequence[str] | None, max_draft: int) -> dict[str, Policy]:
    """Thresholds as they are written, and what they mean; the default ones if there are none.

    Raises:
        BildError: as of :func:`~bild_fairseq.experiments.settings.parse_policy`.
    """
    return {setting: parse_policy(setting, max_draft) for setting in settings or [DEFAULT_SETTING]}


def precisions(joined: str) -> dict[str, tuple[str, str]]:
    """The precisions of ``--precision`` as they are written, and those of the large and the small model.

    Raises:
        BildError: as of :func:`~bild_fairseq.experiments.pairs.parse_precision`.
    """
    return {text: parse_precision(text) for text in joined.split(",")}


class Competition:
    """The models to compare, and the systems made of them.

    Args:
        task: with its data.
        args: as of ``scripts/benchmark.py``.
        worker: the program that runs CTranslate2.

    Raises:
        BildError: a model cannot be loaded, does not fit the data or has no exits.
    """

    def __init__(self, task: FairseqTask, args: argparse.Namespace, worker: Path):
        self._task, self._args, self._worker = task, args, worker
        self._search = SearchOptions.from_args(args)
        self._precisions = precisions(args.precision)
        first, _ = next(iter(self._precisions.values()))
        options = {"alone": True, "precision": first, "cuda": args.cuda, "fp16": args.fp16}
        self._large = early = Pair.load(args.large, task=task, **options)
        small = [named(item, "--small") for item in args.small]
        self._small = {name: self._large.drafted_by(path, task) for name, path in small}
        if args.early_exit and args.early_exit != args.large:
            early = Pair.load(args.early_exit, task=task, **options)
        self._early = with_exit(early, args.exit_layer) if args.early_exit else None
        dictionary = task.target_dictionary
        self._vocabularies = [DraftVocabulary.load(path, dictionary, "--draft-vocab") for path in args.draft_vocab]

    def pairs(self) -> list[Pair]:
        """All models that were given."""
        return [self._large, *self._small.values(), *([self._early] if self._early else [])]

    def large_weights(self) -> int:
        """How many weights the large model has; one that several parts share counts once."""
        return sum(weight.numel() for model in self._large.large for weight in model.parameters())

    def systems(self, names: Sequence[str]) -> list[System]:
        """The systems of some names, at every precision and setting that they can have."""
        return [system for name in names for system in self._systems(name)]

    def _systems(self, name: str) -> list[System]:
        if name in FOREIGN:
            return [self._ctranslate2(name)]
        if name.startswith("fairseq"):
            return [stock(self._large.large, self._task, 5 if name == "fairseq-beam5" else 1, self._search)]
        if name == "greedy":
            return self._ours("greedy", self._large)
        if name.startswith("exit"):
            return self._drafted(name.removeprefix("exit-"), self._early, f"exit {self._early.exit_layer}")
        return [
            system
            for label, pair in self._small.items()
            for system in self._drafted(name, pair, "bild", f", {label}" if len(self._small) > 1 else "")
        ]

    def _drafted(self, name: str, pair: Pair, what: str, label: str = "") -> list[System]:
        """The systems of one pair; the label tells it from other pairs."""
        if name == "full":
            return self._ours("early-exit model, full depth", pair.greedy())
        if name in ("small", "alone"):
            return self._ours(f"{'small' if pair.small else what} alone{label}", pair.small_alone())
        if name == "lossless":
            chosen = {"lossless": Policy(self._args.lossless_fallback, 0.0, self._args.max_draft, verify_end=True)}
        else:
            settings = self._args.bild if pair.small else self._args.exit or self._args.bild
            chosen = {f"({text})": one for text, one in policies(settings, self._args.max_draft).items()}
        pairs = {label: pair}
        for vocabulary in self._vocabularies:
            pairs[f"{label}, {len(vocabulary.types)} types"] = dataclasses.replace(pair, draft_vocabulary=vocabulary)
        return [
            one
            for text, policy in chosen.items()
            for label, drafting in pairs.items()
            for one in self._ours(f"{what} {text}{label}", drafting, policy)
        ]

    def _ours(self, name: str, pair: Pair, policy: Policy | None = None) -> list[System]:
        """A system of this package at every precision that it can have."""
        wanted = self._precisions
        if pair.alone:
            wanted = {precision: (precision, precision) for precision, _ in wanted.values()}
        made = []
        for text, (precision, small_precision) in wanted.items():
            small = None if pair.alone else small_precision
            exact = dataclasses.replace(pair, precision=precision, small_precision=small)
            title = name if text == "float32" else f"{name} {text}"
            made.append(ours(title, exact, self._task, self._search, policy, self._args.max_batch))
        return made

    def _ctranslate2(self, name: str) -> System:
        args = self._args
        options = {
            "device": "cuda" if args.cuda else "cpu",
            "compute_type": name.removeprefix("ctranslate2-"),
            "threads": args.ctranslate2_threads or args.threads,
        }
        return ctranslate2_system(name, args.large, self._task, self._search, self._worker, options)
