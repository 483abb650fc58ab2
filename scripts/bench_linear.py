#!/usr/bin/env python3
"""Times the ways to multiply few rows by a weight that is out of the processor's nearest caches.

Prints microseconds (median) for a decoder's weight shapes: torch's F.linear, addmm over a transposed weight, and
oneDNN over a prepacked one. ``bild_fairseq/linear.py`` chooses between the last two by the size of the weight.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bild_fairseq.engines.torch.linear import pack, transpose

ROWS = (1, 2, 6, 11, 32)


def median_us(functions: Sequence[Callable[[], object]], rounds: int = 50) -> float:
    """Median time of calls that take turns, so that each finds the others' weights in the cache."""
    times = []
    for number in range(rounds + 5):
        for function in functions:
            start = time.perf_counter()
            function()
            if number >= 5:
                times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=256, help="width of the decoder (default: 256)")
    parser.add_argument("--vocabulary", type=int, default=8200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dim = args.dim
    shapes = [(dim, dim), (3 * dim, dim), (4 * dim, dim), (dim, 4 * dim), (args.vocabulary, dim)]
    print(f"{args.threads} threads; microseconds\nout x in        rows   F.linear   addmm   oneDNN")
    for out, width in shapes:
        weights = [torch.randn(out, width) for _ in range(max(2, 16_000_000 // (out * width)))]
        bias = torch.randn(out)
        plain = [functools.partial(F.linear, weight=weight, bias=bias) for weight in weights]
        ways = [plain, [transpose(weight, bias) for weight in weights], [pack(weight, bias) for weight in weights]]
        for rows in ROWS:
            x = torch.randn(rows, width)
            times = [median_us([functools.partial(function, x) for function in way]) for way in ways]
            print(f"{out:>6} x {width:<6} {rows:>4}   {times[0]:>8.0f} {times[1]:>7.0f} {times[2]:>8.0f}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
