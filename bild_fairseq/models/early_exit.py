"""What turns a fairseq Transformer class into its early-exit version, and registers its sizes."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_INV_REGISTRY,
    register_model_architecture,
)
from fairseq.models.transformer import TransformerConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..errors import BildError
from .exits import EarlyExitTransformerDecoder, parse_exit_layers

PREFIX = "early_exit_"


class EarlyExitMixin:
    """Put in front of a fairseq Transformer model class: exits, their options, their training.

    Without `return_exit_logits` the model computes exactly what the class behind it does.
    """

    def __init__(self, args, encoder, decoder):
        super().__init__(args, encoder, decoder)
        self.exit_freeze_model = args.exit_freeze_model
        if self.exit_freeze_model:
            self._freeze_all_but_exits()

    @classmethod
    def add_args(cls, parser) -> None:
        """Adds the options of the class behind and those of the exits."""
        super().add_args(parser)
        parser.add_argument(
            "--exit-layers",
            metavar="K[,K...]",
            help="decoder layers that get a prediction head, counted from 1 at the bottom (default: 1)",
        )
        parser.add_argument(
            "--exit-share-output-projection",
            action=argparse.BooleanOptionalAction,
            help="exits use the decoder's output projection; with --no-... each has its own (default: shared)",
        )
        parser.add_argument(
            "--exit-own-layers",
            type=int,
            metavar="N",
            help="decoder layers that each exit has for itself, between its layer and its head: it agrees more, and "
            "drafts cost more (default: 0)",
        )
        parser.add_argument(
            "--exit-freeze-model",
            action="store_true",
            help="train the exits alone; everything else stays as it was loaded, bit for bit",
        )

    @classmethod
    def build_model(cls, args, task):
        """Builds the model; options that are absent get their defaults.

        Raises:
            BildError: options that exits cannot work with, see `check_decoder_options`.
        """
        if isinstance(args, DictConfig):  # of Hydra; fairseq's models read a namespace
            args = argparse.Namespace(**OmegaConf.to_container(args, resolve=True))
        set_exit_defaults(args)
        return super().build_model(args, task)

    @classmethod
    def build_decoder(cls, args, tgt_dict, embed_tokens):
        cfg = TransformerConfig.from_namespace(args)
        return EarlyExitTransformerDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)

    def forward(self, *args, return_exit_logits: bool = False, **kwargs):
        """The forward pass of the class behind, and on request the exits' scores from it.

        The exits are computed here rather than by the criterion so that a distributed wrapper
        sees every parameter used.

        Returns:
            (logits, extra); with `return_exit_logits`, ``extra["exit_logits"]`` maps each exit
            layer to its scores, (batch, time, vocab).
        """
        if not return_exit_logits:
            return super().forward(*args, **kwargs)
        with _inputs(self.decoder) as inputs:
            logits, extra = super().forward(*args, **kwargs)
        padding = inputs["prev_output_tokens"].eq(self.decoder.padding_idx)
        extra["exit_logits"] = {
            layer: self.decoder.exit_logits(
                extra["inner_states"][layer], layer, inputs.get("encoder_out"), padding=padding
            )
            for layer in self.decoder.exit_layers
        }
        return logits, extra

    def train(self, mode: bool = True):
        """Sets training mode; a frozen model stays in evaluation mode, without any dropout."""
        return super().train(mode and not self.exit_freeze_model)

    def make_generation_fast_(self, **kwargs):
        """Prepares for inference, after which fairseq allows no training.

        A frozen model then gives its plain model's output bit for bit: PyTorch chooses among
        matrix products, which round differently, by whether a weight requires gradients.
        """
        super().make_generation_fast_(**kwargs)
        self.requires_grad_(True)

    def upgrade_state_dict_named(self, state_dict, name):
        """Lets the checkpoint of a plain model load, see `fill_missing_exits`."""
        super().upgrade_state_dict_named(state_dict, name)
        self.decoder.fill_missing_exits(state_dict, f"{name}.decoder" if name else "decoder")

    def _freeze_all_but_exits(self) -> None:
        exit_parameters = list(self.decoder.exit_parameters())
        if not exit_parameters:
            raise BildError(
                "--exit-freeze-model leaves nothing to train: the exits of this model share its"
                " output projection and have no layer norm; add --no-exit-share-output-projection or"
                " --exit-own-layers 1"
            )
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in exit_parameters:
            parameter.requires_grad_(True)


@contextmanager
def _inputs(module: nn.Module) -> Iterator[dict[str, Any]]:
    """What a decoder is given in its next forward pass, by name."""
    given: dict[str, Any] = {}

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.update(zip(("prev_output_tokens", "encoder_out"), args, strict=False), **kwargs)

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield given
    finally:
        handle.remove()


def set_exit_defaults(args: Any) -> None:
    """Completes `args`, in place, with the exit options that it lacks; `exit_layers` as a list.

    Raises:
        BildError: `exit_layers` does not read as layers.
    """
    flatten(args)
    args.exit_layers = parse_exit_layers(getattr(args, "exit_layers", [1]))
    args.exit_share_output_projection = getattr(args, "exit_share_output_projection", True)
    args.exit_own_layers = getattr(args, "exit_own_layers", 0)
    args.exit_freeze_model = getattr(args, "exit_freeze_model", False)


def flatten(args: Any) -> None:
    """Gives nested options, Hydra's `encoder.layers`, the command line's names, `encoder_layers`; in place."""
    for group in ("encoder", "decoder", "quant_noise"):
        options = getattr(args, group, None)
        if isinstance(options, (dict, DictConfig)):
            for name, value in dict(options).items():
                setattr(args, f"{group}_{name}", value)
            delattr(args, group)


def register_early_exit_architectures(stock_model: str) -> None:
    """Registers ``early_exit_<arch>`` for each architecture that fairseq has of `stock_model`.

    Args:
        stock_model: registered name of a fairseq model; ``early_exit_<stock_model>`` must be
            registered already.
    """
    for stock_arch in list(ARCH_MODEL_INV_REGISTRY[stock_model]):
        register = register_model_architecture(PREFIX + stock_model, PREFIX + stock_arch)
        register(_with_exit_defaults(ARCH_CONFIG_REGISTRY[stock_arch]))


def _with_exit_defaults(stock_defaults):
    def set_defaults(args):
        # What omegaconf 2.0 lacks is None, not absent, and would get no default.
        complete = argparse.Namespace(**OmegaConf.to_container(args)) if isinstance(args, DictConfig) else args
        set_exit_defaults(complete)
        stock_defaults(complete)
        if complete is not args:
            for name in set(args) - set(vars(complete)):
                del args[name]
            for name, value in vars(complete).items():
                args[name] = value

    return set_defaults
