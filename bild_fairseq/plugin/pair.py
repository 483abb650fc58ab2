"""A large model with what drafts for it: from checkpoints and flags to readers for ``decode``.

fairseq's programs come here through ``Pair.from_args``, scripts through ``Pair.load``; both get the same checks.

    pair = Pair.load("large.pt", "small.pt", task=task)             # two models
    pair = Pair.load("early.pt", task=task)                         # an early-exit model, its lowest exit drafts
    pair = Pair.load("large.pt", task=task, alone=True)             # greedy decoding, nothing drafts
    other = pair.drafted_by("aligned.pt", task)                     # same large model, another small one
    quick = other.drafting_among("aligned.vocab.txt", task)         # same models, but a draft has few types only
    BildGenerator(pair, task.target_dictionary, Policy(0.6, 2.0))   # .greedy() and .small_alone() of a pair, too
    print("fairseq-generate data", pair.flags())
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from fairseq import utils
from fairseq.tasks import FairseqTask
from torch import nn

from ..decoding.constraints import Constraints
from ..decoding.reader import Reader
from ..engines.base import Engine
from ..engines.changes import weight_versions
from ..engines.choose import cut_head_for, engine_for
from ..engines.precision import PRECISIONS
from ..engines.readers import combined
from ..engines.supported import is_t5
from ..errors import BildError
from ..models import exit_model
from ..models.exits import ExitHeads
from .checkpoints import Loading, load_large, load_small
from .draft_vocabulary import DraftVocabulary
from .files import unreadable
from .fits import check_positions, check_task
from .flags import option, small_loading, small_paths

logger = logging.getLogger(__name__)


@dataclass
class Pair:
    """The models of a generation, checked, with their weights laid out for decoding.

    Weights may change later, in training for instance: every batch is decoded with those that the models have then.

    Args:
        large: the large model, or the members of an ensemble.
        small: the small model, or the members of an ensemble, on the same device; empty for none.
        exit_layer: decoder layer of ``large``, counted from the bottom, whose exit drafts; with ``alone`` it decodes
            without the layers above. Not together with ``small``.
        alone: nothing drafts: ``large``, or its exit, decodes greedily.
        precision: of the weights, one of ``PRECISIONS``.
        small_precision: of the weights that draft, the small model's or the exit's; None for the same. An exit of
            another precision is run by an engine of its own, beside the large model's.
        large_path: checkpoints that ``large`` comes from, joined by ``:``; for :meth:`flags` only.
        small_path: checkpoints that ``small`` comes from, joined by ``:``; for :meth:`flags` only.
        draft_vocabulary: the types that the small model or the exit drafts among; None for all.

    Raises:
        BildError: nothing drafts, two things do, an exit is not there, a precision is unknown, or a model has an
            option that cannot be decoded; one line that says so.

    Attributes:
        large_engines, small_engines: what runs the models, one each. An exit is run by the large model's engine, unless
            it has another precision.
    """

    large: Sequence[nn.Module]
    small: Sequence[nn.Module] = ()
    exit_layer: int | None = None
    alone: bool = False
    precision: str = "float32"
    small_precision: str | None = None
    large_path: str | None = None
    small_path: str | None = None
    draft_vocabulary: DraftVocabulary | None = None
    large_engines: list[Engine] = field(init=False, repr=False)
    small_engines: list[Engine] = field(init=False, repr=False)
    _cuts: list[int | None] = field(init=False, repr=False)  # the head that each model, or its exit, drafts with
    _seen: list[list[Hashable]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for precision in (self.precision, self.small_precision or self.precision):
            if precision not in PRECISIONS:
                raise BildError(f"precision {precision}: choose from {', '.join(PRECISIONS)}")
        if self.small and (self.exit_layer is not None or self.alone):
            raise BildError("a small model drafts only where no exit does and the large model is not alone")
        if not self.small and self.exit_layer is None and not self.alone:
            raise BildError("nothing drafts: give a small model or an exit layer")
        if self.exit_layer is not None:
            check_exit(self.large, self.exit_layer)
        if self.alone and self.small_precision not in (None, self.precision):
            raise BildError("nothing drafts whose weights could have a precision of their own")
        if self.alone and self.draft_vocabulary is not None:
            raise BildError("a draft vocabulary is of what drafts; here nothing does")
        self._find_engines()

    def _find_engines(self) -> None:
        self.large_engines = [engine_for(model, self.precision, "large") for model in self.large]
        precision = self.small_precision or self.precision
        apart = self.exit_layer is not None and not self.alone and precision != self.precision
        small = [_exit_model(model, self.exit_layer) for model in self.large] if apart else self.small
        self.small_engines = [engine_for(model, precision, "small") for model in small]
        self._cuts = self._cut_heads(small, precision)
        self._seen = self._versions()

    @property
    def _exit_shares(self) -> bool:
        """Whether an exit drafts with the large model's engine."""
        return self.exit_layer is not None and not self.alone and not self.small_engines

    def _cut_heads(self, small: Sequence[nn.Module], precision: str) -> list[int | None]:
        """What each small model, or each large one's exit, drafts with; None for the head over all types."""
        if self._exit_shares:
            drafting = [(*one, self.exit_layer, "large") for one in zip(self.large_engines, self.large, strict=True)]
        else:
            drafting = [
                (engine, one, engine.depth, "small") for engine, one in zip(self.small_engines, small, strict=True)
            ]
        if self.draft_vocabulary is None:
            return [None] * len(drafting)
        types = self.draft_vocabulary.types
        return [cut_head_for(engine, model, depth, types, precision, role) for engine, model, depth, role in drafting]

    def _versions(self) -> list[list[Hashable]]:
        return [weight_versions(model) for model in (*self.large, *self.small)]

    @classmethod
    def from_args(cls, models: Sequence[nn.Module], task: FairseqTask, args: Any) -> Pair:
        """The pair that checked generation options ask for, beside models that fairseq has loaded.

        Args:
            models: of ``--path``.
            task: that the models run in.
            args: fairseq's generation config with this package's fields.

        Raises:
            BildError: no small model and no exit, or one that cannot be loaded or does not fit.
        """
        small_precision = str(option(args, "bild_small_precision"))
        precision = {
            "precision": str(option(args, "bild_precision")),
            "small_precision": None if small_precision == "same" else small_precision,
        }
        check_task(models, task)
        _warn_of_overflow(models)
        path = option(args, "bild_draft_vocab")
        vocabulary = None if path is None else DraftVocabulary.load(path, task.target_dictionary)
        drafting = {"draft_vocabulary": vocabulary, **precision}
        paths = small_paths(args)
        if paths:
            small = _load_drafting(paths, task, models, small_loading(args))
            return cls(models, small, small_path=os.pathsep.join(paths), **drafting)
        alone = str(args.generator) == "greedy"
        return cls(models, exit_layer=_exit_of_args(models, args, alone), alone=alone, **drafting)

    @classmethod
    def load(
        cls,
        large_path: str,
        small_path: str | None = None,
        *,
        task: FairseqTask,
        exit_layer: int | None = None,
        alone: bool = False,
        precision: str = "float32",
        small_precision: str | None = None,
        cuda: bool = False,
        fp16: bool = False,
    ) -> Pair:
        """Loads a pair.

        Args:
            large_path: a checkpoint, or several joined by ``:`` for an ensemble.
            small_path: the same for the small model; None: an exit drafts, or nothing does.
            task: whose dictionaries and languages all models must fit.
            exit_layer: of an early-exit model; None for the lowest, where there is neither a small model nor ``alone``.
            alone: nothing drafts.
            precision, small_precision: as of :class:`Pair`.
            cuda: on the GPU.
            fp16: the models themselves in half precision, as fairseq's ``--fp16``.

        Raises:
            BildError: a checkpoint cannot be loaded or does not fit; one line that names it.
        """
        large = load_large(utils.split_paths(large_path), task, cuda=cuda, fp16=fp16)
        _warn_of_overflow(large)
        if small_path is None and not alone and exit_layer is None:
            exit_layer = lowest_exit(large)
        small = _load_drafting(utils.split_paths(small_path), task, large) if small_path else ()
        return cls(large, small, exit_layer, alone, precision, small_precision, large_path, small_path)

    def drafted_by(self, small_path: str, task: FairseqTask) -> Pair:
        """The same large model with another small one; see :meth:`load`."""
        small = _load_drafting(utils.split_paths(small_path), task, self.large)
        return dataclasses.replace(self, small=small, small_path=small_path, exit_layer=None, alone=False)

    def drafted_by_exit(self, exit_layer: int | None = None) -> Pair:
        """The same large model with one of its exits, the lowest unless given."""
        layer = lowest_exit(self.large) if exit_layer is None else exit_layer
        return dataclasses.replace(self, small=(), small_path=None, exit_layer=layer, alone=False)

    def drafting_among(self, path: str, task: FairseqTask, flag: str = "--bild-draft-vocab") -> Pair:
        """The same models, which draft among the types of a file; see :meth:`DraftVocabulary.load`."""
        vocabulary = DraftVocabulary.load(path, task.target_dictionary, flag)
        return dataclasses.replace(self, draft_vocabulary=vocabulary)

    def greedy(self) -> Pair:
        """The large model alone."""
        return dataclasses.replace(
            self, small=(), small_path=None, small_precision=None, exit_layer=None, alone=True, draft_vocabulary=None
        )

    def small_alone(self) -> Pair:
        """What drafts, decoding greedily without the large model, and among all types."""
        precision = self.small_precision or self.precision
        if not self.small:
            return dataclasses.replace(
                self, alone=True, precision=precision, small_precision=None, draft_vocabulary=None
            )
        return Pair(self.small, alone=True, precision=precision, large_path=self.small_path)

    @property
    def engines(self) -> list[Engine]:
        """All that run a model of this pair."""
        return self.large_engines + self.small_engines

    @property
    def max_positions(self) -> int:
        """Tokens of the longest output, the end symbol included, that every model can write."""
        return min(model.max_decoder_positions() for model in (*self.large, *self.small))

    @torch.no_grad()
    def readers(
        self, net_input: dict[str, Any], constraints: Constraints, temperature: float = 1.0
    ) -> tuple[Reader, Reader | None]:
        """Runs the encoders on a batch, with the weights that the models have now.

        Args:
            net_input: as fairseq collates it: ``src_tokens`` (batch, source) and ``src_lengths`` (batch,).
            constraints: of the batch.
            temperature: that all logits are divided by.

        Returns:
            the large model's reader and the reader that drafts, if something does, for ``decode``.
        """
        if self._versions() != self._seen:
            self._find_engines()
        net_input = {name: value for name, value in net_input.items() if name != "prev_output_tokens"}
        cuts = iter(self._cuts)
        small = [
            engine.reader(engine.start(net_input), (0, engine.depth), constraints, cut=next(cuts))
            for engine in self.small_engines
        ]
        large = []
        for engine in self.large_engines:
            state = engine.start(net_input)
            if self._exit_shares:
                shallow = engine.reader(state, (0, self.exit_layer), constraints, keep=True, cut=next(cuts))
                small.append(shallow)
                large.append(engine.reader(state, (self.exit_layer, engine.depth), constraints, below=shallow))
            else:
                depth = self.exit_layer if self.alone and self.exit_layer else engine.depth
                large.append(engine.reader(state, (0, depth), constraints))
        return combined(large, constraints, temperature), combined(small, constraints, temperature) if small else None

    def flags(self) -> str:
        """What selects this pair in fairseq-generate."""
        words = ["--path", self.large_path, "--generator", "greedy" if self.alone else "bild"]
        if self.small:
            words += ["--bild-small-path", self.small_path]
        elif self.exit_layer is not None:
            words += ["--bild-exit-layer", str(self.exit_layer)]
        if self.precision != "float32":
            words += ["--bild-precision", self.precision]
        if self.small_precision not in (None, self.precision):
            words += ["--bild-small-precision", self.small_precision]
        if self.draft_vocabulary is not None:
            words += ["--bild-draft-vocab", self.draft_vocabulary.path]
        return shlex.join(words)


