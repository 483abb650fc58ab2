"""What the pictures share: the files that they read, their style, and how they are written.

Figures can be read in black and white: methods differ in marker and line, and the page in strokes and weight.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BildError
from ..plugin.files import replacing, writing
from .settings import thresholds_text

# Dark and light in turn, so that neighbours differ on paper too.
COLORS = ["#1f4e8c", "#e07b00", "#117a5c", "#b03060", "#6f5f9e", "#8c6d1f"]
MARKERS = ["o", "s", "^", "D", "v", "P"]


def read(path: str, name: str, wanted: Sequence[str]) -> dict[str, Any]:
    """A JSON file with at least the wanted entries; of a folder, the file ``name`` in it.

    Raises:
        BildError: it cannot be read, is no JSON, or lacks an entry.
    """
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BildError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise BildError(f"{file}: is no JSON") from error
    if not isinstance(content, dict) or not all(entry in content for entry in wanted):
        raise BildError(f"{file}: holds no {' and '.join(wanted)}; is it of another program?")
    return content


def read_rounds(path: str) -> dict[str, Any]:
    """A file of ``scripts/rounds.py``: ``sentences`` by number, and ``settings`` with the rounds of each sentence."""
    return read(path, "rounds.json", ["sentences", "settings"])


def setting_name(setting: dict[str, Any]) -> str:
    """A setting of a file of rounds as a person writes it: method, thresholds and what is not the default."""
    policy = setting["policy"]
    thresholds = thresholds_text(policy["fallback_threshold"], policy["rollback_threshold"], policy["verify_end"])
    draft = f"; draft {policy['max_draft']}" if policy["max_draft"] != 10 else ""
    return f"{setting['method']} ({thresholds}{draft})"


def style(number: int) -> dict[str, str]:
    """Color and marker of the curve with a number, counted from 0."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def distances(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Intervals as matplotlib wants them: how far they reach below and above each value."""
    ends = list(zip(values, intervals, strict=True))
    # A bootstrap's interval may lie beside the value.
    return [[max(0.0, value - low) for value, (low, _) in ends], [max(0.0, high - value) for value, (_, high) in ends]]


def pyplot() -> Any:
    """matplotlib's pyplot, in the style of the figures and without a window.

    Raises:
        BildError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BildError("needs the package matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    matplotlib.pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return matplotlib.pyplot


def picture_format(path: str) -> str:
    """The format that a picture's file is named after: ``png`` where its name has no suffix."""
    return os.path.splitext(path)[1].removeprefix(".").lower() or "png"


def save(figure: Any, flag: str, path: str) -> None:
    """Writes a figure, in the format of the file's name, at once or not at all.

    Args:
        figure: matplotlib's.
        flag: that names the file, for the message.
        path: of the file.

    Raises:
        BildError: there is no such format, or the file cannot be written.
    """
    with writing(f"{flag} {path}"), replacing(path) as temporary:
        try:
            figure.savefig(temporary, dpi=160, format=picture_format(path))
        except ValueError as error:
            raise BildError(f"{flag} {path}: {error}") from error
