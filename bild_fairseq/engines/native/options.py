"""Which encoders and decoders the C code can run, and why it cannot run others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fairseq.models.transformer import TransformerDecoderBase
from fairseq.modules import gelu, gelu_accurate
from torch import nn

from ..supported import unsupported_encoder
from .build import library

_ACTIVATIONS = ((torch.relu, 1), (F.relu, 1), (gelu, 2), (F.gelu, 2), (gelu_accurate, 3))
_ACTIVATION_KINDS = {"gelu_tanh": 3}


def missing_option(module: nn.Module) -> str | None:
    """Why an encoder or a decoder that the package supports cannot be run in C; None if it can."""
    reason = None if decodes(module) else unsupported_encoder(module)
    if reason is not None:
        return reason
    layers = list(module.layers)
    if not layers:
        return "no layers"
    checks = {
        "no C kernels (BILD_NATIVE=0, or no compiler that works)": library() is None,
        "not on a CPU in float32": any(
            p.device.type != "cpu" or p.dtype is not torch.float32 for p in module.parameters()
        ),
        "an activation other than relu and gelu": any(activation(layer) is None for layer in layers),
        "another width of the embeddings": module.embed_tokens.embedding_dim != layers[0].fc1.in_features
        or getattr(module, "project_in_dim", None) is not None
        or getattr(module, "project_out_dim", None) is not None,
        "a norm without weights": any(
            part.weight is None or getattr(part, "bias", part.weight) is None
            for part in module.modules()
            if isinstance(part, (nn.LayerNorm, nn.RMSNorm))
        ),
        "layers that differ": len({_shape(layer) for layer in layers}) != 1,
        "attention heads that do not fill its products": any(
            part.num_heads * part.head_dim != part.q_proj.out_features
            for layer in layers
            for part in (layer.self_attn, getattr(layer, "encoder_attn", None))
            if part is not None
        ),
        "NormFormer scales": any(
            getattr(layer, name, None) is not None
            for layer in layers
            for name in ("c_attn", "attn_ln", "ffn_layernorm", "w_resid")
        ),
        "no encoder-decoder attention": decodes(module) and any(layer.encoder_attn is None for layer in layers),
    }
    return next((reason for reason, present in checks.items() if present), None)


def decodes(module: nn.Module) -> bool:
    """Whether a module is a decoder."""
    return isinstance(module, TransformerDecoderBase) or getattr(module, "engine_kind", None) == "t5_decoder"


def _shape(layer: nn.Module) -> tuple[object, ...]:
    """What has to be the same in all layers."""
    kind = getattr(layer, "normalize_before", True), activation(layer), getattr(layer, "fc1_linear", None) is None
    parts = [part for part in layer.modules() if isinstance(part, nn.Linear)]
    return layer.self_attn.num_heads, *kind, *(tuple(part.weight.shape) for part in parts)


def activation(layer: nn.Module) -> int | None:
    """The number that ``transformer.c`` has for a layer's activation; None if it has none."""
    known = next((number for function, number in _ACTIVATIONS if layer.activation_fn is function), None)
    return known or _ACTIVATION_KINDS.get(getattr(layer.activation_fn, "engine_kind", None))
