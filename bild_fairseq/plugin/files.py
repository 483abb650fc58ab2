"""Files: why one cannot be read, and how to replace one at once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unreadable(path: str | os.PathLike) -> str | None:
    """Why a path is no file to read from, in words; None if it is one."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {getattr(error, 'strerror', error)}"
    if stat.S_ISDIR(mode):
        return "that is a folder; name a file in it"
    if stat.S_ISFIFO(mode):
        return "that is a pipe; a file is needed, because it is not read from front to back"
    if not stat.S_ISREG(mode):
        return "that is a device, not a file"
    return None if os.access(path, os.R_OK) else "it cannot be read: Permission denied"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end; if something fails nothing is left of it.

    Whatever happens, ``path`` holds its old content or the new one.
    """
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
