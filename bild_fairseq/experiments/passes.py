"""What one forward pass of a decoder costs, by the number of new tokens that it reads.

It is the table behind every speed of BiLD: the large model verifies a draft in one pass, and that pays as far as
reading several tokens costs little more than reading one. A pass over few tokens is bound by how fast the weights are
read from memory, one over many tokens by arithmetic, so both speeds of the machine are measured with it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import nn

from ..engines.base import Engine, Pass, State
from ..errors import BildError
from .timing import timed

NEW_TOKENS = (1, 2, 3, 4, 5, 6, 8, 16)
SOURCE_TOKENS = 24
EARLIER_TOKENS = 16  # read before each pass, so that its self-attention has something to attend to
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_READ_BYTES = 512 << 20  # more than any processor's cache holds
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Machine:
    """What a machine can do at the moment.

    Attributes:
        gflops: float32 arithmetic in a product of large matrices, 10^9 operations a second.
        gbytes: reading from memory, 10^9 bytes a second.
    """

    gflops: float
    gbytes: float


@dataclass(frozen=True)
class Costs:
    """Medians in milliseconds.

    Attributes:
        encoder: encoding a batch of sources and projecting it for the decoder.
        passes: one pass, by the number of new tokens in each sentence.
    """

    encoder: float
    passes: dict[int, float]


def load_without_data(path: str) -> nn.Module:
    """Loads a model with stand-ins for its dictionaries, which have the right number of symbols.

    Raises:
        BildError: the checkpoint cannot be loaded.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    sizes = [len(state["model"].get(f"{side}.embed_tokens.weight", ())) for side in ("encoder", "decoder")]
    if not all(sizes):
        raise BildError(f"{path}: it is not an encoder-decoder Transformer")
    config = TranslationConfig(source_lang="source", target_lang="target")
    task = TranslationTask(config, *map(_dictionary, sizes))
    (model,), _ = checkpoint_utils.load_model_ensemble([path], task=task, state=state)
    return model.eval()


def _dictionary(size: int) -> Dictionary:
    made = Dictionary()
    for number in range(size - len(made)):
        made.add_symbol(f"symbol{number}")
    return made


def megabytes(model: nn.Module, precision: str) -> float:
    """Weights that a pass of the decoder over one token reads, in 10^6 bytes: matrices of all layers and the output's.

    Keys and values of the source are not projected again in every pass.
    """
    matrices = [
        module.weight.numel()
        for name, module in (*model.decoder.layers.named_modules(), ("", model.decoder.output_projection))
        if isinstance(module, nn.Linear) and not name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    ]
    return sum(matrices) * _BYTES[precision] / 1e6