# By large model: the task, and what the files were, when a small one was loaded last.
_drafting: WeakKeyDictionary[nn.Module, tuple[FairseqTask, Hashable, list[nn.Module]]] = WeakKeyDictionary()


def _load_drafting(
    paths: Sequence[str], task: FairseqTask, large: Sequence[nn.Module], loading: Loading | None = None
) -> list[nn.Module]:
    """A small model that reads whatever the large one is given; loaded once for as long as nothing has changed.

    fairseq's hub interface builds a generator for every call.
    """
    loading = loading or Loading()
    weight = next(large[0].parameters())
    names = [file for path in paths for file in loading.files(path) if unreadable(file) is None]
    names += [beside for path in paths for beside in sorted(Path(path).parent.glob("dict.*.txt"))]  # checked on loading
    files = [os.stat(name) for name in names]
    key = (
        *(tuple(paths), tuple((file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns) for file in files)),
        *(repr(loading), weight.device, weight.dtype),
    )
    known_task, known_key, small = _drafting.get(large[0], (None, None, []))
    if known_task is not task or known_key != key:
        small = load_small(paths, task, large[0], loading)
        _warn_of_larger(small, large)
        _drafting[large[0]] = task, key, small
    limits = task.max_positions()
    # Tasks of several languages have limits for each pair of them.
    limit = max(pair[0] for pair in limits.values()) if isinstance(limits, dict) else limits[0]
    check_positions(small, min(limit, *(model.encoder.max_positions() for model in large)))
    return small


