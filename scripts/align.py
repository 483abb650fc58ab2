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
from bild_fairseq.experiments.align_options import AlignOptions as Default
from bild_fairseq.experiments.align_report import table
from bild_fairseq.experiments.arguments import (
    add_language_arguments,
    add_score_arguments,
    add_search_arguments,
    score_options,
    search_options,
)
from bild_fairseq.experiments.commandline import quiet, run


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
    add("--large", type=Path, required=True, help="checkpoint of the large model")
    add("--small", type=Path, help="checkpoint of the small model")
    exit_help = "instead of --small: train exits of the large model after these layers, which stays as it is itself"
    add("--early-exit", metavar="K[,K...]", help=f"{exit_help}; the lowest one is measured")
    own_help = "with --early-exit: decoder layers that each exit has for itself, see README (default: 0)"
    add("--exit-own-layers", type=int, default=Default.exit_own_layers, metavar="N", help=own_help)
    add(
        "--out", type=Path, required=True, help="where the aligned small model, or the model with its exits, is written"
    )
    add("--half", action="store_true", help="write it in half precision")
    vocab_help = "also write the N most frequent types of what the large model wrote, to OUT with the suffix .vocab.txt"
    add("--draft-vocab", type=int, metavar="N", help=f"{vocab_help}: a file for --bild-draft-vocab")
    add("--work", type=Path, help="folder for all else (default: OUT with the suffix .work)")
    add("--report", type=Path, help="JSON file for the figures (default: OUT with the suffix .json)")
    add("--cpu", action="store_true", help="do not use a GPU")
    add("--seed", type=int, default=Default.seed, help="of the samples and of the training (default: 1)")
    add_calibration_arguments(parser.add_argument_group("calibration set: what the large model writes"))
    add_training_arguments(parser.add_argument_group("training"))
    add_report_arguments(parser.add_argument_group("report, on validation sentences drawn at random"))
    return parser


def add_calibration_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--subset", default=Default.subset, help="the sources to learn from (default: train)")
    add("--sample", type=int, metavar="N", help="only N of them, drawn at random")
    add(
        "--splice",
        type=int,
        default=Default.splice,
        metavar="N",
        help="N more sources, each spliced from two that have two tokens in a row in common; a small corpus is soon "
        "learned by heart, and what the large model makes of these is as good to learn from (default: 0)",
    )
    add("--valid-subset", default=Default.valid_subset, help="the sources to validate with (default: valid)")
    valid_help = "at most N of them, drawn at random (default: 2000)"
    add("--valid-sample", type=int, default=Default.valid_sample, metavar="N", help=valid_help)
    truncate_help = "cut longer sources, as fairseq does for summarization"
    add("--truncate-source", type=int, metavar="TOKENS", help=truncate_help)
    part_help = "sentences that are written in one go, which an interruption costs (default: 5000)"
    add("--part", type=int, default=Default.part, help=part_help)
    add("--generate-tokens", type=int, default=Default.generate_tokens, help="tokens a batch (default: 8000)")
    add_search_arguments(group)


def add_training_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--distill",
        type=float,
        default=Default.distill,
        metavar="W",
        help="0 to 1: how much is learned from the large model's distribution at each position rather than from its "
        "text; above 0 the large model runs during training as well (default: 0)",
    )
    add(
        "--distill-top",
        type=int,
        default=Default.distill_top,
        metavar="K",
        help="with --distill: only the large model's K most probable words, which stay in memory (6 K bytes a token), "
        "so that it runs in the first epoch only; 32 loses little (default: 0, all words in every epoch)",
    )
    add("--epochs", type=int, default=Default.epochs, help="passes over the calibration set (default: 10)")
    on_policy_help = (
        "so many passes more, at half the learning rate, over what both models write together at --fallback and "
        "--rollback: the small model learns what the large one predicts after the small one's own words (default: 0)"
    )
    add("--on-policy", type=int, default=Default.on_policy, metavar="EPOCHS", help=on_policy_help)
    add("--lr", type=float, default=Default.lr, help="learning rate, which falls to 0 (default: 1e-3)")
    add("--max-tokens", type=int, default=Default.max_tokens, help="tokens a batch (default: 4000)")
    add("--dropout", type=float, default=Default.dropout, help="of the small model (default: 0)")


def add_report_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--sentences", type=int, default=Default.sentences, help="how many are generated and timed (default: 100)")
    add("--batch-size", type=int, default=Default.batch_size)
    add("--fallback", type=float, default=Default.fallback, help="threshold (default: 0.6)")
    add("--rollback", type=float, default=Default.rollback, help="threshold (default: 2)")
    add("--max-draft", type=int, default=Default.max_draft, help="tokens a draft (default: 10)")
    add("--verify-end", action="store_true", help="also verify what is drafted before the end")
    lossless_help = "fallback threshold of lossless runs (default: 0.25)"
    add("--lossless-fallback", type=float, default=Default.lossless_fallback, help=lossless_help)
    add_score_arguments(group)


def parse_options(arguments: Sequence[str]) -> Default:
    """Reads the command line; what follows ``--`` is left as it is."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args = make_parser().parse_args(arguments[:end])
    fields = {field.name for field in dataclasses.fields(Default)}
    named = {name: value for name, value in vars(args).items() if name in fields}
    cuda = torch.cuda.is_available() and not args.cpu
    search, score = search_options(args), score_options(args)
    return Default(**named, cuda=cuda, search=search, score=score, train_flags=tuple(arguments[end + 1 :]))


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
