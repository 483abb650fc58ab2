"""Loading checkpoints: safely, and only small models that fit the large one and the data."""

from __future__ import annotations

import argparse
import functools
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask
from torch import nn

from ..errors import BildError

# What torch.load reports of a file that is no checkpoint, is cut off, or holds what is not allowed.
_LOAD_ERRORS = (
    OSError,
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    ValueError,
    AttributeError,
    TypeError,
)


def allow_fairseq_globals() -> None:
    """Lets torch's safe unpickler read what fairseq puts into checkpoints, and nothing else.

    From torch 2.6 on ``torch.load`` refuses every class that is not allowed by name. These hold data only.
    """
    scalar = np.float64(0).__reduce__()[0]
    # NumPy 2 moved it; checkpoints name the place that their NumPy had.
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    torch.serialization.add_safe_globals([argparse.Namespace, np.dtype, *scalars, *dtypes])


def with_readable_errors(load: Callable[..., dict]) -> Callable[..., dict]:
    """Wraps fairseq's ``load_checkpoint_to_cpu`` so that it raises BildError, naming the file."""

    @functools.wraps(load)
    def load_or_explain(path: str, *args: Any, **kwargs: Any) -> dict:
        try:
            return load(path, *args, **kwargs)
        except _LOAD_ERRORS as error:
            raise BildError(f"{path}: cannot load this checkpoint: {_explain(error)}") from error

    return load_or_explain


def _explain(error: Exception) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return f"it holds {refused[1]}, not only data, and could run code; it is not opened"
    if isinstance(error, pickle.UnpicklingError):
        # torch's own words advise to load it unsafely.
        return "it is damaged, or no checkpoint at all"
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def load_large(paths: Sequence[str], task: FairseqTask, cuda: bool = False, fp16: bool = False) -> list[nn.Module]:
    """Loads the large model, or the members of an ensemble, ready to decode.

    Args:
        paths: checkpoint files.
        task: the task that they run in.
        cuda: on the GPU.
        fp16: in half precision.

    Raises:
        BildError: a file cannot be loaded; one line that names it.
    """
    models, _ = checkpoint_utils.load_model_ensemble(paths, task=task)
    for model in models:
        model.eval()
        if fp16:
            model.half()
        if cuda:
            model.cuda()
    return models


def load_small(paths: Sequence[str], task: FairseqTask, like: nn.Module) -> list[nn.Module]:
    """Loads the small model, or the members of an ensemble, ready to decode next to the large model.

    Args:
        paths: checkpoint files.
        task: the task that the large model runs in; its dictionaries and languages must fit.
        like: the large model; the small one goes to its device and precision.

    Raises:
        BildError: a file cannot be loaded, or holds a model that does not fit; one line that names it.
    """
    parameter = next(like.parameters())
    models = []
    for path in paths:
        state = with_readable_errors(checkpoint_utils.load_checkpoint_to_cpu)(path)
        _check_fits(path, state, task)
        try:
            members, _ = checkpoint_utils.load_model_ensemble([path], task=task, state=state)
        except _LOAD_ERRORS as error:
            raise BildError(f"{path}: cannot build the small model: {_explain(error)}") from error
        models += members
    return [model.to(device=parameter.device, dtype=parameter.dtype).eval() for model in models]


def _check_fits(path: str, state: dict, task: FairseqTask) -> None:
    weights = state.get("model") or {}
    sides = (
        ("source", "encoder", task.source_dictionary),
        ("target", "decoder", task.target_dictionary),
    )
    for side, part, dictionary in sides:
        embedding = weights.get(f"{part}.embed_tokens.weight")
        if embedding is None:
            raise BildError(f"{path}: has no {part}, so it is not an encoder-decoder Transformer")
        if embedding.size(0) != len(dictionary):
            raise BildError(
                f"{path}: was trained with another {side} dictionary ({embedding.size(0)} symbols, this data "
                f"has {len(dictionary)}); train it with --srcdict and --tgtdict of the large model"
            )
    for side, language, dictionary in (
        ("source", getattr(task.cfg, "source_lang", None), task.source_dictionary),
        ("target", getattr(task.cfg, "target_lang", None), task.target_dictionary),
    ):
        trained_on = getattr(_task_config(state), f"{side}_lang", None)
        if language and trained_on and language != trained_on:
            raise BildError(f"{path}: its {side} language is {trained_on}, this data's is {language}")
        beside = Path(path).parent / f"dict.{language}.txt"
        if beside.is_file() and Dictionary.load(str(beside)) != dictionary:
            raise BildError(f"{path}: the dictionary beside it, {beside.name}, is not this data's")


def _task_config(state: dict) -> Any:
    config = state.get("cfg")
    return state.get("args") if config is None else config.get("task")


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
