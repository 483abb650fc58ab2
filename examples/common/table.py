"""Put the paper's numbers beside one's own.

    python table.py write PAPER.json RESULTS        # RESULTS/TABLE.md from what benchmark.py and sweep.py measured
    python table.py flags PAPER.json RESULTS --subset valid --method aligned    # what benchmark.py is to measure

PAPER.json holds what Kim et al. (NeurIPS 2023) report for the benchmark, and what a public reproduction on the same
kind of GPU with the authors' models found ("rerun").
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from corpus import writing

Row = dict[str, Any]

METHODS = {"unaligned": "two models, unaligned", "aligned": "two models, aligned", "early-exit": "early exit"}
METRICS = {"bleu": "BLEU", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
# Thresholds where the paper names none for a method: its most careful ones and looser ones.
DEFAULT_POLICIES = ["0.6,2", "0.5,3"]
DEFAULT_DRAFT = 10
SETTING = re.compile(r"^(?:bild|exit \d+) \((?P<fallback>[^,]+),(?P<rollback>[^,)]+)(?P<end>,end)?\)$")
LOSSES = (0.0, 0.5, 1.0)


def read_json(path: pathlib.Path) -> Any:
    """Return a JSON file's content.

    Raises:
        SystemExit: it is missing, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"table: {path}: {error.strerror}") from None
    except ValueError:
        raise SystemExit(f"table: {path} is no JSON") from None


def paper_settings(paper: Row, method: str) -> list[Row]:
    return [row for row in paper["settings"] if row["models"] == method]


def flags(paper: Row, results: pathlib.Path, subset: str, method: str) -> list[str]:
    """Return the flags of benchmark.py that set the thresholds.

    They are the paper's on the validation set, which its numbers are on, and on the test set those that calibrate.py
    has chosen on the validation set, if it has.
    """
    option = "--exit" if method == "early-exit" else "--bild"
    chosen = results / f"calibrate-{method}.json"
    if subset == "test" and chosen.exists() and (best := read_json(chosen)["best"]):
        end = ",end" if best["verify_end"] else ""
        thresholds = f"{best['fallback_threshold']},{best['rollback_threshold']}{end}"
        return [option, thresholds, "--max-draft", str(best["max_draft"])]
    published = [f"{row['fallback']:g},{row['rollback']:g}" for row in paper_settings(paper, method)]
    return [word for policy in published or DEFAULT_POLICIES for word in (option, policy)]


def line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return [line(header), line("---" for _ in header), *map(line, rows)]


def signed(value: float) -> str:
    return f"{value:+.2f}"


class Measured:
    """The rows of one run of benchmark.py.

    Args:
        path: its JSON; the text that it printed lies beside it.
    """

    def __init__(self, path: pathlib.Path):
        content = read_json(path)
        self.rows: list[Row] = content["rows"]
        self.metric: str = content["arguments"]["metric"]
        self.max_draft: int = content["arguments"]["max_draft"]
        self.greedy = next(row for row in self.rows if row["system"] == "greedy")
        text = path.with_suffix(".txt")
        conditions = text.read_text(encoding="utf-8").split("\n")[0] if text.exists() else ""
        # Memory is a run's own; all else is the same for every method.
        self.conditions = re.sub(r"; peak memory \d+ MB \(all systems\)", "", conditions)

    def quality(self, row: Row) -> float:
        return row[self.metric]

    def change(self, row: Row) -> float:
        return self.quality(row) - self.quality(self.greedy)

    def cells(self, row: Row) -> list[str]:
        """Quality with its change, speedups over lean greedy and over fairseq, rates."""

        def speedup(name: str) -> str:
            value = row.get(f"speedup_over_{name}")
            return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]" if value else "-"

        rates = ["-", "-"]
        if row.get("small_calls"):
            rates = [f"{row['fallback_rate']:.1%}", f"{row['rollback_rate']:.1%}"]
        quality = f"{self.quality(row):.2f} ({signed(self.change(row))})"
        return [quality, speedup("greedy"), speedup("fairseq --beam 1"), *rates]

    def settings(self) -> list[tuple[Row, float, float, bool]]:
        """The rows of BiLD with fallback and rollback threshold, and whether the end was verified."""
        found = []
        for row in self.rows:
            if match := SETTING.match(row["system"]):
                found.append((row, float(match["fallback"]), float(match["rollback"]), bool(match["end"])))
        return found


