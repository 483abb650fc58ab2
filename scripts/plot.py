#!/usr/bin/env python3
"""Draws what sweep.py and rounds.py have written.

  plot.py curve SWEEP...        quality against latency or speedup: a curve a method, the Pareto front, ablations
  plot.py lengths ROUNDS...     how many drafted tokens a call of the large model accepts
  plot.py tokens ROUNDS         a page that shows who wrote which token of each sentence

Figures can be read in black and white: methods differ in marker and line, and the page in strokes and weight.
"""

from __future__ import annotations

import argparse
import collections
import html
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Dark and light in turn, so that neighbours differ on paper too.
COLORS = ["#1f4e8c", "#e07b00", "#117a5c", "#b03060", "#6f5f9e", "#8c6d1f"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
LINES = {"bild": "-", "no rollback": "--", "no fallback": (0, (1, 1.5))}
ABLATION_MARKERS = {"no rollback": "x", "no fallback": "+"}
HATCHES = ["", "////", "....", "\\\\\\\\", "xx", "--"]
BASELINES = {"greedy": "*", "fairseq --beam 1": "X", "small alone": "p"}


class PlotError(Exception):
    """Something the user can mend, in one line."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    curve = commands.add_parser("curve", help="quality against latency")
    curve.add_argument("sweeps", nargs="+", metavar="SWEEP", help="results.json of sweep.py, or its folder")
    curve.add_argument("--x", choices=["latency", "speedup"], default="latency")
    curve.add_argument("--labels", action="store_true", help="write the thresholds at the Pareto front")
    lengths = commands.add_parser("lengths", help="distribution of accepted lengths")
    lengths.add_argument("rounds", nargs="+", metavar="ROUNDS", help="file of rounds.py")
    tokens = commands.add_parser("tokens", help="who wrote which token")
    tokens.add_argument("rounds", metavar="ROUNDS", help="file of rounds.py")
    tokens.add_argument("--sentences", type=int, default=50, help="how many, from the first on (default: 50)")
    for command, kind in ((curve, "PNG, PDF or SVG"), (lengths, "PNG, PDF or SVG"), (tokens, "HTML")):
        command.add_argument("--out", required=True, help=f"{kind} file")
        command.add_argument("--title", default="", help="over the figure")
    return parser.parse_args()


def read(path: str, name: str, wanted: Sequence[str]) -> dict[str, Any]:
    """A JSON file with at least the wanted entries; of a folder, the file ``name`` in it."""
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlotError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise PlotError(f"{file}: is no JSON") from error
    if not isinstance(content, dict) or not all(entry in content for entry in wanted):
        raise PlotError(f"{file}: holds no {' and '.join(wanted)}; is it of another program?")
    return content


@dataclass(frozen=True)
class Point:
    """A setting in the plane of the figure."""

    x: float
    quality: float
    speedup: float
    row: Row

    @property
    def label(self) -> str:
        end = ", end" if self.row["verify_end"] else ""
        return f"{self.row['fallback_threshold']:g}, {float(self.row['rollback_threshold']):g}{end}"


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other one beats in both speed and quality, from the slowest on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speedup, -p.quality)):
        if not best or point.quality > best[-1].quality:
            best.append(point)
    return best[::-1]


def points_of(sweep: dict[str, Any], x: str) -> dict[tuple[str, str], list[Point]]:
    """The points of a sweep by method and kind.

    Latency is that of greedy decoding divided by the speedup: a machine that was slower for a while has then not
    moved the settings that it met.
    """
    greedy = {row["method"]: row["ms_mean"] for row in sweep["rows"] if row["kind"] == "greedy"}
    groups = collections.defaultdict(list)
    for row in sweep["rows"]:
        where = row["speedup"]
        if x == "latency":
            if row["baseline"] not in greedy:
                raise PlotError("the sweep has not measured greedy decoding yet; let it go on, or add --x speedup")
            where = greedy[row["baseline"]] / row["speedup"]
        groups[row["method"], row["kind"]].append(Point(where, row["quality"], row["speedup"], row))
    return groups


def load_sweeps(paths: Sequence[str], x: str) -> tuple[dict[tuple[str, str], list[Point]], str]:
    """The points of several sweeps, and the metric that they share; a method of the same name gets its folder's."""
    groups: dict[tuple[str, str], list[Point]] = {}
    metrics = set()
    for path in paths:
        sweep = read(path, "results.json", ["origin", "rows"])
        metrics.add(sweep["origin"]["metric_name"])
        folder = (Path(path) if Path(path).is_dir() else Path(path).parent).resolve().name
        for (method, kind), points in points_of(sweep, x).items():
            groups[(method if (method, kind) not in groups else f"{method}, {folder}"), kind] = points
    if len(metrics) > 1:
        raise PlotError(f"the sweeps are in different metrics, {' and '.join(sorted(metrics))}; draw them apart")
    if not any(kind in LINES for _, kind in groups):
        raise PlotError(f"{', '.join(paths)}: no setting has been measured yet")
    return groups, metrics.pop()


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError("needs the package matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    matplotlib.pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return matplotlib.pyplot


def draw_curve(args: argparse.Namespace) -> None:
    groups, metric = load_sweeps(args.sweeps, args.x)
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    methods = list(dict.fromkeys(method for method, kind in groups if kind in LINES))
    for number, method in enumerate(methods):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        for kind, line in LINES.items():
            points = groups.get((method, kind))
            if not points:
                continue
            best = front(points)
            name = method if kind == "bild" else f"{method}, {kind}"
            sign = marker if kind == "bild" else ABLATION_MARKERS[kind]
            style = {"linestyle": line, "linewidth": 1.5, "color": color}
            axes.plot(*columns(best), marker=sign, markersize=5, label=name, zorder=3, **style)
            rest = [point for point in points if point not in best]
            axes.plot(*columns(rest), sign, color=color, markersize=3, alpha=0.45, fillstyle="none", zorder=2)
    settings = [point for (_, kind), points in groups.items() if kind == "bild" for point in points]
    best = front(settings)
    if settings:
        axes.plot(*columns(best), "o", color="black", markersize=11, fillstyle="none", label="Pareto front", zorder=4)
    if args.labels:
        # On the side that the front leaves free.
        place = {"xytext": (7, 6), "ha": "left"} if args.x == "speedup" else {"xytext": (-7, 6), "ha": "right"}
        style = {"textcoords": "offset points", "fontsize": 7, "color": "0.25", **place}
        for point in best:
            axes.annotate(point.label, (point.x, point.quality), **style)
    baselines = [(m, kind, points[0]) for (m, kind), points in groups.items() if kind in BASELINES]
    every = [point for (_, kind), points in groups.items() if kind in LINES for point in points]
    show_range(axes, worth_showing(every, settings), [p for _, k, p in baselines if k == "greedy"])
    for method, kind, point in baselines:
        name = kind.replace("greedy", "lean greedy")
        name = name if method == "large model" else f"{method}, {name}"
        draw_baseline(axes, point, name, BASELINES[kind])
    axes.set_xlabel("speedup over lean greedy" if args.x == "speedup" else "latency (ms a sentence)")
    axes.set_ylabel(metric)
    axes.set_title(args.title)
    axes.grid(color="0.9", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save(figure, args.out)


def columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.x for point in points], [point.quality for point in points]


def worth_showing(every: Sequence[Point], settings: Sequence[Point]) -> list[Point]:
    """The settings with both policies, and of the ablations those that are no worse than the worst of these."""
    worst = min((point.quality for point in settings), default=-math.inf)
    return [point for point in every if point.quality >= worst]


def show_range(axes: Any, settings: Sequence[Point], greedy: Sequence[Point]) -> None:
    """Lets the settings fill the figure; a baseline far away would squeeze them."""
    for values, limits in (
        ([p.x for p in [*settings, *greedy]], axes.set_xlim),
        ([p.quality for p in [*settings, *greedy]], axes.set_ylim),
    ):
        margin = 0.08 * (max(values) - min(values)) or 0.5
        limits(min(values) - margin, max(values) + margin)


def draw_baseline(axes: Any, point: Point, name: str, marker: str) -> None:
    """A point with its name; one outside the figure is given in words."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    style = {"color": "black", "markersize": 10 if marker == "*" else 8, "linestyle": "none", "zorder": 5}
    if left <= point.x <= right and low <= point.quality <= high:
        axes.plot(point.x, point.quality, marker, label=name, **style)
        if marker == "*":
            axes.axhline(point.quality, color="0.55", linewidth=0.8, linestyle=(0, (5, 5)), zorder=1)
    else:
        label = f"{name}: {point.quality:.1f} at {point.speedup:.2f}x, outside"
        axes.plot([], [], marker, label=label, **style)


def load_rounds(paths: Sequence[str]) -> list[dict[str, Any]]:
    return [setting for path in paths for setting in read(path, "rounds.json", ["sentences", "settings"])["settings"]]


def setting_name(setting: dict[str, Any]) -> str:
    policy = setting["policy"]
    thresholds = f"{policy['fallback_threshold']:g}, {float(policy['rollback_threshold']):g}"
    end = ", end" if policy["verify_end"] else ""
    draft = f"; draft {policy['max_draft']}" if policy["max_draft"] != 10 else ""
    return f"{setting['method']} ({thresholds}{end}{draft})"


def accepted_lengths(setting: dict[str, Any]) -> list[int]:
    """For each large call to which the small model had its turn before, the drafted tokens that it accepted."""
    return [
        one["accepted"]
        for rounds in setting["rounds"].values()
        for one in rounds
        if one["verified"] and (one["drafted"] or one["fallback"])
    ]


def draw_lengths(args: argparse.Namespace) -> None:
    settings = load_rounds(args.rounds)
    if len(settings) > len(HATCHES):
        raise PlotError(f"{len(settings)} settings are too many for one figure; draw at most {len(HATCHES)}")
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    width = 0.84 / len(settings)
    longest = 0
    for number, setting in enumerate(settings):
        lengths = accepted_lengths(setting)
        if not lengths:
            raise PlotError(f"{setting_name(setting)}: the large model was never called after a draft")
        counts = collections.Counter(lengths)
        longest = max(longest, *counts)
        mean = sum(lengths) / len(lengths)
        places = [length + (number - (len(settings) - 1) / 2) * width for length in range(longest + 1)]
        shares = [100 * counts[length] / len(lengths) for length in range(longest + 1)]
        color = COLORS[number % len(COLORS)]
        axes.bar(
            places,
            shares,
            width,
            label=f"{setting_name(setting)}: mean {mean:.2f}",
            facecolor=color if not number else "white",
            edgecolor=color,
            hatch=HATCHES[number],
            linewidth=1,
        )
    axes.set_xticks(range(longest + 1))
    axes.set_xlabel("drafted tokens accepted by a call of the large model")
    axes.set_ylabel("calls (%)")
    axes.set_title(args.title)
    axes.legend(fontsize=8, frameon=False)
    save(figure, args.out)


def save(figure: Any, path: str) -> None:
    """Writes a figure, in the format of the file's name, at once or not at all."""
    file = Path(path)
    temporary = file.with_name(f".{file.stem}.tmp{file.suffix}")
    try:
        figure.savefig(temporary, dpi=160)
        os.replace(temporary, file)
    except OSError as error:
        raise PlotError(f"--out {path}: cannot write it: {error.strerror}") from error
    except ValueError as error:
        raise PlotError(f"--out {path}: {error}") from error
    print(path)


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --gone: light-dark(#666, #aaa);
  --small: light-dark(#1f4e8c, #9cc4ff); --large: light-dark(#a34a00, #ffb366); }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }}
section {{ border-top: 1px solid var(--line); padding: .6rem 0; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; margin: 0; }}
dt {{ color: var(--gone); font-size: .85rem; line-height: 1.75; }}
dd {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
.output {{ line-height: 1.9; }}
.count {{ color: var(--gone); font-size: .8rem; }}
.small {{ color: var(--small); }}
.unread {{ color: var(--small); font-style: italic; border-bottom: 1px dotted; }}
.large {{ color: var(--large); font-weight: 700; border-bottom: 2px solid; }}
del {{ color: var(--gone); font-size: .9em; }}
del.first {{ text-decoration-thickness: 2px; }}
.call {{ color: var(--gone); margin: 0 .15em; user-select: none; }}
</style>
<h1>{title}</h1>
<p><span class="small">small model's, kept</span> &nbsp;
<span class="unread">small model's, never verified</span> &nbsp;
<del class="first">small model's, rolled back</del> &nbsp; <span class="large">large model's</span> &nbsp;
<span class="call">|</span> end of a large call. Point at a large model's token to see why it was called.</p>
{sentences}
</html>
"""


def draw_tokens(args: argparse.Namespace) -> None:
    if args.sentences < 1:
        raise PlotError(f"--sentences {args.sentences}: must be 1 or more")
    content = read(args.rounds, "rounds.json", ["sentences", "settings"])
    names = list(content["sentences"])[: args.sentences]
    sections = [section(name, content["sentences"][name], content["settings"]) for name in names]
    page = PAGE.format(title=html.escape(args.title or "Who wrote which token"), sentences="\n".join(sections))
    temporary = Path(f"{args.out}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, args.out)
    except OSError as error:
        raise PlotError(f"--out {args.out}: cannot write it: {error.strerror}") from error
    print(args.out)


def section(name: str, texts: dict[str, str], settings: Sequence[dict[str, Any]]) -> str:
    """One sentence with what each setting made of it."""
    lines = [f"<dt>{label}</dt><dd>{html.escape(texts[label])}</dd>" for label in ("source", "reference", "greedy")]
    for setting in settings:
        rounds = setting["rounds"][name]
        lines.append(f"<dt>{html.escape(setting_name(setting))}</dt><dd class=output>{''.join(spans(rounds))}")
        lines.append(f"<div class=count>{account(rounds)}</div></dd>")
    return f"<section><h2 class=count>sentence {html.escape(name)}</h2><dl>{''.join(lines)}</dl></section>"


def spans(rounds: Sequence[dict[str, Any]]) -> Iterator[str]:
    for number, one in enumerate(rounds):
        kept, gone = one["drafted"][: one["accepted"]], one["drafted"][one["accepted"] :]
        for piece in kept:
            yield span(piece, "span", "small" if one["verified"] else "unread")
        for index, piece in enumerate(gone):
            yield span(piece, "del", "" if index else "first")
        if one["large"] is not None:
            yield span(one["large"], "span", "large", reason(one, number))
        if one["verified"]:
            yield "<span class=call>|</span>"


def span(piece: str, tag: str, kind: str, why: str = "") -> str:
    """A token; the space at its ends stays outside, where it is not stroked."""
    text = piece.strip() or piece
    before, _, after = piece.partition(text)
    attributes = f' class="{kind}"' * bool(kind) + f' title="{html.escape(why)}"' * bool(why)
    return f"{before}<{tag}{attributes}>{html.escape(text)}</{tag}>{after}"


def reason(one: dict[str, Any], number: int) -> str:
    """Why the large model was called, or took a token back."""
    if one["accepted"] < len(one["drafted"]):
        return "rollback"
    if one["fallback"]:
        return "fallback"
    return "the draft was long enough" if one["drafted"] else "the first token" if not number else "no draft"


def account(rounds: Sequence[dict[str, Any]]) -> str:
    """A sentence's counts in words."""
    small = sum(one["accepted"] for one in rounds)
    large = sum(one["large"] is not None for one in rounds)
    calls = sum(one["verified"] for one in rounds)
    fallbacks = sum(one["fallback"] for one in rounds)
    rollbacks = sum(one["accepted"] < len(one["drafted"]) for one in rounds)
    return (
        f"{small + large} tokens: {small} of the small model, {large} of the large one in {calls} calls; "
        f"{fallbacks} fallbacks, {rollbacks} rollbacks"
    )


def main() -> None:
    args = parse_args()
    {"curve": draw_curve, "lengths": draw_lengths, "tokens": draw_tokens}[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except PlotError as error:
        sys.exit(f"plot: {error}")
