"""Loading checkpoints: safely, only models that fit the data, and with one line where it cannot be done."""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from ..errors import BildError
from .arrays import stand_ins
from .explain import building_error, reading_error
from .files import unreadable


def allow_fairseq_globals() -> None:
    """Lets torch's safe unpickler read what fairseq puts into checkpoints, and nothing else.

    From torch 2.6 on ``torch.load`` refuses every class that is not allowed by name. These hold data only.
    """
    torch.serialization.add_safe_globals([argparse.Namespace, *stand_ins()])


def explaining_reading(load: Callable[..., dict]) -> Callable[..., dict]:
    """Wraps a function that reads a checkpoint, fairseq's for one, so that it raises BildError, naming the file."""

    @functools.wraps(load)
    def load_or_explain(path: str, *args: Any, **kwargs: Any) -> dict:
        reason = unreadable(path)
        if reason:
            raise BildError(f"{path}: {reason}")
        try:
            return load(path, *args, **kwargs)
        except BildError as error:
            raise BildError(f"{path}: {error}") from error
        except Exception as error:  # whatever a damaged file makes torch and fairseq do
            raise BildError(f"{path}: {reading_error(error)}") from error

    return load_or_explain


@explaining_reading
def read(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint with a model, as it was saved, on the CPU; fairseq changes what it reads.

    Raises:
        BildError: it cannot be read, or is none; one line that names it.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    check_content(state)
    return state


def completing(upgrade: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """Wraps fairseq's upgrade of old checkpoints, so that one with only the model and its options loads."""

    @functools.wraps(upgrade)
    def upgrade_state_dict(state: dict) -> dict:
        if not state.get("optimizer_history") and "best_loss" not in state:
            state["optimizer_history"] = [{"optimizer_name": None, "lr_scheduler_state": {}, "num_updates": 0}]
            state.setdefault("last_optimizer_state", None)
        if "epoch" not in state:
            state.setdefault("extra_state", {})
        return upgrade(state)

    return upgrade_state_dict


def explaining_building(load: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wraps fairseq's ``load_model_ensemble_and_task`` so that it raises BildError, naming the file."""

    @functools.wraps(load)
    def load_model_ensemble_and_task(
        filenames: Sequence[str],
        arg_overrides: dict[str, Any] | None = None,
        task: FairseqTask | None = None,
        strict: bool = True,
        suffix: str = "",
        num_shards: int = 1,
        state: dict | None = None,
    ) -> tuple:
        members, config = [], None
        for filename in filenames:
            if state is None and num_shards == 1:
                state = checkpoint_utils.load_checkpoint_to_cpu(file_of(filename, suffix), arg_overrides)
            try:
                if state is not None:
                    check_content(state)
                member, config, task = load([filename], arg_overrides, task, strict, suffix, num_shards, state)
            except BildError as error:
                raise BildError(f"{filename}: {str(error).removeprefix(f'{filename}: ')}") from error
            except Exception as error:  # fairseq and the models in it raise all kinds
                raise BildError(f"{filename}: {building_error(error)}") from error
            members += member
            state = None
        return members, config, task

    return load_model_ensemble_and_task


def file_of(path: str, suffix: str = "", shard: int = 0, shards: int = 1) -> str:
    """The file that fairseq reads for a path: it may have a suffix, or be a shard of a model."""
    return checkpoint_utils.get_maybe_sharded_checkpoint_filename(path, suffix, shard, shards)


def check_content(state: Any) -> None:
    """Refuses what is no model with its options, and options that ask for a far larger model than the weights are of.

    A size without bounds would be allocated, and a number of layers without bounds built, before it is noticed.
    """
    weights = state.get("model") if isinstance(state, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise BildError("it holds no model (an entry model with named weights)")
    options = _model_options(state)
    known = {*models.MODEL_REGISTRY, *models.ARCH_MODEL_REGISTRY}
    name = options.get("_name") or options.get("arch")
    if name not in known:
        raise BildError(f"its architecture, {name}, is not known here; is it defined by a package for --user-dir?")
    columns = max((weight.size(-1) for weight in weights.values() if weight.dim()), default=1)
    longest = max((size for weight in weights.values() for size in weight.shape), default=1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for option, value in options.items():
        if type(value) is not int or value <= 0:
            continue
        layers = option.endswith("_layers") and value > max(len(weights), 1000)
        dimension = option.endswith("_dim") and value > 16 * longest  # 16: an option that the model does not use
        rows = option.endswith(("_dim", "_positions")) and 4 * value * columns > memory / 4
        if layers or dimension or rows:
            raise BildError(f"its options declare {option} {value}, which its weights do not have")


def _model_options(state: dict) -> dict[str, Any]:
    if isinstance(state.get("args"), argparse.Namespace):
        return vars(state["args"])
    options = _option(state.get("cfg"), "model")
    if options is None:
        raise BildError("it holds no options of its model (an entry args, or model in an entry cfg)")
    return vars(options) if isinstance(options, argparse.Namespace) else dict(options)


def load_large(
    paths: Sequence[str],
    task: FairseqTask,
    overrides: dict[str, Any] | None = None,
    cuda: bool = False,
    fp16: bool = False,
) -> list[nn.Module]:
    """Loads the large model, or the members of an ensemble, ready to decode.

    Args:
        paths: checkpoint files.
        task: the task that they run in; its dictionaries and languages must fit.
        overrides: model options that replace the checkpoint's, as ``--model-overrides``.
        cuda: on the GPU.
        fp16: in half precision.

    Raises:
        BildError: a file cannot be loaded, or holds a model that does not fit; one line that names it.
    """
    loaded = [_load(path, task, overrides) for path in paths]
    for model in loaded:
        model.eval()
        if fp16:
            model.half()
        if cuda:
            model.cuda()
    return loaded


def load_small(
    paths: Sequence[str], task: FairseqTask, like: nn.Module, overrides: dict[str, Any] | None = None
) -> list[nn.Module]:
    """Loads the small model, or the members of an ensemble, ready to decode next to the large model.

    Args:
        paths, task, overrides: as for :func:`load_large`.
        like: the large model; the small one goes to its device and precision.

    Raises:
        BildError: as of :func:`load_large`.
    """
    parameter = next(like.parameters())
    loaded = [_load(path, task, overrides) for path in paths]
    return [model.to(device=parameter.device, dtype=parameter.dtype).eval() for model in loaded]


def _load(path: str, task: FairseqTask, overrides: dict[str, Any] | None) -> nn.Module:
    state = checkpoint_utils.load_checkpoint_to_cpu(file_of(path), overrides)
    try:
        check_content(state)
        _check_fits(path, state, task)
    except BildError as error:
        raise BildError(f"{path}: {error}") from error
    (model,), _ = checkpoint_utils.load_model_ensemble([path], arg_overrides=overrides, task=task, state=state)
    return model


def _check_fits(path: str, state: dict, task: FairseqTask) -> None:
    """Refuses a model of another kind, other languages or other dictionaries than the task's."""
    for part in ("encoder", "decoder"):
        if not any(re.match(rf"(models\.[^.]+\.)?{part}\.", name) for name in state["model"]):
            raise BildError(f"it has no {part}, so it is not an encoder-decoder Transformer")
    for side, dictionary in (("source", task.source_dictionary), ("target", task.target_dictionary)):
        language = _option(task.cfg or getattr(task, "args", None), f"{side}_lang")
        trained_on = _option(_task_options(state), f"{side}_lang")
        if language and trained_on and language != trained_on:
            raise BildError(f"its {side} language is {trained_on}, this data's is {language}")
        beside = Path(path).parent / f"dict.{language}.txt"
        if beside.is_file() and not _begins_with(dictionary, Dictionary.load(str(beside))):
            raise BildError(f"the dictionary beside it, {beside.name}, is not this data's")


def _begins_with(dictionary: Dictionary, beginning: Dictionary) -> bool:
    """Whether a dictionary is another one, or one to whose end a task has added symbols."""
    return dictionary.symbols[: len(beginning)] == beginning.symbols


def _task_options(state: dict) -> Any:
    return state["args"] if state.get("args") is not None else _option(state["cfg"], "task")


def _option(options: Any, name: str) -> Any:
    """An option, of a configuration of any age; None where it is not."""
    if isinstance(options, Mapping):
        return options[name] if name in options else None
    return getattr(options, name, None)


def check_positions(small: Sequence[nn.Module], source_limit: int) -> None:
    """Refuses a small model that cannot read every source that the large one may be given.

    Args:
        small: the members of the small model.
        source_limit: tokens of the longest source that will be translated.

    Raises:
        BildError: naming the option that shortens the sources.
    """
    readable = min(model.encoder.max_positions() for model in small)
    if readable < source_limit:
        raise BildError(
            f"the small model reads at most {readable} source tokens, the large one {source_limit}; "
            f"add --max-source-positions {readable}"
        )
