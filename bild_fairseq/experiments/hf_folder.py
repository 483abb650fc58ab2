"""Reads a T5 or mT5 folder in Hugging Face's format: its configuration and its tensors, without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BildError
from .t5_vocabulary import SENTINELS


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a T5 or mT5 folder.

    Raises:
        BildError: there is none, or it is another model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise BildError(f"{folder}: has no config.json; give a folder of T5, mT5 or Flan-T5 in Hugging Face's format")
    config = _read_json(path)
    kind = config.get("model_type")
    if kind not in ("t5", "mt5"):
        raise BildError(f"{path}: is of a {kind} model; only t5 and mt5 can be converted")
    if "quantization_config" in config:
        raise BildError(f"{path}: the model is quantized; convert the one that it was made from")
    for name in ("vocab_size", "pad_token_id", "eos_token_id"):
        if not isinstance(config.get(name), int):
            raise BildError(f"{path}: {name} is {config.get(name)}; one number is needed")
    start = config.get("decoder_start_token_id", config["pad_token_id"])
    if start != config["pad_token_id"]:
        raise BildError(f"{path}: texts start with symbol {start}, not with padding; that is no T5")
    return config


def check_generation(folder: Path, padding: int) -> None:
    """Makes sure that settings of generation, where there are some, start texts with padding, too.

    transformers prefers them to config.json.

    Raises:
        BildError: they have another start.
    """
    path = folder / "generation_config.json"
    start = _read_json(path).get("decoder_start_token_id") if path.is_file() else None
    if start not in (None, padding):
        raise BildError(f"{path}: texts start with symbol {start}, not with padding; that is no T5")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BildError(f"{path}: is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise BildError(f"{path}: holds no JSON object")
    return read


def read_sentinels(folder: Path) -> int:
    """How many sentinels the tokenizer adds behind the pieces."""
    path = folder / "tokenizer_config.json"
    count = _read_json(path).get("extra_ids", SENTINELS) if path.is_file() else SENTINELS
    if type(count) is not int or count < 0:
        raise BildError(f"{path}: extra_ids is {count!r}; a number of sentinels is needed, 0 for none")
    return count


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, from one file or several.

    Raises:
        BildError: there are none, a file is missing, or one cannot be read.
    """
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_pickle)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            # A name is one of a file in this folder, whatever the index says.
            tensors: dict[str, Tensor] = {}
            for shard in _shards(index):
                if not (folder / shard).is_file():
                    raise BildError(f"{folder}: {shard} is missing; {index.name} names it")
                tensors |= read(folder / shard)
            return tensors
    raise BildError(f"{folder}: has neither model.safetensors nor pytorch_model.bin")


def _shards(index: Path) -> list[str]:
    """The names of the files that an index names."""
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise BildError(f"{index}: has no weight_map that says in which file each tensor is")
    return sorted({Path(file).name for file in files.values()})


def safetensors_library() -> Any:
    """The module `safetensors.torch`.

    Raises:
        BildError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise BildError("safetensors is not installed; pip install safetensors") from error
    return safetensors.torch


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    library = safetensors_library()
    try:
        return library.load_file(str(path))
    except Exception as error:  # the library's own class of errors derives from Exception only
        raise BildError(f"{path}: cannot be read: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch do
        raise BildError(f"{path}: is damaged, or holds more than tensors; it is not opened") from error
    if not isinstance(tensors, dict) or not all(map(_is_plain, tensors.values())):
        raise BildError(f"{path}: holds something else than tensors by name")
    return tensors


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor whose numbers are all in memory."""
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
