"""Loading checkpoints: safely, only models that fit the data, and with one line where it cannot be done."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.tasks import FairseqTask
from torch import nn

from ..errors import BildError
from .arrays import stand_ins
from .content import check_content, check_parts, option_in, task_options
from .explain import building_error, reading_error
from .files import unreadable
from .fits import check_fits, check_task, remember


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
                remember(member, filename, option_in(config, "task"))
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
            check_parts(state)
        except BildError as error:
            raise BildError(f"{path}: {error}") from error
        check_fits(path, task_options(state), task)
    options = {"strict": how.shards == 1, "suffix": how.suffix, "num_shards": how.shards}
    (model,), _ = checkpoint_utils.load_model_ensemble([path], how.overrides, task, state=state, **options)
    check_task([model], task)
    return model