def measure_machine(device: str) -> Machine:
    """Measures a machine's peaks with the threads that torch is set to; takes about a second.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    size = _MATRIX_SIZE[device]
    left, right = torch.rand(2, size, size, device=device)
    product = torch.empty(size, size, device=device)
    arithmetic = min(_milliseconds(lambda: torch.mm(left, right, out=product), device) for _ in range(6))
    read = torch.ones(_READ_BYTES // 4, device=device)
    reading = min(_milliseconds(read.sum, device) for _ in range(6))
    return Machine(2 * size**3 / arithmetic / 1e6, _READ_BYTES / reading / 1e6)


def measure_passes(
    engine: Engine, model: nn.Module, batch_size: int = 1, repeats: int = 25, new_tokens: Sequence[int] = NEW_TOKENS
) -> Costs:
    """Times an engine's passes over random tokens.

    Numbers of new tokens take turns, so that what disturbs the machine for a while disturbs all of them.

    Args:
        engine: runs the model.
        model: tells the vocabulary and the device.
        batch_size: sentences.
        repeats: of which the median counts.
        new_tokens: in each sentence.

    Raises:
        BildError: the model cannot read so many tokens.
    """
    longest = EARLIER_TOKENS + max(new_tokens)
    for side, tokens, limit in zip(("source", "target"), (SOURCE_TOKENS, longest), model.max_positions(), strict=True):
        if limit < tokens:
            raise BildError(f"passes are timed with {tokens} {side} tokens, and the model reads at most {limit}")
    device = model.decoder.embed_tokens.weight.device.type
    sources, texts = _random_tokens(model, batch_size, longest)
    net_input = {
        "src_tokens": torch.tensor(sources, device=device),
        "src_lengths": torch.full((batch_size,), SOURCE_TOKENS, device=device),
    }
    with torch.inference_mode():
        state = engine.start(net_input)
        rows = range(batch_size)
        earlier = [text[:EARLIER_TOKENS] for text in texts]
        engine.run(state, Pass(rows, [0] * batch_size, earlier, (0, engine.depth), "all"))
        runs = {count: _pass(engine, state, texts, count) for count in new_tokens}
        times = _in_turns({0: lambda: engine.start(net_input), **runs}, repeats, device)
    return Costs(times.pop(0), times)


def _random_tokens(model: nn.Module, batch_size: int, longest: int) -> tuple[list[list[int]], list[list[int]]]:
    """Sources and target texts of a batch, without padding."""
    dice = random.Random(1)
    sides = ((model.encoder, SOURCE_TOKENS), (model.decoder, longest))
    sources, texts = (
        [
            dice.choices(range(side.padding_idx + 1, side.embed_tokens.num_embeddings), k=length)
            for _ in range(batch_size)
        ]
        for side, length in sides
    )
    return sources, texts


def _pass(engine: Engine, state: State, texts: Sequence[Sequence[int]], count: int) -> Callable[[], Any]:
    step = Pass(
        rows=range(len(texts)),
        starts=[EARLIER_TOKENS] * len(texts),
        tokens=[text[EARLIER_TOKENS : EARLIER_TOKENS + count] for text in texts],
        layers=(0, engine.depth),
        predict="all",
    )
    return lambda: engine.run(state, step)


def _in_turns(runs: dict[int, Callable[[], Any]], repeats: int, device: str) -> dict[int, float]:
    """Median milliseconds of each, after a turn that does not count."""
    turns = [{key: _milliseconds(run, device) for key, run in runs.items()} for _ in range(repeats + 1)]
    return {key: statistics.median(turn[key] for turn in turns[1:]) for key in runs}


def _milliseconds(run: Callable[[], Any], device: str) -> float:
    return 1000 * timed(run, device == "cuda")[1]


def conditions(engine: Engine, model: nn.Module, repeats: int) -> str:
    """What the times of :func:`measure_passes` are of, in one line."""
    return (
        f"{engine.depth} decoder layers, width {model.decoder.embed_tokens.embedding_dim}, "
        f"{model.decoder.embed_tokens.num_embeddings} words; {SOURCE_TOKENS} source tokens, {EARLIER_TOKENS} target "
        f"tokens read before; milliseconds, medians of {repeats} (in brackets: times one new token)"
    )


def table_head(new_tokens: Sequence[int] = NEW_TOKENS) -> str:
    """The first two lines of a Markdown table of :func:`table_row`."""
    columns = ["precision", "threads", "batch", "GFLOP/s", "GB/s", "encoder", *map(str, new_tokens), "GB/s at 1"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_row(precision: str, threads: int, batch_size: int, machine: Machine, costs: Costs, read: float) -> str:
    """One line of the table: milliseconds, and how many times a pass over the fewest tokens that is.

    Args:
        read: megabytes that a pass reads.
    """
    fewest = costs.passes[min(costs.passes)]
    cells = [precision, threads, batch_size, f"{machine.gflops:.0f}", f"{machine.gbytes:.1f}", f"{costs.encoder:.3g}"]
    cells += [f"{value:.3g} ({value / fewest:.2f})" for value in costs.passes.values()]
    cells.append(f"{read / fewest:.1f}")
    return f"| {' | '.join(map(str, cells))} |"
