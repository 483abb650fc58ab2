"""Files that a script will write, tried before work starts; and what tells one file from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import BildError, flag
from ..plugin.files import unwritable, write_text, writing


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


def write_output(flag: str, path: str | os.PathLike, text: str) -> None:
    """Writes a result to the file that a flag names.

    Raises:
        BildError: it cannot be written.
    """
    with writing(f"{flag} {path}"):
        write_text(path, text)


# Flags and arguments of scripts that name files, or folders of data, that are read.
_READ = ("data", "large", "small", "early_exit", "draft_vocab", "reference", "sentencepiece_model", "rounds", "sweeps")
_READ += ("benchmarks", "gpt2_encoder_json", "gpt2_vocab_bpe")


def check_outputs(given: Mapping[str, Any], *outputs: str) -> None:
    """Makes sure that no file that a script writes is one that it reads, or writes for another flag.

    Args:
        given: what each flag has, under its name with underscores.
        outputs: the flags that name files to write; each may have nothing.

    Raises:
        BildError: naming both.
    """
    read = [file for name in _READ for file in _files(given.get(name))]
    written: dict[str, str] = {}
    for name in outputs:
        path = given.get(name)
        if path is None or (os.path.exists(path) and not os.path.isfile(path)):  # a device is nobody's
            continue
        real, spelt = os.path.realpath(path), flag(name)
        if real in written:
            raise BildError(f"{spelt} {path}: {written[real]} names the same file; give each one of its own")
        written[real] = spelt
        for file in read:
            if os.path.exists(path) and os.path.samefile(file, path):
                raise BildError(f"{spelt} {path}: it would be written over {file}, which is read; name another file")


def _files(value: Any) -> Iterator[str]:
    """The files that exist among what a flag names: paths, some with a name before or a layer after, or a folder."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _files(item)
    elif isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        for path in {text, *text.partition("=")[2].split(":"), *text.split(":")}:
            if os.path.isfile(path):
                yield path
            elif path and os.path.isdir(path):
                folder = Path(path)
                patterns = ("dict.*.txt", "*.bin", "*.idx", "results.json")
                yield from (str(file) for pattern in patterns for file in folder.glob(pattern))


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