def _warn_of_overflow(models: Sequence[nn.Module]) -> None:
    """Says so where a T5 is in float16, whose range its hidden states can leave; the text is then none."""
    if any(is_t5(model.decoder) and model.decoder.embed_tokens.weight.dtype is torch.float16 for model in models):
        logger.warning("T5 overflows in float16; leave --fp16 out, or give --bild-precision bfloat16 instead of it")


def _warn_of_larger(small: Sequence[nn.Module], large: Sequence[nn.Module]) -> None:
    """Says so where the small model is the larger one, as after the two were swapped."""
    sizes = [
        sum(weight.numel() for model in models for weight in model.decoder.parameters()) for models in (small, large)
    ]
    if sizes[0] > sizes[1]:
        logger.warning(
            f"the small model's decoder has {sizes[0]:,} weights, the large one's {sizes[1]:,}; are --path and "
            "--bild-small-path swapped?"
        )


# By early-exit model: its exits as models of their own, by layer, and the modules that they were made of.
_exits: WeakKeyDictionary[nn.Module, dict[int, tuple[list[nn.Module], nn.Module]]] = WeakKeyDictionary()


def _exit_model(model: nn.Module, exit_layer: int) -> nn.Module:
    """An exit as a model of its own; the same one while the model's modules are, so that its engine is found again."""
    exits = _exits.setdefault(model, {})
    modules = [*model.encoder.modules(), *model.decoder.modules()]
    if exit_layer not in exits or exits[exit_layer][0] != modules:
        exits[exit_layer] = modules, exit_model(model, exit_layer)
    return exits[exit_layer][1]


