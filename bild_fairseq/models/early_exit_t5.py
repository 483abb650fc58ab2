"""`--arch early_exit_t5` and its sizes, such as `early_exit_mt5_small`, the model of the paper's early-exit results."""

import argparse
import dataclasses

from fairseq.data import Dictionary
from fairseq.models import register_model
from torch import nn

from ..errors import BildError
from .early_exit import EarlyExitMixin, register_early_exit_architectures
from .exits import ExitHeads, check_exit_layers, parse_exit_layers
from .t5 import T5Decoder, T5Model
from .t5_config import from_namespace


class EarlyExitT5Decoder(ExitHeads, T5Decoder):
    """T5's decoder plus one head for each exit; at full depth it is T5's decoder.

    Raises:
        BildError: an exit above the second-highest layer, or with layers of its own.
    """

    def __init__(self, args: argparse.Namespace, dictionary: Dictionary, embed_tokens: nn.Embedding):
        config = from_namespace(args)
        exit_layers = parse_exit_layers(args.exit_layers)
        check_exit_layers(exit_layers, config.num_decoder_layers, "--num-decoder-layers")
        if args.exit_own_layers:
            raise BildError(f"--exit-own-layers {args.exit_own_layers}: exits of T5 have no layers of their own")
        super().__init__(config, dictionary, embed_tokens)
        self.add_exits(exit_layers, args.exit_share_output_projection)


@register_model("early_exit_t5")
class EarlyExitT5Model(EarlyExitMixin, T5Model):
    """T5 with prediction heads on chosen decoder layers."""

    @classmethod
    def build_decoder(
        cls, args: argparse.Namespace, tgt_dict: Dictionary, embed_tokens: nn.Embedding
    ) -> EarlyExitT5Decoder:
        return EarlyExitT5Decoder(args, tgt_dict, embed_tokens)


register_early_exit_architectures("t5")


def t5_exit_model(model: EarlyExitT5Model, exit_layer: int) -> T5Model:
    """A plain T5 with the first `exit_layer` decoder layers and that exit's head; shares all modules with `model`."""
    full = model.decoder
    config = dataclasses.replace(model.cfg, num_decoder_layers=0)  # the layers come from the full decoder
    projection = full.exit_output_projection(exit_layer)
    decoder = T5Decoder(config, full.dictionary, full.embed_tokens, projection)
    decoder.relative_attention_bias = full.relative_attention_bias
    decoder.layers = nn.ModuleList(full.layers[:exit_layer])
    decoder.layer_norm = full.exit_layer_norm(exit_layer)
    decoder.training = full.training
    args = argparse.Namespace(**vars(model.args) | {"num_decoder_layers": exit_layer})
    small = T5Model(args, model.encoder, decoder)
    small.training = model.training
    return small
