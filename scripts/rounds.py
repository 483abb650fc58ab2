#!/usr/bin/env python3
"""Writes down, round by round, who wrote which token: drafted, accepted, rolled back, put by the large model.

scripts/plot.py draws the file: the distribution of accepted lengths, and a page that shows every token.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq.tasks import FairseqTask
from tqdm import tqdm

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
from bild_fairseq.experiments.data import check_sources, first_sentences, load, make_batches
from bild_fairseq.experiments.files import write_atomically
from bild_fairseq.experiments.methods import Method, add_method_arguments, load_methods
from bild_fairseq.experiments.scoring import Scorer
from bild_fairseq.experiments.settings import parse_drafts, parse_policy
from bild_fairseq.experiments.systems import system_of
from bild_fairseq.experiments.timing import measure
from bild_fairseq.plugin.trace import traced


@dataclass(frozen=True)
class Round:
    """What happened from one call of the large model to the next; of the tokens drafted last, to the end."""

    drafted: list[int]  # by the small model, in order
    accepted: int  # how many of them stayed, from the first on
    fallback: bool  # the small model handed over because it was unsure
    verified: bool  # the large model has read the draft
    large: int | None  # the token that the large model put after the accepted ones, if it put one


def rounds_of(states: Sequence[tuple[bool, list[int]]], final: list[int]) -> list[Round]:
    """The rounds of one sentence.

    Args:
        states: for each forward pass over the sentence whether it was the large model's, and the generated tokens
            that stood at that time.
        final: the sentence, the end symbol included.
    """
    rounds = []
    verified, small_calls = 0, 0
    for number, (is_large, tokens) in enumerate(states):
        if not is_large:
            small_calls += 1
            continue
        after = states[number + 1][1] if number + 1 < len(states) else final
        drafted = tokens[verified:]
        fallback = small_calls > len(drafted)
        if after[: len(tokens)] == tokens:  # all accepted; nothing follows an end symbol
            rounds.append(Round(drafted, len(drafted), fallback, True, (after[len(tokens) :] or [None])[0]))
        else:
            rounds.append(Round(drafted, len(after) - 1 - verified, fallback, True, after[-1]))
        verified, small_calls = len(after), 0
    if len(final) > verified:
        rounds.append(Round(final[verified:], len(final) - verified, False, False, None))
    return rounds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser, subset="valid")
    add_method_arguments(parser)
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


def record(
    task: FairseqTask,
    method: Method,
    settings: Sequence[Policy],
    batches: Sequence[dict[str, Any]],
    args: argparse.Namespace,
    scorer: Scorer,
    bar: tqdm,
) -> list[dict[str, Any]]:
    """All rounds of some settings of a method, with tokens as the text that they are shown as."""
    generator = method.generator(task, search_options(args))
    recorded = []
    for policy in settings:
        generator.policy = policy
        sentences = {}
        for batch in batches:
            calls = traced(generator, batch)
            for row, hypos in enumerate(generator.generate([], batch)):
                # A call's tokens start with the start symbol.
                states = [(is_large, tokens[row][1:]) for is_large, tokens, rows, *_ in calls if row in rows]
                rounds = rounds_of(states, hypos[0]["tokens"].tolist())
                sentences[int(batch["id"][row])] = [readable(one, scorer) for one in rounds]
            bar.update(len(batch["id"]))
        rollback = policy.rollback_threshold
        thresholds = {"rollback_threshold": "inf" if rollback == math.inf else rollback}  # JSON has no infinity
        recorded.append({"method": method.name, "policy": asdict(policy) | thresholds, "rounds": sentences})
    return recorded


def readable(one: Round, scorer: Scorer) -> dict[str, Any]:
    drafted = [scorer.piece(token) for token in one.drafted]
    return asdict(one) | {"drafted": drafted, "large": None if one.large is None else scorer.piece(one.large)}


def main() -> None:
    args = parse_args()
    settings = [parse_policy(item, n) for item in args.setting or ["0.6,2"] for n in parse_drafts(args.max_draft)]
    if not Path(args.out).resolve().parent.is_dir() or Path(args.out).is_dir():
        raise BildError(f"--out {args.out}: cannot write there; name a file in a folder that exists")
    if args.batch_size < 1:
        raise BildError(f"--batch-size {args.batch_size}: must be 1 or more")
    quiet()
    torch.set_num_threads(args.threads)
    task, large = load(args)
    methods = load_methods(task, large, args)
    check_sources(task, args, [model for method in methods for model in (method.large, *method.small)])
    ids = first_sentences(task, args.subset, args.sentences)
    batches = make_batches(task.dataset(args.subset), ids, args.batch_size, cuda=args.cuda)
    scorer = Scorer(task, args.subset, ids, score_options(args))
    with tqdm(total=len(ids) * len(settings) * len(methods), unit="sentence", disable=None) as bar:
        recorded = [one for method in methods for one in record(task, method, settings, batches, args, scorer, bar)]
    greedy = system_of("greedy", methods[0].greedy(task, search_options(args)))
    measure([greedy], batches, cuda=args.cuda, warmup=0)
    dataset = task.dataset(args.subset)
    sentences = {
        i: {
            "source": scorer.plain(task.source_dictionary, dataset[i]["source"].tolist()),
            "reference": scorer.reference(i),
            "greedy": scorer.text(greedy.outputs[i]),
        }
        for i in sorted(ids)
    }
    write_atomically(args.out, json.dumps({"sentences": sentences, "settings": recorded}, indent=1) + "\n")
    print(f"{len(recorded)} settings of {len(ids)} sentences in {args.out}")


if __name__ == "__main__":
    run("rounds", main, "interrupted; nothing is written")