def has_exits(models: Sequence[nn.Module]) -> bool:
    """Whether every model is an early-exit one."""
    return all(isinstance(getattr(model, "decoder", None), ExitHeads) for model in models)


def lowest_exit(models: Sequence[nn.Module]) -> int:
    """The lowest trained exit of an early-exit model.

    Raises:
        BildError: the model has no exits.
    """
    if not has_exits(models):
        raise BildError("nothing drafts: the model has no exits, and no small model is given")
    return min(models[0].decoder.exit_layers)


def check_exit(models: Sequence[nn.Module], exit_layer: int) -> None:
    """Refuses an exit that was not trained.

    Raises:
        BildError: naming the exits that there are.
    """
    if not has_exits(models):
        raise BildError("--bild-exit-layer needs an early-exit model in --path; this one has no exits")
    for model in models:
        try:
            model.decoder.check_exit(exit_layer)
        except ValueError as error:
            raise BildError(f"--bild-exit-layer {exit_layer}: {error}") from error


def _exit_of_args(models: Sequence[nn.Module], args: Any, alone: bool) -> int | None:
    """The exit that drafts, or decodes alone; None for greedy decoding at full depth."""
    wanted = option(args, "bild_exit_layer")
    if wanted is not None or alone:
        return wanted
    if not has_exits(models):
        raise BildError(
            "--generator bild needs a small model: --bild-small-path small.pt, or an early-exit model in --path"
        )
    return lowest_exit(models)
