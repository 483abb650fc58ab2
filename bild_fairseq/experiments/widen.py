"""Checkpoints of the same function, but wider or deeper: what decoding costs at a size that nobody has trained.

Net2Net (Chen et al., 2016) with every unit repeated the same number of times. A hidden state of the wide model is the
narrow one's, several times over, so layer norms see the same mean and variance. A matrix is repeated along both sides
and divided by the number of repetitions; attention gets more heads of the same size. Every weight is stored and read
as in a trained model of that size: matrices are dense, and nothing is shared that such a model would not share.
"""

from __future__ import annotations

import copy
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.bart import BARTModel
from fairseq.models.transformer import (
    DEFAULT_MAX_SOURCE_POSITIONS,
    DEFAULT_MAX_TARGET_POSITIONS,
    TransformerConfig,
    TransformerModel,
)
from fairseq.modules import SinusoidalPositionalEmbedding
from torch import Tensor

from ..errors import BildError
from ..models import EarlyExitBARTModel, EarlyExitTransformerModel
from ..plugin.checkpoints import read
from ..plugin.files import unwritable, writing
from ..plugin.light import for_inference, save

# Parts of a model whose options Hydra's configurations may keep apart: "encoder_layers", or "encoder": {"layers": ...}.
_PARTS = ("encoder", "decoder", "quant_noise")
_MODELS = (TransformerModel, BARTModel, EarlyExitTransformerModel, EarlyExitBARTModel)

_LAYER = r"(encoder\.layers\.\d+|decoder\.(layers|exit_own_layers\.\d+)\.\d+)\."
_PROJECTION = r"((self|encoder)_attn\.[qkv]_proj|(self|encoder)_attn\.out_proj|fc1|fc2)"
_LAYER_NORM = r"(self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm|attn_ln|ffn_layernorm)"
# From units to units: repeated along both sides.
_MATRIX = re.compile(rf"{_LAYER}{_PROJECTION}\.weight|decoder\.project_(in|out)_dim\.weight")
# From tokens or positions to units, or from units to tokens: every row is repeated.
_TABLE = re.compile(
    r"(encoder|decoder)\.embed_(tokens|positions)\.weight"
    r"|decoder\.(output_projection|exit_output_projections\.\d+)\.weight"
)
# A number for each unit, or for each attention head.
_VECTOR = re.compile(
    rf"{_LAYER}({_PROJECTION}\.bias|{_LAYER_NORM}\.(weight|bias)|c_attn|w_resid)"
    r"|(encoder|decoder)\.(layer_norm|layernorm_embedding)\.(weight|bias)"
    r"|decoder\.exit_layer_norms\.\d+\.(weight|bias)"
)
_VERSION = re.compile(r"(encoder|decoder)\.version")
# What fairseq computes: position tables, and the copies of encoder weights that 0.12.2 makes when it loads them.
_COMPUTED = re.compile(
    r"(encoder|decoder)\.embed_positions\.(weights|_float_tensor)"
    r"|encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)"
)
# The last thing before a layer adds to its input; `attn_ln` is NormFormer's norm behind the self-attention.
_LAYER_OUTPUT = re.compile(rf"{_LAYER}((self|encoder)_attn\.out_proj|fc2|attn_ln)\.(weight|bias)")


def widen_file(path: Path, out: Path, times: int, deepen: int = 1, half: bool = False) -> tuple[int, int]:
    """Reads a checkpoint and writes a wider or deeper one of the same function; see :func:`widen`.

    Returns:
        The number of weights before and after; what is shared counts once.

    Raises:
        BildError: a file cannot be read or written, or the model cannot be widened.
    """
    reason = unwritable(out)
    if reason:
        raise BildError(f"{out}: {reason}")
    if out.exists() and path.exists() and out.samefile(path):
        raise BildError(f"{out}: is the checkpoint that is read; give another file to write")
    state = read(path)
    try:
        wide = widen(state, times, deepen, half)
    except BildError as error:
        raise BildError(f"{path}: {error}") from error
    with writing(str(out)):
        save(wide, out)
    return count_weights(state["model"]), count_weights(wide["model"])


def count_weights(weights: Mapping[str, Tensor]) -> int:
    """How many weights a model has; those that lie in the same memory count once."""
    skipped = (_VERSION, _COMPUTED)
    own = [weight for name, weight in weights.items() if not any(kind.fullmatch(name) for kind in skipped)]
    return sum({weight.data_ptr(): weight.numel() for weight in own}.values())


