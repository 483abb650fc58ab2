#!/usr/bin/env python3
"""Writes a checkpoint of the same function K times as wide, to time decoding at a size that nobody has trained.

    python scripts/widen.py large.pt large-x4.pt 4 --half

Every unit is repeated K times and what it feeds is divided by K (Net2Net, Chen et al. 2016), so the predictions are
the same up to rounding, while each pass costs what it costs in a trained model of that size. What two widened models
say about speed holds for their sizes with the agreement that the narrow ones have.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bild_fairseq.experiments.commandline import run
from bild_fairseq.experiments.widen import widen_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Plain and early-exit Transformers and BART models."
    )
    parser.add_argument("checkpoint", metavar="IN", type=Path, help="checkpoint to read")
    parser.add_argument("out", metavar="OUT", type=Path, help="checkpoint to write")
    parser.add_argument("times", metavar="K", type=int, help="how many times as wide; 1 leaves the width as it is")
    parser.add_argument(
        "--deepen",
        type=int,
        default=1,
        metavar="N",
        help="make encoder and decoder N times as deep, with layers on top that add nothing (pre-norm models only)",
    )
    parser.add_argument("--half", action="store_true", help="write matrices in float16: a file of half the size")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    before, after = widen_file(args.checkpoint, args.out, args.times, args.deepen, args.half)
    size = args.out.stat().st_size
    print(f"{args.out}: {after / 1e6:.1f} M weights (before: {before / 1e6:.1f} M), {size / 1e6:.0f} MB")


if __name__ == "__main__":
    run("widen", main)
