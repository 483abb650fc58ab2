"""Ways to translate a batch: fairseq's own generator, and generators of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask

from ..decoding.counters import Counters
from ..decoding.decode import Policy
from ..plugin.generator import BildGenerator, SearchOptions
from ..plugin.trace import replay

Run = Callable[[dict[str, Any]], list[list[int]]]


@dataclass
class System:
    """One way to translate a batch, and what came of it."""

    name: str
    run: Run  # fairseq batch -> token numbers per sentence, end symbol included
    generator: BildGenerator | None = None
    seconds: list[float] = field(default_factory=list)  # per batch
    encoding: list[float] = field(default_factory=list)  # per batch: its encoders alone, if asked for
    floor: list[float] = field(default_factory=list)  # per batch: its bare forward passes, if asked for
    outputs: dict[int, list[int]] = field(default_factory=dict)  # by sentence
    counters: list[Counters] = field(default_factory=list)
    encode: Callable[[dict[str, Any]], Any] | None = None  # runs the encoders alone
    clock: Callable[[], float] | None = None  # seconds of the last run, for a system that measures itself
    rest: float = 0.0  # seconds to wait after its turn, for threads that keep a core busy for a while


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
        net_input = {name: value for name, value in batch["net_input"].items() if name != "prev_output_tokens"}
        return [model.encoder.forward_torchscript(net_input) for model in models]

    return System(f"fairseq --beam {beam}", run, encode=encode)


def ours(
    name: str, models: Sequence[torch.nn.Module], task: FairseqTask, search: SearchOptions, **kwargs: Any
) -> System:
    """A system of this package; ``kwargs`` are those of ``BildGenerator``."""
    kwargs.setdefault("policy", Policy())
    return system_of(name, BildGenerator(models, task.target_dictionary, options=search, **kwargs))


def system_of(name: str, generator: BildGenerator, policy: Policy | None = None) -> System:
    """A system that runs a generator, which several may share, with a policy of its own if one is given."""

    def run(batch: dict[str, Any]) -> list[list[int]]:
        if policy is not None:
            generator.policy = policy
        hypotheses = generator.generate([], batch)
        system.counters += [hypos[0]["counters"] for hypos in hypotheses]
        return [hypos[0]["tokens"].tolist() for hypos in hypotheses]

    system = System(name, run, generator, encode=lambda batch: replay(generator, batch, []))
    return system
