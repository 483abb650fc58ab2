"""Which models an engine may run by their weights alone, and why it may not run others.

An engine reads the weights of a model and computes what fairseq's modules compute with them. So every module on the
way from tokens to log-probabilities has to be one of fairseq's own kinds, and every method on that way the stock one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fairseq.models import BaseFairseqModel
from fairseq.models.transformer import (
    TransformerDecoder,
    TransformerDecoderBase,
    TransformerEncoder,
    TransformerEncoderBase,
    TransformerModelBase,
)
from fairseq.modules import (
    LayerNorm,
    LearnedPositionalEmbedding,
    MultiheadAttention,
    SinusoidalPositionalEmbedding,
)
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import nn

# Kinds whose forward pass an engine replaces or ignores; a subclass of one computes something else.
_PLAIN = (nn.Linear, nn.Embedding, nn.LayerNorm, type(LayerNorm(1)), LearnedPositionalEmbedding)
_PLAIN += (SinusoidalPositionalEmbedding, nn.Dropout, nn.Identity, nn.ModuleList, nn.ModuleDict)
# Subclasses of these are fine as long as they compute with the stock methods.
_STOCK: dict[type, tuple[type, ...]] = {
    TransformerDecoderBase: (TransformerDecoder, TransformerDecoderBase),
    TransformerEncoderBase: (TransformerEncoder, TransformerEncoderBase),
    TransformerDecoderLayerBase: (TransformerDecoderLayerBase,),
    TransformerEncoderLayerBase: (TransformerEncoderLayerBase,),
    MultiheadAttention: (MultiheadAttention,),
    FairseqDropout: (FairseqDropout,),
    nn.ModuleList: (nn.ModuleList,),
}
# Methods with which a model is made, trained, saved and loaded; they may be a subclass's own.
_NOT_COMPUTING = ("__init__", "build_", "upgrade_state_dict", "add_args", "make_generation_fast_", "prepare_for_onnx")
_NOT_COMPUTING += ("reset_parameters", "__iter__", "train", "load_state_dict", "__module__", "__doc__", "__class__")


class UnsupportedModel(ValueError):
    """A model with an option that no engine implements; the message names it."""


def unsupported_model(model: nn.Module) -> str | None:
    """Why no engine can run a model, naming the option; None if one can."""
    if not hasattr(model, "encoder") or not hasattr(model, "decoder"):
        return "it has no encoder, so it is not an encoder-decoder Transformer"
    for name in ("get_normalized_probs", "get_normalized_probs_scriptable"):
        if getattr(type(model), name) not in [getattr(kind, name) for kind in (BaseFairseqModel, TransformerModelBase)]:
            return f"{type(model).__name__} computes {name} in its own way"
    return unsupported_decoder(model.decoder)


def unsupported_decoder(decoder: nn.Module) -> str | None:
    """Why no engine can run a decoder, naming the option; None if one can."""
    if not isinstance(decoder, TransformerDecoderBase):
        return f"its decoder is a {type(decoder).__name__}, not a fairseq Transformer decoder"
    if not decoder.layers:
        return "its decoder has no layers"
    checks = {
        "--adaptive-softmax-cutoff": decoder.adaptive_softmax is not None,
        "--cross-self-attention": decoder.cross_self_attention,
        "--quant-noise-pq": decoder.quant_noise is not None,
        "--decoder-xformers-att-config": any(map(_uses_xformers, decoder.modules())),
    }
    for option, present in checks.items():
        if present:
            return f"it was trained with {option}"
    for layer in decoder.layers:
        if not isinstance(layer, TransformerDecoderLayerBase):
            return f"it has a layer of type {type(layer).__name__} (--base-layers or a custom architecture)"
    return unusual_computation(decoder)


def unsupported_encoder(encoder: nn.Module) -> str | None:
    """Why only the encoder itself can run its forward pass; None if its weights say all."""
    if not isinstance(encoder, TransformerEncoderBase):
        return f"an encoder of type {type(encoder).__name__}"
    if getattr(encoder, "return_fc", False) or any(map(_uses_xformers, encoder.modules())):
        return "an encoder with an option of its own"
    for layer in encoder.layers:
        if not isinstance(layer, TransformerEncoderLayerBase):
            return f"an encoder layer of type {type(layer).__name__}"
    return unusual_computation(encoder)


def unusual_computation(module: nn.Module) -> str | None:
    """What a module and its parts compute beyond fairseq's own modules, in words; None if nothing."""
    return next(_unusual_computations(module), None)


def _unusual_computations(root: nn.Module) -> Iterator[str]:
    for name, module in root.named_modules():
        where = f" ({name})" if name else ""
        stock = next((kinds for base, kinds in _STOCK.items() if isinstance(module, base)), None)
        if module._forward_hooks or module._forward_pre_hooks:
            yield f"{type(module).__name__} has a hook on its forward pass{where}"
        if stock is None and type(module) not in _PLAIN:
            yield f"it has a module of type {type(module).__name__}{where}, which is not read by its weights alone"
        if stock is not None:
            yield from (f"{type(module).__name__} computes {own} in its own way" for own in own_methods(module, stock))
        if isinstance(module, FairseqDropout) and module.apply_during_inference and module.p > 0:
            yield f"it drops units during inference (--retain-dropout){where}"
        if isinstance(module, MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
            yield "its attention has an extra key (add_bias_kv or add_zero_attn)"


def own_methods(module: nn.Module, stock: tuple[type, ...]) -> list[str]:
    """Methods of a stock kind of module that a module computes in its own way, by name.

    Args:
        module: an instance of a stock kind or of a subclass.
        stock: the stock kinds that it may be.
    """
    known = {base for kind in stock for base in kind.__mro__}
    own = [vars(kind) for kind in type(module).__mro__ if kind not in known]
    # A method may also be put in the place of the class's for one object alone.
    own.append({name: value for name, value in module.__dict__.items() if inspect.isroutine(value)})
    return sorted(
        name
        for names in own
        for name, value in names.items()
        if callable(value) and any(hasattr(kind, name) for kind in stock) and not name.startswith(_NOT_COMPUTING)
    )


def _uses_xformers(module: nn.Module) -> bool:
    return bool(getattr(module, "use_xformers", False))
