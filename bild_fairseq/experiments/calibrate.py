"""The search for the fastest thresholds that lose no more quality than is allowed.

Every setting of a large space is walked over recorded predictions. The fastest ones whose loss is within the bound are
run, and the fastest of these wins. The bound is a paired bootstrap over the sentences.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from fairseq.tasks import FairseqTask

from ..decoding.policies import Policy
from ..plugin.pair import Pair
from ..plugin.search import SearchOptions
from .bootstrap import bootstrap_weights
from .costs import TURN, CostModel, fit_costs
from .estimates import Estimates
from .origin import origin_of
from .progress import progress_bar
from .recorded import walk
from .recorder import Record, Recorder
from .sample import load_sample
from .scoring import quality_change
from .settings import ENDS, parse_drafts, parse_fallbacks, parse_rollbacks
from .systems import System, ours
from .timing import measure, ratio

SURE = 0.95  # a setting is given up after a part of the sentences only if it loses too much with this probability
SLACK = 1.1  # how much slower than another a setting must seem before it is left out
GROUP = 12  # settings that are walked over all sentences before the next ones are looked at
TAIL = 5  # sentences that should lie beyond a bound
# The space, by whether nothing may be lost: then it has two dimensions only, and can be finer.
FALLBACKS = {
    False: "0.2,0.3,0.4,0.5,0.6,0.8",
    True: "0,0.05,0.1,0.15,0.2,0.25,0.3,0.35,0.4,0.45,0.5,0.6,0.7,0.8,0.9",
}
DRAFTS = {False: "5,10", True: "2,3,4,5,6,7,8,10,12,15,20"}


def add_space_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings that are searched."""
    space = parser.add_argument_group("the space, values joined by commas")
    space.add_argument("--fallback", help=f"(default: {FALLBACKS[False]}; with --lossless {FALLBACKS[True]})")
    space.add_argument("--rollback", default="1,1.5,2,3,4,6")
    space.add_argument("--max-draft", help=f"(default: {DRAFTS[False]}; with --lossless {DRAFTS[True]})")
    space.add_argument("--verify-end", choices=list(ENDS), default="both")


def policies(args: argparse.Namespace) -> list[Policy]:
    """The space, and for each fallback threshold and draft length the setting that loses nothing.

    Args:
        args: of :func:`add_space_arguments`, and whether only the latter are wanted, ``lossless``.

    Raises:
        BildError: a number is out of range.
    """
    fallbacks = parse_fallbacks(args.fallback or FALLBACKS[args.lossless])
    drafts = parse_drafts(args.max_draft or DRAFTS[args.lossless])
    rollbacks, ends = [] if args.lossless else parse_rollbacks(args.rollback), ENDS[args.verify_end]
    found = [Policy(f, r, d, verify_end=end) for f, r, d, end in itertools.product(fallbacks, rollbacks, drafts, ends)]
    found += [Policy(f, 0.0, d, verify_end=True) for f, d in itertools.product(fallbacks, drafts)]
    return list(dict.fromkeys(found))


def lossless(policy: Policy) -> bool:
    """Whether the output is the large model's own, whatever the models."""
    return policy.rollback_threshold == 0 and policy.verify_end


def sentences_needed(confidence: float) -> int:
    """How many sentences a bound with this confidence takes: a few must lie beyond it by chance."""
    return round(TAIL / (1 - confidence))


def loosening(settings: Sequence[Policy]) -> list[list[tuple[int, list[int]]]]:
    """Settings (by number) in waves from strict to loose, each with those of an earlier wave that are a step stricter.

    A step is the next higher fallback threshold or the next lower rollback threshold, all else equal.
    """
    numbers = {policy: number for number, policy in enumerate(settings)}
    fallbacks = sorted({policy.fallback_threshold for policy in settings}, reverse=True)
    rollbacks = sorted({policy.rollback_threshold for policy in settings})
    waves: list[list[tuple[int, list[int]]]] = [[] for _ in range(len(fallbacks) + len(rollbacks) - 1)]
    for policy, number in numbers.items():
        f, r = fallbacks.index(policy.fallback_threshold), rollbacks.index(policy.rollback_threshold)
        stricter = [dataclasses.replace(policy, fallback_threshold=fallbacks[f - 1])] if f else []
        stricter += [dataclasses.replace(policy, rollback_threshold=rollbacks[r - 1])] if r else []
        waves[f + r].append((number, [numbers[one] for one in stricter if one in numbers]))
    return waves


