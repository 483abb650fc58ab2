"""Every place where this package reaches into fairseq's own programs, installed by :func:`install`.

``fairseq-generate`` imports the user directory before it builds its parser, so what is put in place here is there in
time. It relies on the following, and ``tests/plugin/test_plugin.py`` fails if fairseq moves:

- ``fairseq.options.GenerationConfig`` is the dataclass that the parser's generation flags come from;
- ``FairseqConfig.generation`` holds the same class (0.12.3) or an instance of it (0.12.2), for Hydra's store;
- the programs call ``options.parse_args_and_arch`` by attribute, and ``FairseqTask.build_generator``;
- ``checkpoint_utils.load_checkpoint_to_cpu`` is what reads every checkpoint, with ``_upgrade_state_dict``, and
  ``checkpoint_utils.load_model_ensemble_and_task`` what makes models of them;
- ``Trainer`` is made of a configuration, a task, a model and a criterion before the first step;
- ``distributed.utils.broadcast_object`` calls ``_broadcast_object_slow`` for all that is no tensor;
- data sets call ``data_utils.batch_by_size`` by attribute;
- ``FairseqTask.get_batch_iterator`` remembers data sets in ``dataset_to_epoch_iter``;
- encoder layers with a fast path decide by their attribute ``can_use_fastpath`` whether to take it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fairseq.dataclass.configs
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.data import data_utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import hydra_init
from fairseq.distributed import utils as distributed_utils
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.sequence_generator import SequenceGenerator
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from hydra.core.hydra_config import HydraConfig
from torch import Tensor, nn

from ..errors import BildError, require
from . import batches, training
from .checkpoints import Loading, allow_fairseq_globals, completing, explaining_building, explaining_reading
from .ending import one_line_errors, report_at_exit
from .files import unreadable
from .flags import BildGenerationConfig, check, check_overrides, check_stats, like_the_large_model, option, policy
from .generator import BildGenerator
from .pair import Pair
from .search import SearchOptions

logger = logging.getLogger(__name__)


def install() -> None:
    """Puts the flags, the generators and safe loading in place; a second call changes nothing."""
    if options.GenerationConfig is BildGenerationConfig:
        return
    allow_fairseq_globals()
    _install_loading()
    data_utils.batch_by_size = batches.complete(data_utils.batch_by_size)
    FairseqTask.get_batch_iterator = batches.forgetting(FairseqTask.get_batch_iterator)
    _install_flags()
    _install_generators()
    Trainer.__init__ = training.checking(Trainer.__init__)
    distributed_utils._broadcast_object_slow = training.broadcasting(distributed_utils._broadcast_object_slow)
    _switch_off_encoder_fast_path()
    sys.excepthook = one_line_errors(sys.excepthook)
    if HydraConfig.initialized():
        # Hydra prints its own kind of traceback unless it is told to let errors through.
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")


def _install_loading() -> None:
    checkpoint_utils.load_checkpoint_to_cpu = explaining_reading(checkpoint_utils.load_checkpoint_to_cpu)
    checkpoint_utils._upgrade_state_dict = completing(checkpoint_utils._upgrade_state_dict)
    checkpoint_utils.load_model_ensemble_and_task = explaining_building(checkpoint_utils.load_model_ensemble_and_task)


def _install_flags() -> None:
    generation = FairseqConfig.__dataclass_fields__["generation"]
    replacement = BildGenerationConfig if isinstance(generation.default, type) else BildGenerationConfig()
    generation.type = BildGenerationConfig
    generation.default = replacement
    FairseqConfig.__annotations__["generation"] = BildGenerationConfig
    FairseqConfig.generation = replacement
    fairseq.dataclass.configs.GenerationConfig = BildGenerationConfig
    options.GenerationConfig = BildGenerationConfig
    hydra_init()
    options.parse_args_and_arch = _checked_parse(options.parse_args_and_arch)


def _checked_parse(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the flags as soon as they are parsed, before a model is loaded."""

    @functools.wraps(parse)
    def parse_args_and_arch(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parser.error = functools.partial(_parser_error, parser, parser.error)
        parsed = parse(parser, *args, **kwargs)
        namespace = parsed[0] if isinstance(parsed, tuple) else parsed
        if hasattr(namespace, "generator"):
            _check_generating(namespace)
        return parsed

    return parse_args_and_arch


def _check_generating(namespace: argparse.Namespace) -> None:
    """Checks the flags of a program that generates; with this package's generators it then reports when it ends."""
    like_the_large_model(namespace)
    check(namespace)
    if namespace.generator == "beam":
        return
    check_stats(namespace, [*_large_files(namespace), *_data_files(namespace)])
    check_overrides("--model-overrides", namespace.model_overrides)
    _check_data(namespace)
    if sys.stdout is None and not namespace.results_path:
        raise BildError("standard output is closed, so nothing can be printed; redirect it to a file")
    # A full disk would make every line of the log a traceback.
    logging.raiseExceptions = False
    FairseqTask.build_generator = _reporting(FairseqTask.build_generator)


def _parser_error(parser: argparse.ArgumentParser, error: Callable[[str], Any], message: str) -> None:
    if "--bild-" in message or "--generator" in message:
        parser.exit(2, f"bild_fairseq: {message}\n")
    error(message)


def _large_files(namespace: argparse.Namespace) -> list[str]:
    """The files of the large model, each of which can be read."""
    if not namespace.path:
        raise BildError("--path is missing; name the large model's checkpoint")
    shards = namespace.checkpoint_shard_count
    require(shards >= 1, "checkpoint_shard_count", shards, "1 or more")
    loading = Loading(suffix=namespace.checkpoint_suffix, shards=shards)
    files = [file for path in utils.split_paths(namespace.path) for file in loading.files(path)]
    for file in files:
        reason = unreadable(file)
        if reason:
            raise BildError(f"--path {file}: {reason}")
    return files


def _data_files(namespace: argparse.Namespace) -> list[str | os.PathLike]:
    """Dictionaries, binarized text, and the text to translate."""
    folders = map(Path, utils.split_paths(getattr(namespace, "data", None) or ""))
    patterns = itertools.product(folders, ("dict.*.txt", "*.bin", "*.idx"))
    return [*(file for folder, pattern in patterns for file in folder.glob(pattern)), getattr(namespace, "input", "-")]


def _check_data(namespace: argparse.Namespace) -> None:
    """Refuses a data folder that is not there; and one language without the other where fairseq, which then ignores it,
    would take another direction."""
    given = [getattr(namespace, f"{side}_lang", None) for side in ("source", "target")]
    folder = (utils.split_paths(getattr(namespace, "data", None) or "") or [""])[0]
    if namespace.task != "translation" or not folder:
        return
    if not os.path.isdir(folder):
        raise BildError(f"{folder}: no such folder; give one that fairseq-preprocess has made")
    if None not in given:
        return
    found = data_utils.infer_language_pair(folder)
    if None in found:
        raise BildError(f"{folder}: its files do not name the languages; give both -s and -t")
    for flag, wanted, taken in zip(("-s", "-t"), given, found, strict=True):
        if wanted is not None and wanted != taken:
            raise BildError(f"{flag} {wanted} alone has no effect, and the data's files are of {taken}; give -s and -t")


def _reporting(build: Callable[..., Any]) -> Callable[..., Any]:
    """Has a program report on its generator when it ends."""
    if hasattr(build, "reports"):
        return build

    @functools.wraps(build)
    def build_generator(*args: Any, **kwargs: Any) -> Any:
        generator = build(*args, **kwargs)
        if isinstance(generator, BildGenerator):
            report_at_exit(generator)
        return generator

    build_generator.reports = True
    return build_generator


def _install_generators() -> None:
    for name, task in tasks.TASK_REGISTRY.items():
        if "build_generator" in vars(task):
            task.build_generator = _guarded(task.build_generator, name)
    FairseqTask.build_generator = _choosing(FairseqTask.build_generator)


def _guarded(build: Callable[..., Any], task: str) -> Callable[..., Any]:
    """For tasks that build a generator of their own: refuses instead of ignoring ``--generator``."""

    @functools.wraps(build)
    def build_generator(self: FairseqTask, models: Any, args: Any, *more: Any, **kwargs: Any) -> Any:
        generator = build(self, models, args, *more, **kwargs)
        wanted = str(option(args, "generator"))
        if wanted != "beam" and not isinstance(generator, (BildGenerator, SequenceScorer)):
            raise BildError(f"--task {task} builds its own generator; --generator {wanted} needs another task")
        return generator

    return build_generator


def _choosing(build: Callable[..., Any]) -> Callable[..., Any]:
    """fairseq's ``build_generator``, or this package's if ``--generator`` asks for it."""

    @functools.wraps(build)
    def build_generator(
        self: FairseqTask,
        models: Sequence[nn.Module],
        args: Any,
        seq_gen_cls: type | None = None,
        extra_gen_cls_kwargs: dict[str, Any] | None = None,
        prefix_allowed_tokens_fn: Callable | None = None,
    ) -> Any:
        check(args)
        if str(option(args, "generator")) == "beam" or option(args, "score_reference"):
            return build(self, models, args, seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn)
        # fairseq reads this one from either.
        allowed = prefix_allowed_tokens_fn or getattr(args, "prefix_allowed_tokens_fn", None)
        if seq_gen_cls is not None or allowed is not None:
            raise BildError(f"{type(self).__name__} asks for a search that --generator {args.generator} lacks")
        return _build(self, models, args, extra_gen_cls_kwargs or {})

    return build_generator


def _build(task: FairseqTask, models: Sequence[nn.Module], args: Any, extra: dict[str, Any]) -> BildGenerator:
    for name, value in extra.items():
        if name not in ("lm_weight", "eos", "symbols_to_strip_from_output") and value is not None:
            raise BildError(f"--generator {args.generator} does not support {name}")
    if option(args, "beam") != 1:
        logger.info("--generator %s is greedy: --beam %d becomes 1", args.generator, option(args, "beam"))
        args.beam = 1
    return BildGenerator(
        Pair.from_args(models, task, args),
        task.target_dictionary,
        policy(args),
        SearchOptions.from_args(args),
        source_lengths=functools.partial(source_lengths, pad=task.target_dictionary.pad()),
        eos=extra.get("eos"),
        symbols_to_strip_from_output=extra.get("symbols_to_strip_from_output"),
        stats_path=option(args, "bild_stats"),
        max_batch=option(args, "bild_max_batch"),
    )


def _switch_off_encoder_fast_path() -> None:
    """Makes every fairseq encoder layer compute as it does in training.

    Once loaded, the post-norm encoder layers of fairseq 0.12.2 call a private fused kernel of PyTorch, without the
    mask type that PyTorch has asked for since 1.13, and fail on any padded batch (fairseq issue 4858). Other versions
    of fairseq have no such path and stay as they are.
    """
    if "can_use_fastpath" in TransformerEncoderLayerBase.__init__.__code__.co_names:
        # Layers assign the attribute in their constructor, so the class takes no notice of that.
        TransformerEncoderLayerBase.can_use_fastpath = property(lambda layer: False, lambda layer, value: None)


def source_lengths(net_input: dict[str, Any], pad: int) -> Tensor:
    """Source lengths as this version of fairseq counts them for ``--match-source-len``: (batch,).

    0.12.3 counts the end symbol, 0.12.2 does not.
    """
    lengths = net_input["src_tokens"].ne(pad).sum(dim=1)
    counts_end = "src_lengths" in SequenceGenerator._generate.__code__.co_consts
    return lengths if counts_end else lengths - 1
