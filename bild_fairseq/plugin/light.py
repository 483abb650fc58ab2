"""Light checkpoints: a model and its options, without the state of its training.

A training checkpoint is six times as large as its model in half precision: it holds float32 weights and the two
moments of Adam.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..errors import BildError
from .checkpoints import read
from .files import replacing

# Options that name folders of the machine that trained the model; whoever uses it gives them anew.
_FOLDERS = {
    "data": "data-bin",
    "save_dir": "checkpoints",
    "user_dir": None,
    "plasma_path": "plasma",
    "finetune_from_model": None,
}


def write_light(paths: Sequence[Path], out: Path, half: bool = True, keep_folders: bool = False) -> None:
    """Writes an ordinary fairseq checkpoint with what inference needs of one training checkpoint, or of several.

    Args:
        paths: checkpoints of one training; the model is the mean of theirs, all else is that of the first one.
        out: file to write, whose folder is made.
        half: in half precision. fairseq reads it back into float32 unless ``--fp16`` is given.
        keep_folders: leave the options that name folders of this machine as they are.

    Raises:
        BildError: a checkpoint cannot be read, or is of another model than the first one.
    """
    states = [read(path) for path in paths]
    newest = states[0]
    for path, state in zip(paths, states, strict=True):
        if state["model"].keys() != newest["model"].keys():
            raise BildError(f"{path}: its model has other weights than that in {paths[0]}")
    options = {name: newest.get(name) for name in ("args", "cfg")}
    out.parent.mkdir(parents=True, exist_ok=True)
    light = for_inference(newest, mean([state["model"] for state in states], half))
    save({**light, **(options if keep_folders else _without_folders(options))}, out)


def save(state: Mapping[str, Any], out: Path) -> None:
    """Writes a checkpoint at once, or not at all.

    Raises:
        OSError: it cannot be written; the disk is full, for instance.
        BildError: something else than a file is there.
    """
    with replacing(out) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # what torch makes of a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def for_inference(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a fairseq checkpoint must hold to be loaded for inference: the given weights, and all else of ``state``."""
    extra_state = state.get("extra_state") or {}
    return {
        "args": state.get("args"),
        "cfg": state.get("cfg"),
        "model": weights,
        "criterion": None,
        "optimizer_history": [{"num_updates": 0, **_last(state.get("optimizer_history")), "lr_scheduler_state": {}}],
        "task_state": {},
        "extra_state": {"epoch": extra_state.get("train_iterator", {}).get("epoch", 1)},
        "last_optimizer_state": None,
    }


def _last(history: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    return history[-1] if history else {}


def last_epochs(save_dir: Path, count: int) -> list[Path]:
    """The checkpoints of a training's last epochs, newest first: as many as there are up to ``count``, or none."""
    epochs = {
        int(match[1]): path
        for path in save_dir.glob("checkpoint*.pt")
        if (match := re.fullmatch(r"checkpoint(\d+)\.pt", path.name))
    }
    return [epochs[epoch] for epoch in sorted(epochs, reverse=True)[:count]]


def mean(models: Sequence[dict[str, Tensor]], half: bool) -> dict[str, Tensor]:
    """The mean of several models' weights, in their own precision or in half.

    Weights that share their memory, as tied embeddings do, share it in the result as well, or the file would hold the
    same matrix three times.
    """
    shared: dict[tuple, Tensor] = {}
    result = {}
    for name, weight in models[0].items():
        if not weight.is_floating_point():
            result[name] = weight
            continue
        where = (weight.data_ptr(), weight.shape) if weight.numel() else name
        if where not in shared:
            total = weight if len(models) == 1 else torch.stack([model[name].float() for model in models]).mean(dim=0)
            shared[where] = total.half() if half else total.to(weight.dtype)
        result[name] = shared[where]
    return result


def _without_folders(value: Any, name: str = "") -> Any:
    if name in _FOLDERS:
        return _FOLDERS[name]
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_without_folders(vars(value)))
    if isinstance(value, dict):
        return {key: _without_folders(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and os.path.isabs(value):
        return PurePosixPath(value).name
    return value
