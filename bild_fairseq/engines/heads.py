"""Where a decoder predicts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def heads_of(decoder: nn.Module) -> Iterator[tuple[int, nn.Module | None, nn.Linear]]:
    """The depths that a decoder predicts at, with the final norm and the output projection there."""
    yield len(decoder.layers), decoder.layer_norm, decoder.output_projection
    for depth in getattr(decoder, "exit_layers", ()):
        yield depth, decoder.exit_layer_norm(depth), decoder.exit_output_projection(depth)
