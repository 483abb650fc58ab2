#!/usr/bin/env python3
"""Times BiLD next to what else a user could run, on the same sentences, in one process and one run.

Systems take turns batch by batch, so that noise of the machine hits all alike. Quality is that of exactly the
outputs that were timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from sacremoses import MosesDetokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask

import bild_fairseq  # noqa: F401
from bild_fairseq.checkpoints import load_small
from bild_fairseq.decode import Policy
from bild_fairseq.errors import BildError
from bild_fairseq.generator import BildGenerator, SearchOptions
from bild_fairseq.stats import Counters, total
from bild_fairseq.trace import replay, traced

Run = Callable[[dict[str, Any]], list[list[int]]]


@dataclass
class System:
    """One way to translate a batch, and what came of it."""

    name: str
    run: Run  # fairseq batch -> token numbers per sentence, end symbol included
    generator: BildGenerator | None = None
    seconds: list[float] = field(default_factory=list)  # per batch
    floor: list[float] = field(default_factory=list)  # per batch: its bare forward passes, if asked for
    outputs: dict[int, list[int]] = field(default_factory=dict)  # by sentence
    counters: list[Counters] = field(default_factory=list)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="binarized data (fairseq-preprocess)")
    parser.add_argument("--large", required=True, help="checkpoint of the large model")
    parser.add_argument("--small", help="checkpoint of the small model")
    parser.add_argument("--early-exit", help="checkpoint of an early-exit model")
    parser.add_argument("--exit-layer", type=int, help="its exit (default: the lowest)")
    parser.add_argument("--subset", default="test")
    parser.add_argument("--sentences", type=int, default=100, help="how many, from the first on (default: 100)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every system (default: 2)")
    parser.add_argument("--warmup", type=int, default=3, help="batches that are run first and not counted")
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument("--fp16", action="store_true", help="half precision")
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
    parser.add_argument("--max-draft", type=int, default=10)
    parser.add_argument(
        "--floor",
        action="store_true",
        help="also time the bare forward passes of each run; wall / floor is the decoding loop's overhead",
    )
    parser.add_argument("--reference", help="raw reference text, to score detokenized output against")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--plot", help="PNG of latency against output length (needs matplotlib)")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[FairseqTask, torch.nn.Module]:
    """The task with its data, and the large model."""
    parsed = options.parse_args_and_arch(options.get_generation_parser(), [args.data, "--path", args.large])
    task = tasks.setup_task(convert_namespace_to_omegaconf(parsed).task)
    large = load_model(args.large, task, args)
    task.load_dataset(args.subset)
    return task, large


def load_model(path: str, task: FairseqTask, args: argparse.Namespace) -> torch.nn.Module:
    models, _ = checkpoint_utils.load_model_ensemble([path], task=task)
    model = models[0].eval()
    if args.fp16:
        model.half()
    return model.cuda() if args.cuda else model


def make_batches(task: FairseqTask, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Batches of sentences of like length, in random order so that no system meets them sorted."""
    dataset = task.dataset(args.subset)
    ids = sorted(range(min(args.sentences, len(dataset))), key=lambda i: (dataset.src_sizes[i], i))
    chunks = [ids[i : i + args.batch_size] for i in range(0, len(ids), args.batch_size)]
    random.Random(0).shuffle(chunks)
    batches = [dataset.collater([dataset[i] for i in chunk]) for chunk in chunks]
    return [utils.move_to_cuda(batch) for batch in batches] if args.cuda else batches


def stock(models: Sequence[torch.nn.Module], task: FairseqTask, beam: int) -> Run:
    """fairseq's own generator."""
    generator = SequenceGenerator(models, task.target_dictionary, beam_size=beam)
    return lambda batch: [hypos[0]["tokens"].tolist() for hypos in generator.generate(models, batch)]


def ours(name: str, models: Sequence[torch.nn.Module], task: FairseqTask, **kwargs: Any) -> System:
    kwargs.setdefault("policy", Policy())
    generator = BildGenerator(models, task.target_dictionary, options=SearchOptions(), **kwargs)

    def run(batch: dict[str, Any]) -> list[list[int]]:
        hypotheses = generator.generate(models, batch)
        system.counters += [hypos[0]["counters"] for hypos in hypotheses]
        return [hypos[0]["tokens"].tolist() for hypos in hypotheses]

    system = System(name, run, generator)
    return system


