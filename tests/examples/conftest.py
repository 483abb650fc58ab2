"""What the tests of the benchmarks under examples/ share."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_support import COMMON, EXAMPLES, OFFLINE

Step = Callable[..., subprocess.CompletedProcess]
# Setting up finds that pip is there and that nothing is missing.
PYTHON = """#!/bin/sh
case "$1 $2" in "-m pip" | "- "*) exit 0 ;; esac
exec {} "$@"
"""


@pytest.fixture(autouse=True)
def _common_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules beside a program are there, as when it runs."""
    monkeypatch.syspath_prepend(COMMON)


@pytest.fixture(scope="module")
def run_step(programs, tmp_path_factory) -> Step:
    """``bash run.sh`` of a benchmark, offline, in an environment whose Python waits for no imports."""
    environment = tmp_path_factory.mktemp("environment")
    python = programs.bin(environment / "bin") / "python"
    quick = python.rename(python.with_name("quick-python"))
    python.write_text(PYTHON.format(quick))
    python.chmod(0o755)

    def run(benchmark: str, work: Path, *arguments: object, status: int = 0, **variables: object) -> Any:
        if "DRY_RUN" not in variables:
            # run.sh would install what is missing.
            pytest.importorskip("rouge_score")
            pytest.importorskip("matplotlib")
        defaults = {"VIRTUAL_ENV": environment, "OMP_NUM_THREADS": 1, "CPU": 1, "WORK": work}
        done = subprocess.run(
            ["bash", str(EXAMPLES / benchmark / "run.sh"), *map(str, arguments)],
            env={**os.environ, **OFFLINE, **{name: str(value) for name, value in {**defaults, **variables}.items()}},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, f"{arguments}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return done

    return run
