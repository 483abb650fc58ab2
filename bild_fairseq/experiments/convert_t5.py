"""T5, mT5 and Flan-T5 from Hugging Face's folders to fairseq checkpoints, and back.

A converted folder holds `model.pt`, `dict.txt`, `spiece.model`, and in `hf/` the configuration files as they were, for
the way back. `transformers` is needed for neither way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf
from torch import Tensor

from ..errors import BildError
from ..models.t5_config import T5Config, from_namespace
from ..plugin.content import check_content
from ..plugin.files import writing
from ..plugin.light import for_inference, save
from .files import try_folder
from .hf_folder import check_generation, read_config, read_sentinels, read_tensors, safetensors_library
from .t5_shapes import check_shapes
from .t5_vocabulary import Vocabulary, read_vocabulary

MODEL_FILE = "model.pt"
DICT_FILE = "dict.txt"
SPIECE_FILE = "spiece.model"
HF_FOLDER = "hf"

# Kept in `hf/` as they are.
_HF_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
# Names in config.json that T5's architecture options have as well.
_SAME_NAMES = (
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "num_layers",
    "relative_attention_num_buckets",
    "feed_forward_proj",
    "layer_norm_epsilon",
)
# What old folders have and transformers takes no notice of.
_IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
_SHARED = "shared.weight"
_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = ("decoder.output_projection.weight", "lm_head.weight")


def convert(folder: Path, out: Path, rows: int | None = None) -> str:
    """Converts a T5, mT5 or Flan-T5 folder.

    Args:
        folder: with config.json, spiece.model, and model.safetensors or pytorch_model.bin, in shards or not.
        out: folder that is written.
        rows: of the vocabulary; where the other model of a pair has more rows, as many as it has.

    Returns:
        one line that says what was written.

    Raises:
        BildError: the folder is something else, or a library that reads it is missing.
    """
    _check_apart(out, folder, out / HF_FOLDER)
    try_folder("OUT", out / HF_FOLDER)
    config = read_config(folder)
    spiece = folder / SPIECE_FILE
    if not spiece.is_file():
        raise BildError(f"{folder}: has no {SPIECE_FILE}; put the one of the published model that it stems from there")
    vocabulary = read_vocabulary(spiece, config, read_sentinels(folder), rows)
    check_generation(folder, config["pad_token_id"])
    tensors = read_tensors(folder)
    model, arch = to_fairseq(config, tensors, vocabulary, folder)

    with writing(f"OUT {out}"):
        _copy_files(folder, out / HF_FOLDER, spiece, out)
        vocabulary.dictionary.save(str(out / DICT_FILE))
        save(checkpoint(model, arch), out / MODEL_FILE)
    return f"{out / MODEL_FILE}: {_size(model[_EMBEDDINGS[0]], tensors)}, {len(vocabulary.ids)} symbols"


def _check_apart(out: Path, read: Path, *written: Path) -> None:
    """Refuses an output folder that is the one that is read, itself or in a folder that is written in it."""
    if read.resolve() in {path.resolve() for path in (out, *written)}:
        raise BildError(f"{out}: the folder {read} is read, and would be written over; name another one")


def _read_checkpoint(path: Path) -> tuple[T5Config, dict[str, Tensor]]:
    """Options and parameters of a T5 in fairseq."""
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    try:
        check_content(state)
        return from_namespace(state["cfg"]["model"]), state["model"]
    except BildError as error:
        raise BildError(f"{path}: {error}") from error
    except AttributeError as error:
        raise BildError(f"{path}: is no T5 ({error})") from error


def _copy_files(folder: Path, hf: Path, spiece: Path, out: Path) -> None:
    """Copies the configuration files of a folder to `hf`, and `spiece` to `out`; both are made.

    A configuration file that an earlier conversion left in `hf` is removed where `folder` has none.
    """
    hf.mkdir(parents=True, exist_ok=True)
    for name in _HF_FILES:
        (hf / name).unlink(missing_ok=True)
        if (folder / name).is_file():
            shutil.copyfile(folder / name, hf / name)
    if not ((out / SPIECE_FILE).exists() and spiece.samefile(out / SPIECE_FILE)):
        shutil.copyfile(spiece, out / SPIECE_FILE)


def restore(folder: Path, out: Path, checkpoint_path: Path | None = None) -> str:
    """Converts back: writes a folder that transformers loads.

    Args:
        folder: as `convert` wrote it.
        out: folder that is written.
        checkpoint_path: a model trained on from the one in `folder`; that one itself unless given.

    Returns:
        one line that says what was written.

    Raises:
        BildError: the folder or the checkpoint is something else.
    """
    original, spiece = folder / HF_FOLDER, folder / SPIECE_FILE
    if not (original.is_dir() and spiece.is_file()):
        raise BildError(f"{folder}: has no {HF_FOLDER}/ and {SPIECE_FILE}; give a folder that was converted from T5's")
    _check_apart(out, folder)
    _check_apart(out, original)
    try_folder("OUT", out)
    config = read_config(original)
    path = checkpoint_path or folder / MODEL_FILE
    arch, model = _read_checkpoint(path)
    rows = config["vocab_size"] + arch.missing_rows
    vocabulary = read_vocabulary(spiece, config, read_sentinels(original), rows)
    tensors = to_hf(arch, model, vocabulary, path)
    _check_sizes(arch, config, path)

    with writing(f"OUT {out}"):
        _copy_files(original, out, spiece, out)
        _write_config(out, config, tensors[_SHARED].dtype)
        safetensors_library().save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    return f"{out}: {_size(tensors[_SHARED], tensors)}"


def architecture(config: Mapping[str, Any], tied: bool, missing_rows: int = 0) -> T5Config:
    """T5's options from its config.json.

    Args:
        config: config.json.
        tied: whether the output projection is the embedding.
        missing_rows: see `T5Config`.

    Raises:
        BildError: an option is not supported; the message names it.
    """
    sizes = {name: config[name] for name in _SAME_NAMES if name in config}
    options = {
        **sizes,
        "num_decoder_layers": config.get("num_decoder_layers") or config.get("num_layers", T5Config.num_layers),
        "relative_attention_max_distance": config.get("relative_attention_max_distance", 128),
        "scale_decoder_outputs": _scales_outputs(config),
        "dropout": config.get("dropout_rate", 0.1),
    }
    _check_types(options)
    arch = T5Config(**options, tie_word_embeddings=tied, missing_rows=missing_rows)
    _check_activation(config, arch.feed_forward_proj)
    return arch


def _check_types(options: Mapping[str, Any]) -> None:
    """Refuses what is written in JSON as something else than the option is: a number as a string, for instance."""
    for name, wanted in ((option.name, option.type) for option in dataclasses.fields(T5Config)):
        value = options.get(name)
        # Python takes true for an integer.
        fits = type(value) in (int, float) if wanted is float else type(value) is wanted
        if name in options and not fits:
            raise BildError(f"config.json: {name} is {value!r}; it must be of type {wanted.__name__}")


def _check_activation(config: Mapping[str, Any], proj: str) -> None:
    """Refuses other names of the feed-forward layer's activation, which transformers would believe instead."""
    gated = proj.startswith("gated")
    for name, wanted in (("dense_act_fn", "gelu_new" if gated else "relu"), ("is_gated_act", gated)):
        if config.get(name, wanted) != wanted:
            raise BildError(f"config.json: {name} is {config[name]!r}, which does not go with feed_forward_proj {proj}")