def compare(paper: Row, results: pathlib.Path, subset: str) -> list[str]:
    """The lines of the table of one part of the data; none if nothing was measured there."""
    runs = {m: Measured(path) for m in METHODS if (path := results / f"{subset}-{m}.json").exists()}
    if not runs:
        return []
    with_paper = subset == "valid" and bool(paper["settings"])
    metric = METRICS[next(iter(runs.values())).metric]
    ours = [f"{metric} (change)", "x lean greedy", "x fairseq greedy", "fallback rate", "rollback rate"]
    theirs = [f"paper: {paper['metric']} (change)", "paper: x large", "rerun"] if with_paper else []
    nothing = ["-"] * len(theirs)
    rows = []
    for method, run in runs.items():
        # The large model of the two pairs is the same; the early-exit model is its own.
        if method in ("early-exit", next(iter(runs))):
            name = "early-exit model, full depth" if method == "early-exit" else "large model alone"
            alone = nothing
            if with_paper and method != "early-exit":
                source = f" ({paper['large_alone_from']})" if "large_alone_from" in paper else ""
                alone = [f"{paper['large_alone']:.1f}{source}", "1.00", "-"]
            rows.append([name, "-", *alone, *run.cells(run.greedy)])
        for row in run.rows:
            if row["system"].endswith("alone"):
                rows.append([f"{METHODS[method]}: {row['system']}", "-", *nothing, *run.cells(row)])
        published = {(row["fallback"], row["rollback"]): row for row in paper_settings(paper, method)}
        for row, fallback, rollback, end in run.settings():
            cells = nothing
            if with_paper and not end and (fallback, rollback) in published:
                known = published[fallback, rollback]
                change = signed(known["score"] - paper["large_alone"])
                cells = [f"{known['score']:.2f} ({change})", f"{known['speedup']:.2f}", f"{known['rerun']:.2f}"]
            thresholds = setting_name(f"{rollback:g}", f"{fallback:g}", run.max_draft, end)
            rows.append([METHODS[method], thresholds, *cells, *run.cells(row)])
    header = ["system", "rollback, fallback", *theirs, *ours]
    conditions = dict.fromkeys(run.conditions for run in runs.values() if run.conditions)
    return [*table(header, rows), "", *(f"- Measured: {text}" for text in conditions)]


def setting_name(rollback: str, fallback: str, max_draft: int, verify_end: bool) -> str:
    text = f"{rollback}, {fallback}" + (f", draft {max_draft}" if max_draft != DEFAULT_DRAFT else "")
    return text + (", end" if verify_end else "")


def swept_setting(row: Row) -> str:
    # A file of JSON holds an infinite threshold as a word.
    rollback, fallback = (f"{float(row[name]):g}" for name in ("rollback_threshold", "fallback_threshold"))
    return setting_name(rollback, fallback, row["max_draft"], row["verify_end"])


