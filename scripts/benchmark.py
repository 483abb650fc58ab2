#!/usr/bin/env python3
"""Times BiLD next to what else a user could run, on the same sentences, in one process and one run.

Systems take turns every few batches, so that noise of the machine hits all alike. Quality is that of exactly the
outputs that were timed.
"""

from __future__ import annotations

import argparse
import atexit
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.tasks import FairseqTask

from bild_fairseq.decoding.counters import total
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
from bild_fairseq.experiments.data import device_name, first_sentences, load, load_model, make_batches
from bild_fairseq.experiments.files import write_atomically
from bild_fairseq.experiments.methods import parse_precision
from bild_fairseq.experiments.scoring import Scorer
from bild_fairseq.experiments.settings import parse_policy
from bild_fairseq.experiments.systems import System, ours, stock
from bild_fairseq.experiments.timing import measure, percentile90, ratio
from bild_fairseq.plugin.checkpoints import load_small


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_arguments(parser, subset="test")
    parser.add_argument("--small", help="checkpoint of the small model")
    parser.add_argument("--early-exit", help="checkpoint of an early-exit model")
    parser.add_argument("--exit-layer", type=int, help="its exit (default: the lowest)")
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
        "--systems",
        help="which, joined by commas: fairseq, fairseq-beam5, greedy, small, bild, lossless, exit-full, exit-alone, "
        "exit, exit-lossless, ctranslate2-float32, ctranslate2-int8 (default: all that the models allow, without "
        "ctranslate2)",
    )
    parser.add_argument(
        "--bild",
        action="append",
        metavar="FALLBACK,ROLLBACK[,end]",
        help="thresholds of the bild system, with ',end' for --bild-verify-end; repeat for several (default: 0.6,2)",
    )
    parser.add_argument(
        "--exit", action="append", metavar="FALLBACK,ROLLBACK[,end]", help="the same for the exit system"
    )
    parser.add_argument(
        "--lossless-fallback", type=float, default=0.6, help="fallback threshold of the lossless system (default: 0.6)"
    )
    parser.add_argument(
        "--ctranslate2-threads",
        type=int,
        help="CTranslate2's threads, where another number suits it better (default: as --threads); it also reads "
        "environment variables of its own, CT2_USE_MKL=0 for one",
    )
    parser.add_argument("--max-draft", type=int, default=10)
    parser.add_argument(
        "--precision",
        default="float32",
        help="weights of this package's systems: float32, float16, bfloat16, int8, or two of them joined by +, for the "
        "large model and the small one; several, joined by commas, are compared (default: float32)",
    )
    parser.add_argument(
        "--floor",
        action="store_true",
        help="also time the bare forward passes of each run; wall / floor is the decoding loop's overhead",
    )
    add_search_arguments(parser)
    add_score_arguments(parser)
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--plot", help="PNG of latency against output length (needs matplotlib)")
    return parser.parse_args()


