"""Decoders with prediction heads part of the way up.

The early exit of Kim et al., *Speculative Decoding with Big Little Decoder* (NeurIPS 2023): the
first layers of a decoder, with a head of their own, are the small model of the pair.
"""

import copy
import logging
from collections.abc import Iterator, Sequence

from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase
from torch import Tensor, nn

from ..errors import BildError

logger = logging.getLogger(__name__)


def parse_exit_layers(value: str | int | Sequence[int]) -> list[int]:
    """Reads exit layers from ``"1,2"``, ``1`` or ``[1, 2]``: counted from the bottom, from 1.

    Raises:
        BildError: anything but ascending positive integers without repeats.
    """
    items = value.split(",") if isinstance(value, str) else value
    items = [items] if isinstance(items, int) else items
    try:
        layers = [int(item) for item in items]
    except (TypeError, ValueError):
        layers = []
    if not layers or layers[0] < 1 or layers != sorted(set(layers)):
        raise BildError(
            f"--exit-layers {value}: give decoder layers counted from 1 at the bottom, ascending, such as 1 or 1,2"
        )
    return layers


def check_exit_layers(exit_layers: Sequence[int], depth: int, flag: str = "--decoder-layers") -> None:
    """Refuses exits that leave no layer above them.

    Args:
        exit_layers: as of `parse_exit_layers`.
        depth: number of decoder layers.
        flag: the option that sets it, for the message.

    Raises:
        BildError: an exit above the second-highest layer.
    """
    if depth < 2:
        raise BildError(f"{flag} {depth} leaves no layer to exit before; give at least 2")
    if exit_layers[-1] >= depth:
        raise BildError(f"--exit-layers {exit_layers[-1]}: with {flag} {depth} the highest exit is {depth - 1}")


def check_decoder_options(cfg: TransformerConfig) -> None:
    """Refuses, by name, what an early-exit decoder cannot do.

    Raises:
        BildError: an exit above the second-highest layer, or an option that breaks the exits.
    """
    check_exit_layers(parse_exit_layers(cfg.exit_layers), cfg.decoder.layers)
    if cfg.decoder.layerdrop > 0:
        raise BildError("--decoder-layerdrop skips layers, so an exit has no fixed layer under it; leave it 0")
    if cfg.adaptive_softmax_cutoff is not None:
        raise BildError("--adaptive-softmax-cutoff does not work with early exit; train with a plain softmax")
    if cfg.base_layers:
        raise BildError("--base-layers changes what an exit layer counts; leave it 0")


class ExitHeads:
    """Put in front of a fairseq decoder class: one prediction head for each exit.

    The decoder has `layer_norm`, `output_projection`, and `project_to_vocabulary(features, projection)`.

    Attributes:
        exit_layers: the layers that have a head, ascending, counted from 1 at the bottom.
        exit_layer_norms: final layer norm of each exit, keyed by ``str(layer)``; empty where the
            decoder itself has none (post-norm, or ``--no-decoder-final-norm``).
        exit_output_projections: output projection of each exit, keyed by ``str(layer)``; empty
            where the exits share the decoder's.
    """

    def add_exits(self, exit_layers: Sequence[int], share_output_projection: bool) -> None:
        """Makes the heads, as copies of the decoder's own."""
        self.exit_layers = list(exit_layers)
        self.exit_layer_norms = nn.ModuleDict()
        self.exit_output_projections = nn.ModuleDict()
        for key in map(str, self.exit_layers):
            if self.layer_norm is not None:
                self.exit_layer_norms[key] = copy.deepcopy(self.layer_norm)
            if not share_output_projection:
                self.exit_output_projections[key] = copy.deepcopy(self.output_projection)

    def check_exit(self, exit_layer: int) -> None:
        """Raises BildError, naming the exits there are, where `exit_layer` is not one."""
        if exit_layer not in self.exit_layers:
            trained = ", ".join(map(str, self.exit_layers))
            raise BildError(f"the model has no exit at layer {exit_layer}; its exits: {trained}")

    def exit_layer_norm(self, exit_layer: int) -> nn.Module | None:
        """The final layer norm of an exit, or None where the decoder has no final norm."""
        key = str(exit_layer)
        return self.exit_layer_norms[key] if key in self.exit_layer_norms else None

    def exit_output_projection(self, exit_layer: int) -> nn.Module:
        """The output projection of an exit: its own, or the decoder's where it is shared."""
        key = str(exit_layer)
        if key in self.exit_output_projections:
            return self.exit_output_projections[key]
        return self.output_projection

    def exit_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that only the exits have."""
        yield from self.exit_layer_norms.parameters()
        yield from self.exit_output_projections.parameters()

    def exit_logits(self, inner_state: Tensor, exit_layer: int) -> Tensor:
        """Unnormalised scores of an exit.

        Args:
            inner_state: output of layer `exit_layer`, (time, batch, dim); fairseq's
                ``extra["inner_states"][exit_layer]``.
            exit_layer: one of `exit_layers`.

        Returns:
            (batch, time, vocab)

        Raises:
            BildError: `exit_layer` is not one of `exit_layers`.
        """
        self.check_exit(exit_layer)
        norm = self.exit_layer_norm(exit_layer)
        features = inner_state if norm is None else norm(inner_state)
        features = features.transpose(0, 1)  # (batch, time, dim)
        return self.project_to_vocabulary(features, self.exit_output_projection(exit_layer))

    def fill_missing_exits(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Completes the checkpoint of a plain model, in place, so that it loads strictly.

        An exit that the checkpoint lacks starts from the checkpoint's own final layer norm and
        output projection; where it lacks those too, from what the exit holds now.

        Args:
            state_dict: parameters by name, already upgraded to this fairseq's names.
            name: where the decoder sits in `state_dict`, ``"decoder"`` for a whole model.
        """
        filled = []
        for heads, origin in (
            ("exit_layer_norms", "layer_norm"),
            ("exit_output_projections", "output_projection"),
        ):
            for key, current in getattr(self, heads).state_dict().items():
                if f"{name}.{heads}.{key}" in state_dict:
                    continue
                parameter = key.partition(".")[2]  # "weight" of "1.weight"
                start = state_dict.get(f"{name}.{origin}.{parameter}", current)
                state_dict[f"{name}.{heads}.{key}"] = start
                filled.append(f"{heads}.{key}")
        if filled:
            logger.info(
                "the checkpoint has no %s; they start as copies of its final layer norm and output projection",
                ", ".join(filled),
            )


class EarlyExitTransformerDecoder(ExitHeads, TransformerDecoderBase):
    """fairseq's decoder plus one head for each exit; at full depth it is fairseq's decoder.

    Raises:
        BildError: see `check_decoder_options`.
    """

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False, output_projection=None):
        check_decoder_options(cfg)
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn, output_projection)
        self.add_exits(parse_exit_layers(cfg.exit_layers), cfg.exit_share_output_projection)

    def project_to_vocabulary(self, features: Tensor, projection: nn.Module) -> Tensor:
        """Scores of the next token, (..., vocab), from the output of a final norm, (..., dim)."""
        if self.project_out_dim is not None:
            features = self.project_out_dim(features)
        return projection(features)
