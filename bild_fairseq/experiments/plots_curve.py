"""Quality against speed: a curve a method, the Pareto front, ablations and baselines, from a sweep's results.

Speed is the speedup over lean greedy decoding, or greedy's mean time divided by that speedup: a machine that was slower
for a while has then not moved the settings that it met. Intervals are those of the sweep, 95 %.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BildError
from .plots import distances, pyplot, read, style
from .settings import thresholds_text

Row = dict[str, Any]

LINES = {"bild": "-", "no rollback": "--", "no fallback": (0, (1, 1.5))}
ABLATION_MARKERS = {"no rollback": "x", "no fallback": "+"}
BEATEN = {"markersize": 3, "alpha": 0.45, "fillstyle": "none"}
BARS = {"elinewidth": 0.7, "alpha": 0.5, "capsize": 1.5}
AXES = {"speedup": "speedup over lean greedy", "latency": "ms a sentence: lean greedy's mean / speedup"}
BASELINES = {"greedy": "*", "fairseq --beam 1": "X", "small alone": "p"}


Interval = tuple[float, float]  # its lower and its upper end


@dataclass(frozen=True)
class Point:
    """A setting in the plane of the figure."""

    x: float
    quality: float
    speedup: float
    x_interval: Interval
    quality_interval: Interval
    row: Row

    @property
    def label(self) -> str:
        """Its thresholds: fallback, rollback, and whether the end is verified."""
        return thresholds_text(*(self.row[name] for name in ("fallback_threshold", "rollback_threshold", "verify_end")))


# The points of each method and kind of setting.
Groups = dict[tuple[str, str], list[Point]]


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other one beats in both speed and quality, from the slowest on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speedup, -p.quality)):
        if not best or point.quality > best[-1].quality:
            best.append(point)
    return best[::-1]


def points_of(sweep: dict[str, Any], x: str) -> Groups:
    """The points of a sweep by method and kind.

    Args:
        sweep: what ``scripts/sweep.py`` has written.
        x: ``speedup``, or ``latency``: greedy's mean milliseconds a sentence divided by the speedup.

    Raises:
        BildError: greedy decoding has not been measured.
    """
    greedy = {row["method"]: row["ms_mean"] for row in sweep["rows"] if row["kind"] == "greedy"}
    groups = collections.defaultdict(list)
    for row in sweep["rows"]:
        speeds = [row[name] for name in ("speedup", "speedup_low", "speedup_high")]
        if x == "latency":
            if row["baseline"] not in greedy:
                raise BildError("the sweep has not measured greedy decoding yet; let it go on, or add --x speedup")
            speeds = [greedy[row["baseline"]] / speed for speed in speeds]
        # The interval is that of the difference to greedy decoding, whose own quality is taken as it is.
        base = row["quality"] - row["quality_change"]
        ends = (base + row["quality_change_low"], base + row["quality_change_high"])
        point = Point(speeds[0], row["quality"], row["speedup"], (min(speeds), max(speeds)), ends, row)
        groups[row["method"], row["kind"]].append(point)
    return groups


def load_sweeps(paths: Sequence[str], x: str) -> tuple[Groups, str]:
    """The points of several sweeps, and the metric that they share; a method of the same name gets its folder's.

    Raises:
        BildError: a file cannot be read, metrics differ, or nothing but baselines has been measured.
    """
    groups: Groups = {}
    metrics = set()
    for path in paths:
        sweep = read(path, "results.json", ["origin", "rows"])
        metrics.add(sweep["origin"]["metric_name"])
        folder = (Path(path) if Path(path).is_dir() else Path(path).parent).resolve().name
        for (method, kind), points in points_of(sweep, x).items():
            groups[(method if (method, kind) not in groups else f"{method}, {folder}"), kind] = points
    if len(metrics) > 1:
        raise BildError(f"the sweeps are in different metrics, {' and '.join(sorted(metrics))}; draw them apart")
    if not any(kind in LINES for _, kind in groups):
        raise BildError(f"{', '.join(paths)}: no setting has been measured yet")
    return groups, metrics.pop()


def draw(groups: Groups, metric: str, *, x: str, labels: bool, title: str) -> Any:
    """The figure.

    Args:
        groups: of :func:`load_sweeps`.
        metric: name of the quality.
        x: ``latency`` or ``speedup``, as the points were made.
        labels: write the thresholds at the Pareto front.
        title: over the figure.

    Returns:
        a matplotlib figure.
    """
    figure, axes = pyplot().subplots(figsize=(8, 5.4), layout="constrained")
    settings = [point for (_, kind), points in groups.items() if kind == "bild" for point in points]
    shown = {group: worth_showing(points, settings) for group, points in groups.items() if group[1] in LINES}
    for number, method in enumerate(dict.fromkeys(method for method, _ in shown)):
        draw_method(axes, shown, groups, method, number)
    explain_markers(axes)
    if settings:
        draw_front(axes, front(settings), x if labels else None)
    baselines = [(m, kind, points[0]) for (m, kind), points in groups.items() if kind in BASELINES]
    show_range(axes, shown, [point for _, kind, point in baselines if kind == "greedy"])
    for method, kind, point in baselines:
        name = kind.replace("greedy", "lean greedy")
        name = name if method == "large model" else f"{method}, {name}"
        draw_baseline(axes, point, name, BASELINES[kind])
    axes.set_xlabel(AXES[x])
    axes.set_ylabel(metric)
    axes.set_title(title)
    axes.grid(color="0.9", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)
    return figure


def draw_method(axes: Any, shown: Groups, groups: Groups, method: str, number: int) -> None:
    """A line through the best of a method's settings, with intervals, and of each ablation; small markers beside them.

    What is too bad to be shown is counted in the legend; the line ends before it.
    """
    color = style(number)["color"]
    for kind, line in LINES.items():
        points = shown.get((method, kind))
        if not points:
            continue
        best = front(points)
        left_out = len(groups[method, kind]) - len(points)
        name = method if kind == "bild" else f"{method}, {kind}"
        marker = style(number)["marker"] if kind == "bild" else ABLATION_MARKERS[kind]
        label = f"{name} ({left_out} worse, left out)" if left_out else name
        curve = {"linestyle": line, "linewidth": 1.5, "color": color}
        axes.plot(*columns(best), marker=marker, markersize=5, label=label, zorder=3, **curve)
        if kind == "bild":
            axes.errorbar(*columns(best), fmt="none", ecolor=color, zorder=2, **bars(best), **BARS)
        rest = [point for point in points if point not in best]
        axes.plot(*columns(rest), marker, color=color, zorder=2, **BEATEN)


def explain_markers(axes: Any) -> None:
    """Entries of the legend for what all methods share."""
    axes.plot([], [], "o", color="0.3", label="small: beaten by another of its curve", **BEATEN)
    bar = {"xerr": [math.nan], "yerr": [math.nan]}
    axes.errorbar([math.nan], [math.nan], fmt="none", ecolor="0.3", label="95 % intervals", **bar, **BARS)


def bars(points: Sequence[Point]) -> dict[str, list[list[float]]]:
    """The intervals of some points, as matplotlib wants them."""
    x, quality = columns(points)
    return {
        "xerr": distances(x, [point.x_interval for point in points]),
        "yerr": distances(quality, [point.quality_interval for point in points]),
    }


def draw_front(axes: Any, best: Sequence[Point], x: str | None) -> None:
    """Rings around the Pareto front of all methods, with thresholds unless ``x`` is None."""
    axes.plot(*columns(best), "o", color="black", markersize=11, fillstyle="none", label="Pareto front", zorder=4)
    if x is None:
        return
    # On the side that the front leaves free.
    side = {"xytext": (7, 6), "ha": "left"} if x == "speedup" else {"xytext": (-7, 6), "ha": "right"}
    text = {"textcoords": "offset points", "fontsize": 7, "color": "0.25", **side}
    for point in best:
        axes.annotate(point.label, (point.x, point.quality), **text)


def columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """The points as matplotlib wants them: all x, all y."""
    return [point.x for point in points], [point.quality for point in points]


def worth_showing(points: Sequence[Point], settings: Sequence[Point]) -> list[Point]:
    """Those that are no worse than the worst setting with both policies; others would squeeze the figure."""
    worst = min((point.quality for point in settings), default=-math.inf)
    return [point for point in points if point.quality >= worst]


def show_range(axes: Any, shown: Groups, greedy: Sequence[Point]) -> None:
    """Lets the points, their intervals and greedy decoding fill the figure; others would squeeze it."""
    points = [point for group in shown.values() for point in group] + list(greedy)
    barred = [point for (_, kind), group in shown.items() if kind == "bild" for point in front(group)]
    for values, intervals, limits in (
        ([p.x for p in points], [p.x_interval for p in barred], axes.set_xlim),
        ([p.quality for p in points], [p.quality_interval for p in barred], axes.set_ylim),
    ):
        values += [end for interval in intervals for end in interval]
        margin = 0.04 * (max(values) - min(values)) or 0.5
        limits(min(values) - margin, max(values) + margin)


def draw_baseline(axes: Any, point: Point, name: str, marker: str) -> None:
    """A point with its name; one outside the figure is given in words."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    mark = {"color": "black", "markersize": 10 if marker == "*" else 8, "linestyle": "none", "zorder": 5}
    if left <= point.x <= right and low <= point.quality <= high:
        axes.plot(point.x, point.quality, marker, label=name, **mark)
        if marker == "*":
            axes.axhline(point.quality, color="0.55", linewidth=0.8, linestyle=(0, (5, 5)), zorder=1)
    else:
        label = f"{name}: {point.quality:.1f} at {point.speedup:.2f}x, outside"
        axes.plot([], [], marker, label=label, **mark)