def ctranslate2_system(name: str, compute_type: str, task: FairseqTask, args: argparse.Namespace) -> System:
    """CTranslate2, greedy, on the same large checkpoint, in a process of its own that times itself."""
    try:
        import ctranslate2
    except ImportError:
        raise BildError(f"{name} needs the package ctranslate2: pip install ctranslate2") from None

    folder = tempfile.mkdtemp(prefix="ctranslate2-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    ctranslate2.converters.FairseqConverter(args.large, args.data).convert(folder, force=True)
    options = {
        "max_decoding_length": int(args.max_len_b),
        "min_decoding_length": args.min_len,
        "no_repeat_ngram_size": args.no_repeat_ngram_size,
    }
    worker = subprocess.Popen(
        [
            *(sys.executable, str(Path(__file__).with_name("ctranslate2_worker.py")), folder),
            *("--device", "cuda" if args.cuda else "cpu", "--compute-type", compute_type),
            *("--threads", str(args.ctranslate2_threads or args.threads), "--options", json.dumps(options)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(worker.kill)
    source, target = task.source_dictionary, task.target_dictionary
    seconds = [0.0]

    def run(batch: dict[str, Any]) -> list[list[int]]:
        rows = batch["net_input"]["src_tokens"].tolist()
        texts = [[source[token] for token in row if token not in (source.pad(), source.eos())] for row in rows]
        worker.stdin.write(json.dumps(texts) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        if not answer:
            raise BildError(f"{name} failed; its error is above")
        texts, seconds[0] = json.loads(answer)
        return [[target.index(word) for word in text] + [target.eos()] for text in texts]

    # Its threads spin for 200 ms after their work.
    return System(name, run, clock=lambda: seconds[0], rest=0.25)


def make_systems(task: FairseqTask, large: torch.nn.Module, args: argparse.Namespace) -> list[System]:
    search = search_options(args)
    precisions = args.precision.split(",")
    for precision in precisions:
        parse_precision(precision)
    bild_settings = args.bild or ["0.6,2"]
    lossless = Policy(args.lossless_fallback, 0.0, args.max_draft, verify_end=True)
    small = load_small([args.small], task, large) if args.small else []
    early = None
    if args.early_exit:
        early = (
            large
            if args.early_exit == args.large
            else load_model(args.early_exit, task, cuda=args.cuda, fp16=args.fp16)
        )
    exit_layer = args.exit_layer or (min(early.decoder.exit_layers) if early else None)

    def policies(name: str, settings: Sequence[str]) -> list[tuple[str, Policy]]:
        return [(f"{name} ({setting})", parse_policy(setting, args.max_draft)) for setting in settings]

    def at_all(name: str, models: Sequence[torch.nn.Module], **kwargs: Any) -> list[System]:
        """A system of this package at every precision that it can have."""
        made = []
        for text in precisions:
            precision, small_precision = parse_precision(text)
            if precision == small_precision or "small_models" in kwargs:
                title = name if text == "float32" else f"{name} {text}"
                both = {"precision": precision, "small_precision": small_precision}
                made.append(ours(title, models, task, search, **both, **kwargs))
        return made

    makers: dict[str, Callable[[], list[System]]] = {
        "fairseq": lambda: [stock([large], task, 1, search)],
        "fairseq-beam5": lambda: [stock([large], task, 5, search)],
        "greedy": lambda: at_all("greedy", [large], alone=True),
    }
    if small:
        makers |= {
            "small": lambda: at_all("small alone", small, alone=True),
            "bild": lambda: [
                system
                for name, policy in policies("bild", bild_settings)
                for system in at_all(name, [large], small_models=small, policy=policy)
            ],
            "lossless": lambda: at_all("bild lossless", [large], small_models=small, policy=lossless),
        }
    if early:
        makers |= {
            "exit-full": lambda: at_all("early-exit model, full depth", [early], alone=True),
            "exit-lossless": lambda: at_all(
                f"exit {exit_layer} lossless", [early], exit_layer=exit_layer, policy=lossless
            ),
            "exit-alone": lambda: at_all(f"exit {exit_layer} alone", [early], alone=True, exit_layer=exit_layer),
            "exit": lambda: [
                system
                for name, policy in policies(f"exit {exit_layer}", args.exit or bild_settings)
                for system in at_all(name, [early], exit_layer=exit_layer, policy=policy)
            ],
        }
    default = ",".join(makers)
    for compute_type in ("float32", "int8"):
        name = f"ctranslate2-{compute_type}"
        makers[name] = lambda name=name, kind=compute_type: [ctranslate2_system(name, kind, task, args)]
    systems = []
    for name in (args.systems or default).split(","):
        if name not in makers:
            raise BildError(f"--systems {name}: unknown, or its model was not given; there are {', '.join(makers)}")
        systems += makers[name]()
    return systems


def report(
    systems: Sequence[System], scores: Sequence[float], metric: str, batches: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row of figures per system."""
    by_name = {system.name: system for system in systems}
    sizes = [len(batch["id"]) for batch in batches]
    rows = []
    for system, quality in zip(systems, scores, strict=True):
        per_sentence = [1000 * s / n for s, n in zip(system.seconds, sizes, strict=True)]
        tokens = sum(map(len, system.outputs.values()))
        row: dict[str, Any] = {
            "system": system.name,
            metric: quality,
            "ms_per_sentence_median": statistics.median(per_sentence),
            "ms_per_sentence_p90": percentile90(per_sentence),
            "ms_per_token": 1000 * sum(system.seconds) / tokens,
            "tokens_per_second": tokens / sum(system.seconds),
        }
        for name in ("fairseq --beam 1", "greedy", "ctranslate2-float32", "ctranslate2-int8"):
            if name in by_name:
                row[f"speedup_over_{name}"] = ratio(system.seconds, by_name[name].seconds)
        if "greedy" in by_name:
            greedy = by_name["greedy"].outputs
            row["differ_from_greedy"] = sum(system.outputs[i] != greedy[i] for i in greedy)
        if system.encoding:
            row["encoding_ms_per_sentence"] = 1000 * sum(system.encoding) / sum(sizes)
        if system.floor:
            row["wall_over_floor"] = sum(system.seconds) / sum(system.floor)
        row |= total(system.counters).as_dict() if system.counters else {}
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, Any]], metric: str, metric_name: str) -> None:
    def speedup(row: dict[str, Any], over: str) -> str:
        value = row.get(f"speedup_over_{over}")
        return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]" if value else "-"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "system": lambda r: r["system"],
        metric_name: lambda r: f"{r[metric]:.2f}",
        "ms/sentence": lambda r: f"{r['ms_per_sentence_median']:.1f}",
        "p90": lambda r: f"{r['ms_per_sentence_p90']:.1f}",
        "ms/token": lambda r: f"{r['ms_per_token']:.2f}",
        "encoding": lambda r: f"{r['encoding_ms_per_sentence']:.1f}" if "encoding_ms_per_sentence" in r else "-",
        "x fairseq": lambda r: speedup(r, "fairseq --beam 1"),
        "x greedy": lambda r: speedup(r, "greedy"),
        "x ct2 float32": lambda r: speedup(r, "ctranslate2-float32"),
        "x ct2 int8": lambda r: speedup(r, "ctranslate2-int8"),
        "fallback": lambda r: f"{r['fallback_rate']:.1%}" if r.get("small_calls") else "-",
        "rollback": lambda r: f"{r['rollback_rate']:.1%}" if r.get("small_calls") else "-",
        "tokens/large call": lambda r: f"{r['mean_accepted_length']:.2f}" if r.get("large_calls") else "-",
        "differ": lambda r: str(r.get("differ_from_greedy", "-")),
        "wall/floor": lambda r: f"{r['wall_over_floor']:.2f}" if "wall_over_floor" in r else "-",
    }
    table = [[cell(row) for cell in columns.values()] for row in rows]
    keep = [i for i in range(len(columns)) if any(line[i] != "-" for line in table)]
    header = [list(columns)[i] for i in keep]
    body = [[line[i] for i in keep] for line in table]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    for line in (header, ["-" * width for width in widths], *body):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def plot(systems: Sequence[System], batches: Sequence[dict[str, Any]], path: str) -> None:
    """Latency of each batch against the tokens of its longest output."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(7, 4.5))
    for system in systems:
        lengths = [max(len(system.outputs[i]) for i in batch["id"].tolist()) for batch in batches]
        axes.scatter(lengths, [1000 * s for s in system.seconds], s=8, label=system.name)
    axes.set_xlabel("output length (tokens)")
    axes.set_ylabel("latency (ms)")
    axes.legend(fontsize=8)
    plt.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    quiet()
    args = parse_args()
    torch.set_num_threads(args.threads)
    task, large = load(args)
    systems = make_systems(task, large, args)
    ids = first_sentences(task, args.subset, args.sentences)
    batches = make_batches(task.dataset(args.subset), ids, args.batch_size, cuda=args.cuda)
    scorer = Scorer(task, args.subset, ids, score_options(args))

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {len(batches)} batches", end="\n" * (done == len(batches)), file=sys.stderr, flush=True)

    measure(
        systems,
        batches,
        cuda=args.cuda,
        warmup=args.warmup,
        turn=args.turn,
        encoding=True,
        floor=args.floor,
        progress=progress,
    )
    rows = report(systems, [scorer.score(system.outputs) for system in systems], args.metric, batches)
    device = device_name(args.cuda, args.threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    print(
        f"{len(ids)} sentences, batch size {args.batch_size}, {device}, {'float16' if args.fp16 else 'float32'}; "
        f"peak memory {peak / 1024:.0f} MB (all systems); {scorer.name} {scorer.signature}"
    )
    print_table(rows, args.metric, scorer.name)
    if args.json:
        figures = {"arguments": vars(args), "device": device, "peak_memory_kib": peak}
        figures |= {"signature": scorer.signature, "rows": rows}
        write_atomically(args.json, json.dumps(figures, indent=1) + "\n")
    if args.plot:
        plot(systems, batches, args.plot)


if __name__ == "__main__":
    run("benchmark", main)
