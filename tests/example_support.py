"""The benchmarks under examples/ in tests: their folders, their programs as modules, and text to work on."""

import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
COMMON = EXAMPLES / "common"
# Nothing listens there: every download fails at once, on a machine with a network too.
OFFLINE = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")} | {"no_proxy": ""}
WORDS = ["Der", "Hund", "sieht", "die", "Katze", "nicht", "und", "schläft", "heute", "lange"]


@functools.cache
def load(path: Path) -> ModuleType:
    """A script, or what a benchmark says of its text, as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}".replace(".", "_"), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def error_line(done: subprocess.CompletedProcess) -> str:
    """The last line of a failed step, once it is certain that it is the only one that tells of an error."""
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    lines = done.stderr.strip().split("\n")
    # Before it come the commands that the step shows, with a + each.
    assert [line for line in lines if re.match(r"\w+(\.sh)?: ", line)] == lines[-1:], done.stderr
    return lines[-1]


def write_raw(folder: Path, languages: tuple[str, str], parts: Mapping[str, int]) -> None:
    """Text that is not hard to translate: the other side is in upper case."""
    folder.mkdir(parents=True)
    for number, (part, count) in enumerate(parts.items()):
        lines = [" ".join(WORDS[(i * step + number) % 10] for step in range(1, 5 + i % 3)) + "." for i in range(count)]
        (folder / f"{part}.{languages[0]}").write_text("".join(line + "\n" for line in lines))
        (folder / f"{part}.{languages[1]}").write_text("".join(line.upper() + "\n" for line in lines))
