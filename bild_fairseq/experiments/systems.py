"""Ways to translate a batch: fairseq's own generator, and generators of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask

from ..decoding.counters import Counters
from ..decoding.policies import Policy
from ..engines.base import Engine
from ..plugin.generator import BildGenerator
from ..plugin.pair import Pair
from ..plugin.search import SearchOptions

Run = Callable[[dict[str, Any]], list[list[int]]]


@dataclass
class System:
    """One way to translate a batch, and what came of it."""

    name: str
    run: Run  # fairseq batch -> token numbers per sentence, end symbol included
    encode: Callable[[dict[str, Any]], Any] | None = None  # runs the encoders alone
    engines: Sequence[Engine] = ()  # that run its models, for a system of this package
    clock: Callable[[], float] | None = None  # seconds of the last run, for a system that measures itself
    rest: float = 0.0  # seconds to wait after its turn, for threads that keep a core busy for a while
    seconds: list[float] = field(default_factory=list)  # per batch
    encoding: list[float] = field(default_factory=list)  # per batch: its encoders alone, if asked for
    floor: list[float] = field(default_factory=list)  # per batch: the time inside its engines, if asked for
    outputs: dict[int, list[int]] = field(default_factory=dict)  # by sentence
    counters: list[Counters] = field(default_factory=list)


def stock(models: Sequence[torch.nn.Module], task: FairseqTask, beam: int, search: SearchOptions) -> System:
    """fairseq's own generator."""
    generator = SequenceGenerator(
        models,
        task.target_dictionary,
        beam_size=beam,
        max_len_a=search.max_len_a,
        max_len_b=search.max_len_b,
        min_len=search.min_len,
        no_repeat_ngram_size=search.no_repeat_ngram_size,
    )

    def run(batch: dict[str, Any]) -> list[list[int]]:
        return [hypos[0]["tokens"].tolist() for hypos in generator.generate(models, batch)]

    @torch.no_grad()
    def encode(batch: dict[str, Any]) -> Any:
        return [model.encoder.forward_torchscript(_sources(batch)) for model in models]

    return System(f"fairseq --beam {beam}", run, encode)


def ours(
    name: str,
    pair: Pair,
    task: FairseqTask,
    search: SearchOptions,
    policy: Policy | None = None,
    max_batch: int | None = None,
) -> System:
    """A system of this package; a pair's models are laid out once, however many systems share it."""
    generator = BildGenerator(pair, task.target_dictionary, policy or Policy(), search, max_batch=max_batch)

    def run(batch: dict[str, Any]) -> list[list[int]]:
        hypotheses = generator.generate([], batch)
        system.counters += [hypos[0]["counters"] for hypos in hypotheses]
        return [hypos[0]["tokens"].tolist() for hypos in hypotheses]

    @torch.no_grad()
    def encode(batch: dict[str, Any]) -> Any:
        return [engine.start(_sources(batch)) for engine in pair.engines]

    system = System(name, run, encode, pair.engines)
    return system


def _sources(batch: dict[str, Any]) -> dict[str, Any]:
    """What an encoder reads of a batch."""
    return {name: value for name, value in batch["net_input"].items() if name != "prev_output_tokens"}
