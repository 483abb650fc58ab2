#!/usr/bin/env python3
"""Finds the fastest thresholds that lose no more quality than you allow, and prints the flags to paste.

Predictions of both models are recorded once; every setting of a large space is then walked over them without running
a model, which gives its outputs and its counts of model calls exactly. A cost model, fitted to a few timed runs, turns
the counts into time. The fastest settings whose loss is within the bound are really run, next to lean greedy decoding,
and the fastest of these wins. The bound is a paired bootstrap over the sentences.

With --lossless only settings are looked at whose text is the large model's own, whatever the models: the fastest one by
the cost model wins, and is run next to greedy decoding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from bild_fairseq.decoding.policies import Policy
from bild_fairseq.errors import BildError, flag, require
from bild_fairseq.experiments import arguments, calibrate
from bild_fairseq.experiments.commandline import quiet, run
from bild_fairseq.experiments.data import device_name, load
from bild_fairseq.experiments.files import check_outputs, try_file, write_output
from bild_fairseq.experiments.pairs import load_pairs
from bild_fairseq.experiments.settings import policy_flags, policy_of
from bild_fairseq.experiments.work_folder import locked_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_data_arguments(parser, subset="valid", sentences=300)
    arguments.add_drafting_arguments(parser)
    parser.add_argument(
        "--max-loss", type=float, default=0.5, help="points of the metric below greedy decoding at most (default: 0.5)"
    )
    parser.add_argument(
        "--lossless", action="store_true", help="find the fallback threshold and draft length for rollback threshold 0"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of that bound (default: 0.95)")
    parser.add_argument("--record", help="file that keeps what was recorded, for another run with another --max-loss")
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("--batch-size", type=int, default=32, help="of the recording; timing has 1 (default: 32)")
    parser.add_argument("--timing-sentences", type=int, default=20, help="for the cost model (default: 20)")
    parser.add_argument("--candidates", type=int, default=3, help="settings that are really run (default: 3)")
    calibrate.add_space_arguments(parser)
    arguments.add_search_arguments(parser)
    arguments.add_score_arguments(parser)
    args = parser.parse_args()
    for name in ("max_loss", "confidence", "candidates", "rollback", "verify_end"):
        if args.lossless and getattr(args, name) != parser.get_default(name):
            raise BildError(f"{flag(name)} has no effect with --lossless, which loses nothing; leave it out")
    return args


def check(args: argparse.Namespace) -> None:
    """Raises BildError for what the options alone can tell."""
    require(args.max_loss >= 0, "max_loss", args.max_loss, "0 or more")
    require(0.5 <= args.confidence < 1, "confidence", args.confidence, "at least 0.5 and below 1")
    arguments.check_positive(args, "batch_size", "timing_sentences", "candidates")
    try_file("--record", args.record)
    try_file("--json", args.json)
    check_outputs(vars(args), "record", "json")


def describe(row: dict[str, Any], metric: str, args: argparse.Namespace, enough: bool) -> str:
    """One line about a setting that was run."""
    bound = f", with confidence {args.confidence:g} at least {-row['loss_bound']:+.2f}" if enough else ""
    speedup, low, high = row["speedup"]
    return (
        f"{policy_flags(policy_of(row))}: {metric} {row['quality']:.2f} ({row['quality_change']:+.2f}{bound}), "
        f"{speedup:.2f}x lean greedy [{low:.2f}, {high:.2f}]"
    )


def main() -> None:
    started = time.monotonic()
    args = parse_args()
    check(args)
    settings = calibrate.policies(args)
    quiet()
    with locked_file(args.record, "--record"):
        search(args, settings, started)


def search(args: argparse.Namespace, settings: Sequence[Policy], started: float) -> None:
    """Finds the fastest setting, and prints it."""
    task = load(args)
    pair, *more = load_pairs(task, args).values()
    if more:
        raise BildError("thresholds belong to one pair of models: give one --small or one --early-exit")
    calibration = calibrate.Calibration(task, pair, args, settings)
    metric, within = calibration.scorer.name, f"within {args.max_loss:g} {calibration.scorer.name}"
    costs = calibration.fit_costs()
    print(f"cost: {costs}")
    if args.lossless:
        within, found = "that loses nothing", [calibration.cheapest(costs)]
        print(f"{len(settings)} settings with the large model's own text")
    else:
        found = calibration.shortlist(costs)
        print(f"{len(settings)} settings, {len(found)} fast ones {within} of greedy decoding")
    result = calibration.fastest(found)
    result |= {"device": device_name(args.cuda, args.threads), "wall_seconds": time.monotonic() - started}
    needed = calibrate.sentences_needed(args.confidence)
    enough = len(calibration.ids) >= needed
    for row in result["verified"]:
        print(describe(row, metric, args, enough and not args.lossless))
    if args.json:
        write_output("--json", args.json, json.dumps(result, indent=1) + "\n")
    best = result["best"]
    if best is None:
        raise BildError(f"no setting {'' if args.lossless else 'keeps '}{within} of greedy decoding when it is run")
    if best["speedup"][0] <= 1:
        print("none of them is faster than greedy decoding (--generator greedy) with these models on this machine")
    if not enough and not args.lossless:
        print(
            f"{len(calibration.ids)} sentences are too few for a bound with confidence {args.confidence:g}, which "
            f"takes {needed}: the loss may be larger on others; raise --sentences"
        )
    print(f"fastest {within}, found in {result['wall_seconds']:.0f} s:")
    print(f"{pair.flags()} {policy_flags(policy_of(best))}")


if __name__ == "__main__":
    run("calibrate", main, "interrupted; with --record the same command goes on where it stopped")
