"""Which models an engine may run by their weights alone, and why it may not run others.

An engine reads the weights of a model and computes what fairseq's modules compute with them. So every module on the
way from tokens to log-probabilities has to be one of fairseq's own kinds, and every method on that way the stock one.
The same holds for this package's T5, whose classes say what they are with ``engine_kind``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from fairseq.models import BaseFairseqModel
from fairseq.models.transformer import (
    TransformerDecoder,
    TransformerDecoderBase,
    TransformerEncoder,
    TransformerEncoderBase,
    TransformerModelBase,
)
from fairseq.modules import (
    LayerDropModuleList,
    LayerNorm,
    LearnedPositionalEmbedding,
    MultiheadAttention,
    SinusoidalPositionalEmbedding,
)
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import nn

from .precision import IntegerLinear

# Kinds whose forward pass an engine replaces or ignores; a subclass of one computes something else.
_PLAIN = (nn.Linear, nn.Embedding, nn.LayerNorm, type(LayerNorm(1)), LearnedPositionalEmbedding)
_PLAIN += (SinusoidalPositionalEmbedding, nn.ModuleList, nn.ModuleDict, LayerDropModuleList, IntegerLinear)
# Subclasses of these are fine as long as they compute with the stock methods.
_STOCK: dict[type, tuple[type, ...]] = {
    TransformerDecoderBase: (TransformerDecoder, TransformerDecoderBase),
    TransformerEncoderBase: (TransformerEncoder, TransformerEncoderBase),
    TransformerDecoderLayerBase: (TransformerDecoderLayerBase,),
    TransformerEncoderLayerBase: (TransformerEncoderLayerBase,),
    MultiheadAttention: (MultiheadAttention,),
    FairseqDropout: (FairseqDropout,),
}
# The same for T5, beside the classes with an ``engine_kind``, which are stock themselves.
_PLAIN_T5 = (nn.Linear, IntegerLinear, nn.Embedding, nn.RMSNorm, nn.ModuleList, nn.ModuleDict)
# Methods with which a model is made, trained, saved and loaded; they may be a subclass's own.
_NOT_COMPUTING = ("__init__", "build_", "upgrade_state_dict", "add_args", "make_generation_fast_", "prepare_for_onnx")
_NOT_COMPUTING += ("reset_parameters", "train", "load_state_dict", "__module__", "__doc__", "__class__")
# A model's methods between its decoder and log-probabilities.
_PROBABILITIES = ("get_normalized_probs", "get_normalized_probs_scriptable")
_RETAINED_DROPOUT = "it drops units during inference (--retain-dropout)"


def unsupported_model(model: nn.Module) -> str | None:
    """Why no engine can run a model, naming the option; None if one can."""
    if not hasattr(model, "encoder") or not hasattr(model, "decoder"):
        return "it has no encoder, so it is not an encoder-decoder Transformer"
    for name in _PROBABILITIES:
        stock = [getattr(kind, name) for kind in (BaseFairseqModel, TransformerModelBase)]
        if name in vars(model) or getattr(type(model), name) not in stock:
            return f"{type(model).__name__} computes {name} in its own way"
    # An encoder may be of any kind, as the engines then run its own forward pass; but that has to give the same again.
    dropping = next(filter(_drops_during_inference, model.encoder.modules()), None)
    return unsupported_decoder(model.decoder) if dropping is None else _RETAINED_DROPOUT


def unsupported_decoder(decoder: nn.Module) -> str | None:
    """Why no engine can run a decoder, naming the option; None if one can."""
    if is_t5(decoder):
        return _unsupported_t5(decoder)
    if not isinstance(decoder, TransformerDecoderBase):
        return f"its decoder is a {type(decoder).__name__}, not a fairseq Transformer decoder"
    layers = list(decoder.layers.children())  # not its iterator, which draws random numbers where layers are dropped
    if not layers:
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
    for layer in layers:
        if not isinstance(layer, TransformerDecoderLayerBase):
            return f"it has a layer of type {type(layer).__name__} (--base-layers or a custom architecture)"
    shapes = {(layer.embed_dim, layer.self_attn.num_heads, layer.encoder_attn is None) for layer in layers}
    if len(shapes) > 1:
        return "its decoder's layers differ in width, attention heads or encoder-decoder attention"
    return unusual_computation(decoder)


def is_t5(module: nn.Module) -> bool:
    """Whether a module is this package's T5 encoder or decoder, with exits or without."""
    return getattr(module, "engine_kind", None) in ("t5_encoder", "t5_decoder")


