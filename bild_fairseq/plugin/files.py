"""Files that are replaced at once: whatever happens, one holds its old content or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place if nothing fails; else nothing is left of it."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replaces a text file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
