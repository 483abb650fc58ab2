"""The small model inside an early-exit model, as a model of its own."""

import copy

from fairseq.models import FairseqEncoderDecoderModel
from fairseq.models.transformer import TransformerDecoderBase, TransformerModelBase
from torch import nn

from ..errors import BildError
from .early_exit_t5 import EarlyExitT5Model, t5_exit_model
from .exits import EarlyExitTransformerDecoder, ExitHeads


def exit_model(model: nn.Module, exit_layer: int) -> FairseqEncoderDecoderModel:
    """The first `exit_layer` decoder layers of an early-exit model, with that exit's own layers and head.

    Args:
        model: an early-exit model, on any device, in any precision.
        exit_layer: one of ``model.decoder.exit_layers``.

    Returns:
        A stock Transformer, or a plain T5, with `model`'s own encoder. It shares parameters and
        modules with `model`: moving, casting or training one does so to the other.

    Raises:
        BildError: `model` has no exits, or none at `exit_layer`.
    """
    full = getattr(model, "decoder", None)
    if not isinstance(full, ExitHeads):
        raise BildError(f"the model has no exits ({type(model).__name__}): it is not of an early_exit_* architecture")
    full.check_exit(exit_layer)
    if isinstance(model, EarlyExitT5Model):
        return t5_exit_model(model, exit_layer)
    decoder = _truncated_decoder(full, exit_layer)
    small = TransformerModelBase(decoder.cfg, model.encoder, decoder)
    small.training = model.training
    return small


def _truncated_decoder(full: EarlyExitTransformerDecoder, exit_layer: int) -> TransformerDecoderBase:
    cfg = copy.deepcopy(full.cfg)
    cfg.decoder.layers = 0  # the constructor makes no layers, they come from the full decoder
    decoder = TransformerDecoderBase(
        cfg,
        full.dictionary,
        full.embed_tokens,
        no_encoder_attn=cfg.no_cross_attention,
        output_projection=full.exit_output_projection(exit_layer),
    )
    replaced = {"layers", "layer_norm", "output_projection"}
    for name, module in full.named_children():
        if hasattr(decoder, name) and name not in replaced:
            setattr(decoder, name, module)
    decoder.layers = nn.ModuleList([*full.layers[:exit_layer], *full.own_layers(exit_layer)])
    decoder.layer_norm = full.exit_layer_norm(exit_layer)
    decoder.num_layers = cfg.decoder.layers = len(decoder.layers)
    decoder.training = full.training
    return decoder
