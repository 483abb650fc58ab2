"""Files that a script will write, tried before work starts; and what tells one file from another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import BildError
from ..plugin.files import unwritable


def try_file(flag: str, path: str | os.PathLike | None) -> None:
    """Makes sure that a file can be written where a flag says. Nothing is written.

    Args:
        flag: that names the file, for the message.
        path: the file; None if the flag was not given.

    Raises:
        BildError: it is a folder, its folder does not exist, or nothing can be written there.
    """
    reason = None if path is None else unwritable(path)
    if reason:
        raise BildError(f"{flag} {path}: cannot write there: {reason}")


def try_folder(flag: str, path: str | os.PathLike) -> None:
    """Makes sure that files can be written in a folder, which may not exist yet; see :func:`try_file`."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise BildError(f"{flag} {path}: cannot write there: {folder} is a file; name a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BildError(f"{flag} {path}: cannot write there: Permission denied")


def file_digest(path: str | os.PathLike) -> str:
    """What tells a file from another: SHA-256 of its content, shortened.

    Raises:
        BildError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise BildError(f"{path}: cannot read it: {error.strerror}") from error
    return digest.hexdigest()[:16]