def _scales_outputs(config: Mapping[str, Any]) -> bool:
    """Whether outputs are scaled before the projection, which transformers says in three ways."""
    if "scale_decoder_outputs" in config:
        return config["scale_decoder_outputs"]
    mt5 = config["model_type"] == "mt5"
    version = str(config.get("transformers_version", "")).partition(".")[0]
    if mt5 and version.isdigit() and int(version) >= 5:
        return False  # these versions write tie_word_embeddings for every mT5, and scale none
    return config.get("tie_word_embeddings", not mt5)


def tensor_names(arch: T5Config) -> Iterator[tuple[str, str]]:
    """Pairs of names, ours and Hugging Face's, of every tensor but the embeddings and the output projection."""
    feed_forward = {"fc1": "wi", "fc2": "wo"}
    if arch.feed_forward_proj.startswith("gated"):
        feed_forward = {"fc1": "wi_0", "fc1_linear": "wi_1", "fc2": "wo"}
    attention = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}
    for side, depth in (("encoder", arch.num_layers), ("decoder", arch.num_decoder_layers)):
        parts = [("self_attn", "SelfAttention", "self_attn_layer_norm", attention)]
        if side == "decoder":
            parts.append(("encoder_attn", "EncDecAttention", "encoder_attn_layer_norm", attention))
        parts.append(("", "DenseReluDense", "final_layer_norm", feed_forward))
        for layer in range(depth):
            ours = f"{side}.layers.{layer}"
            for number, (module, hf_module, norm, products) in enumerate(parts):
                theirs = f"{side}.block.{layer}.layer.{number}"
                yield f"{ours}.{norm}.weight", f"{theirs}.layer_norm.weight"
                for name, hf_name in products.items():
                    path = ".".join(filter(None, (ours, module, name)))
                    yield f"{path}.weight", f"{theirs}.{hf_module}.{hf_name}.weight"
        table = "relative_attention_bias.weight"
        yield f"{side}.{table}", f"{side}.block.0.layer.0.SelfAttention.{table}"
        yield f"{side}.layer_norm.weight", f"{side}.final_layer_norm.weight"


