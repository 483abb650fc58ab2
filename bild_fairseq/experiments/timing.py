"""Systems timed in turns on the same batches, and what their times say of each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .bootstrap import bootstrap_weights, interval
from .systems import System


def timed(run: Callable[[], Any], cuda: bool) -> tuple[Any, float]:
    """What ``run`` returns, and its seconds; with ``cuda`` the GPU's work is waited for."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def measure(
    systems: Sequence[System],
    batches: Sequence[dict[str, Any]],
    *,
    cuda: bool,
    warmup: int,
    turn: int = 1,
    encoding: bool = False,
    floor: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Runs all systems over all batches in turns; a run that took very long is repeated, and the shorter time counts.

    Args:
        systems: each gets its seconds, outputs and counters.
        batches: fairseq's.
        cuda: the systems run on a GPU.
        warmup: batches that are run first and not counted.
        turn: batches that a system runs before the next one's turn.
        encoding: also time the encoders alone.
        floor: also take the time that each run spends inside its engines, in encoders and forward passes.
        progress: called with the number of batches done.
    """
    for batch in batches[:warmup]:
        for system in systems:
            system.run(batch)
    for system in systems:
        system.counters.clear()
    for number, begin in enumerate(range(0, len(batches), turn)):
        block = batches[begin : begin + turn]
        first = number % len(systems)
        for system in [*systems[first:], *systems[:first]]:
            for batch in block:
                _run(system, batch, cuda, floor)
            if encoding and system.encode:
                system.encoding += [timed(partial(system.encode, batch), cuda)[1] for batch in block]
            time.sleep(system.rest)
        progress(begin + len(block))


def _run(system: System, batch: dict[str, Any], cuda: bool, floor: bool) -> None:
    outputs, seconds, inside = _run_once(system, batch, cuda, floor)
    if len(system.seconds) >= 5 and seconds > 10 * statistics.median(system.seconds):
        # A very long batch, or a machine that was asleep meanwhile: a second run tells.
        counted = len(system.counters)
        _, again, inside_again = _run_once(system, batch, cuda, floor)
        seconds, inside = min((seconds, inside), (again, inside_again))
        del system.counters[counted:]
    system.seconds.append(seconds)
    system.outputs.update(zip(batch["id"].tolist(), outputs, strict=True))
    if floor and system.engines:
        system.floor.append(inside)


def _run_once(system: System, batch: dict[str, Any], cuda: bool, floor: bool) -> tuple[list[list[int]], float, float]:
    """The outputs, the seconds that they took, and how many of them inside the system's engines."""
    for engine in system.engines:
        engine.synchronizes = cuda and floor
    before = sum(engine.seconds for engine in system.engines)
    outputs, seconds = timed(lambda: system.run(batch), cuda)
    inside = sum(engine.seconds for engine in system.engines) - before
    return outputs, system.clock() if system.clock else seconds, inside


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """How many times faster: ratio of total times, and its 95 % bootstrap interval over batches."""
    weights = bootstrap_weights(len(ours))
    return sum(theirs) / sum(ours), *interval((weights @ theirs) / (weights @ ours))


def percentile90(values: Sequence[float]) -> float:
    return sorted(values)[int(0.9 * (len(values) - 1))]
