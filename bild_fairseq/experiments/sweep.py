"""A grid of thresholds, draft lengths and models, each measured next to greedy decoding."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq.tasks import FairseqTask
from tqdm import tqdm

from ..decoding.counters import total
from ..decoding.policies import Policy
from ..errors import BildError
from ..plugin.files import write_text
from ..plugin.pair import Pair
from ..plugin.search import SearchOptions
from .origin import difference
from .scoring import Scorer, quality_change
from .settings import (
    ENDS,
    parse_drafts,
    parse_fallbacks,
    parse_policy,
    parse_rollbacks,
    threshold_columns,
    thresholds_text,
)
from .systems import System, ours, stock
from .timing import measure, percentile90, ratio


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    method: str  # name of the pair of models
    kind: str  # bild, no rollback, no fallback, or a baseline
    baseline: str  # whose greedy decoding its speedup is over
    policy: Policy | None = None  # None for baselines

    @property
    def columns(self) -> dict[str, Any]:
        """What names the setting in the results; None where it does not apply."""
        names = {"method": self.method, "kind": self.kind, "baseline": self.baseline}
        if self.policy is None:
            return names | dict.fromkeys(("fallback_threshold", "rollback_threshold", "max_draft", "verify_end"))
        values = {"max_draft": self.policy.max_draft, "verify_end": self.policy.verify_end}
        return names | threshold_columns(self.policy) | values

    def __str__(self) -> str:
        if self.policy is None:
            return f"{self.method}, {self.kind}"
        policy = self.policy
        thresholds = thresholds_text(policy.fallback_threshold, policy.rollback_threshold, policy.verify_end)
        return f"{self.method}, {self.kind} ({thresholds}; draft {policy.max_draft})"


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of a sweep."""
    grid = parser.add_argument_group("the grid, values joined by commas")
    grid.add_argument("--fallback", default="0.2,0.4,0.6,0.8", help="fallback thresholds (default: 0.2,0.4,0.6,0.8)")
    grid.add_argument("--rollback", default="1,2,4,8", help="rollback thresholds (default: 1,2,4,8)")
    grid.add_argument("--max-draft", default="10", help="tokens drafted at most (default: 10)")
    grid.add_argument("--verify-end", choices=list(ENDS), default="off")
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


def policies(args: argparse.Namespace) -> list[tuple[str, Policy]]:
    """The kind and policy of every setting of one pair, each once.

    Args:
        args: of :func:`add_grid_arguments`.

    Raises:
        BildError: a number is out of range.
    """
    fallbacks, rollbacks = parse_fallbacks(args.fallback), parse_rollbacks(args.rollback)
    drafts, windows, ends = parse_drafts(args.max_draft), parse_drafts(args.windows), ENDS[args.verify_end]
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


def settings_of(
    pairs: Mapping[str, Pair], large_path: str, grid: Sequence[tuple[str, Policy]], fairseq: bool
) -> list[tuple[Pair, list[Setting]]]:
    """Every pair's settings, the baselines first; a large model's own baselines come once.

    Args:
        pairs: by name.
        large_path: the checkpoint of the sweep's large model; others belong to early-exit models.
        grid: kind and policy of each setting.
        fairseq: also fairseq's own decoder.
    """
    groups = []
    baselines: dict[str, str] = {}
    for name, pair in pairs.items():
        settings = []
        if pair.large_path not in baselines:
            alone = "large model" if pair.large_path == large_path else f"{name}, full depth"
            baselines[pair.large_path] = alone
            kinds = ["greedy", *(["fairseq --beam 1"] if fairseq else [])]
            settings += [Setting(alone, kind, alone) for kind in kinds]
        baseline = baselines[pair.large_path]
        settings.append(Setting(name, "small alone", baseline))
        settings += [Setting(name, kind, baseline, policy) for kind, policy in grid]
        groups.append((pair, settings))
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
        except BildError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BildError(f"{self._json}: holds no results of a sweep; name another --out") from error

    def _go_on(self, old: dict[str, Any]) -> None:
        differs = difference(old["origin"], self._origin)
        if differs:
            raise BildError(f"{self._json}: was measured with another {differs}; name another --out, or delete it")
        self._origin = {**self._origin, "models": {**old["origin"]["models"], **self._origin["models"]}}
        self.rows = list(old["rows"])

    def has(self, setting: Setting) -> bool:
        """Whether a setting has been measured."""
        return any(setting.columns.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Adds the figures of a setting, and writes the files."""
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        text = io.StringIO()
        names = dict.fromkeys(name for row in self.rows for name in row)
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self._csv, text.getvalue())
        write_text(self._json, json.dumps({"origin": self._origin, "rows": self.rows}, indent=1) + "\n")


def systems_of(
    pair: Pair, settings: Sequence[Setting], task: FairseqTask, search: SearchOptions
) -> Iterator[tuple[Setting, System, System]]:
    """Each setting with its system and a greedy one next to it, which are the same for greedy decoding."""
    if not settings:
        return
    alone, small_alone = pair.greedy(), pair.small_alone()
    for setting in settings:
        greedy = system = ours("greedy", alone, task, search)
        if setting.kind == "fairseq --beam 1":
            system = stock(pair.large, task, 1, search)
        elif setting.kind == "small alone":
            system = ours(setting.kind, small_alone, task, search)
        elif setting.kind != "greedy":
            system = ours(str(setting), pair, task, search, setting.policy)
        yield setting, system, greedy


def measure_all(
    groups: Sequence[tuple[Pair, Sequence[Setting]]],
    results: Results,
    task: FairseqTask,
    search: SearchOptions,
    batches: Sequence[dict[str, Any]],
    scorer: Scorer,
    bar: tqdm,
    **turns: Any,
) -> None:
    """Measures settings, each next to greedy decoding, and prints a line for each.

    Args:
        groups: pairs with their settings.
        results: gets a row for each setting.
        bar: counts batches.
        turns: further arguments of :func:`~bild_fairseq.experiments.timing.measure`.
    """
    for pair, settings in groups:
        for setting, system, greedy in systems_of(pair, settings, task, search):
            bar.set_description(str(setting))
            systems = [greedy] if system is greedy else [greedy, system]
            measure(systems, batches, progress=lambda done, before=bar.n: bar.update(before + done - bar.n), **turns)
            row = row_of(setting, system, greedy, batches, scorer)
            results.add(row)
            bar.write(f"{setting}: {describe(row, scorer.name)}")


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
