"""Loading checkpoints: safely, only models that fit the data, and with one line where it cannot be done."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from fairseq import checkpoint_utils, models, utils
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from ..errors import BildError
from .arrays import stand_ins
from .explain import building_error, reading_error
from .files import unreadable

logger = logging.getLogger(__name__)

# By model: the file that it was loaded from, and the options of the task that it was trained in.
_origins: WeakKeyDictionary[nn.Module, tuple[str, Any]] = WeakKeyDictionary()


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
        if not isinstance(state, Mapping):
            raise BildError("it is damaged, or no checkpoint at all")
        if not state.get("optimizer_history") and "best_loss" not in state:
            state["optimizer_history"] = [{"optimizer_name": None, "lr_scheduler_state": {}, "num_updates": 0}]
            state.setdefault("last_optimizer_state", None)
        if "epoch" not in state:
            state.setdefault("extra_state", {})
        return upgrade(state)

    return upgrade_state_dict


def explaining_building(load: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wraps fairseq's ``load_model_ensemble_and_task`` so that it raises BildError, naming the file.

    Where it has read a file itself, that is remembered for :func:`check_task`.
    """

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
            read_before = state is not None
            if not read_before:
                state = _whole_model(filename, Loading(arg_overrides, suffix, num_shards))
            try:
                if state is None:
                    member, config, task = load([filename], arg_overrides, task, strict, suffix, num_shards)
                else:
                    check_content(state)
                    whole = strict or num_shards > 1
                    member, config, task = load([filename], arg_overrides, task, whole, suffix, 1, state)
            except BildError as error:
                raise BildError(f"{filename}: {str(error).removeprefix(f'{filename}: ')}") from error
            except Exception as error:  # fairseq and the models in it raise all kinds
                raise BildError(f"{filename}: {building_error(error)}") from error
            members += member
            if not read_before:
                _origins.update((model, (filename, _option(config, "task"))) for model in member)
            state = None
        return members, config, task

    return load_model_ensemble_and_task


def _whole_model(path: str, how: Loading) -> dict | None:
    """A checkpoint that has all of its model's weights; None for shards that fairseq has to join.

    Of shards that say nothing about joining them fairseq takes the last one for the model, which must then be whole.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(how.files(path)[-1], how.overrides)
    return None if how.shards > 1 and "fsdp_metadata" in state else state


@dataclass(frozen=True)
class Loading:
    """How fairseq is to read checkpoints.

    Args:
        overrides: model options that replace the checkpoint's, as ``--model-overrides``.
        suffix: of the files' names, as ``--checkpoint-suffix``.
        shards: in how many files each model is, as ``--checkpoint-shard-count``.
    """

    overrides: dict[str, Any] | None = None
    suffix: str = ""
    shards: int = 1

    def files(self, path: str) -> list[str]:
        """The files that fairseq reads for a path: its name may get a suffix, or a shard's number."""
        name = checkpoint_utils.get_maybe_sharded_checkpoint_filename
        return [name(path, self.suffix, shard, self.shards) for shard in range(self.shards)]


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


def load_large(paths: Sequence[str], task: FairseqTask, cuda: bool = False, fp16: bool = False) -> list[nn.Module]:
    """Loads the large model, or the members of an ensemble, ready to decode.

    Args:
        paths: checkpoint files.
        task: the task that they run in; its dictionaries and languages must fit.
        cuda: on the GPU.
        fp16: in half precision.

    Raises:
        BildError: a file cannot be loaded, or holds a model that does not fit; one line that names it.
    """
    loaded = [_load(path, task, Loading()) for path in paths]
    for model in loaded:
        model.eval()
        if fp16:
            model.half()
        if cuda:
            model.cuda()
    return loaded


def load_small(
    paths: Sequence[str], task: FairseqTask, like: nn.Module, loading: Loading | None = None
) -> list[nn.Module]:
    """Loads the small model, or the members of an ensemble, ready to decode next to the large model.

    Args:
        paths, task: as for :func:`load_large`.
        like: the large model; the small one goes to its device and precision.
        loading: how the checkpoints are read.

    Raises:
        BildError: as of :func:`load_large`.
    """
    parameter = next(like.parameters())
    loaded = [_load(path, task, loading or Loading()) for path in paths]
    return [model.to(device=parameter.device, dtype=parameter.dtype).eval() for model in loaded]


def _load(path: str, task: FairseqTask, how: Loading) -> nn.Module:
    state = _whole_model(path, how)
    if state is not None:
        try:
            check_content(state)
            _check_parts(state)
            _check_fits(path, _task_options(state), task)
        except BildError as error:
            raise BildError(f"{path}: {error}") from error
    options = {"strict": how.shards == 1, "suffix": how.suffix, "num_shards": how.shards}
    (model,), _ = checkpoint_utils.load_model_ensemble([path], how.overrides, task, state=state, **options)
    check_task([model], task)
    return model


def _check_parts(state: dict) -> None:
    """Refuses a model of another kind."""
    for part in ("encoder", "decoder"):
        if not any(re.match(rf"(models\.[^.]+\.)?{part}\.", name) for name in state["model"]):
            raise BildError(f"it has no {part}, so it is not an encoder-decoder Transformer")


def check_task(loaded: Sequence[nn.Module], task: FairseqTask) -> None:
    """Refuses models that were trained for other languages or other dictionaries than a task's; looks once.

    Args:
        loaded: models; one that comes from no checkpoint fits.

    Raises:
        BildError: naming the checkpoint.
    """
    for model in loaded:
        if model in _origins:
            path, options = _origins[model]
            try:
                _check_fits(path, options, task)
            except BildError as error:
                raise BildError(f"{path}: {error}") from error
            del _origins[model]


def _check_fits(path: str, trained_in: Any, task: FairseqTask) -> None:
    """Refuses other languages than the task's, and a dictionary beside the checkpoint that is not the task's.

    Warns if the data that the checkpoint was trained on is still there and has another dictionary.
    """
    given = task.cfg or getattr(task, "args", None)
    for side in ("source", "target"):
        language, trained_on = (_option(options, f"{side}_lang") for options in (given, trained_in))
        if language and trained_on and language != trained_on:
            raise BildError(
                f"its {side} language is {trained_on}, this data's is {language}; choose data of its direction (-s, -t)"
            )
    for side in ("source", "target"):
        name, dictionary = f"dict.{_option(given, f'{side}_lang')}.txt", getattr(task, f"{side}_dictionary", None)
        if not _is_beginning(Path(path).parent / name, dictionary):
            raise BildError(f"the dictionary beside it, {name}, is not this data's")
        data = _option(trained_in, "data")
        for folder in utils.split_paths(data) if isinstance(data, str) else ():
            if not _is_beginning(Path(folder) / name, dictionary):
                logger.warning(
                    "%s was trained on %s, whose %s is not this data's: the text is wrong if that is still the "
                    "dictionary that it was trained with",
                    *(path, folder, name),
                )


def _is_beginning(file: Path, dictionary: Dictionary | None) -> bool:
    """Whether a dictionary is one in a file, to whose end a task may have added symbols; or there is no such file."""
    if dictionary is None or not os.path.isfile(file):
        return True
    try:
        beginning = Dictionary.load(str(file))
    except Exception:  # fairseq raises bare ones where it is none
        return False
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
