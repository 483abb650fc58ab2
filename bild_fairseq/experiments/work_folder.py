"""A folder for what a long experiment makes on its way, so that the same command goes on after an interruption."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BildError
from ..plugin.files import cause, write_text


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of a step, or makes sure that what is in it was made with these settings.

    Raises:
        BildError: it was not.
    """
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} {before.get(name)}, not {new}" for name, new in settings.items() if before.get(name) != new]
        if changed:
            raise BildError(
                f"{folder} was made with {'; '.join(changed)}: remove it to make it anew, or give another --work"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=1) + "\n")


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Keeps a folder for one run at a time; the lock ends with the process, however that ends.

    Args:
        folder: made if it is not there.
        flag: that names it, for the message.

    Raises:
        BildError: another run has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise BildError(f"{flag} {folder}: cannot write there: {cause(error)}") from error
    with _held(descriptor, f"{flag} {folder}"):
        yield


@contextmanager
def locked_file(path: str | os.PathLike | None, flag: str) -> Iterator[None]:
    """Keeps a file for one run at a time, as :func:`locked` keeps a folder.

    The file itself is replaced whenever it is written, so another one beside it is locked, and removed at the end.

    Args:
        path: None if the flag was not given; a device or a pipe is nobody's.
        flag: that names it, for the message.

    Raises:
        BildError: another run has it.
    """
    if path is None or (os.path.exists(path) and not os.path.isfile(path)):
        yield
        return
    lock = Path(f"{os.path.realpath(path)}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise BildError(f"{flag} {path}: cannot write there: {cause(error)}") from error
    with _held(descriptor, f"{flag} {path}"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _held(descriptor: int, what: str) -> Iterator[None]:
    """Locks an open file or folder, and closes it at the end."""
    busy = f"{what}: another run is at work there; wait for its end, or give another name"
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BildError(busy) from error
        except OSError:
            pass  # a file system without locks
        if not os.fstat(descriptor).st_nlink:  # removed by a run that has just ended
            raise BildError(busy)
        yield
    finally:
        os.close(descriptor)
