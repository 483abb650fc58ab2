#!/usr/bin/env python3
"""Times BiLD next to what else a user could run, on the same sentences, in one process and one run.

Systems take turns every few batches, so that noise of the machine hits all alike. Quality is that of exactly the
outputs that were timed.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

from bild_fairseq.experiments import benchmark, figures
from bild_fairseq.experiments.arguments import (
    add_data_arguments,
    add_score_arguments,
    add_search_arguments,
    check_positive,
)
from bild_fairseq.experiments.commandline import quiet, run
from bild_fairseq.experiments.data import device_name, load
from bild_fairseq.experiments.files import check_outputs, try_file, write_output
from bild_fairseq.experiments.progress import progress_bar
from bild_fairseq.experiments.sample import load_sample
from bild_fairseq.experiments.timing import measure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_arguments(parser, subset="test")
    parser.add_argument(
        "--small",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="checkpoint of the small model; repeat for several, aligned and unaligned for instance",
    )
    parser.add_argument("--early-exit", help="checkpoint of an early-exit model")
    parser.add_argument("--exit-layer", type=int, help="its exit (default: the lowest)")
    add_search_arguments(parser)
    add_score_arguments(parser)
    benchmark.add_system_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3, help="batches that are run first and not counted")
    parser.add_argument(
        "--turn",
        type=int,
        default=10,
        help="batches that a system runs before the next one's turn; with 1 each finds its weights driven out of the "
        "caches by the others, as nobody would run it (default: 10)",
    )
    parser.add_argument(
        "--floor",
        action="store_true",
        help="also take the time inside encoders and forward passes; wall / floor is the decoding loop's overhead",
    )
    parser.add_argument(
        "--brief", action="store_true", help="print a few columns, and what they come to in one sentence"
    )
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--plot", help="PNG of latency against output length (needs matplotlib)")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Tells what the command line alone can tell, before anything is loaded."""
    benchmark.check(args)
    check_positive(args, "batch_size", "turn")
    try_file("--json", args.json)
    try_file("--plot", args.plot)
    check_outputs(vars(args), "json", "plot")
    if args.plot:
        figures.check_plot(args.plot)


def main() -> None:
    quiet()
    args = parse_args()
    check(args)
    task = load(args)
    models = benchmark.Competition(task, args, Path(__file__).with_name("ctranslate2_worker.py"))
    sample = load_sample(task, args, models.pairs(), args.batch_size)
    batches, scorer = sample.batches, sample.scorer
    systems = models.systems(benchmark.chosen_systems(args))
    turns = {"warmup": args.warmup, "turn": args.turn, "encoding": True, "floor": args.floor}
    with progress_bar(len(batches), "batch") as bar:
        measure(systems, batches, cuda=args.cuda, progress=lambda done: bar.update(done - bar.n), **turns)
    rows = figures.rows_of(systems, [scorer.score(system.outputs) for system in systems], args.metric, batches)
    device = device_name(args.cuda, args.threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    print(
        f"{len(sample.ids)} sentences, batch size {args.batch_size}, {device}, "
        f"{'float16' if args.fp16 else 'float32'}; peak memory {peak / 1024:.0f} MB (all systems); "
        f"{scorer.name} {scorer.signature}"
    )
    print(figures.table_of(rows, args.metric, scorer.name, args.brief))
    if args.brief and (conclusion := figures.conclusion_of(rows)):
        print(conclusion)
    if args.json:
        found = {"arguments": vars(args), "device": device, "peak_memory_kib": peak, "signature": scorer.signature}
        found |= {"large_weights": models.large_weights(), "rows": rows}
        write_output("--json", args.json, json.dumps(found, indent=1) + "\n")
    if args.plot:
        figures.plot(systems, batches, args.plot)


if __name__ == "__main__":
    run("benchmark", main)
