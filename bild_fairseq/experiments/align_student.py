"""What an alignment trains: a small model, or the exits of the large one."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from fairseq.tasks import FairseqTask
from torch import nn

from ..errors import BildError
from ..models.early_exit import PREFIX
from ..models.exits import check_exit_layers, parse_exit_layers
from ..models.truncated import exit_model
from ..plugin.checkpoints import load_large, load_small, read
from ..plugin.light import for_inference, save
from ..plugin.pair import Pair
from .align_options import AlignOptions


class Student(Protocol):
    """What drafts, and is trained to agree with the large model."""

    config: argparse.Namespace  # the model options of what fairseq-train trains
    greatest: str  # the figure of the training that says which checkpoint agrees most

    def start(self) -> Path:
        """The checkpoint to start from; makes it where it is not there."""

    def pair(self, path: Path) -> Pair:
        """The large model with what drafts for it, of a checkpoint of the training or the one to start from."""

    def drafter(self, pair: Pair) -> nn.Module:
        """What drafts, as a model of its own."""

    def criterion(self, on_policy: bool) -> list[object]:
        """The flags of its loss: on the large model's text, or on what both write together."""


def student(options: AlignOptions, task: FairseqTask) -> Student:
    """The one that the options name.

    Raises:
        BildError: a checkpoint cannot be read, or the large model cannot have such exits.
    """
    return SmallModel(options, task) if options.small else Exits(options, task)


class SmallModel:
    """A small model beside the large one."""

    greatest = "accuracy"  # the target is the large model's own choice

    def __init__(self, options: AlignOptions, task: FairseqTask):
        self._options, self._task = options, task
        self.config = load_checkpoint_to_cpu(str(options.small))["cfg"]["model"]
        if getattr(self.config, "exit_freeze_model", False):
            raise BildError(
                f"--small {options.small}: only the exits of this model can be trained (--exit-freeze-model); are "
                "--large and --small swapped? For the exits of a large model give --early-exit instead of --small"
            )

    def start(self) -> Path:
        return self._options.small

    @cached_property
    def _large(self) -> list[nn.Module]:
        return load_large([str(self._options.large)], self._task, cuda=self._options.cuda)

    def pair(self, path: Path) -> Pair:
        # It may read fewer tokens than the large one: longer sources are left out.
        return Pair(self._large, load_small([str(path)], self._task, self._large[0]))

    def drafter(self, pair: Pair) -> nn.Module:
        return pair.small[0]

    def criterion(self, on_policy: bool) -> list[object]:
        options = self._options
        if not options.distill and not on_policy:
            return ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0, "--report-accuracy"]
        return [
            *("--criterion", "word_distillation_cross_entropy", "--teacher-path", options.large),
            *("--teacher-weight", options.distill, "--teacher-top", options.distill_top),
            *["--teacher-choice"] * on_policy,
        ]


class Exits:
    """Exits of the large model, which itself stays as it is. The lowest one drafts."""

    def __init__(self, options: AlignOptions, task: FairseqTask):
        self._options, self._task = options, task
        self._layers = parse_exit_layers(options.early_exit)
        config = load_checkpoint_to_cpu(str(options.large))["cfg"]["model"]
        self.config = exit_config(config, self._layers, options.exit_own_layers)
        self.greatest = f"exit{self._layers[0]}_accuracy"

    def start(self) -> Path:
        path = self._options.work / "start.pt"
        if not path.exists():
            state = read(self._options.large)
            weights = exit_weights(state["model"], self._layers, self._options.exit_own_layers)
            save({**for_inference(state, weights), **with_model_options(state, self.config)}, path)
        return path

    def pair(self, path: Path) -> Pair:
        return Pair.load(str(path), task=self._task, exit_layer=self._layers[0], cuda=self._options.cuda)

    def drafter(self, pair: Pair) -> nn.Module:
        return exit_model(pair.large[0], self._layers[0])

    def criterion(self, on_policy: bool) -> list[object]:
        # Text that the exit has written is not learned itself; what the last layer predicts there is.
        distill = 1.0 if on_policy else self._options.distill
        weights = ["1"] * len(self._layers) + ["0"]  # the last layer stays as it is
        return [
            *("--criterion", "early_exit_label_smoothed_cross_entropy", "--label-smoothing", 0),
            *("--exit-distill", distill, "--exit-loss-weights", ",".join(weights)),
        ]


def exit_config(config: argparse.Namespace, layers: list[int], own_layers: int) -> argparse.Namespace:
    """The model options of a model with exits, of which only the exits are trained.

    Raises:
        BildError: not one of fairseq's Transformer or BART models, or one without so many layers.
    """
    arch = getattr(config, "arch", None) or ""
    if not arch.removeprefix(PREFIX).startswith(("transformer", "bart")):
        raise BildError(f"--large: its architecture is {arch or 'not known'}; exits need one of transformer* or bart*")
    check_exit_layers(layers, config.decoder_layers, "the model's --decoder-layers")
    new = copy.copy(config)
    new.arch = new._name = PREFIX + arch.removeprefix(PREFIX)
    new.exit_layers, new.exit_own_layers, new.exit_freeze_model = layers, own_layers, True
    return new


def with_model_options(state: Mapping[str, Any], config: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint's options, as fairseq kept them up to 0.10 or keeps them now, with other ones of its model."""
    if state.get("cfg") is None:
        return {"args": argparse.Namespace(**vars(state["args"]) | vars(config)), "cfg": None}
    return {"args": None, "cfg": {**state["cfg"], "model": config}}


def exit_weights(weights: Mapping[str, Any], layers: list[int], own_layers: int) -> dict[str, Any]:
    """A model's weights without those of exits, or exits' layers, that it will not have."""
    kept = {}
    for name, weight in weights.items():
        kind, _, rest = name.removeprefix("decoder.").partition(".")
        layer, number = (*rest.split("."), "")[:2]
        exits = kind.startswith("exit_")
        if exits and (int(layer) not in layers or kind == "exit_own_layers" and int(number) >= own_layers):
            continue
        kept[name] = weight
    return kept