def widen(state: Mapping[str, Any], times: int, deepen: int = 1, half: bool = False) -> dict[str, Any]:
    """Makes a checkpoint of the same function with more units, and on request with more layers.

    Sinusoidal positions, which fairseq computes from the width, become learned ones with the same values. An output
    projection that shares the embeddings goes on doing so where only it reads the final layer norms, which are then
    scaled; elsewhere it gets weights of its own.

    Args:
        state: a checkpoint as ``torch.load`` gives it, of a plain Transformer, of BART, or of an early-exit version
            of one of them.
        times: how many times as wide the model becomes: embeddings, hidden states, feed-forward layers, and the
            number of attention heads.
        deepen: how many times as many layers encoder and decoder get. The new layers are copies of the old ones, on
            top of them, so that exits stay where they are. Their last matrices are zero: they add nothing.
        half: stores matrices in float16; positions, norms and biases stay in float32. No more is rounded than in the
            checkpoint itself if that is in float16 and ``times`` is a power of 4.

    Returns:
        A checkpoint for inference, without an optimizer's state, to be written with ``torch.save``.

    Raises:
        BildError: the model has something that cannot be widened, or is post-norm and so cannot be deepened.
    """
    if min(times, deepen) < 1:
        raise BildError(f"{times} times as wide and {deepen} times as deep: both must be 1 or more")
    if "model" not in state or not _configs(state):
        raise BildError("holds no weights, or not the options that its model was made with")
    options = _complete_options(_configs(state)[0])
    _check_options(options)
    weights = {name: weight for name, weight in state["model"].items() if not _COMPUTED.fullmatch(name)}
    _check_names(weights)
    _check_sizes(weights, options)
    changes = _wide_options(options, times, deepen)
    if not options.no_token_positional_embeddings:
        changes |= {"encoder_learned_pos": True, "decoder_learned_pos": True}
        weights |= _sinusoidal_tables(options)
    if deepen > 1:
        weights |= _added_layers(weights, options, deepen)
    tied = options.share_all_embeddings or options.share_decoder_input_output_embed
    norms = _output_norms(weights, options) if tied else []
    if tied and not norms:
        changes |= {"share_all_embeddings": False, "share_decoder_input_output_embed": False}
        weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"]
    factors = _factors(weights, times, norms, scaled_embeddings=not options.no_scale_embedding)
    return _for_inference(state, changes, dict(_repeated(weights, factors, times, half)))


def _configs(state: Mapping[str, Any]) -> list[Any]:
    """A model's options: up to fairseq 0.10 a namespace, then a part of a configuration; sometimes both."""
    both = (state.get("args"), (state.get("cfg") or {}).get("model"))
    return [config for config in both if config is not None]


def _entries(config: Any) -> dict[str, Any]:
    return vars(config) if isinstance(config, Namespace) else config


def _complete_options(config: Any) -> TransformerConfig:
    """All options of a model, with the defaults of its architecture where the checkpoint names none."""
    entries = Namespace()
    for name, value in copy.deepcopy(_entries(config)).items():
        if name in _PARTS and isinstance(value, dict):
            vars(entries).update({f"{name}_{rest}": option for rest, option in value.items()})
        else:
            setattr(entries, name, value)
    arch = getattr(entries, "_name", None) or getattr(entries, "arch", None)
    if ARCH_MODEL_REGISTRY.get(arch) not in _MODELS:
        raise BildError(f"{arch} models cannot be widened; Transformers, BART and their early-exit versions can")
    ARCH_CONFIG_REGISTRY[arch](entries)
    return TransformerConfig.from_namespace(entries)


def _check_options(options: TransformerConfig) -> None:
    noise, sides = options.quant_noise, (options.encoder, options.decoder)
    refused = {
        "--adaptive-input": options.adaptive_input,
        "--adaptive-softmax-cutoff": options.adaptive_softmax_cutoff,
        "--base-layers": options.base_layers,
        "--char-inputs": options.char_inputs,
        "--merge-src-tgt-embed": getattr(options, "merge_src_tgt_embed", False),
        "--quant-noise-pq": noise.pq,
        "--quant-noise-scalar": noise.scalar,
        "--encoder-layers-to-keep or --decoder-layers-to-keep": any(side.layers_to_keep for side in sides),
        "xFormers attention": any(side.xformers_att_config for side in sides),
    }
    for name, value in refused.items():
        if value:
            raise BildError(f"a model with {name} cannot be widened")


def _check_names(weights: Mapping[str, Tensor]) -> None:
    for name in weights:
        if not any(kind.fullmatch(name) for kind in (_MATRIX, _TABLE, _VECTOR, _VERSION)):
            raise BildError(f"a model with {name} cannot be widened: no weight of that name is known here")


def _check_sizes(weights: Mapping[str, Tensor], options: TransformerConfig) -> None:
    for name, side in (("encoder", options.encoder), ("decoder", options.decoder)):
        last = weights.get(f"{name}.layers.{side.layers - 1}.fc1.weight")
        above = f"{name}.layers.{side.layers}.fc1.weight" in weights
        if last is None or last.shape != (side.ffn_embed_dim, side.embed_dim) or above:
            raise BildError(f"the weights of the {name} do not fit the options that the checkpoint names")


def _wide_options(options: TransformerConfig, times: int, deepen: int) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "decoder_input_dim": times * int(options.decoder.input_dim),
        "decoder_output_dim": times * int(options.decoder.output_dim),
    }
    for name, side in (("encoder", options.encoder), ("decoder", options.decoder)):
        changes[f"{name}_embed_dim"] = times * side.embed_dim
        changes[f"{name}_ffn_embed_dim"] = times * side.ffn_embed_dim
        changes[f"{name}_attention_heads"] = times * side.attention_heads
        changes[f"{name}_layers"] = deepen * side.layers
        # fairseq would read the file again, and the vectors in it have the old width.
        changes[f"{name}_embed_path"] = None
    return changes


