"""A proof that an engine computes what its model does: both run on a few random tokens and must agree.

The model runs as stock fairseq generates with it, token by token, up to the log-probabilities. The engine reads the
same tokens in several passes, each of several tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BildError
from .base import Engine, Pass, State
from .precision import rounded_copy

_SOURCES = (5, 2, 4)  # tokens of each source, the end symbol included
_TARGETS = (6, 3, 5)  # tokens that the decoder reads of each sentence
# How many of them a first pass reads. The layers above an exit go on where the layers below have read all.
_FIRST, _FIRST_ABOVE = (4, 1, 2), (2, 3, 1)

# How much two ways to compute the same log-probabilities may differ, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# In int8 an input halfway between two integers may be rounded to either one, and all that is computed from it differs.
# So an engine may differ from the rounded model by this tolerance, and from the rounded model at most so many times as
# much as from the model before rounding. That misses small faults of one product, which are proved one by one as they
# are packed, and all else is proved in float32 first.
_INT8_TOLERANCE = 5e-2
_INT8_FARTHER = 2.0

# The probability of this log-probability is 0 in float32. Tokens that a T5 lacks have lower ones, which the engine and
# the model need not agree on.
_IMPOSSIBLE = -100.0

# For each sentence the float32 log-probabilities (tokens, vocab) after each of its tokens.
Predictions = list[Tensor]


@torch.no_grad()
def prove(engine: Engine, model: nn.Module, precision: str, role: str) -> None:
    """Compares an engine with its model, at full depth, at every exit, and in the layers above every exit.

    Sentences for which the model itself gives NaN, because a weight is NaN for instance, are left out.

    Args:
        engine: made from the model.
        model: in eval mode; it is left as it is.
        precision: that the engine's weights are rounded to; the model is compared with its weights rounded likewise.
        role: what messages call the model: ``"large"``, ``"small"``.

    Raises:
        BildError: they differ by more than rounding, so text would be wrong.
    """
    exits = [depth for depth in getattr(model.decoder, "exit_layers", ()) if depth < engine.depth]
    comparison = _Comparison(model, precision, role, exits)
    for depth, where, found in _readings(engine, comparison.net_input, comparison.tokens, exits):
        comparison.check(found, depth, where)


@torch.no_grad()
def prove_cut_head(
    engine: Engine, cut: int, model: nn.Module, depth: int, types: Sequence[int], precision: str, role: str
) -> None:
    """Compares a head of an engine that predicts some types only with what the model gives these.

    Args:
        engine, model, precision, role: as for :func:`prove`.
        cut: the head's number.
        depth: after which layer it predicts.
        types: token numbers.

    Raises:
        BildError: they differ by more than rounding, or another type has a probability.
    """
    comparison = _Comparison(model, precision, role, [depth] if depth < engine.depth else [])
    state = engine.start(comparison.net_input)
    found = _read(engine, state, comparison.tokens, (0, depth), _FIRST, keep=depth < engine.depth, cut=cut)
    comparison.check(found, depth, " with its draft vocabulary", types)


class _Comparison:
    """What a model predicts on a few random tokens, to compare an engine's predictions with.

    Args:
        model, precision, role: as for :func:`prove`.
        exits: the exit layers to compare at, besides the full depth.
    """

    def __init__(self, model: nn.Module, precision: str, role: str, exits: Sequence[int]):
        self._model, self._role = model, role
        self._tolerance = _TOLERANCE[next(model.parameters()).dtype]
        self._missing = list(getattr(model.decoder, "missing_rows", ()))
        self.net_input, self.tokens = _random_batch(model)
        self._expected = _generate(rounded_copy(model, precision), self.net_input, self.tokens, exits)
        self._unrounded = None
        if precision == "int8":
            self._tolerance = max(self._tolerance, _INT8_TOLERANCE)
            self._unrounded = _generate(model, self.net_input, self.tokens, exits)

    def check(self, found: Predictions, depth: int, where: str, types: Sequence[int] | None = None) -> None:
        """Compares what an engine has predicted after a layer.

        Args:
            found: its log-probabilities.
            depth: the layer.
            where: the same in words.
            types: those that it predicts, None for all.

        Raises:
            BildError: it differs from the model by more than rounding.
        """
        found, (wanted, largest) = _floored(found, self._missing), self._expected[depth]
        if types is not None:
            wanted = _among(wanted, types, self._missing)
        agrees = _agree(found, wanted, largest, self._tolerance)
        if self._unrounded is not None:
            unrounded, _ = self._unrounded[depth]
            unrounded = unrounded if types is None else _among(unrounded, types, self._missing)
            allowed = max(_INT8_FARTHER * _distance(found, unrounded), _TOLERANCE[torch.float32])
            agrees = agrees and _distance(found, wanted) <= allowed
        if not agrees:
            raise BildError(
                f"the {self._role} model ({type(self._model).__name__}) cannot be decoded exactly: its forward pass "
                f"computes something else than its weights say{where}"
            )


def _random_batch(model: nn.Module) -> tuple[dict[str, Any], list[list[int]]]:
    """Sources as fairseq collates them, and what the decoder reads; the same ones every time."""
    rng = random.Random(0)
    device = next(model.parameters()).device
    dictionary = model.decoder.dictionary

    def draw(count: int, module: nn.Module) -> list[int]:
        """Words, the unknown one among them, that a module has embeddings of."""
        embeddings = getattr(getattr(module, "embed_tokens", None), "num_embeddings", len(dictionary))
        words = max(0, min(embeddings, len(dictionary)) - dictionary.nspecial)
        drawn = [rng.randint(0, words) for _ in range(count)]
        return [dictionary.nspecial + word - 1 if word else dictionary.unk() for word in drawn]

    lengths = [min(length, model.encoder.max_positions()) for length in _SOURCES]
    source = torch.full((len(lengths), max(lengths)), dictionary.pad())
    for row, length in enumerate(lengths):
        source[row, max(lengths) - length :] = torch.tensor([*draw(length - 1, model.encoder), dictionary.eos()])
    targets = [min(length, model.max_decoder_positions()) for length in _TARGETS]
    tokens = [[dictionary.eos(), *draw(length - 1, model.decoder)] for length in targets]
    return {"src_tokens": source.to(device), "src_lengths": torch.tensor(lengths, device=device)}, tokens


def _generate(
    model: nn.Module, net_input: dict[str, Any], tokens: Sequence[Sequence[int]], exits: Sequence[int]
) -> dict[int, tuple[Predictions, float]]:
    """By depth, what stock fairseq computes when it generates the tokens, and the size of the largest logit."""
    decoder, depth = model.decoder, len(model.decoder.layers)
    width = max(map(len, tokens))
    padded = [[*one, *[decoder.dictionary.pad()] * (width - len(one))] for one in tokens]
    previous = torch.tensor(padded, device=net_input["src_tokens"].device)
    encoded = model.encoder.forward_torchscript(net_input)
    incremental_state: dict[str, Any] = {}
    # By depth, for each position the logits and log-probabilities (batch, vocab).
    steps: dict[int, list[tuple[Tensor, Tensor]]] = {one: [] for one in (*exits, depth)}
    for length in range(1, width + 1):
        logits, extra = decoder.forward(previous[:, :length], encoder_out=encoded, incremental_state=incremental_state)
        lprobs = model.get_normalized_probs((logits[:, -1:].clone(), extra), log_probs=True, sample=None)
        steps[depth].append((logits[:, -1], lprobs[:, -1]))
        for one in exits:
            logits = decoder.exit_logits(extra["inner_states"][one], one, encoded, incremental_state)[:, -1]
            steps[one].append((logits, logits.float().log_softmax(dim=-1)))
    lengths, missing = [len(row) for row in tokens], list(getattr(decoder, "missing_rows", ()))
    return {one: _predictions(pairs, lengths, missing) for one, pairs in steps.items()}


def _predictions(
    steps: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int], missing: Sequence[int]
) -> tuple[Predictions, float]:
    """Log-probabilities of every position but those beyond the end of a sentence, and the size of the largest logit.

    A token that the model lacks has a huge negative logit, which says nothing of the others' rounding.
    """
    logits, lprobs = (torch.stack(kind, dim=1).float() for kind in zip(*steps, strict=True))  # (batch, length, vocab)
    logits[..., missing] = 0.0
    largest = float(logits[logits.isfinite()].abs().amax()) if logits.isfinite().any() else 0.0
    kept = [row[:length] for row, length in zip(lprobs, lengths, strict=True)]
    return _floored(kept, missing), max(1.0, largest)


def _readings(
    engine: Engine, net_input: dict[str, Any], tokens: Sequence[Sequence[int]], exits: Sequence[int]
) -> Iterator[tuple[int, str, Predictions]]:
    """The depths that an engine predicts at, in words where that is, and its log-probabilities there."""
    yield engine.depth, "", _read(engine, engine.start(net_input), tokens, (0, engine.depth), _FIRST)
    for depth in exits:
        state = engine.start(net_input)
        yield depth, f" at exit layer {depth}", _read(engine, state, tokens, (0, depth), _FIRST, keep=True)
        above = _read(engine, state, tokens, (depth, engine.depth), _FIRST_ABOVE)
        yield engine.depth, f" above exit layer {depth}", above


def _read(
    engine: Engine,
    state: State,
    tokens: Sequence[Sequence[int]],
    layers: tuple[int, int],
    first: Sequence[int],
    keep: bool = False,
    cut: int | None = None,
) -> Predictions:
    """An engine's log-probabilities, read in two passes.

    Args:
        layers, keep, cut: as in a :class:`~bild_fairseq.engines.base.Pass`.
        first: how many tokens of each sentence the first pass reads.
    """
    found: list[list[Tensor]] = [[] for _ in tokens]
    middle = [min(count, len(one)) for count, one in zip(first, tokens, strict=True)]
    for starts, ends in (([0] * len(tokens), middle), (middle, [len(one) for one in tokens])):
        rows = [row for row in range(len(tokens)) if ends[row] > starts[row]]
        if rows:
            chunks = [tokens[row][starts[row] : ends[row]] for row in rows]
            step = Pass(rows, [starts[row] for row in rows], chunks, layers, "all", keep, cut)
            logits, normalizers = engine.run(state, step)
            lprobs = logits - normalizers[:, None]
            for row, part in zip(rows, lprobs.split([len(chunk) for chunk in chunks]), strict=True):
                found[row].append(part)
    return [torch.cat(parts) for parts in found]


def _among(predictions: Predictions, types: Sequence[int], missing: Sequence[int]) -> Predictions:
    """Log-probabilities over some types only, -inf for the others; floored as by :func:`_floored`."""
    possible = sorted(set(types).difference(missing))
    among = [torch.full_like(row, -math.inf) for row in predictions]
    for row, all_types in zip(among, predictions, strict=True):
        row[:, possible] = all_types[:, possible].log_softmax(dim=-1)
    return _floored(among, missing)


def _floored(predictions: Predictions, missing: Sequence[int]) -> Predictions:
    """The same log-probabilities, where tokens that the model lacks have no less than ``_IMPOSSIBLE``."""
    columns = torch.tensor(missing, dtype=torch.long)
    return [row.index_copy(1, columns.to(row.device), row[:, missing].clamp(min=_IMPOSSIBLE)) for row in predictions]


def _agree(found: Predictions, expected: Predictions, largest: float, tolerance: float) -> bool:
    """Whether what an engine found is what the model gives, in all sentences where that is a number."""
    return all(
        one.shape == other.shape and bool(((one - other).abs().le(tolerance * largest) | (one == other)).all())
        for one, other in zip(found, expected, strict=True)
        if not other.isnan().any()
    )


def _distance(found: Predictions, other: Predictions) -> float:
    """The mean difference of log-probabilities, in nats, where both are numbers."""
    differences = (torch.cat(list(found)) - torch.cat(list(other))).abs()
    numbers = differences[differences.isfinite()]
    return float(numbers.mean()) if numbers.numel() else 0.0
