#!/usr/bin/env python3
"""Measures a grid of thresholds, draft lengths and models on a validation set.

Every setting takes turns with lean greedy decoding every few sentences, so that its speedup is a ratio of times
from the same minutes. Finished settings are in OUT/results.json and OUT/results.csv at once; the same command again
measures only what is missing. scripts/plot.py draws the results.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq.tasks import FairseqTask
from tqdm import tqdm

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
from bild_fairseq.experiments.data import check_sources, device_name, first_sentences, load, make_batches
from bild_fairseq.experiments.files import write_atomically
from bild_fairseq.experiments.methods import Method, add_method_arguments, load_methods
from bild_fairseq.experiments.origin import difference, origin_of
from bild_fairseq.experiments.scoring import Scorer, quality_change
from bild_fairseq.experiments.settings import parse_drafts, parse_fallbacks, parse_policy, parse_rollbacks
from bild_fairseq.experiments.systems import System, stock, system_of
from bild_fairseq.experiments.timing import measure, percentile90, ratio
from bild_fairseq.plugin.generator import SearchOptions


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    method: str
    kind: str  # bild, no rollback, no fallback, or a baseline
    baseline: str  # whose greedy decoding its speedup is over
    policy: Policy | None = None  # None for baselines

    @property
    def columns(self) -> dict[str, Any]:
        """What names the setting in the results; None where it does not apply."""
        policy = self.policy
        return {
            "method": self.method,
            "kind": self.kind,
            "baseline": self.baseline,
            "fallback_threshold": policy and policy.fallback_threshold,
            # JSON has no infinity.
            "rollback_threshold": policy
            and ("inf" if policy.rollback_threshold == math.inf else policy.rollback_threshold),
            "max_draft": policy and policy.max_draft,
            "verify_end": policy and policy.verify_end,
        }

    def __str__(self) -> str:
        if self.policy is None:
            return f"{self.method}, {self.kind}"
        end = ", end" if self.policy.verify_end else ""
        thresholds = f"{self.policy.fallback_threshold:g}, {self.policy.rollback_threshold:g}"
        return f"{self.method}, {self.kind} ({thresholds}{end}; draft {self.policy.max_draft})"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser, subset="valid")
    add_method_arguments(parser)
    parser.add_argument("--out", required=True, help="folder for results.json and results.csv")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2, help="batches before each setting that are not counted")
    parser.add_argument("--turn", type=int, default=10, help="batches before the other one's turn (default: 10)")
    grid = parser.add_argument_group("the grid, values joined by commas")
    grid.add_argument("--fallback", default="0.2,0.4,0.6,0.8", help="fallback thresholds (default: 0.2,0.4,0.6,0.8)")
    grid.add_argument("--rollback", default="1,2,4,8", help="rollback thresholds (default: 1,2,4,8)")
    grid.add_argument("--max-draft", default="10", help="tokens drafted at most (default: 10)")
    grid.add_argument("--verify-end", choices=["off", "on", "both"], default="off")
    grid.add_argument(
        "--setting",
        action="append",
        metavar="FALLBACK,ROLLBACK[,end]",
        help="these pairs of thresholds instead of the grid of them",
    )
    grid.add_argument(
        "--ablations",
        action="store_true",
        help="also without rollback (rollback threshold inf), and without fallback (fallback threshold 0 with each "
        "of --windows)",
    )
    grid.add_argument("--windows", default="2,4,6,8", help="draft lengths without fallback (default: 2,4,6,8)")
    grid.add_argument("--fairseq", action="store_true", help="also fairseq's own decoder with --beam 1")
    add_search_arguments(parser)
    add_score_arguments(parser)
    return parser.parse_args()


def policies(args: argparse.Namespace) -> list[tuple[str, Policy]]:
    """The kind and policy of every setting of one method, each once."""
    fallbacks, rollbacks = parse_fallbacks(args.fallback), parse_rollbacks(args.rollback)
    drafts, windows = parse_drafts(args.max_draft), parse_drafts(args.windows)
    ends = {"off": [False], "on": [True], "both": [False, True]}[args.verify_end]
    if args.setting:
        found = [("bild", parse_policy(setting, draft)) for setting in args.setting for draft in drafts]
    else:
        grid = itertools.product(fallbacks, rollbacks, drafts, ends)
        found = [("bild", Policy(f, r, draft, verify_end=end)) for f, r, draft, end in grid]
    if args.ablations:
        # Verifying the end without ever rolling back would only cost time.
        found += [("no rollback", Policy(f, math.inf, draft)) for f, draft in itertools.product(fallbacks, drafts)]
        grid = itertools.product(rollbacks, windows, ends)
        found += [("no fallback", Policy(0.0, r, window, verify_end=end)) for r, window, end in grid]
    return list(dict.fromkeys(found))


def settings_of(methods: Sequence[Method], args: argparse.Namespace) -> list[tuple[Method, list[Setting]]]:
    """Every method's settings, the baselines first; a large model's own baselines come once."""
    grid, groups = policies(args), []
    baselines: dict[str, str] = {}
    for method in methods:
        settings = []
        if method.large_path not in baselines:
            name = "large model" if method.large_path == args.large else f"{method.name}, full depth"
            baselines[method.large_path] = name
            kinds = ["greedy", *(["fairseq --beam 1"] if args.fairseq else [])]
            settings += [Setting(name, kind, name) for kind in kinds]
        baseline = baselines[method.large_path]
        settings.append(Setting(method.name, "small alone", baseline))
        settings += [Setting(method.name, kind, baseline, policy) for kind, policy in grid]
        groups.append((method, settings))
    return groups


class Results:
    """The rows of a sweep, on disk from the moment each is measured.

    Args:
        folder: made if it is not there.
        origin: what the measurements depend on, by name; ``models`` maps names to what tells a model from another.

    Raises:
        BildError: the folder holds results of other data, models or conditions, or cannot be written.
    """

    def __init__(self, folder: Path, origin: dict[str, Any]):
        self._json, self._csv = folder / "results.json", folder / "results.csv"
        self._origin = origin
        self.rows: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._json.exists():
                self._go_on(json.loads(self._json.read_text(encoding="utf-8")))
            self._write()
        except OSError as error:
            raise BildError(f"--out {folder}: cannot write there: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, BildError):
                raise
            raise BildError(f"{self._json}: holds no results of a sweep; name another --out") from error

    def _go_on(self, old: dict[str, Any]) -> None:
        differs = difference(old["origin"], self._origin)
        if differs:
            raise BildError(f"{self._json}: was measured with another {differs}; name another --out, or delete it")
        self._origin = {**self._origin, "models": {**old["origin"]["models"], **self._origin["models"]}}
        self.rows = list(old["rows"])

    def has(self, setting: Setting) -> bool:
        return any(setting.columns.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        text = io.StringIO()
        names = dict.fromkeys(name for row in self.rows for name in row)
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self._csv, text.getvalue())
        write_atomically(self._json, json.dumps({"origin": self._origin, "rows": self.rows}, indent=1) + "\n")


def systems_of(
    method: Method, settings: Sequence[Setting], task: FairseqTask, search: SearchOptions
) -> Iterator[tuple[Setting, System, System]]:
    """Each setting with its system and a greedy one; generators are made when they are needed, and shared."""
    alone = method.greedy(task, search)
    bild = None
    for setting in settings:
        greedy = system_of("greedy", alone)
        if setting.kind == "greedy":
            system = greedy
        elif setting.kind == "fairseq --beam 1":
            system = stock([method.large], task, 1, search)
        elif setting.kind == "small alone":
            system = system_of(setting.kind, method.small_alone(task, search))
        else:
            bild = bild or method.generator(task, search)
            system = system_of(str(setting), bild, setting.policy)
        yield setting, system, greedy


def row_of(
    setting: Setting, system: System, greedy: System, batches: Sequence[dict[str, Any]], scorer: Scorer
) -> dict[str, Any]:
    """The figures of one setting; times are per sentence."""
    sizes = [len(batch["id"]) for batch in batches]
    milliseconds = [1000 * s / n for s, n in zip(system.seconds, sizes, strict=True)]
    speedup = ratio(system.seconds, greedy.seconds)
    change = quality_change(scorer, scorer.statistics(system.outputs), scorer.statistics(greedy.outputs))
    rates = total(system.counters).as_dict()
    if setting.policy is None:
        calls = {"greedy": "large_calls", "small alone": "small_calls"}.get(setting.kind)
        rates = dict.fromkeys(rates) | {"tokens": sum(map(len, system.outputs.values()))}
        rates |= {calls: rates["tokens"]} if calls else {}
    return {
        **setting.columns,
        "quality": scorer.score(system.outputs),
        **dict(zip(("quality_change", "quality_change_low", "quality_change_high"), change, strict=True)),
        "ms_median": statistics.median(milliseconds),
        "ms_p90": percentile90(milliseconds),
        "ms_mean": 1000 * sum(system.seconds) / sum(sizes),
        "greedy_ms_mean": 1000 * sum(greedy.seconds) / sum(sizes),
        **dict(zip(("speedup", "speedup_low", "speedup_high"), speedup, strict=True)),
        "sentences": sum(sizes),
        "differ_from_greedy": sum(system.outputs[i] != output for i, output in greedy.outputs.items()),
        **rates,
    }


def describe(row: dict[str, Any], metric: str) -> str:
    """One line for the terminal."""
    return (
        f"{metric} {row['quality']:.2f} ({row['quality_change']:+.2f}), {row['ms_median']:.1f} ms a sentence, "
        f"{row['speedup']:.2f}x lean greedy [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
    )


def main() -> None:
    args = parse_args()
    policies(args)  # so that a mistyped grid is told before models are loaded
    for name in ("batch_size", "turn"):
        if getattr(args, name) < 1:
            raise BildError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    quiet()
    torch.set_num_threads(args.threads)
    task, large = load(args)
    methods = load_methods(task, large, args)
    check_sources(task, args, [model for method in methods for model in (method.large, *method.small)])
    ids = first_sentences(task, args.subset, args.sentences)
    batches = make_batches(task.dataset(args.subset), ids, args.batch_size, cuda=args.cuda)
    scorer = Scorer(task, args.subset, ids, score_options(args))
    origin = origin_of(task, methods, args) | {
        "metric": args.metric,
        "metric_name": scorer.name,
        "subwords": args.bpe,
        "batch size": args.batch_size,
        "device": device_name(args.cuda, args.threads),
        "torch": torch.__version__,
    }
    results = Results(Path(args.out), origin)
    groups = [
        (method, [setting for setting in settings if not results.has(setting)])
        for method, settings in settings_of(methods, args)
    ]
    missing = sum(len(settings) for _, settings in groups)
    with tqdm(total=missing * len(batches), unit="batch", smoothing=0.05, disable=None) as bar:
        for method, settings in groups:
            if not settings:
                continue
            for setting, system, greedy in systems_of(method, settings, task, search_options(args)):
                bar.set_description(str(setting))
                systems = list({id(one): one for one in (greedy, system)}.values())
                before = bar.n
                measure(
                    systems,
                    batches,
                    cuda=args.cuda,
                    warmup=args.warmup,
                    turn=args.turn,
                    progress=lambda done, before=before: bar.update(before + done - bar.n),
                )
                row = row_of(setting, system, greedy, batches, scorer)
                results.add(row)
                tqdm.write(f"{setting}: {describe(row, scorer.name)}")
    print(f"{len(results.rows)} settings in {args.out}/results.json and results.csv; {missing} measured now")


if __name__ == "__main__":
    run("sweep", main, "interrupted; the same command goes on where it stopped")