def _sinusoidal_tables(options: TransformerConfig) -> dict[str, Tensor]:
    """Position tables that fairseq computes instead of loading, at the width that the model has now."""
    pad = Dictionary().pad()
    source = options.max_source_positions or DEFAULT_MAX_SOURCE_POSITIONS
    target = options.max_target_positions or DEFAULT_MAX_TARGET_POSITIONS
    return {
        # Positions are numbered from the padding symbol's number + 1 on.
        f"{name}.embed_positions.weight": SinusoidalPositionalEmbedding.get_embedding(
            positions + pad + 1, side.embed_dim, pad
        )
        for name, side, positions in (("encoder", options.encoder, source), ("decoder", options.decoder, target))
        if not side.learned_pos
    }


def _added_layers(weights: Mapping[str, Tensor], options: TransformerConfig, deepen: int) -> dict[str, Tensor]:
    """Layers to put on top of the others; each is a copy of one of them that adds nothing to its input."""
    added = {}
    for name, side in (("encoder", options.encoder), ("decoder", options.decoder)):
        if not side.normalize_before:
            raise BildError(f"only pre-norm models can be deepened; the {name} of this one normalizes after each layer")
        for layer in range(side.layers, deepen * side.layers):
            origin = f"{name}.layers.{layer % side.layers}."
            for key in [key for key in weights if key.startswith(origin)]:
                weight = torch.zeros_like(weights[key]) if _LAYER_OUTPUT.fullmatch(key) else weights[key].clone()
                if key.endswith(".w_resid"):
                    weight.fill_(1)
                added[f"{name}.layers.{layer}.{key.removeprefix(origin)}"] = weight
    return added


def _output_norms(weights: Mapping[str, Tensor], options: TransformerConfig) -> list[str]:
    """The layer norms in front of the decoder's output projection, if nothing else reads one of them; else none."""
    exits_share = getattr(options, "exit_share_output_projection", False)
    if "decoder.layer_norm.weight" in weights:
        exits = {key.rpartition(".")[0] for key in weights if key.startswith("decoder.exit_layer_norms.")}
        return ["decoder.layer_norm", *(exits if exits_share else ())]
    if options.decoder.normalize_before or exits_share:
        # There is no norm, or that of an exit layer, which the next layer reads too.
        return []
    return [f"decoder.layers.{options.decoder.layers - 1}.final_layer_norm"]


def _factors(
    weights: Mapping[str, Tensor], times: int, output_norms: list[str], scaled_embeddings: bool
) -> dict[str, float]:
    """What each weight is multiplied with, by name.

    Args:
        output_norms: scaled instead of the output projection, which shares the embeddings.
        scaled_embeddings: fairseq multiplies embeddings with the square root of their width.
    """
    embedding = times**-0.5 if scaled_embeddings else 1.0
    factors = {}
    for name in weights:
        if name.endswith(".embed_tokens.weight"):
            factors[name] = embedding
        elif name == "decoder.output_projection.weight" and output_norms:
            factors[name] = embedding
        elif name.rpartition(".")[0] in output_norms:
            factors[name] = 1 / (times * embedding)
        elif _MATRIX.fullmatch(name) or "output_projection" in name:
            factors[name] = 1 / times
        else:
            factors[name] = 1.0
    return factors


def _repeated(
    weights: Mapping[str, Tensor], factors: Mapping[str, float], times: int, half: bool
) -> Iterator[tuple[str, Tensor]]:
    shared: dict[tuple[int, float], Tensor] = {}
    for name, weight in weights.items():
        if _VERSION.fullmatch(name):
            yield name, weight
            continue
        key = (weight.data_ptr(), factors[name])
        if key not in shared:
            repeats = (times, times) if _MATRIX.fullmatch(name) else (1, times) if weight.dim() == 2 else (times,)
            rounded = half and weight.dim() == 2 and "embed_positions" not in name
            scaled = (weight.float() * factors[name]).to(torch.float16 if rounded else torch.float32)
            shared[key] = scaled.repeat(repeats)
        yield name, shared[key]


def _for_inference(
    state: Mapping[str, Any], changes: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    args, cfg = copy.deepcopy(state.get("args")), copy.deepcopy(state.get("cfg"))
    for config in _configs({"args": args, "cfg": cfg}):
        for name, value in changes.items():
            _set_option(_entries(config), name, value)
    return {**for_inference(state, weights), "args": args, "cfg": cfg, "task_state": state.get("task_state", {})}


def _set_option(entries: dict[str, Any], name: str, value: Any) -> None:
    """Sets an option where fairseq looks for it: in Hydra's configurations a part may have its own."""
    side, _, rest = name.partition("_")
    if isinstance(entries.get(side), dict):
        entries[side][rest] = value
    else:
        entries[name] = value
