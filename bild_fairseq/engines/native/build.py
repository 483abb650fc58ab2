"""Builds and loads ``transformer.c``.

The compiled file is in the user's cache folder under a name that changes with the sources, the compiler's flags and the
processor, so that it is built once (a few seconds) and never used where it does not fit.
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

from .structs import check_sizes

logger = logging.getLogger(__name__)

_SOURCES = [Path(__file__).with_name(name) for name in ("transformer.c", "integers.h", "threads.h", "vectors.h")]
# No errno and no floating-point traps: with them loops over exp and sqrt are not vectorized.
_FLAGS = "-std=gnu11 -O3 -march=native -fopenmp-simd -pthread -fPIC -shared -fno-math-errno -fno-trapping-math".split()


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they are switched off (``BILD_NATIVE=0``) or cannot be built here.

    Raises:
        BildError: the C code and the Python code do not belong together.
    """
    if os.environ.get("BILD_NATIVE") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("no C compiler (cc) found: decoding with PyTorch's operators, which is slower")
        return None
    try:
        folder = _cache_folder()
        if folder is not None:
            return _load(_build(compiler, folder))
        with tempfile.TemporaryDirectory(prefix="bild_fairseq-") as temporary:  # a loaded file may be deleted
            return _load(_build(compiler, Path(temporary)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("cannot build the C kernels, decoding with PyTorch's operators, which is slower: %s", error)
        return None


def _compiler() -> list[str] | None:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc")):
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    return None


def _cache_folder() -> Path | None:
    """A folder that only this user writes to, as what is in it is loaded and run; None if there is none."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bild_fairseq"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _build(compiler: list[str], folder: Path) -> Path:
    """Path of the compiled library, which is built if it is not there."""
    key = hashlib.sha256()
    parts = [*(source.read_bytes() for source in _SOURCES), shlex.join([*compiler, *_FLAGS]).encode()]
    for part in (*parts, _processor().encode()):
        key.update(hashlib.sha256(part).digest())
    path = folder / f"transformer-{key.hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / path.name
            command = [*compiler, *_FLAGS, str(_SOURCES[0]), "-o", str(built), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if result.returncode:
                raise subprocess.SubprocessError(f"{shlex.join(command)}: {result.stderr.strip()[:500]}")
            built.replace(path)
    return path


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    number, address = ctypes.c_int64, ctypes.c_void_p
    signatures = {
        "bild_panel": (number, []),
        "bild_size": (number, [ctypes.c_char_p]),
        "bild_run": (number, [address] * 3),
        "bild_draft": (number, [address] * 4),
        "bild_verify": (number, [address] * 4),
        "bild_product_room": (number, [address, number]),
        "bild_product": (None, [address, address, number, address, number]),
        "bild_source": (None, [*[address] * 5, number]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    check_sizes(loaded)
    return loaded
