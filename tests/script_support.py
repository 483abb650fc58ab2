"""Runs the scripts in scripts/ on the tiny corpus, and tasks in memory for their parts."""

import importlib.util
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import support
import torch
from cli_support import Corpus, Run
from fairseq.data import LanguagePairDataset, ListDataset

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name: str) -> ModuleType:
    """``scripts/<name>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(corpus: Corpus, name: str, *arguments: object, status: int = 0) -> Run:
    """Runs ``scripts/<name>.py``; as a program of its own, but without the wait for its imports."""
    return corpus.programs("script", SCRIPTS / f"{name}.py", *arguments, status=status)


def refused(corpus: Corpus, name: str, *arguments: object) -> str:
    """The one line that a script ends with when it refuses its arguments."""
    run = run_script(corpus, name, *arguments, status=1)
    assert "Traceback" not in run.err, run.err
    lines = [line for line in run.err.splitlines() if line.startswith(f"{name}: ")]
    assert lines == run.err.splitlines()[-1:], run.err
    return lines[0]


class MemoryTask:
    """A translation task over sentences in memory, with the dictionary of ``support``."""

    source_dictionary = target_dictionary = support.symbols()
    cfg = Namespace(source_lang="de", target_lang="en")

    def __init__(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]):
        words = support.symbols()
        sides = [
            part
            for rows in (sources, targets)
            for part in (ListDataset([torch.tensor(row) for row in rows]), np.array([len(row) for row in rows]), words)
        ]
        self._dataset = LanguagePairDataset(*sides, shuffle=False)

    def dataset(self, subset: str) -> Any:
        return self._dataset
