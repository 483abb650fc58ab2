"""Where a decoder predicts, and the layers on the way there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def heads_of(decoder: nn.Module) -> Iterator[tuple[int, nn.Module | None, nn.Linear]]:
    """The depths that a decoder predicts at, with the final norm and the output projection there."""
    yield len(decoder.layers), decoder.layer_norm, decoder.output_projection
    for depth in getattr(decoder, "exit_layers", ()):
        yield depth, decoder.exit_layer_norm(depth), decoder.exit_output_projection(depth)


def layers_of(decoder: nn.Module) -> tuple[list[nn.Module], Mapping[int, range]]:
    """All layers, as engines number them: the decoder's own, then those that only an exit has.

    Returns:
        the layers, and which of them only an exit has, by exit layer.
    """
    layers, own = [*decoder.layers], {}
    for depth in getattr(decoder, "exit_layers", ()):
        own[depth] = range(len(layers), len(layers) + len(decoder.own_layers(depth)))
        layers += decoder.own_layers(depth)
    return layers, own


def spread(logits: Tensor, types: Tensor, vocabulary: int) -> Tensor:
    """The logits over some types (predictions, kept) as those of all types (predictions, vocabulary), -inf elsewhere.

    Args:
        types: (kept,) token numbers.
    """
    return logits.new_full((len(logits), vocabulary), -math.inf).index_copy_(1, types, logits)
