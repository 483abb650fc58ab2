#!/usr/bin/env python3
"""Finds the fastest thresholds that lose no more quality than you allow, and prints the flags to paste.

Predictions of both models are recorded once; every setting of a large space is then walked over them without running
a model, which gives its outputs and its counts of model calls exactly. A cost model, fitted to a few timed runs, turns
the counts into time. The fastest settings whose loss is within the bound are really run, next to lean greedy decoding,
and the fastest of these wins. The bound is a paired bootstrap over the sentences.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bild_fairseq.experiments.methods import Method, add_method_arguments, load_methods
from fairseq.tasks import FairseqTask
from tqdm import tqdm

from bild_fairseq.decoding.counters import Counters
from bild_fairseq.decoding.decode import Policy
from bild_fairseq.errors import BildError
from bild_fairseq.experiments.arguments import (
    add_data_arguments,
    add_score_arguments,
    add_search_arguments,
    score_options,
    search_options,
)
from bild_fairseq.experiments.commandline import quiet, run
from bild_fairseq.experiments.data import check_sources, device_name, first_sentences, load, make_batches
from bild_fairseq.experiments.files import write_atomically
from bild_fairseq.experiments.origin import difference, origin_of
from bild_fairseq.experiments.recorded import Missing, Recorder, walk
from bild_fairseq.experiments.scoring import Scorer, bootstrap_weights, quality_change
from bild_fairseq.experiments.settings import parse_drafts, parse_fallbacks, parse_rollbacks
from bild_fairseq.experiments.systems import system_of
from bild_fairseq.experiments.timing import measure, ratio
from bild_fairseq.plugin.generator import BildGenerator

TURN = 10  # sentences that a system translates before the next one's turn
SURE = 0.95  # a setting is given up after a part of the sentences only if it loses too much with this probability
SLACK = 1.1  # how much slower than another a setting must seem before it is left out
GROUP = 12  # settings that are judged on all sentences before the next ones are looked at
SAVE_EVERY = 10  # seconds between two writes of the record


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser, subset="valid", sentences=300)
    add_method_arguments(parser)
    parser.add_argument(
        "--max-loss", type=float, default=0.5, help="points of the metric below greedy decoding at most (default: 0.5)"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of that bound (default: 0.95)")
    parser.add_argument("--record", help="file that keeps what was recorded, for another run with another --max-loss")
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("--batch-size", type=int, default=32, help="of the recording; timing has 1 (default: 32)")
    parser.add_argument("--timing-sentences", type=int, default=20, help="for the cost model (default: 20)")
    parser.add_argument("--candidates", type=int, default=3, help="settings that are really run (default: 3)")
    space = parser.add_argument_group("the space, values joined by commas")
    space.add_argument("--fallback", default="0.2,0.3,0.4,0.5,0.6,0.8")
    space.add_argument("--rollback", default="1,1.5,2,3,4,6")
    space.add_argument("--max-draft", default="5,10")
    space.add_argument("--verify-end", choices=["off", "on", "both"], default="both")
    add_search_arguments(parser)
    add_score_arguments(parser)
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raises BildError for what the options alone can tell."""
    if not args.max_loss >= 0:
        raise BildError(f"--max-loss {args.max_loss}: must be 0 or more")
    if not 0.5 <= args.confidence < 1:
        raise BildError(f"--confidence {args.confidence}: must be at least 0.5 and below 1")
    for name in ("batch_size", "timing_sentences", "candidates"):
        if getattr(args, name) < 1:
            raise BildError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    for path in filter(None, (args.record, args.json)):
        if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
            raise BildError(f"{path}: cannot write there; name a file in a folder that exists")


