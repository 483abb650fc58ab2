"""The pairs of models that ``--large``, ``--small`` and ``--early-exit`` name."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fairseq.tasks import FairseqTask

from ..engines.precision import PRECISIONS
from ..errors import BildError
from ..plugin.pair import Pair, has_exits


def parse_precision(text: str) -> tuple[str, str]:
    """The large model's precision and the small one's.

    Args:
        text: as on the command line: one for both, or LARGE+SMALL.

    Raises:
        BildError: not one of :data:`~bild_fairseq.engines.precision.PRECISIONS`.
    """
    precision, plus, small_precision = text.partition("+")
    for one in (precision, small_precision) if plus else (precision,):
        if one not in PRECISIONS:
            raise BildError(f"--precision {text}: choose from {', '.join(PRECISIONS)}, or two joined by +")
    return precision, small_precision or precision


def with_small(large: Pair, path: str, task: FairseqTask, small_precision: str) -> Pair:
    """A large model with a small one that drafts for it; see :meth:`Pair.drafted_by`."""
    return dataclasses.replace(large.drafted_by(path, task), small_precision=small_precision)


def with_exit(large: Pair, layer: int | None = None, small_precision: str | None = None) -> Pair:
    """An early-exit model with one of its exits, the lowest unless given.

    Args:
        small_precision: of the exit's weights; None for the same.

    Raises:
        BildError: the model has no exits, or not this one.
    """
    if not has_exits(large.large):
        raise BildError(f"--early-exit {large.large_path}: the model has no exits")
    return dataclasses.replace(large.drafted_by_exit(layer), small_precision=small_precision)


def load_pairs(task: FairseqTask, args: argparse.Namespace) -> dict[str, Pair]:
    """The pairs of ``add_drafting_arguments`` by name, each model loaded once; prints what they draft among.

    Raises:
        BildError: none is named, a name is used twice, a model does not fit or cannot read the sources.
    """
    precision, small_precision = parse_precision(args.precision)
    if args.fp16 and args.precision != "float32":
        raise BildError("--fp16 and --precision both set the weights' precision; give one of them")
    if not args.small and not args.early_exit:
        raise BildError("nothing drafts: give --small NAME=PATH or --early-exit NAME=PATH")
    small = [named(item, "--small") for item in args.small]
    exits = [named(item, "--early-exit") for item in args.early_exit]
    check_names([name for name, _ in small + exits])
    options = {"alone": True, "precision": precision, "cuda": args.cuda, "fp16": args.fp16}
    large = {args.large: Pair.load(args.large, task=task, **options)}
    pairs = {name: with_small(large[args.large], path, task, small_precision) for name, path in small}
    for name, path in exits:
        path, layer = _layered(path)
        if path not in large:
            large[path] = Pair.load(path, task=task, **options)
        pairs[name] = with_exit(large[path], layer, small_precision)
    if args.draft_vocab is not None:
        pairs = {name: pair.drafting_among(args.draft_vocab, task, "--draft-vocab") for name, pair in pairs.items()}
        print(f"drafting among {next(iter(pairs.values())).draft_vocabulary}")
    return pairs


def check_names(names: Sequence[str]) -> None:
    """Refuses two models of the same name.

    Raises:
        BildError: it names them.
    """
    for name in names:
        if names.count(name) > 1:
            raise BildError(f"two models are called {name}; write NAME=PATH with another name")


def named(item: str, option: str) -> tuple[str, str]:
    """The name and the path in NAME=PATH; the name is that of the file where none is given.

    Raises:
        BildError: one of the two is empty.
    """
    name, equals, path = item.partition("=")
    if not equals:
        name, path = Path(item).stem, item
    if not name or not path:
        raise BildError(f"{option} {item}: write NAME=PATH")
    return name, path


def _layered(path: str) -> tuple[str, int | None]:
    """A path and the exit that it may end with, after a colon."""
    head, _, layer = path.rpartition(":")
    return (head, int(layer)) if head and layer.isdigit() else (path, None)
