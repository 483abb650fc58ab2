"""Progress of long work, visible wherever somebody may look."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

INTERVAL = 30  # seconds between two lines where there is no terminal


class _Lines:
    """A file that gets each state of a bar as a line of its own."""

    def __init__(self, stream: TextIO):
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        text = text.strip()
        if text not in ("", self._last):
            self._last = text
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: int, unit: str, **options: Any) -> tqdm:
    """A bar on the terminal: on standard error, or on standard output if only that is one.

    If neither is one, standard error gets a line every :data:`INTERVAL` seconds.

    Args:
        total: how many units there are.
        unit: what is counted.
        options: further ones of ``tqdm``.
    """
    for stream in (sys.stderr, sys.stdout):
        if stream.isatty():
            return tqdm(total=total, unit=unit, file=stream, **options)
    rare = {"mininterval": INTERVAL, "maxinterval": INTERVAL, "delay": INTERVAL, "miniters": 1}
    return tqdm(total=total, unit=unit, file=_Lines(sys.stderr), ascii=True, **rare, **options)
