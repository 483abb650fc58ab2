"""Which models can be decoded exactly, and why others cannot."""

from __future__ import annotations

from fairseq.models.transformer import TransformerDecoder, TransformerDecoderBase
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import nn


class UnsupportedModel(ValueError):
    """A model with an option that no engine implements; the message names it."""


def unsupported_decoder(decoder: nn.Module) -> str | None:
    """Why no engine can run a decoder, naming the option; None if one can."""
    if not isinstance(decoder, TransformerDecoderBase):
        return f"its decoder is a {type(decoder).__name__}, not a fairseq Transformer decoder"
    for name in ("extract_features", "extract_features_scriptable", "output_layer"):
        implementation = getattr(type(decoder), name)
        if implementation not in (
            getattr(TransformerDecoderBase, name),
            getattr(TransformerDecoder, name),
        ):
            return f"{type(decoder).__name__} computes {name} in its own way"
    checks = {
        "--adaptive-softmax-cutoff": decoder.adaptive_softmax is not None,
        "--cross-self-attention": decoder.cross_self_attention,
        "--quant-noise-pq": decoder.quant_noise is not None,
        "--decoder-xformers-att-config": any(
            getattr(layer.self_attn, "use_xformers", False) for layer in decoder.layers if hasattr(layer, "self_attn")
        ),
    }
    for option, present in checks.items():
        if present:
            return f"it was trained with {option}"
    for layer in decoder.layers:
        if not isinstance(layer, TransformerDecoderLayerBase):
            return f"it has a layer of type {type(layer).__name__} (--base-layers or a custom architecture)"
        if type(layer).forward is not TransformerDecoderLayerBase.forward:
            return f"{type(layer).__name__} computes its forward pass in its own way"
        for attention in (layer.self_attn, layer.encoder_attn):
            if attention is not None and (attention.bias_k is not None or attention.add_zero_attn):
                return "its attention has an extra key (add_bias_kv or add_zero_attn)"
    return None
