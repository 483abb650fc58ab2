"""Files: why one cannot be read or written, and how to write one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BildError


def unreadable(path: str | os.PathLike) -> str | None:
    """Why a path is no file to read from, in words; None if it is one."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {cause(error)}"
    if stat.S_ISDIR(mode):
        return "that is a folder; name a file in it"
    if stat.S_ISFIFO(mode):
        return "that is a pipe; a file is needed, because it is not read from front to back"
    if not stat.S_ISREG(mode):
        return "that is a device, not a file"
    return None if os.access(path, os.R_OK) else "it cannot be read: Permission denied"


def unwritable(path: str | os.PathLike) -> str | None:
    """Why a path cannot be written to, in words; None if it can. Nothing is written."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            return "that is a folder; name a file in it"
        if os.path.exists(path):
            return None if os.access(path, os.W_OK) else "it cannot be written: Permission denied"
        if os.path.lexists(target):
            os.stat(target)  # a link that leads to itself
        mode = os.stat(target.parent).st_mode
    except FileNotFoundError:
        return f"there is no folder {target.parent}; make it first"
    except (OSError, ValueError) as error:
        return f"it cannot be written: {cause(error)}"
    if not stat.S_ISDIR(mode):
        return f"{target.parent} is no folder; name a file in one"
    return None if os.access(target.parent, os.W_OK | os.X_OK) else "its folder cannot be written: Permission denied"


def cause(error: Exception) -> str:
    """What the system says of an error, without number and file."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def writing(output: str) -> Iterator[None]:
    """Has what the system says against writing an output raised as BildError.

    Args:
        output: the file and the flag that names it, for the message.
    """
    try:
        yield
    except OSError as error:
        raise BildError(f"{output}: it cannot be written: {cause(error)}") from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end; if something fails nothing is left of it.

    Whatever happens, ``path`` holds its old content or the new one. A link stays one: the file that it leads to is
    replaced.

    Raises:
        BildError: something else than a file is there, a device for instance.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise BildError(f"{path}: that is no file, so it cannot be replaced; name one")
    temporary = Path(f"{target}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes to what is named: the file that a link leads to, a device, a pipe. A plain file is replaced at once."""
    target = Path(os.path.realpath(path))
    # /dev/stdout may be a plain file that the program is writing to, so it is not replaced.
    named_stream = os.path.abspath(path).startswith(("/dev/", "/proc/"))
    if named_stream or (target.exists() and not (target.is_file() and os.access(target.parent, os.W_OK))):
        with open(path, "a" if named_stream else "w", encoding="utf-8") as file:
            file.write(text)
        return
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