def ctranslate2_run(compute_type: str, task: FairseqTask, args: argparse.Namespace) -> Run:
    """CTranslate2, greedy, on the same large checkpoint."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model"
        ctranslate2.converters.FairseqConverter(args.large, args.data).convert(path)
        translator = ctranslate2.Translator(
            path,
            device="cuda" if args.cuda else "cpu",
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=args.threads,
        )
    source, target = task.source_dictionary, task.target_dictionary

    def run(batch: dict[str, Any]) -> list[list[int]]:
        rows = batch["net_input"]["src_tokens"].tolist()
        texts = [[source[token] for token in row if token not in (source.pad(), source.eos())] for row in rows]
        results = translator.translate_batch(texts, beam_size=1, max_decoding_length=200, max_batch_size=0)
        return [[target.index(word) for word in result.hypotheses[0]] + [target.eos()] for result in results]

    return run


def parse_policy(setting: str, max_draft: int) -> Policy:
    """Reads ``FALLBACK,ROLLBACK[,end]``."""
    fallback, rollback, *end = setting.split(",")
    if end not in ([], ["end"]):
        raise BildError(f"{setting}: write FALLBACK,ROLLBACK or FALLBACK,ROLLBACK,end")
    return Policy(float(fallback), float(rollback), max_draft, verify_end=bool(end))


def make_systems(task: FairseqTask, large: torch.nn.Module, args: argparse.Namespace) -> list[System]:
    bild_settings = args.bild or ["0.6,2"]
    lossless = Policy(args.lossless_fallback, 0.0, args.max_draft, verify_end=True)
    small = load_small([args.small], task, large) if args.small else []
    early = None
    if args.early_exit:
        early = large if args.early_exit == args.large else load_model(args.early_exit, task, args)
    exit_layer = args.exit_layer or (min(early.decoder.exit_layers) if early else None)

    def policies(name: str, settings: Sequence[str]) -> list[tuple[str, Policy]]:
        return [(f"{name} ({setting})", parse_policy(setting, args.max_draft)) for setting in settings]

    makers: dict[str, Callable[[], list[System]]] = {
        "fairseq": lambda: [System("fairseq --beam 1", stock([large], task, 1))],
        "fairseq-beam5": lambda: [System("fairseq --beam 5", stock([large], task, 5))],
        "greedy": lambda: [ours("greedy", [large], task, alone=True)],
    }
    if small:
        makers |= {
            "small": lambda: [ours("small alone", small, task, alone=True)],
            "bild": lambda: [
                ours(name, [large], task, small_models=small, policy=p) for name, p in policies("bild", bild_settings)
            ],
            "lossless": lambda: [ours("bild lossless", [large], task, small_models=small, policy=lossless)],
        }
    if early:
        makers |= {
            "exit-full": lambda: [ours("early-exit model, full depth", [early], task, alone=True)],
            "exit-lossless": lambda: [
                ours(f"exit {exit_layer} lossless", [early], task, exit_layer=exit_layer, policy=lossless)
            ],
            "exit-alone": lambda: [ours(f"exit {exit_layer} alone", [early], task, alone=True, exit_layer=exit_layer)],
            "exit": lambda: [
                ours(name, [early], task, exit_layer=exit_layer, policy=p)
                for name, p in policies(f"exit {exit_layer}", args.exit or bild_settings)
            ],
        }
    default = ",".join(makers)
    for compute_type in ("float32", "int8"):
        name = f"ctranslate2-{compute_type}"
        makers[name] = lambda name=name, kind=compute_type: [System(name, ctranslate2_run(kind, task, args))]
    systems = []
    for name in (args.systems or default).split(","):
        if name not in makers:
            raise BildError(f"--systems {name}: unknown, or its model was not given; there are {', '.join(makers)}")
        systems += makers[name]()
    return systems


def timed(args: argparse.Namespace, run: Callable[[], Any]) -> tuple[Any, float]:
    if args.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if args.cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def measure(
    systems: Sequence[System], batches: Sequence[dict[str, Any]], encoder: Run, args: argparse.Namespace
) -> list[float]:
    """Runs all systems over all batches in turns; returns the large encoder's seconds per batch."""
    for batch in batches[: args.warmup]:
        for system in systems:
            system.run(batch)
    for system in systems:
        system.counters.clear()
    encoding = []
    for number, batch in enumerate(batches):
        encoding.append(timed(args, lambda batch=batch: encoder(batch))[1])
        turn = number % len(systems)
        for system in [*systems[turn:], *systems[:turn]]:
            outputs, seconds = timed(args, lambda system=system, batch=batch: system.run(batch))
            system.seconds.append(seconds)
            system.outputs.update(zip(batch["id"].tolist(), outputs, strict=True))
            if args.floor and system.generator is not None:
                calls = traced(system.generator, batch)
                repeat = functools.partial(replay, system.generator, batch, calls)
                system.floor.append(timed(args, repeat)[1])
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {len(batches)} batches", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return encoding


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """How many times faster: ratio of total times, and its 95 % bootstrap interval over batches."""
    generator = random.Random(0)
    pairs = list(zip(theirs, ours, strict=True))
    resampled = []
    for _ in range(1000):
        picked = generator.choices(pairs, k=len(pairs))
        resampled.append(sum(a for a, _ in picked) / sum(b for _, b in picked))
    resampled.sort()
    return sum(theirs) / sum(ours), resampled[25], resampled[974]