class Calibration:
    """The search for one pair of models, in steps.

    Args:
        task: with the subset loaded.
        pair: the models.
        args: the flags of ``scripts/calibrate.py``.
        settings: the space.

    Raises:
        BildError: a source is too long for a model; the record, the references or a vocabulary does not fit.
    """

    def __init__(self, task: FairseqTask, pair: Pair, args: argparse.Namespace, settings: Sequence[Policy]):
        self._task, self._pair, self._args, self._settings = task, pair, args, settings
        self._search = SearchOptions.from_args(args)
        sample = load_sample(task, args, [pair], batch_size=1)
        self.ids, self._batches, self.scorer = sample.ids, sample.batches, sample.scorer
        self.recorder = Recorder(task, args.subset, pair, self._search, self.ids, args.batch_size, args.cuda)
        self._record = Record(args.record, self.recorder, origin_of(task, {"model": pair}, args))
        eos = task.target_dictionary.eos()
        self._estimates = Estimates(settings, self.ids, self.recorder, self.scorer, eos)
        self._columns = list(range(len(self.ids)))

    def fit_costs(self) -> CostModel:
        """Times a few sentences."""
        batches = self._batches[: self._args.timing_sentences]
        return fit_costs(self._pair, self._task, self._search, batches, self._args.cuda)

    def cheapest(self, costs: CostModel) -> Policy:
        """The setting that takes the least time by estimate, whatever it writes."""
        with progress_bar(len(self.ids), "sentence", desc="greedy decoding") as bar:
            self.recorder.record_greedy(bar.update)
        every = range(len(self._settings))
        with progress_bar(len(every) * len(self.ids), "sentence", desc="all sentences") as bar:
            self._estimates.fill(every, self._columns, bar, self._record.save)
        self._record.save(at_once=True)
        milliseconds = self._estimates.milliseconds(every, self._columns, costs)
        return self._settings[int(milliseconds.argmin())]

    def shortlist(self, costs: CostModel) -> list[Policy]:
        """Settings within the bound on all sentences, the fastest by estimate first; more than are needed, not all.

        A part of the sentences comes first: settings that are slower there than the fastest one that loses nothing, or
        certainly lose too much, are not looked at on the others; nor are settings looser than one that loses too much.
        On all sentences the fastest of those left are walked until enough of them have passed.
        """
        try:
            return self._shortlist(costs)
        finally:  # interrupted or not, what has been recorded is kept
            self._record.save(at_once=True)

    def _shortlist(self, costs: CostModel) -> list[Policy]:
        with progress_bar(len(self.ids), "sentence", desc="greedy decoding") as bar:
            self.recorder.record_greedy(bar.update)
        greedy = self._greedy_statistics()
        columns = random.Random(0).sample(self._columns, len(self._columns))
        first = columns[: max(40, len(columns) // 4)]
        hopeful = self._hopeful(first, greedy)
        milliseconds = dict(zip(hopeful, self._estimates.milliseconds(hopeful, first, costs), strict=True))
        sure = min(milliseconds[s] for s in hopeful if lossless(self._settings[s]))
        # Estimates on few sentences are rough, so a setting must be clearly slower to be left out.
        active = sorted((s for s in hopeful if milliseconds[s] <= SLACK * sure), key=milliseconds.__getitem__)
        passing = self._passing(active, milliseconds, len(first), greedy, costs)
        return [self._settings[s] for s in passing]

    def _greedy_statistics(self) -> np.ndarray:
        """Statistics of the large model's own outputs, (sentences, k)."""
        like_greedy = Policy(0.0, 0.0, 1, verify_end=True)
        roots = [self.recorder.roots[i] for i in self.ids]
        sentences = walk(roots, like_greedy, self._task.target_dictionary.eos())
        return self.scorer.statistics(dict(zip(self.ids, (one.tokens[1:] for one in sentences), strict=True)))

    def _hopeful(self, first: Sequence[int], greedy: np.ndarray) -> list[int]:
        """Settings that may keep the bound, after a part of the sentences."""
        args, total = self._args, len(self._settings) * len(first)
        hopeful: list[int] = []
        with progress_bar(total, "sentence", desc="a part of the sentences") as bar:
            for wave in loosening(self._settings):
                kept = set(hopeful)
                wave = [s for s, tighter in wave if kept.issuperset(tighter)]
                if wave:
                    self._estimates.fill(wave, first, bar, self._record.save)
                    losses = self._estimates.losses(wave, first, greedy)
                    low = np.quantile(losses, 1 - max(SURE, args.confidence), axis=1)
                    bounded = zip(wave, low, strict=True)
                    hopeful += [s for s, loss in bounded if loss <= args.max_loss or lossless(self._settings[s])]
        return hopeful

    def _passing(
        self, active: Sequence[int], milliseconds: dict[int, float], known: int, greedy: np.ndarray, costs: CostModel
    ) -> list[int]:
        """Those of some settings, the fastest first, that keep the bound on all sentences.

        Args:
            milliseconds: estimates on the first part of the sentences.
            known: how many sentences that part has.
        """
        passing: list[tuple[float, int]] = []
        total = len(active) * (len(self.ids) - known)
        with progress_bar(total, "sentence", desc="all sentences") as bar:
            for begin in range(0, len(active), GROUP):
                group = active[begin : begin + GROUP]
                enough = 2 * self._args.candidates  # should one not keep what it promises
                if len(passing) >= enough and milliseconds[group[0]] > SLACK * milliseconds[passing[enough - 1][1]]:
                    break
                self._estimates.fill(group, self._columns, bar, self._record.save)
                losses = self._estimates.losses(group, self._columns, greedy)
                bounds = np.quantile(losses, self._args.confidence, axis=1)
                times = self._estimates.milliseconds(group, self._columns, costs)
                found = zip(times, group, bounds, strict=True)
                passing += [(ms, s) for ms, s, bound in found if bound <= self._args.max_loss]
                passing.sort()
        return [s for _, s in passing]

    def fastest(self, found: Sequence[Policy]) -> dict[str, Any]:
        """Runs the first of some settings next to greedy decoding, until one keeps the bound.

        Returns:
            ``settings``: the size of the space; ``verified``: figures of the settings that were run; ``best``: those of
            the fastest one within the bound, None if there is none; ``metric``.
        """
        rows: list[dict[str, Any]] = []
        left = list(found)
        while left and not any(row["within_bound"] for row in rows):
            some, left = left[: self._args.candidates], left[self._args.candidates :]
            rows += self._run(some)
        passing = [row for row in rows if row["within_bound"]]
        best = min(passing, key=lambda row: row["seconds"]) if passing else None
        return {"settings": len(self._settings), "verified": rows, "best": best, "metric": self.scorer.name}

    def _run(self, found: Sequence[Policy]) -> list[dict[str, Any]]:
        """Runs settings and greedy decoding in turns; the figures of each setting, and whether it keeps the bound."""
        greedy = ours("greedy", self._pair.greedy(), self._task, self._search)
        systems = [ours(str(policy), self._pair, self._task, self._search, policy) for policy in found]
        turns = {"cuda": self._args.cuda, "warmup": 2, "turn": TURN}
        with progress_bar(len(self._batches), "sentence", desc=f"running {len(found)} settings") as bar:
            measure([greedy, *systems], self._batches, progress=lambda done: bar.update(done - bar.n), **turns)
        return [self._row(policy, system, greedy) for policy, system in zip(found, systems, strict=True)]

    def _row(self, policy: Policy, system: System, greedy: System) -> dict[str, Any]:
        scorer, args = self.scorer, self._args
        statistics, of_greedy = scorer.statistics(system.outputs), scorer.statistics(greedy.outputs)
        weights = bootstrap_weights(len(of_greedy))
        losses = scorer.from_statistics(weights @ of_greedy) - scorer.from_statistics(weights @ statistics)
        bound = float(np.quantile(losses, args.confidence))
        return {
            "setting": f"{policy.fallback_threshold:g},{policy.rollback_threshold:g}" + ",end" * policy.verify_end,
            **dataclasses.asdict(policy),
            "quality": scorer.score(system.outputs),
            "quality_greedy": scorer.score(greedy.outputs),
            "quality_change": quality_change(scorer, statistics, of_greedy)[0],
            "loss_bound": bound,
            "within_bound": bound <= args.max_loss,
            "speedup": ratio(system.seconds, greedy.seconds),
            "seconds": sum(system.seconds),
        }