def summarize_sweep(path: pathlib.Path) -> list[str]:
    """The fastest setting of every method and ablation for each loss of quality, and the best quality of all."""
    content = read_json(path)
    metric = content["origin"].get("metric_name", "quality")
    rows = [row for row in content["rows"] if row["fallback_threshold"] is not None]
    groups = list(dict.fromkeys((row["method"], row["kind"]) for row in rows))
    lines = []
    for method, kind in groups:
        group = [row for row in rows if (row["method"], row["kind"]) == (method, kind)]
        for loss in LOSSES:
            fit = [row for row in group if row["quality_change"] >= -loss]
            cells = ["-"] * 4
            if fit:
                best = max(fit, key=lambda row: row["speedup"])
                speed = f"{best['speedup']:.2f} [{best['speedup_low']:.2f}, {best['speedup_high']:.2f}]"
                cells = [
                    swept_setting(best),
                    f"{best['quality']:.2f} ({signed(best['quality_change'])})",
                    speed,
                    f"{best['fallback_rate']:.1%}",
                ]
            lines.append([method, kind, f"{loss:g}", *cells])
    header = ["method", "policies", f"{metric} lost, at most", "fastest: rollback, fallback", metric]
    text = table([*header, "x lean greedy", "fallback rate"], lines)
    if rows:
        top = max(rows, key=lambda row: row["quality"])
        low, high = top["quality_change_low"], top["quality_change_high"]
        text += [
            "",
            f"The best {metric} of all settings: {top['quality']:.2f}, {signed(top['quality_change'])} against the "
            f"large model alone [{signed(low)}, {signed(high)}], at {top['speedup']:.2f} times its speed: "
            f"{top['method']}, {top['kind']} ({swept_setting(top)}).",
        ]
    return text


def document(paper: Row, results: pathlib.Path, same_models: bool = False) -> str:
    """The whole of TABLE.md.

    Args:
        paper: what the paper reports.
        results: folder of what was measured.
        same_models: the models are those of the paper's authors.

    Raises:
        SystemExit: there is nothing to show.
    """
    parts = {subset: compare(paper, results, subset) for subset in ("valid", "test")}
    sweep = results / "sweep" / "results.json"
    if not any(parts.values()) and not sweep.exists():
        raise SystemExit(f"table: no results in {results}: run 'bash run.sh evaluate' first")
    text = [f"# {paper['task']}", ""]
    if paper["settings"]:
        models = (
            "The models here are others, so compare the changes against the large model alone and the speedups, not "
            "the scores."
        )
        if same_models:
            models = "The models here are the authors' as well, converted: scores can be compared as they are."
        text += [
            f"The paper: {paper['large']} and {paper['small']} on an NVIDIA T4, batch size 1, greedy; speedups are "
            f'over the large model alone, by latency. Its numbers are on {paper["split"]}. "Rerun" is a public '
            f"reproduction with the authors' models. {models}",
            "",
        ]
        text += [f"- {paper[name]}" for name in ("rates", "early_exit") if name in paper]
        text += [""] * any(name in paper for name in ("rates", "early_exit"))
    titles = {
        "valid": "Validation set" + (", at the paper's thresholds" if paper["settings"] else ""),
        "test": "Test set, at thresholds chosen on the validation set",
    }
    if not any((results / f"calibrate-{method}.json").exists() for method in METHODS):
        titles["test"] = "Test set"
    for subset, lines in parts.items():
        if lines:
            text += [f"## {titles[subset]}", "", *lines, ""]
    if sweep.exists():
        text += ["## What each method reaches on the validation set (sweep)", "", *summarize_sweep(sweep), ""]
    return "\n".join(text).rstrip("\n") + "\n"


def main() -> None:
    """Read the command line and run the chosen command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write and print the table")
    choose = commands.add_parser("flags", help="print flags of benchmark.py, one a line")
    for command in (write, choose):
        command.add_argument("paper", type=pathlib.Path, help="the benchmark's paper.json")
        command.add_argument("results", type=pathlib.Path, help="folder of the results")
    write.add_argument("--out", type=pathlib.Path, help="file to write (default: TABLE.md among the results)")
    write.add_argument("--same-models", action="store_true", help="the models are those of the paper's authors")
    choose.add_argument("--subset", choices=("valid", "test"), required=True)
    choose.add_argument("--method", choices=list(METHODS), required=True)
    args = parser.parse_args()
    paper = read_json(args.paper)
    if args.command == "flags":
        print("\n".join(flags(paper, args.results, args.subset, args.method)))
        return
    text = document(paper, args.results, args.same_models)
    out = args.out or args.results / "TABLE.md"
    with writing(out) as file:
        file.write(text)
    print(text, end="")
    print(f"table: written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