def policies(args: argparse.Namespace) -> list[Policy]:
    """The space, and for each fallback threshold and draft length the setting that loses nothing."""
    fallbacks, rollbacks = parse_fallbacks(args.fallback), parse_rollbacks(args.rollback)
    drafts = parse_drafts(args.max_draft)
    ends = {"off": [False], "on": [True], "both": [False, True]}[args.verify_end]
    found = [Policy(f, r, d, verify_end=end) for f, r, d, end in itertools.product(fallbacks, rollbacks, drafts, ends)]
    found += [Policy(f, 0.0, d, verify_end=True) for f, d in itertools.product(fallbacks, drafts)]
    return list(dict.fromkeys(found))


def lossless(policy: Policy) -> bool:
    return policy.rollback_threshold == 0 and policy.verify_end


class CostModel:
    """Milliseconds of a sentence: so much for each sentence, small call, large call and token that a large call reads
    more than one of."""

    def __init__(self, seconds: Sequence[float], counters: Sequence[Counters]):
        """Fits the four costs, none below 0, to the seconds of sentences decoded one at a time."""
        calls, milliseconds = np.stack([features(one) for one in counters]), 1000 * np.asarray(seconds)
        self.costs = np.zeros(calls.shape[1])
        used = list(range(calls.shape[1]))
        while True:
            # Relative errors count: long sentences would drown the short ones otherwise.
            scale = 1 / milliseconds
            fitted = np.linalg.lstsq(calls[:, used] * scale[:, None], milliseconds * scale, rcond=None)[0]
            if (fitted >= 0).all() or len(used) == 1:
                self.costs[used] = np.maximum(fitted, 0)
                break
            del used[int(fitted.argmin())]
        estimated = calls @ self.costs
        self.error = float(np.abs(estimated / milliseconds - 1).mean())

    def __str__(self) -> str:
        sentence, small, large, token = self.costs
        return (
            f"{sentence:.2f} ms a sentence, {small:.2f} ms a small call, {large:.2f} ms a large call, "
            f"{token:.3f} ms a drafted token that it reads (mean error {self.error:.0%})"
        )


def features(counters: Counters) -> np.ndarray:
    """What a sentence's time is made of: (4,)."""
    read = counters.accepted + counters.discarded
    return np.array([1.0, counters.small_calls, counters.large_calls, read])


def fit_costs(
    greedy: BildGenerator,
    bild: BildGenerator,
    batches: Sequence[dict[str, Any]],
    args: argparse.Namespace,
) -> CostModel:
    """Times systems that differ as much as possible in what they call."""
    apart = [Policy(0.0, math.inf, 10), Policy(0.6, 2.0, 10), Policy(0.9, 0.0, 20, verify_end=True)]
    alone = system_of("greedy", greedy)
    systems = [alone, *(system_of(str(policy), bild, policy) for policy in apart)]
    measure(systems, batches, cuda=args.cuda, warmup=2, turn=TURN)
    seconds = [value for system in systems for value in system.seconds]
    return CostModel(seconds, [one for system in systems for one in system.counters])


