#!/usr/bin/env python3
"""Aligns a small model with a large one: trains it on what the large model writes (Kim et al., NeurIPS 2023).

    python scripts/align.py DATA-BIN --large large.pt --small small.pt --out aligned.pt [-- FAIRSEQ-TRAIN FLAGS]

The large model translates training and validation sources greedily; sources and translations become a calibration
set; the small model is trained on with it, and measured against what it was. All of it is kept in the work folder,
so that the same command goes on after an interruption and repeats nothing that is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bild_fairseq.experiments.align import Alignment
from bild_fairseq.experiments.align_options import (
    AlignOptions,
    add_calibration_arguments,
    add_report_arguments,
    add_student_arguments,
    add_training_arguments,
)
from bild_fairseq.experiments.align_report import table
from bild_fairseq.experiments.arguments import add_language_arguments, score_options
from bild_fairseq.experiments.commandline import quiet, run
from bild_fairseq.plugin.search import SearchOptions


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Flags after -- go to fairseq-train and win over the ones here: -- --fp16 --update-freq 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("data", type=Path, help="binarized data (fairseq-preprocess)")
    add_language_arguments(parser)
    add_student_arguments(parser)
    add(
        "--out", type=Path, required=True, help="where the aligned small model, or the model with its exits, is written"
    )
    add("--half", action="store_true", help="write it in half precision")
    vocab_help = "also write the N most frequent types of what the large model wrote, to OUT with the suffix .vocab.txt"
    add("--draft-vocab", type=int, metavar="N", help=f"{vocab_help}: a file for --bild-draft-vocab")
    add("--work", type=Path, help="folder for all else (default: OUT with the suffix .work)")
    add("--report", type=Path, help="JSON file for the figures (default: OUT with the suffix .json)")
    add("--cpu", action="store_true", help="do not use a GPU")
    add("--seed", type=int, default=AlignOptions.seed, help="of the samples and of the training (default: 1)")
    add_calibration_arguments(parser.add_argument_group("calibration set: what the large model writes"))
    add_training_arguments(parser.add_argument_group("training"))
    add_report_arguments(parser.add_argument_group("report, on validation sentences drawn at random"))
    return parser


def parse_options(arguments: Sequence[str]) -> AlignOptions:
    """Reads the command line; what follows ``--`` is left as it is."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args = make_parser().parse_args(arguments[:end])
    fields = {field.name for field in dataclasses.fields(AlignOptions)}
    named = {name: value for name, value in vars(args).items() if name in fields}
    cuda = torch.cuda.is_available() and not args.cpu
    search, score = SearchOptions.from_args(args), score_options(args)
    return AlignOptions(**named, cuda=cuda, search=search, score=score, train_flags=tuple(arguments[end + 1 :]))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    quiet()
    options = parse_options(sys.argv[1:])
    report = Alignment(options, say=say).run()
    print(table(report))
    say(f"written: {options.out}, {options.report}")


if __name__ == "__main__":
    run("align", main, "interrupted; the same command goes on from here")
