"""Builds and loads ``transformer.c``.

The compiled file lies in the user's cache folder under a name that changes with the source, the compiler's flags and
the processor, so that it is built once (a second or two) and never used where it does not fit.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("transformer.c")
# No errno and no floating-point traps: with them loops over exp and sqrt are not vectorized.
_FLAGS = "-std=gnu11 -O3 -march=native -fopenmp -fPIC -shared -fno-math-errno -fno-trapping-math".split()


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they are switched off (``BILD_NATIVE=0``) or cannot be built here."""
    if os.environ.get("BILD_NATIVE") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("no C compiler (cc) found: decoding with PyTorch's operators, which is slower")
        return None
    try:
        return _load(_build(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("cannot build the C kernels, decoding with PyTorch's operators, which is slower: %s", error)
        return None


def _compiler() -> list[str] | None:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc")):
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    return None


def _build(compiler: list[str]) -> Path:
    """Path of the compiled library, which is built if it is not there."""
    key = hashlib.sha256()
    for part in (_SOURCE.read_bytes(), shlex.join([*compiler, *_FLAGS]).encode(), _processor().encode()):
        key.update(hashlib.sha256(part).digest())
    path = _cache_folder() / f"transformer-{key.hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(built), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if result.returncode:
                raise subprocess.SubprocessError(f"{shlex.join(command)}: {result.stderr.strip()[:500]}")
            built.replace(path)
    return path


def _cache_folder() -> Path:
    """A folder that only this user writes to: what lies there is loaded and run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bild_fairseq"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(_temporary_folder())


@cache
def _temporary_folder() -> str:
    return tempfile.mkdtemp(prefix="bild_fairseq-")


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.bild_panel.restype = ctypes.c_int64
    loaded.bild_workspace.restype = ctypes.c_int64
    loaded.bild_workspace.argtypes = [ctypes.c_void_p] * 3
    loaded.bild_forward.restype = None
    loaded.bild_forward.argtypes = [ctypes.c_void_p] * 3
    loaded.bild_draft.restype = loaded.bild_judge.restype = None
    loaded.bild_draft.argtypes = loaded.bild_judge.argtypes = [ctypes.c_void_p] * 4
    loaded.bild_source.restype = None
    loaded.bild_source.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
    return loaded