def _unsupported_t5(decoder: nn.Module) -> str | None:
    if not len(decoder.layers):
        return "its decoder has no layers"
    foreign = _foreign_t5_layer(decoder)
    if foreign is not None:
        return foreign
    if len({(layer.self_attn.num_heads, layer.self_attn.head_dim) for layer in decoder.layers.children()}) > 1:
        return "its decoder's layers differ in attention heads"
    return unusual_computation(decoder)


def _foreign_t5_layer(module: nn.Module) -> str | None:
    for layer in module.layers.children():
        if getattr(layer, "engine_kind", None) != f"{module.engine_kind}_layer":
            return f"it has a layer of type {type(layer).__name__}, which is not T5's"
    return None


def unsupported_encoder(encoder: nn.Module) -> str | None:
    """Why only the encoder itself can run its forward pass; None if its weights say all."""
    if is_t5(encoder):
        return _foreign_t5_layer(encoder) or unusual_computation(encoder)
    if not isinstance(encoder, TransformerEncoderBase):
        return f"an encoder of type {type(encoder).__name__}"
    if getattr(encoder, "return_fc", False) or any(map(_uses_xformers, encoder.modules())):
        return "an encoder with an option of its own"
    for layer in encoder.layers.children():
        if not isinstance(layer, TransformerEncoderLayerBase):
            return f"an encoder layer of type {type(layer).__name__}"
    return unusual_computation(encoder)


def unusual_computation(module: nn.Module) -> str | None:
    """What a module and its parts compute beyond fairseq's own modules, in words; None if nothing."""
    return next(_unusual_computations(module), None)


def _unusual_computations(root: nn.Module) -> Iterator[str]:
    plain = _PLAIN_T5 if is_t5(root) else _PLAIN
    for name, module in root.named_modules():
        kind, where = type(module).__name__, f" ({name})" if name else ""
        stock = _stock_t5(module) if is_t5(root) else _stock(module)
        if stock is None and type(module) not in plain:
            yield f"it has a module of type {kind}{where}, which is not read by its weights alone"
        if module._forward_hooks or module._forward_pre_hooks:
            yield f"{kind} has a hook on its forward pass{where}"
        yield from (f"{kind} computes {own} in its own way{where}" for own in own_methods(module, stock))
        if _drops_during_inference(module):
            yield f"{_RETAINED_DROPOUT}{where}"
        if isinstance(module, MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
            yield "its attention has an extra key (add_bias_kv or add_zero_attn)"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            yield f"its embeddings have a maximum norm{where}"


def _stock(module: nn.Module) -> tuple[type, ...] | None:
    """The stock classes that a module may be of, if an engine knows its kind."""
    return next((kinds for base, kinds in _STOCK.items() if isinstance(module, base)), None)


def _stock_t5(module: nn.Module) -> tuple[type, ...] | None:
    """The same for a part of T5: the class that says its kind itself, not by inheritance."""
    if isinstance(module, FairseqDropout):
        return (FairseqDropout,)
    return next(((base,) for base in type(module).__mro__ if "engine_kind" in vars(base)), None)


def own_methods(module: nn.Module, stock: tuple[type, ...] | None) -> list[str]:
    """Methods of a stock kind of module that a module computes in its own way, by name.

    Args:
        module: an instance of a stock kind or of a subclass.
        stock: the stock kinds that it may be; None for its own.
    """
    stock = stock or (type(module),)
    known = {base for kind in stock for base in kind.__mro__}
    own = [vars(kind) for kind in type(module).__mro__ if kind not in known]
    # A method may also be put in the place of the class's for one object alone.
    own.append({name: value for name, value in vars(module).items() if not _checkpoints(module, value)})
    return sorted(
        name
        for names in own
        for name, value in names.items()
        if callable(value) and any(hasattr(kind, name) for kind in stock) and not name.startswith(_NOT_COMPUTING)
    )


def _checkpoints(module: nn.Module, value: Any) -> bool:
    """Whether this is a module's own forward pass as ``--checkpoint-activations`` wraps it, which computes the same."""
    return (
        isinstance(value, functools.partial)
        and value.func.__module__ == checkpoint_wrapper.__module__
        and getattr(value.args[0], "__func__", None) is type(module).forward
    )


def _drops_during_inference(module: nn.Module) -> bool:
    return isinstance(module, FairseqDropout) and module.apply_during_inference and module.p > 0


def _uses_xformers(module: nn.Module) -> bool:
    return bool(getattr(module, "use_xformers", False))
