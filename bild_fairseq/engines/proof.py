"""A proof that an engine computes what its model does: both run on a few random tokens and must agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BildError
from .base import Engine, Pass
from .precision import rounded_copy

_SOURCES = (5, 2, 4)  # tokens of each source, the end symbol included
_TARGETS = (6, 3, 5)  # tokens that the decoder reads of each sentence
_FIRST = (4, 1, 2)  # how many of them in a first pass

# How much two ways to compute the same logits may differ, as a share of the largest one.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def prove(engine: Engine, model: nn.Module, precision: str, role: str) -> None:
    """Compares an engine with its model's own forward pass, at full depth and at every exit.

    Args:
        engine: made from the model.
        model: in eval mode.
        precision: that the engine's weights are rounded to; the model is compared with its weights rounded likewise.
        role: what messages call the model: ``"large"``, ``"small"``.

    Raises:
        BildError: they differ by more than rounding, so text would be wrong.
    """
    net_input, tokens = _random_batch(model)
    reference = rounded_copy(model, precision)
    encoded = reference.encoder.forward_torchscript(net_input)
    exits = [depth for depth in getattr(model.decoder, "exit_layers", ()) if depth < engine.depth]
    for depth in (*exits, engine.depth):
        expected = _forward(reference, tokens, encoded, None if depth == engine.depth else depth)
        found = _read(engine, net_input, tokens, depth)
        if not _agree(found, expected, _TOLERANCE[next(model.parameters()).dtype]):
            where = "" if depth == engine.depth else f" at exit layer {depth}"
            raise BildError(
                f"the {role} model ({type(model).__name__}) cannot be decoded exactly: its forward pass computes "
                f"something else than its weights say{where}"
            )


def _random_batch(model: nn.Module) -> tuple[dict[str, Any], list[list[int]]]:
    """Sources as fairseq collates them, and what the decoder reads; the same ones every time."""
    random = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    dictionary = model.decoder.dictionary
    words = len(dictionary) - dictionary.nspecial
    source_words = min(model.encoder.embed_tokens.num_embeddings, len(dictionary)) - dictionary.nspecial

    def draw(count: int, kinds: int) -> list[int]:
        drawn = torch.randint(max(1, kinds), (count,), generator=random)
        return (drawn + min(dictionary.nspecial, len(dictionary) - 1)).tolist()

    lengths = [min(length, model.encoder.max_positions()) for length in _SOURCES]
    source = torch.full((len(lengths), max(lengths)), dictionary.pad())
    for row, length in enumerate(lengths):
        source[row, max(lengths) - length :] = torch.tensor([*draw(length - 1, source_words), dictionary.eos()])
    targets = [min(length, model.max_decoder_positions()) for length in _TARGETS]
    tokens = [[dictionary.eos(), *draw(length - 1, words)] for length in targets]
    return {"src_tokens": source.to(device), "src_lengths": torch.tensor(lengths, device=device)}, tokens


def _forward(model: nn.Module, tokens: Sequence[Sequence[int]], encoded: Any, exit_layer: int | None) -> list[Tensor]:
    """The model's own logits after every token: for each sentence (tokens, vocab)."""
    dictionary = model.decoder.dictionary
    device = next(model.parameters()).device
    previous = torch.full((len(tokens), max(map(len, tokens))), dictionary.pad(), device=device)
    for row, one in enumerate(tokens):
        previous[row, : len(one)] = torch.tensor(one, device=device)
    logits, extra = model.decoder(previous, encoder_out=encoded)
    if exit_layer is not None:
        logits = model.decoder.exit_logits(extra["inner_states"][exit_layer], exit_layer)
    return [row[: len(one)] for row, one in zip(logits, tokens, strict=True)]


def _read(engine: Engine, net_input: dict[str, Any], tokens: Sequence[Sequence[int]], depth: int) -> list[Tensor]:
    """The engine's logits after every token, read in two passes; an exit's layers and those above in one pass each."""
    state = engine.start(net_input)
    rows = range(len(tokens))
    first = [min(count, len(one)) for count, one in zip(_FIRST, tokens, strict=True)]
    found: list[list[Tensor]] = [[] for _ in tokens]
    for starts, ends in (([0] * len(tokens), first), (first, [len(one) for one in tokens])):
        reading = [row for row in rows if ends[row] > starts[row]]
        if reading:
            chunks = [tokens[row][starts[row] : ends[row]] for row in reading]
            step = Pass(reading, [starts[row] for row in reading], chunks, (0, depth), "all")
            logits = engine.run(state, step)[0].clone()
            for row, part in zip(reading, logits.split([len(chunk) for chunk in chunks]), strict=True):
                found[row].append(part)
    return [torch.cat(parts) for parts in found]


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    one, other = torch.cat(list(found)).float(), torch.cat(list(expected)).float()
    if one.shape != other.shape:
        return False
    finite = other[other.isfinite()]
    largest = float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(one, other, rtol=0, atol=tolerance * max(largest, 1.0), equal_nan=True)
