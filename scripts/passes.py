#!/usr/bin/env python3
"""Prints what one pass of a decoder over 1 to 16 new tokens costs, beside what the machine can do at that moment.

    python scripts/passes.py large.pt --precision float32,int8 --threads 1,2 --batch-size 1,8

A Markdown table: for each setting the machine's peaks (GFLOP/s of a large float32 product, GB/s of reading memory),
then milliseconds, medians of 25: encoding 24 source tokens, and a pass over so many new tokens in each sentence (in
brackets: how many times one token). The last column is how fast the pass over one token read the weights.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from bild_fairseq.engines.choose import engine_for
from bild_fairseq.engines.precision import PRECISIONS
from bild_fairseq.errors import BildError
from bild_fairseq.experiments.commandline import run
from bild_fairseq.experiments.passes import (
    conditions,
    load_without_data,
    measure_machine,
    measure_passes,
    megabytes,
    table_head,
    table_row,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="of an encoder-decoder Transformer; no data is needed")
    parser.add_argument(
        "--precision", default="float32,float16,int8", help="of the weights, joined by commas (default: %(default)s)"
    )
    parser.add_argument("--threads", default="2", help="CPU threads, joined by commas (default: %(default)s)")
    parser.add_argument("--batch-size", default="1", help="sentences, joined by commas (default: %(default)s)")
    parser.add_argument("--repeats", default=25, type=int, help="passes whose median counts (default: %(default)s)")
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument("--fp16", action="store_true", help="half precision, on the GPU")
    return parser.parse_args()


def parse_counts(flag: str, text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise BildError(f"{flag} {text}: must be numbers, 1 or more, joined by commas")
    return [int(count) for count in counts]


def main() -> None:
    args = parse_args()
    precisions = args.precision.split(",")
    if unknown := set(precisions) - set(PRECISIONS):
        raise BildError(f"--precision {min(unknown)}: choose from {', '.join(PRECISIONS)}")
    threads, batch_sizes = parse_counts("--threads", args.threads), parse_counts("--batch-size", args.batch_size)
    parse_counts("--repeats", str(args.repeats))
    if args.cuda and not torch.cuda.is_available():
        raise BildError("--cuda: torch finds no GPU")
    device = "cuda" if args.cuda else "cpu"
    model = load_without_data(args.checkpoint)
    model = model.half() if args.fp16 else model
    model.to(device)
    for number, precision in enumerate(precisions):
        engine = engine_for(model, precision, "large")
        if number == 0:
            print(f"{args.checkpoint}: {conditions(engine, model, args.repeats)}\n\n{table_head()}", flush=True)
        for count, batch_size in itertools.product(threads, batch_sizes):
            torch.set_num_threads(count)
            machine = measure_machine(device)
            costs = measure_passes(engine, model, batch_size, args.repeats)
            print(table_row(precision, count, batch_size, machine, costs, megabytes(model, precision)), flush=True)


if __name__ == "__main__":
    run("passes", main)
