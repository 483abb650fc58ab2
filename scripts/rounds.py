#!/usr/bin/env python3
"""Writes down, round by round, who wrote which token: drafted, accepted, rolled back, put by the large model.

scripts/plot.py draws the file: the distribution of the accepted drafts a call, and a page that shows every token.
"""

from __future__ import annotations

import argparse
import json

from bild_fairseq.experiments import rounds
from bild_fairseq.experiments.arguments import (
    add_data_arguments,
    add_drafting_arguments,
    add_score_arguments,
    add_search_arguments,
    check_positive,
)
from bild_fairseq.experiments.commandline import quiet, run
from bild_fairseq.experiments.data import load
from bild_fairseq.experiments.files import check_outputs, try_file, write_output
from bild_fairseq.experiments.pairs import load_pairs
from bild_fairseq.experiments.progress import progress_bar
from bild_fairseq.experiments.sample import load_sample
from bild_fairseq.experiments.settings import parse_drafts, parse_policy
from bild_fairseq.experiments.systems import ours
from bild_fairseq.experiments.timing import measure
from bild_fairseq.plugin.search import SearchOptions


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser, subset="valid")
    add_drafting_arguments(parser)
    parser.add_argument("--out", required=True, help="JSON file")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--setting",
        action="append",
        metavar="FALLBACK,ROLLBACK[,end]",
        help="thresholds, with ',end' for --bild-verify-end; repeat for several (default: 0.6,2)",
    )
    parser.add_argument("--max-draft", default="10", help="tokens drafted at most, joined by commas (default: 10)")
    add_search_arguments(parser)
    add_score_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    policies = [parse_policy(item, n) for item in args.setting or ["0.6,2"] for n in parse_drafts(args.max_draft)]
    check_positive(args, "batch_size")
    try_file("--out", args.out)
    check_outputs(vars(args), "out")
    quiet()
    task, search = load(args), SearchOptions.from_args(args)
    pairs = load_pairs(task, args)
    sample = load_sample(task, args, pairs.values(), args.batch_size)
    with progress_bar(len(sample.ids) * len(policies) * len(pairs), "sentence") as bar:
        settings = [
            {"method": name} | rounds.record(pair, policy, task, search, sample, bar.update)
            for name, pair in pairs.items()
            for policy in policies
        ]
    greedy = ours("greedy", next(iter(pairs.values())).greedy(), task, search)
    measure([greedy], sample.batches, cuda=args.cuda, warmup=0)
    sentences = rounds.texts(task, args.subset, greedy.outputs, sample.scorer)
    write_output("--out", args.out, json.dumps({"sentences": sentences, "settings": settings}, indent=1) + "\n")
    print(f"{len(settings)} settings of {len(sample.ids)} sentences in {args.out}")


if __name__ == "__main__":
    run("rounds", main, "interrupted; nothing is written")
