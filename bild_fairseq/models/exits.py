"""Decoders with prediction heads part of the way up.

The early exit of Kim et al., *Speculative Decoding with Big Little Decoder* (NeurIPS 2023): the
first layers of a decoder, with a head of their own, are the small model of the pair.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
    if cfg.exit_own_layers < 0:
        raise BildError(f"--exit-own-layers {cfg.exit_own_layers}: give a number of layers, 0 for none")
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
        exit_own_layers: decoder layers that only the exit has, between layer and head, keyed by ``str(layer)``; empty
            unless there are some.
    """

    def add_exits(
        self,
        exit_layers: Sequence[int],
        share_output_projection: bool,
        own_layers: int = 0,
        new_layer: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Makes the heads, as copies of the decoder's own.

        Args:
            own_layers: how many decoder layers each exit gets for itself, made by ``new_layer``.
        """
        self.exit_layers = list(exit_layers)
        self.exit_layer_norms = nn.ModuleDict()
        self.exit_output_projections = nn.ModuleDict()
        self.exit_own_layers = nn.ModuleDict()
        for key in map(str, self.exit_layers):
            if own_layers:
                self.exit_own_layers[key] = nn.ModuleList([new_layer() for _ in range(own_layers)])
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

    def own_layers(self, exit_layer: int) -> Sequence[nn.Module]:
        """The decoder layers that only an exit has."""
        key = str(exit_layer)
        return list(self.exit_own_layers[key]) if key in self.exit_own_layers else []

    def exit_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that only the exits have."""
        yield from self.exit_layer_norms.parameters()
        yield from self.exit_output_projections.parameters()
        yield from self.exit_own_layers.parameters()

    def exit_logits(
        self,
        inner_state: Tensor,
        exit_layer: int,
        encoder_out: dict[str, list[Tensor]] | None = None,
        incremental_state: dict[str, Any] | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Unnormalised scores of an exit.

        Args:
            inner_state: output of layer `exit_layer`, (time, batch, dim); fairseq's
                ``extra["inner_states"][exit_layer]``.
            exit_layer: one of `exit_layers`.
            encoder_out, incremental_state: what the decoder was given; for exits with layers of their own.
            padding: (batch, time), true at padding of what the decoder has read; for the same.

        Returns:
            (batch, time, vocab)

        Raises:
            BildError: `exit_layer` is not one of `exit_layers`.
        """
        self.check_exit(exit_layer)
        for layer in self.own_layers(exit_layer):
            inner_state = self._run_own_layer(layer, inner_state, encoder_out, incremental_state, padding)
        norm = self.exit_layer_norm(exit_layer)
        features = inner_state if norm is None else norm(inner_state)
        features = features.transpose(0, 1)  # (batch, time, dim)
        return self.project_to_vocabulary(features, self.exit_output_projection(exit_layer))

    def _run_own_layer(self, layer, x, encoder_out, incremental_state, padding) -> Tensor:
        """One layer as ``TransformerDecoderBase`` runs its own: (time, batch, dim) -> (time, batch, dim)."""
        states, masks = encoder_out["encoder_out"], encoder_out["encoder_padding_mask"]
        return layer(
            x,
            states[0] if states else None,
            masks[0] if masks else None,
            incremental_state,
            self_attn_mask=None if incremental_state is not None else self.buffered_future_mask(x),
            self_attn_padding_mask=padding if padding is not None and padding.any() else None,
        )[0]

    def fill_missing_exits(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Completes the checkpoint of a plain model, in place, so that it loads strictly.

        An exit that the checkpoint lacks starts from the checkpoint's own final layer norm and
        output projection, its own layers from the layers above the exit; where it lacks those too, from what the exit
        holds now.

        Args:
            state_dict: parameters by name, already upgraded to this fairseq's names.
            name: where the decoder sits in `state_dict`, ``"decoder"`` for a whole model.
        """
        filled = []
        for heads, origin in (
            ("exit_layer_norms", _origin("layer_norm")),
            ("exit_output_projections", _origin("output_projection")),
            ("exit_own_layers", _origin_of_own_layer),
        ):
            for key, current in getattr(self, heads).state_dict().items():
                if f"{name}.{heads}.{key}" in state_dict:
                    continue
                start = state_dict.get(f"{name}.{origin(key)}", current)
                state_dict[f"{name}.{heads}.{key}"] = start
                filled.append(f"{heads}.{key}")
        if filled:
            logger.info(
                "the checkpoint has no %s; they start as copies of its final layer norm and output projection, and "
                "of the layers above an exit",
                ", ".join(filled),
            )


def _origin(module: str) -> Callable[[str], str]:
    """From what an exit's weight is copied: ``"1.weight"`` -> ``"layer_norm.weight"``."""
    return lambda key: f"{module}.{key.partition('.')[2]}"


def _origin_of_own_layer(key: str) -> str:
    """The same for an exit's own layers: ``"2.0.fc1.bias"`` -> ``"layers.2.fc1.bias"``, the layer above the exit."""
    exit_layer, number, parameter = key.split(".", 2)
    return f"layers.{int(exit_layer) + int(number)}.{parameter}"


class EarlyExitTransformerDecoder(ExitHeads, TransformerDecoderBase):
    """fairseq's decoder plus one head for each exit; at full depth it is fairseq's decoder.

    Raises:
        BildError: see `check_decoder_options`.
    """

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False):
        check_decoder_options(cfg)
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn)
        self.add_exits(
            parse_exit_layers(cfg.exit_layers),
            cfg.exit_share_output_projection,
            cfg.exit_own_layers,
            lambda: self.build_decoder_layer(cfg, no_encoder_attn),
        )

    def project_to_vocabulary(self, features: Tensor, projection: nn.Module) -> Tensor:
        """Scores of the next token, (..., vocab), from the output of a final norm, (..., dim)."""
        if self.project_out_dim is not None:
            features = self.project_out_dim(features)
        return projection(features)
