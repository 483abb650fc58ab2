"""Get files that other places publish: verified, resumable, and content with what is already there."""

import hashlib
import os
import pathlib
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException

TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 5  # at a download that breaks off without getting further
BLOCK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A file as it is published.

    Args:
        name: what it is called in the download folder.
        urls: where to get it, tried in this order.
        checksum: ``sha256:HEX`` or ``md5:HEX``; None where none is published.
        lines: of a text file that has no published checksum.
    """

    name: str
    urls: tuple[str, ...]
    checksum: str | None = None
    lines: int | None = None


def fetch(files: Sequence[Published], folder: pathlib.Path, instead: str = "") -> list[pathlib.Path]:
    """Return the files' paths in ``folder``, after downloading those that are not there.

    Args:
        files: to be had.
        folder: made if it is not there.
        instead: what else a user can do who has no network; the end of a sentence.

    Raises:
        SystemExit: with one line, if a file cannot be had or is not the one that was published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing: dict[Published, str] = {}
    for file in files:
        path = folder / file.name
        if not path.exists():
            try:
                download(file, path)
            except OSError as error:
                missing[file] = reason(error)
                continue
        if problem := what_is_wrong(file, path):
            raise SystemExit(f"download: {path} {problem}: remove it and run this step again")
    if missing:
        wanted = ", ".join(address(file) for file in missing)
        why = next(iter(missing.values()))
        them = "it" if len(missing) == 1 else "them"
        raise SystemExit(
            f"download: cannot reach the source ({why}): get {wanted}, put {them} into {folder}, "
            f"and run this step again{instead}"
        )
    return [folder / file.name for file in files]


def address(file: Published) -> str:
    """Return where a file is, and what to call it if that is not its name there."""
    url = file.urls[0]
    return url if url.endswith(f"/{file.name}") else f"{url} (as {file.name})"


def reason(error: OSError) -> str:
    """Return why a download failed, on one line."""
    cause = getattr(error, "reason", None) or error
    return " ".join(str(getattr(cause, "strerror", None) or cause).split()) or type(error).__name__


def download(file: Published, path: pathlib.Path) -> None:
    """Download from the first address that answers; what an interruption leaves in PATH.part is used.

    Raises:
        OSError: no address has the file.
    """
    part = path.with_name(path.name + ".part")
    failure: OSError = OSError("no address is known")
    for url in file.urls:
        try:
            download_from(url, part)
        except OSError as error:
            failure = error
            continue
        if problem := what_is_wrong(file, part):
            part.unlink()
            failure = OSError(f"what {url} sends {problem}")
            continue
        os.replace(part, path)
        return
    raise failure


def download_from(url: str, part: pathlib.Path) -> None:
    """Complete ``part``, however often the connection breaks while some bytes come.

    Raises:
        OSError: the address cannot be reached, has no such file or stopped sending.
    """
    fruitless = 0
    while fruitless < ATTEMPTS:
        before = size(part)
        try:
            if receive(url, part):
                return
        except urllib.error.HTTPError as error:
            # The server has nothing behind the end of the file: it is complete.
            if error.code == 416 and before:
                return
            raise
        except (HTTPException, TimeoutError, ConnectionError):
            pass
        fruitless = 0 if size(part) > before else fruitless + 1
    raise OSError(f"{url} stopped sending")


def size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def receive(url: str, part: pathlib.Path) -> bool:
    """Append what is missing of ``part``; return whether it is complete."""
    start = size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "bild_fairseq"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != 206:
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with part.open("ab" if start else "wb") as out:
            while block := response.read(BLOCK):
                out.write(block)
                show_progress(part.stem, out.tell(), total)
    return total is None or size(part) == total


def show_progress(name: str, done: int, total: int | None) -> None:
    if sys.stderr.isatty():
        share = f" of {total / 1e6:.0f}" if total else ""
        end = "\n" if done == total else ""
        print(f"\r{name}: {done / 1e6:.0f}{share} MB", end=end, file=sys.stderr, flush=True)


def what_is_wrong(file: Published, path: pathlib.Path) -> str | None:
    """Return what tells a file from the published one, or None."""
    if file.checksum:
        algorithm, _, expected = file.checksum.partition(":")
        digest = hashlib.new(algorithm)
        with path.open("rb") as content:
            while block := content.read(BLOCK):
                digest.update(block)
        if digest.hexdigest() != expected:
            return f"is not the published file ({algorithm} {digest.hexdigest()}, not {expected})"
    if file.lines:
        with path.open("rb") as content:
            lines = sum(1 for _ in content)
        if lines != file.lines:
            return f"is not the published file ({lines} lines, not {file.lines})"
    return None
