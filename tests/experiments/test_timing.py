"""Measuring: turns, warmup, outputs, the floor; and what times say of each other."""

import time

import pytest
import support
import torch
from script_support import MemoryTask

from bild_fairseq.experiments.systems import System, ours, stock
from bild_fairseq.experiments.timing import measure, percentile90, ratio
from bild_fairseq.plugin.pair import Pair
from bild_fairseq.plugin.search import SearchOptions

BATCHES = [{"id": torch.tensor([number])} for number in range(7)]


def logged(name: str, log: list[tuple[str, int]]) -> System:
    def run(batch: dict) -> list[list[int]]:
        log.append((name, batch["id"].item()))
        return [[batch["id"].item()]]

    return System(name, run)


def test_systems_take_turns_and_each_goes_first():
    log: list[tuple[str, int]] = []
    progress: list[int] = []
    systems = [logged("a", log), logged("b", log)]
    measure(systems, BATCHES, cuda=False, warmup=1, turn=3, progress=progress.append)
    assert log[:2] == [("a", 0), ("b", 0)], "warmup"
    turns = [("a", (0, 1, 2)), ("b", (0, 1, 2)), ("b", (3, 4, 5)), ("a", (3, 4, 5)), ("a", (6,)), ("b", (6,))]
    assert log[2:] == [(name, number) for name, numbers in turns for number in numbers]
    assert progress == [3, 6, 7]
    for one in systems:
        assert len(one.seconds) == 7 and one.outputs == {number: [number] for number in range(7)}


def test_a_run_that_took_very_long_is_repeated():
    """A machine that was asleep meanwhile does not count."""
    slow = [6]

    def run(batch: dict) -> list[list[int]]:
        time.sleep(1.0 if slow and batch["id"] == slow[0] and slow.pop() else 0.01)
        return [[2]]

    one = System("sleepy", run)
    measure([one], BATCHES, cuda=False, warmup=0)
    assert not slow and max(one.seconds) < 0.9


def test_the_floor_is_the_time_inside_the_engines():
    """Above nothing, and not above the whole; with encoders timed apart; fairseq's own generator has none."""
    large, small = support.pair("agreeing", 0)
    task, search = MemoryTask([], []), SearchOptions(max_len_b=12)
    systems = [
        ours("bild", Pair([large], [small]), task, search),
        ours("greedy", Pair([large], alone=True), task, search),
        stock([large], task, 1, search),
    ]
    batches = [support.sample([support.source([1, 2, number])], ids=[number]) for number in range(3)]
    measure(systems, batches, cuda=False, warmup=1, floor=True, encoding=True)
    for one in systems[:2]:
        assert len(one.floor) == 3 and all(0 < f <= s for f, s in zip(one.floor, one.seconds, strict=True))
    assert systems[2].floor == []
    assert all(len(one.encoding) == 3 and min(one.encoding) > 0 for one in systems)
    assert systems[1].outputs == systems[2].outputs
    assert len(systems[0].counters) == 3 and systems[2].counters == []


def test_a_ratio_has_an_interval_over_the_batches():
    assert ratio([1.0, 2.0], [2.0, 4.0]) == (2, 2, 2)
    times = [1.0 + 0.1 * (number % 5) for number in range(40)]
    value, low, high = ratio([1.0] * 40, times)
    assert value == pytest.approx(sum(times) / 40) and low < value < high
    assert 1 < low and high < 1.4


def test_nine_of_ten_values_are_not_above_the_percentile():
    assert percentile90(list(range(1, 12))) == 10 and percentile90([5.0]) == 5