class Judge:
    """Outputs and costs of settings on sentences, from recorded predictions.

    Args:
        settings: to be judged.
        ids: the sentences.
        recorder: where predictions come from; it is made to record what is missing.
        scorer: of the sentences.
        eos: end symbol.
    """

    def __init__(self, settings: Sequence[Policy], ids: Sequence[int], recorder: Recorder, scorer: Scorer, eos: int):
        self._settings, self._ids = settings, ids
        self._recorder, self._scorer, self._eos = recorder, scorer, eos
        self._done = np.zeros((len(settings), len(ids)), dtype=bool)
        self._statistics: np.ndarray | None = None  # (settings, sentences, k)
        self._calls = np.zeros((len(settings), len(ids), 4), dtype=np.float32)
        self._middle = Policy(
            float(np.median([policy.fallback_threshold for policy in settings])),
            float(np.median([policy.rollback_threshold for policy in settings])),
            10,
        )

    def fill(self, active: Sequence[int], columns: Sequence[int], bar: tqdm, saved: Any) -> None:
        """Walks some settings (by number) over some sentences (by column).

        Args:
            bar: counts pairs of a setting and a sentence.
            saved: called after every pass of the models.
        """
        while missing := self._walk(active, columns, bar):
            by_policy = collections.defaultdict(list)
            for place, setting in missing.items():
                # While many are missing, large batches count; of the last ones each goes its own way.
                few = len(missing) <= self._recorder.batch_size
                by_policy[self._settings[setting] if few else self._middle].append(place)
            for policy, places in by_policy.items():
                self._recorder.extend(places, policy)
            saved()

    def _walk(self, active: Sequence[int], columns: Sequence[int], bar: tqdm) -> dict[tuple[int, tuple[int, ...]], int]:
        """Returns the places whose predictions are missing, each with the first setting that came there."""
        missing: dict[tuple[int, tuple[int, ...]], int] = {}
        for setting, column in itertools.product(active, columns):
            if self._done[setting, column]:
                continue
            i = self._ids[column]
            try:
                tokens, counters = walk(self._recorder.roots[i], self._settings[setting], self._eos)
            except Missing as place:
                missing.setdefault((i, tuple(place.tokens)), setting)
                continue
            values = self._scorer.sentence(i, tokens)
            if self._statistics is None:
                self._statistics = np.zeros((*self._done.shape, len(values)), dtype=np.float32)
            self._statistics[setting, column] = values
            self._calls[setting, column] = features(counters)
            self._done[setting, column] = True
            bar.update()
        return missing

    def milliseconds(self, active: Sequence[int], columns: Sequence[int], costs: CostModel) -> np.ndarray:
        """Estimated time of all the sentences: (active,)."""
        return self._calls[np.ix_(active, columns)].sum(axis=1) @ costs.costs

    def losses(self, active: Sequence[int], columns: Sequence[int], greedy: np.ndarray) -> np.ndarray:
        """Loss against greedy output in each resample of the sentences: (active, resamples).

        Args:
            greedy: statistics of greedy outputs of all sentences, (sentences, k).
        """
        columns = sorted(columns)  # the same resamples as when the settings are run
        weights = bootstrap_weights(len(columns))
        theirs = self._scorer.from_statistics(weights @ greedy[columns])
        return np.stack([theirs - self._scorer.from_statistics(weights @ self._statistics[s][columns]) for s in active])


class Record:
    """The file that keeps recorded predictions, if one was asked for.

    Raises:
        BildError: it holds something else, or predictions of other data or models.
    """

    def __init__(self, path: str | None, recorder: Recorder, origin: dict[str, Any]):
        self._path, self._recorder, self._origin = path, recorder, origin
        self._written = time.monotonic()
        if path is None or not Path(path).exists():
            return
        try:
            old = json.loads(Path(path).read_text(encoding="utf-8"))
            differs = difference(old["origin"], origin)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise BildError(f"--record {path}: holds no recorded predictions; name another file") from error
        if differs or old["origin"]["models"] != origin["models"]:
            raise BildError(
                f"--record {path}: was recorded with another {differs or 'model'}; name another file, or delete it"
            )
        recorder.restore(old["predictions"])

    def save(self, at_once: bool = False) -> None:
        """Writes the file, unless that was done a moment ago."""
        if self._path is None or (time.monotonic() - self._written < SAVE_EVERY and not at_once):
            return
        write_atomically(self._path, json.dumps({"origin": self._origin, "predictions": self._recorder.dump()}))
        self._written = time.monotonic()


