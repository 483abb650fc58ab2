"""BiLD's speedup over greedy decoding against the size of the large model, from files of ``scripts/benchmark.py``.

Each file is of one large model, for example of the same one widened by ``scripts/widen.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import BildError
from .plots import distances, pyplot, read, style

SPEEDUP = "speedup_over_greedy"
Point = tuple[float, tuple[float, float, float]]  # millions of weights; speedup with its interval


def curves(paths: Sequence[str]) -> dict[str, list[Point]]:
    """For each system in which two models took part, its speedups by size; not of one that a size lacks.

    Raises:
        BildError: a file is not the benchmark's, two are of the same size, or none has what is to be drawn.
    """
    files = [read(path, "benchmark.json", ["rows", "large_weights"]) for path in paths]
    sizes = [file["large_weights"] for file in files]
    if len(set(sizes)) < len(sizes):
        raise BildError("two files are of large models of the same size; give one a size")
    found: dict[str, list[Point]] = {}
    for file in sorted(files, key=lambda file: file["large_weights"]):
        for row in file["rows"]:
            if row.get("small_calls") and row.get("large_calls") and SPEEDUP in row:
                found.setdefault(row["system"], []).append((file["large_weights"] / 1e6, tuple(row[SPEEDUP])))
    found = {name: points for name, points in found.items() if len(points) == len(files)}
    if not found:
        raise BildError("no BiLD was measured beside greedy decoding at every size")
    return found


def draw(systems: dict[str, list[Point]], title: str) -> Any:
    """The figure, with 95 % intervals.

    Args:
        systems: as of :func:`curves`.
        title: over the figure.

    Returns:
        a matplotlib figure.
    """
    figure, axes = pyplot().subplots(figsize=(6.4, 4), layout="constrained")
    for number, (name, points) in enumerate(systems.items()):
        sizes = [size for size, _ in points]
        speedups = [speedup for _, (speedup, _, _) in points]
        bars = distances(speedups, [(low, high) for _, (_, low, high) in points])
        axes.errorbar(sizes, speedups, bars, label=name, capsize=3, linewidth=1.2, markersize=5, **style(number))
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    ticks = sorted({size for points in systems.values() for size, _ in points})
    axes.set_xticks(ticks, [f"{size:.3g}" for size in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("weights of the large model (millions)")
    axes.set_ylabel("times as fast as greedy decoding")
    axes.set_title(title)
    axes.legend(fontsize=8, frameon=False)
    return figure
