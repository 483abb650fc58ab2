"""A large model with what drafts for it, as ``--small`` and ``--early-exit`` name them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq.tasks import FairseqTask

from ..decoding.decode import Policy
from ..engines.precision import PRECISIONS
from ..errors import BildError
from ..models.exits import EarlyExitTransformerDecoder
from ..plugin.checkpoints import check_positions, load_small
from ..plugin.generator import BildGenerator, SearchOptions
from .data import load_model


@dataclass(frozen=True)
class Method:
    """A large model with what drafts for it: a small model, or an exit of its own."""

    name: str
    large: torch.nn.Module
    large_path: str
    small: tuple[torch.nn.Module, ...] = ()
    small_path: str | None = None
    exit_layer: int | None = None
    precision: str = "float32"

    def generator(self, task: FairseqTask, search: SearchOptions) -> BildGenerator:
        """With the default policy."""
        drafting = {"small_models": self.small, "exit_layer": self.exit_layer}
        return self._generator([self.large], task, search, **drafting)

    def greedy(self, task: FairseqTask, search: SearchOptions) -> BildGenerator:
        """The large model alone."""
        return self._generator([self.large], task, search, alone=True)

    def small_alone(self, task: FairseqTask, search: SearchOptions) -> BildGenerator:
        """What drafts, decoding greedily without the large model."""
        return self._generator(self.small or [self.large], task, search, exit_layer=self.exit_layer, alone=True)

    def _generator(
        self, models: Sequence[torch.nn.Module], task: FairseqTask, search: SearchOptions, **kwargs: Any
    ) -> BildGenerator:
        precision, small_precision = parse_precision(self.precision)
        return BildGenerator(
            models,
            task.target_dictionary,
            Policy(),
            search,
            precision=precision,
            small_precision=small_precision,
            **kwargs,
        )

    def flags(self) -> str:
        """What selects it in fairseq-generate."""
        flags = f"--path {self.large_path} --generator bild"
        if self.exit_layer is None:
            flags += f" --bild-small-path {self.small_path}"
        else:
            flags += f" --bild-exit-layer {self.exit_layer}"
        precision, small_precision = parse_precision(self.precision)
        if precision != "float32":
            flags += f" --bild-precision {precision}"
        if small_precision != precision:
            flags += f" --bild-small-precision {small_precision}"
        return flags


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """What drafts for the large model, and the precision of all models' weights."""
    parser.add_argument(
        "--small",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a small model, and what to call it; repeat for several, aligned and unaligned for instance",
    )
    parser.add_argument(
        "--early-exit",
        action="append",
        default=[],
        metavar="NAME=PATH[:LAYER]",
        help="an early-exit model that drafts from its exit (default layer: the lowest); repeat for several",
    )
    parser.add_argument(
        "--precision",
        default="float32",
        help=f"of the models' weights: {', '.join(PRECISIONS)}, or two joined by + for the large model and the small "
        "one (default: float32)",
    )


def parse_precision(text: str) -> tuple[str, str]:
    """The large model's precision and the small one's.

    Args:
        text: as on the command line: one for both, or LARGE+SMALL.

    Raises:
        BildError: not one of :data:`PRECISIONS`.
    """
    precision, plus, small_precision = text.partition("+")
    for one in (precision, small_precision) if plus else (precision,):
        if one not in PRECISIONS:
            raise BildError(f"--precision {text}: choose from {', '.join(PRECISIONS)}, or two joined by +")
    return precision, small_precision or precision


def load_methods(task: FairseqTask, large: torch.nn.Module, args: argparse.Namespace) -> list[Method]:
    """The models of ``--small`` and ``--early-exit``, each loaded once.

    Raises:
        BildError: none is named, a name is used twice, a model does not fit or cannot read the sources.
    """
    precision, small_precision = parse_precision(args.precision)
    if args.early_exit and small_precision != precision:
        raise BildError(
            f"--precision {args.precision}: an exit has the large model's precision; leave +{small_precision} out"
        )
    if args.fp16 and args.precision != "float32":
        raise BildError("--fp16 and --precision both set the weights' precision; give one of them")
    methods = []
    for item in args.small:
        name, path = _named(item, "--small")
        small = load_small(path.split(os.pathsep), task, large)
        check_positions(small, min(task.max_positions()[0], large.max_positions()[0]))
        methods.append(Method(name, large, args.large, tuple(small), path, precision=args.precision))
    loaded = {args.large: large}
    for item in args.early_exit:
        name, path = _named(item, "--early-exit")
        head, _, layer = path.rpartition(":")
        if head and layer.isdigit():
            path = head
        if path not in loaded:
            loaded[path] = load_model(path, task, cuda=args.cuda, fp16=args.fp16)
        decoder = loaded[path].decoder
        if not isinstance(decoder, EarlyExitTransformerDecoder):
            raise BildError(f"--early-exit {path}: the model has no exits")
        exit_layer = int(layer) if head and layer.isdigit() else min(decoder.exit_layers)
        decoder.check_exit(exit_layer)
        methods.append(Method(name, loaded[path], path, exit_layer=exit_layer, precision=args.precision))
    if not methods:
        raise BildError("nothing drafts: give --small NAME=PATH or --early-exit NAME=PATH")
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise BildError(f"two models are called {name}; write NAME=PATH with another name")
    return methods


def _named(item: str, option: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    if not equals:
        name, path = Path(item).stem, item
    if not name or not path:
        raise BildError(f"{option} {item}: write NAME=PATH")
    return name, path