def texts(outputs: dict[int, list[int]], task: FairseqTask, detokenize: bool) -> list[str]:
    """Outputs as text without subword marks, in order of the sentences."""
    dictionary = task.target_dictionary
    lines = [dictionary.string(torch.tensor(outputs[i]), "@@ ") for i in sorted(outputs)]
    if not detokenize:
        return lines
    moses = MosesDetokenizer(lang=task.cfg.target_lang or "en")
    return [moses.detokenize(line.split()) for line in lines]


def score(systems: Sequence[System], task: FairseqTask, args: argparse.Namespace) -> tuple[list[float], str]:
    """BLEU of every system, and sacrebleu's signature."""
    ids = sorted(systems[0].outputs)
    if args.reference:
        lines = Path(args.reference).read_text(encoding="utf-8").splitlines()
        references, metric = [lines[i] for i in ids], sacrebleu.BLEU()
    else:
        dataset = task.dataset(args.subset)
        references = [task.target_dictionary.string(dataset[i]["target"], "@@ ") for i in ids]
        metric = sacrebleu.BLEU(tokenize="none", force=True)
    scores = [
        metric.corpus_score(texts(system.outputs, task, bool(args.reference)), [references]).score for system in systems
    ]
    return scores, str(metric.get_signature())


def report(
    systems: Sequence[System], scores: Sequence[float], batches: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row of figures per system."""
    by_name = {system.name: system for system in systems}
    sizes = [len(batch["id"]) for batch in batches]
    rows = []
    for system, bleu in zip(systems, scores, strict=True):
        per_sentence = [1000 * s / n for s, n in zip(system.seconds, sizes, strict=True)]
        tokens = sum(map(len, system.outputs.values()))
        row: dict[str, Any] = {
            "system": system.name,
            "bleu": bleu,
            "ms_per_sentence_median": statistics.median(per_sentence),
            "ms_per_sentence_p90": sorted(per_sentence)[int(0.9 * (len(per_sentence) - 1))],
            "ms_per_token": 1000 * sum(system.seconds) / tokens,
            "tokens_per_second": tokens / sum(system.seconds),
        }
        for name in ("fairseq --beam 1", "greedy", "ctranslate2-float32", "ctranslate2-int8"):
            if name in by_name:
                row[f"speedup_over_{name}"] = ratio(system.seconds, by_name[name].seconds)
        if "greedy" in by_name:
            greedy = by_name["greedy"].outputs
            row["differ_from_greedy"] = sum(system.outputs[i] != greedy[i] for i in greedy)
        if system.floor:
            row["wall_over_floor"] = sum(system.seconds) / sum(system.floor)
        row |= total(system.counters).as_dict() if system.counters else {}
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    def speedup(row: dict[str, Any], over: str) -> str:
        value = row.get(f"speedup_over_{over}")
        return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]" if value else "-"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "system": lambda r: r["system"],
        "BLEU": lambda r: f"{r['bleu']:.2f}",
        "ms/sentence": lambda r: f"{r['ms_per_sentence_median']:.1f}",
        "p90": lambda r: f"{r['ms_per_sentence_p90']:.1f}",
        "ms/token": lambda r: f"{r['ms_per_token']:.2f}",
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
    args = parse_args()
    torch.set_num_threads(args.threads)
    task, large = load(args)
    systems = make_systems(task, large, args)
    batches = make_batches(task, args)

    @torch.no_grad()
    def encoder(batch: dict[str, Any]) -> Any:
        return large.encoder.forward_torchscript(
            {k: v for k, v in batch["net_input"].items() if k != "prev_output_tokens"}
        )

    encoding = measure(systems, batches, encoder, args)
    scores, signature = score(systems, task, args)
    rows = report(systems, scores, batches)
    device = torch.cuda.get_device_name() if args.cuda else f"CPU, {args.threads} threads"
    sentences = sum(len(batch["id"]) for batch in batches)
    print(
        f"{sentences} sentences, batch size {args.batch_size}, {device}, {'float16' if args.fp16 else 'float32'}; "
        f"large encoder {1000 * sum(encoding) / sentences:.2f} ms a sentence (included below); BLEU {signature}"
    )
    print_table(rows)
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "device": device, "rows": rows}, indent=1))
    if args.plot:
        plot(systems, batches, args.plot)


if __name__ == "__main__":
    try:
        main()
    except BildError as error:
        sys.exit(f"benchmark: {error}")