def shortlist(
    judge: Judge,
    settings: Sequence[Policy],
    columns: Sequence[int],
    greedy: np.ndarray,
    costs: CostModel,
    args: argparse.Namespace,
    saved: Any,
) -> list[int]:
    """Settings within the bound on all sentences, the fastest by estimate first; more than are needed, not all.

    A part of the sentences comes first: settings that are slower there than the fastest one that loses nothing, or
    certainly lose too much, are not looked at on the others; nor are settings looser than one that loses too much.
    On all sentences the fastest of those left are judged until enough of them have passed.
    """
    columns = random.Random(0).sample(columns, len(columns))
    first = columns[: max(40, len(columns) // 4)]
    hopeful: list[int] = []
    with tqdm(total=len(settings) * len(first), unit="sentence", desc="a part of the sentences", disable=None) as bar:
        for wave in loosening(settings):
            kept = set(hopeful)
            wave = [s for s, tighter in wave if kept.issuperset(tighter)]
            if wave:
                judge.fill(wave, first, bar, saved)
                low = np.quantile(judge.losses(wave, first, greedy), 1 - max(SURE, args.confidence), axis=1)
                bounded = zip(wave, low, strict=True)
                hopeful += [s for s, loss in bounded if loss <= args.max_loss or lossless(settings[s])]
    milliseconds = dict(zip(hopeful, judge.milliseconds(hopeful, first, costs), strict=True))
    sure = min(milliseconds[s] for s in hopeful if lossless(settings[s]))
    # Estimates on few sentences are rough, so a setting must be clearly slower to be left out.
    active = sorted((s for s in hopeful if milliseconds[s] <= SLACK * sure), key=milliseconds.__getitem__)
    passing: list[tuple[float, int]] = []
    with tqdm(
        total=len(active) * (len(columns) - len(first)), unit="sentence", desc="all sentences", disable=None
    ) as bar:
        for begin in range(0, len(active), GROUP):
            group = active[begin : begin + GROUP]
            enough = 2 * args.candidates  # should one not keep what it promises
            if len(passing) >= enough and milliseconds[group[0]] > SLACK * milliseconds[passing[enough - 1][1]]:
                break
            judge.fill(group, columns, bar, saved)
            bounds = np.quantile(judge.losses(group, columns, greedy), args.confidence, axis=1)
            times = judge.milliseconds(group, columns, costs)
            passing += [(ms, s) for ms, s, bound in zip(times, group, bounds, strict=True) if bound <= args.max_loss]
            passing.sort()
    return [s for _, s in passing]


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


def verify(
    found: Sequence[Policy],
    greedy: BildGenerator,
    bild: BildGenerator,
    batches: Sequence[dict[str, Any]],
    scorer: Scorer,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Runs settings and greedy decoding in turns; the figures of each setting, and whether it keeps the bound."""
    alone = system_of("greedy", greedy)
    systems = [system_of(str(policy), bild, policy) for policy in found]
    with tqdm(total=len(batches), unit="sentence", desc=f"running {len(found)} settings", disable=None) as bar:
        measure(
            [alone, *systems],
            batches,
            cuda=args.cuda,
            warmup=2,
            turn=TURN,
            progress=lambda done: bar.update(done - bar.n),
        )
    theirs = scorer.statistics(alone.outputs)
    weights = bootstrap_weights(len(theirs))
    rows = []
    for policy, system in zip(found, systems, strict=True):
        ours = scorer.statistics(system.outputs)
        losses = scorer.from_statistics(weights @ theirs) - scorer.from_statistics(weights @ ours)
        bound = float(np.quantile(losses, args.confidence))
        rows.append(
            {
                "setting": f"{policy.fallback_threshold:g},{policy.rollback_threshold:g}" + ",end" * policy.verify_end,
                **dataclasses.asdict(policy),
                "quality": scorer.score(system.outputs),
                "quality_greedy": scorer.score(alone.outputs),
                "quality_change": quality_change(scorer, ours, theirs)[0],
                "loss_bound": bound,
                "within_bound": bound <= args.max_loss,
                "speedup": ratio(system.seconds, alone.seconds),
                "seconds": sum(system.seconds),
            }
        )
    return rows


def flags(policy: Policy) -> str:
    return (
        f"--bild-fallback-threshold {policy.fallback_threshold:g} --bild-rollback-threshold "
        f"{policy.rollback_threshold:g} --bild-max-draft {policy.max_draft}" + " --bild-verify-end" * policy.verify_end
    )


def choose(task: FairseqTask, method: Method, args: argparse.Namespace, settings: Sequence[Policy]) -> dict[str, Any]:
    """The whole search; returns what ``--json`` writes."""
    search = search_options(args)
    ids = list(first_sentences(task, args.subset, args.sentences))
    batches = make_batches(task.dataset(args.subset), ids, 1, cuda=args.cuda)
    scorer = Scorer(task, args.subset, ids, score_options(args))
    recorder = Recorder(task, method, args, ids, args.batch_size)
    record = Record(args.record, recorder, origin_of(task, [method], args))
    greedy = method.greedy(task, search)
    bild = method.generator(task, search)
    costs = fit_costs(greedy, bild, batches[: args.timing_sentences], args)
    print(f"cost: {costs}")
    with tqdm(total=len(ids), unit="sentence", desc="greedy decoding", disable=None) as bar:
        recorder.record_greedy(bar.update)
    eos = task.target_dictionary.eos()
    like_greedy = Policy(0.0, 0.0, 1, verify_end=True)
    outputs = {i: walk(root, like_greedy, eos)[0] for i, root in recorder.roots.items()}
    judge = Judge(settings, ids, recorder, scorer, eos)
    columns = list(range(len(ids)))
    found = shortlist(judge, settings, columns, scorer.statistics(outputs), costs, args, record.save)
    record.save(at_once=True)
    print(f"{len(settings)} settings, {len(found)} fast ones within {args.max_loss:g} {scorer.name} of greedy decoding")
    rows: list[dict[str, Any]] = []
    while found and not any(row["within_bound"] for row in rows):
        some, found = found[: args.candidates], found[args.candidates :]
        rows += verify([settings[s] for s in some], greedy, bild, batches, scorer, args)
    passing = [row for row in rows if row["within_bound"]]
    best = min(passing, key=lambda row: row["seconds"]) if passing else None
    return {"settings": len(settings), "verified": rows, "best": best, "metric": scorer.name}


def main() -> None:
    started = time.monotonic()
    args = parse_args()
    check(args)
    settings = policies(args)
    quiet()
    torch.set_num_threads(args.threads)
    task, large = load(args)
    methods = load_methods(task, large, args)
    if len(methods) > 1:
        raise BildError("thresholds belong to one pair of models: give one --small or one --early-exit")
    check_sources(task, args, [model for method in methods for model in (method.large, *method.small)])
    result = choose(task, methods[0], args, settings)
    result |= {"device": device_name(args.cuda, args.threads), "wall_seconds": time.monotonic() - started}
    metric = result["metric"]
    for row in result["verified"]:
        policy = Policy(**{field.name: row[field.name] for field in dataclasses.fields(Policy)})
        speedup, low, high = row["speedup"]
        print(
            f"{flags(policy)}: {metric} {row['quality']:.2f} ({row['quality_change']:+.2f}, with confidence "
            f"{args.confidence:g} at least {-row['loss_bound']:+.2f}), {speedup:.2f}x lean greedy "
            f"[{low:.2f}, {high:.2f}]"
        )
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")
    best = result["best"]
    if best is None:
        raise BildError(f"no setting keeps within {args.max_loss:g} {metric} of greedy decoding when it is run")
    if best["speedup"][0] <= 1:
        print("none of them is faster than greedy decoding (--generator greedy) with these models on this machine")
    print(f"fastest within {args.max_loss:g} {metric}, found in {result['wall_seconds']:.0f} s:")
    policy = Policy(**{field.name: best[field.name] for field in dataclasses.fields(Policy)})
    print(f"{methods[0].flags()} {flags(policy)}")


if __name__ == "__main__":
    run("calibrate", main, "interrupted; with --record the same command goes on where it stopped")
