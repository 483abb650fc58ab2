"""A folder for what a long experiment makes on its way, so that the same command goes on after an interruption."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BildError
from ..plugin.files import write_text


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
        BildError: another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BildError(
                f"{flag} {folder}: another run is at work there; wait for its end, or name another folder"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