def to_fairseq(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], vocabulary: Vocabulary, source: Path
) -> tuple[dict[str, Tensor], T5Config]:
    """The parameters by fairseq's names, in the types that they have, and the options that build the model.

    Args:
        config: config.json.
        tensors: by Hugging Face's names.
        vocabulary: of the model.
        source: where they are from, for messages.

    Raises:
        BildError: tensors are missing, or there are some that a T5 does not have.
    """
    unread = {name: tensor for name, tensor in tensors.items() if name not in _IGNORED}
    copies = [unread.pop(name) for name in (_SHARED, *_EMBEDDINGS) if name in unread]
    if not copies or any(not torch.equal(copies[0], copy) for copy in copies):
        raise BildError(f"{source}: encoder and decoder do not share one embedding; that is no T5")
    head = unread.pop(_HEAD[1], copies[0])
    for called, matrix in (("embedding", copies[0]), ("output projection", head)):
        if matrix.dim() != 2:
            raise BildError(f"{source}: the {called} is no matrix; that is no T5")
        if matrix.size(0) != config["vocab_size"]:
            raise BildError(f"{source}: the {called} has {matrix.size(0)} rows, config.json {config['vocab_size']}")
    arch = architecture(config, torch.equal(head, copies[0]), vocabulary.missing_rows)

    model, names = {}, dict(tensor_names(arch))
    for ours, theirs in names.items():
        if theirs not in unread:
            raise BildError(f"{source}: {theirs} is missing; a whole T5 is needed, with encoder and decoder")
        model[ours] = unread.pop(theirs)
    if unread:
        raise BildError(f"{source}: {min(unread)} is no part of a T5; {len(unread)} such tensors")
    # Entries that share their memory are written once.
    model |= dict.fromkeys(_EMBEDDINGS, vocabulary.to_fairseq(copies[0]))
    model[_HEAD[0]] = model[_EMBEDDINGS[0]] if arch.tie_word_embeddings else vocabulary.to_fairseq(head)
    check_shapes(arch, vocabulary.dictionary, model, {**names, _EMBEDDINGS[0]: _SHARED}, source)
    return model, arch


def to_hf(arch: T5Config, model: Mapping[str, Tensor], vocabulary: Vocabulary, source: Path) -> dict[str, Tensor]:
    """The inverse of `to_fairseq`: tensors by Hugging Face's names, each once.

    Raises:
        BildError: the parameters are not those of a T5 with this vocabulary.
    """
    names = dict(tensor_names(arch))
    unread = dict(model)
    tensors = {}
    try:
        for ours, theirs in names.items():
            tensors[theirs] = unread.pop(ours).contiguous()
        embedding, _, head = (unread.pop(name) for name in (*_EMBEDDINGS, _HEAD[0]))
    except KeyError as error:
        raise BildError(f"{source}: {error.args[0]} is missing; that is no T5") from error
    if unread:
        raise BildError(f"{source}: {min(unread)} has no counterpart in Hugging Face's T5; convert a plain t5")
    check_shapes(arch, vocabulary.dictionary, model, {}, source)
    tensors[_SHARED] = vocabulary.to_t5(embedding)
    if not arch.tie_word_embeddings:
        tensors[_HEAD[1]] = vocabulary.to_t5(head)
    return tensors


def checkpoint(model: Mapping[str, Tensor], arch: T5Config) -> dict[str, Any]:
    """A fairseq checkpoint of a model that fairseq has not trained, with a whole configuration as fairseq-train's.

    With the model's options alone fairseq would complete them through Hydra each time that it loads the file.
    """
    args = argparse.Namespace(arch="t5", task="translation", **dataclasses.asdict(arch))
    config = OmegaConf.to_container(convert_namespace_to_omegaconf(args), resolve=True, enum_to_str=True)
    return for_inference({"cfg": config}, dict(model))


def _size(embedding: Tensor, tensors: Mapping[str, Tensor]) -> str:
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{count / 1e6:.1f} million weights in {_type_name(embedding.dtype)}"


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_sizes(arch: T5Config, config: Mapping[str, Any], source: Path) -> None:
    expected = architecture(config, arch.tie_word_embeddings, arch.missing_rows)
    # Dropout is chosen anew in each training.
    for name, value in dataclasses.asdict(dataclasses.replace(expected, dropout=arch.dropout)).items():
        if getattr(arch, name) != value:
            raise BildError(f"{source}: {name} is {getattr(arch, name)}, in {HF_FOLDER}/config.json {value}")


def _write_config(out: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Corrects the weights' type in config.json, if it has changed."""
    written = _type_name(dtype)
    for name in ("dtype", "torch_dtype"):
        if config.get(name, written) != written:
            text = json.dumps(config | {name: written}, indent=2, sort_keys=True)
            (out / "config.json").write_text(f"{text}\n", encoding="utf-8")
