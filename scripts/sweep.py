#!/usr/bin/env python3
"""Measures a grid of thresholds, draft lengths and models on a validation set.

Every setting takes turns with lean greedy decoding every few sentences, so that its speedup is a ratio of times
from the same minutes. Finished settings are in OUT/results.json and OUT/results.csv at once; the same command again
measures only what is missing. scripts/plot.py draws the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bild_fairseq.decoding.policies import Policy
from bild_fairseq.experiments import sweep
from bild_fairseq.experiments.arguments import (
    add_data_arguments,
    add_drafting_arguments,
    add_score_arguments,
    add_search_arguments,
    check_positive,
)
from bild_fairseq.experiments.commandline import quiet, run
from bild_fairseq.experiments.data import device_name, load
from bild_fairseq.experiments.files import try_folder
from bild_fairseq.experiments.origin import origin_of
from bild_fairseq.experiments.pairs import load_pairs
from bild_fairseq.experiments.progress import progress_bar
from bild_fairseq.experiments.sample import load_sample
from bild_fairseq.experiments.work_folder import locked
from bild_fairseq.plugin.search import SearchOptions


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser, subset="valid")
    add_drafting_arguments(parser)
    parser.add_argument("--out", required=True, help="folder for results.json and results.csv")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2, help="batches before each setting that are not counted")
    parser.add_argument("--turn", type=int, default=10, help="batches before the other one's turn (default: 10)")
    sweep.add_grid_arguments(parser)
    add_search_arguments(parser)
    add_score_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    grid = sweep.policies(args)
    check_positive(args, "batch_size", "turn")
    try_folder("--out", args.out)
    quiet()
    with locked(Path(args.out), "--out"):
        measure(args, grid)


def measure(args: argparse.Namespace, grid: Sequence[tuple[str, Policy]]) -> None:
    """Measures the settings that are not in the results yet."""
    task, search = load(args), SearchOptions.from_args(args)
    pairs = load_pairs(task, args)
    sample = load_sample(task, args, pairs.values(), args.batch_size)
    origin = origin_of(task, pairs, args) | {
        "metric": args.metric,
        "metric_name": sample.scorer.name,
        "subwords": args.bpe,
        "batch size": args.batch_size,
        "device": device_name(args.cuda, args.threads),
        "torch": torch.__version__,
    }
    results = sweep.Results(Path(args.out), origin)
    groups = [
        (pair, [setting for setting in settings if not results.has(setting)])
        for pair, settings in sweep.settings_of(pairs, args.large, grid, args.fairseq)
    ]
    missing = sum(len(settings) for _, settings in groups)
    turns = {"cuda": args.cuda, "warmup": args.warmup, "turn": args.turn}
    with progress_bar(missing * len(sample.batches), "batch", smoothing=0.05) as bar:
        sweep.measure_all(groups, results, task, search, sample.batches, sample.scorer, bar, **turns)
    print(f"{len(results.rows)} settings in {args.out}/results.json and results.csv; {missing} measured now")


if __name__ == "__main__":
    run("sweep", main, "interrupted; the same command goes on where it stopped")
