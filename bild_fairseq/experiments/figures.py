"""What a benchmark measured: figures of each system, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..decoding.counters import total
from ..errors import BildError
from .plots import picture_format, pyplot, save, style
from .systems import System
from .timing import percentile90, ratio

Row = dict[str, Any]
BASELINES = ("fairseq --beam 1", "greedy", "ctranslate2-float32", "ctranslate2-int8")


def rows_of(
    systems: Sequence[System], scores: Sequence[float], metric: str, batches: Sequence[dict[str, Any]]
) -> list[Row]:
    """The figures of each system, by name.

    Args:
        systems: all measured on the same batches.
        scores: of their outputs.
        metric: what the scores are called.
        batches: that they were measured on.
    """
    baselines = {system.name: system for system in systems if system.name in BASELINES}
    sizes = [len(batch["id"]) for batch in batches]
    return [_row(system, score, metric, sizes, baselines) for system, score in zip(systems, scores, strict=True)]


def _row(system: System, score: float, metric: str, sizes: Sequence[int], baselines: dict[str, System]) -> Row:
    per_sentence = [1000 * s / n for s, n in zip(system.seconds, sizes, strict=True)]
    tokens = sum(map(len, system.outputs.values()))
    row: Row = {
        "system": system.name,
        metric: score,
        "ms_per_sentence_median": statistics.median(per_sentence),
        "ms_per_sentence_p90": percentile90(per_sentence),
        "ms_per_token": 1000 * sum(system.seconds) / tokens,
        "tokens_per_second": tokens / sum(system.seconds),
    }
    for name in BASELINES:
        if name in baselines:
            row[f"speedup_over_{name}"] = ratio(system.seconds, baselines[name].seconds)
    if "greedy" in baselines:
        greedy = baselines["greedy"].outputs
        row["differ_from_greedy"] = sum(system.outputs[i] != greedy[i] for i in greedy)
    if system.encoding:
        row["encoding_ms_per_sentence"] = 1000 * sum(system.encoding) / sum(sizes)
    if system.floor:
        row["wall_over_floor"] = sum(system.seconds) / sum(system.floor)
    return row | (total(system.counters).as_dict() if system.counters else {})


BRIEF = ("system", "ms/token", "x fairseq", "x greedy", "tokens/large call", "differ")


def table_of(rows: Sequence[Row], metric: str, metric_name: str, brief: bool = False) -> str:
    """A table in Markdown; columns that no system has a figure for are left out.

    Args:
        rows: as of :func:`rows_of`.
        metric, metric_name: what the scores are called in the rows, and in the table.
        brief: only the quality and the columns of :data:`BRIEF`.
    """

    def cell(row: Row, name: str, form: str) -> str:
        return format(row[name], form) if name in row else "-"

    def speedup(row: Row, over: str) -> str:
        value = row.get(f"speedup_over_{over}")
        return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]" if value else "-"

    columns: dict[str, Callable[[Row], str]] = {
        "system": lambda r: r["system"],
        metric_name: lambda r: f"{r[metric]:.2f}",
        "ms/sentence": lambda r: f"{r['ms_per_sentence_median']:.1f}",
        "p90": lambda r: f"{r['ms_per_sentence_p90']:.1f}",
        "ms/token": lambda r: f"{r['ms_per_token']:.2f}",
        "encoding": lambda r: cell(r, "encoding_ms_per_sentence", ".1f"),
        "x fairseq": lambda r: speedup(r, "fairseq --beam 1"),
        "x greedy": lambda r: speedup(r, "greedy"),
        "x ct2 float32": lambda r: speedup(r, "ctranslate2-float32"),
        "x ct2 int8": lambda r: speedup(r, "ctranslate2-int8"),
        "fallback": lambda r: f"{r['fallback_rate']:.1%}" if r.get("small_calls") else "-",
        "rollback": lambda r: f"{r['rollback_rate']:.1%}" if r.get("small_calls") else "-",
        "tokens/large call": lambda r: f"{r['mean_accepted_length']:.2f}" if r.get("large_calls") else "-",
        "differ": lambda r: cell(r, "differ_from_greedy", "d"),
        "wall/floor": lambda r: cell(r, "wall_over_floor", ".2f"),
    }
    if brief:
        columns = {name: show for name, show in columns.items() if name in (*BRIEF, metric_name)}
    cells = [[show(row) for show in columns.values()] for row in rows]
    keep = [i for i in range(len(columns)) if any(line[i] != "-" for line in cells)]
    header = [list(columns)[i] for i in keep]
    body = [[line[i] for i in keep] for line in cells]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = (header, ["-" * width for width in widths], *body)
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def conclusion_of(rows: Sequence[Row]) -> str | None:
    """What a table comes to, in one sentence: the fastest lossless BiLD over the baselines.

    Other settings may write the same text for a few sentences by chance.

    Returns:
        None if greedy decoding was not measured, or no lossless BiLD, or its text differs.
    """
    lossless = [row for row in rows if "lossless" in row["system"] and "speedup_over_greedy" in row]
    same = [row for row in lossless if not row["differ_from_greedy"]]
    if not same:
        return None
    best = min(same, key=lambda row: row["ms_per_token"])
    sentence = f"BiLD wrote the same text as greedy decoding {best['speedup_over_greedy'][0]:.1f} times as fast"
    if "speedup_over_fairseq --beam 1" in best:
        sentence += f", and {best['speedup_over_fairseq --beam 1'][0]:.1f} times as fast as fairseq's own decoder"
    return f"{sentence} ({best['system']})."


def check_plot(path: str) -> None:
    """Makes sure that a figure can be drawn and written in the format that its file is named after.

    Raises:
        BildError: matplotlib is not installed, or does not know the format.
    """
    try:
        known = pyplot().figure().canvas.get_supported_filetypes()
    except BildError as error:
        raise BildError(f"--plot {path}: {error}") from error
    kind = picture_format(path)
    if kind not in known:
        raise BildError(f"--plot {path}: no format of pictures is called {kind}; name a .png, .pdf or .svg file")


def plot(systems: Sequence[System], batches: Sequence[dict[str, Any]], path: str) -> None:
    """Draws the latency of each batch against the tokens of its longest output, with the medians along the lengths."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, system in enumerate(systems):
        lengths = [max(len(system.outputs[i]) for i in batch["id"].tolist()) for batch in batches]
        milliseconds = [1000 * s for s in system.seconds]
        axes.scatter(lengths, milliseconds, s=7, alpha=0.35, linewidths=0, **style(number))
        axes.plot(*medians(lengths, milliseconds), markersize=4.5, linewidth=1.2, label=system.name, **style(number))
    axes.set_yscale("log")
    axes.set_xlabel("output length (tokens)")
    axes.set_ylabel("latency (ms)")
    axes.legend(fontsize=8)
    save(figure, "--plot", path)
    plt.close(figure)


def medians(lengths: Sequence[int], values: Sequence[float], groups: int = 8) -> tuple[list[float], list[float]]:
    """A line through points: the medians of groups of about as many neighbours each, by length."""
    points = sorted(zip(lengths, values, strict=True))
    groups = min(groups, len(points))
    parts = [points[len(points) * i // groups : len(points) * (i + 1) // groups] for i in range(groups)]
    return tuple([statistics.median(point[axis] for point in part) for part in parts] for axis in (0, 1))
