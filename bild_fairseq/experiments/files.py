"""Files that are whole at any time, and what tells one file from another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import BildError


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replaces a file at once: it holds the old text or the new one, whatever happens."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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
