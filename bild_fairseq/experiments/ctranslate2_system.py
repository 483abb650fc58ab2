"""CTranslate2 beside the other systems: in a process of its own, on the same checkpoint and sentences."""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq.tasks import FairseqTask

from ..errors import BildError
from ..plugin.search import SearchOptions
from .systems import System

REST = 0.25  # seconds; its threads spin for 200 ms after their work


def ctranslate2_system(
    name: str, checkpoint: str, task: FairseqTask, search: SearchOptions, worker: Path, options: Mapping[str, Any]
) -> System:
    """Greedy decoding of a checkpoint by CTranslate2, which times itself.

    Args:
        name: of the system.
        checkpoint: of a fairseq model.
        task: whose dictionaries it has.
        search: length limits.
        worker: the program that translates, ``scripts/ctranslate2_worker.py``.
        options: ``device``, ``compute_type`` and ``threads``.

    Raises:
        BildError: ctranslate2 is not installed, or cannot convert the model.
    """
    process = _start(name, _convert(name, checkpoint, task), search, worker, options)
    source, target = task.source_dictionary, task.target_dictionary
    seconds = [0.0]

    def run(batch: dict[str, Any]) -> list[list[int]]:
        rows = batch["net_input"]["src_tokens"].tolist()
        texts = [[source[token] for token in row if token not in (source.pad(), source.eos())] for row in rows]
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells
            process.stdin.write(json.dumps(texts) + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise BildError(f"{name} failed; its error is above")
        texts, seconds[0] = json.loads(answer)
        return [[target.index(word) for word in text] + [target.eos()] for text in texts]

    return System(name, run, clock=lambda: seconds[0], rest=REST)


def _convert(name: str, checkpoint: str, task: FairseqTask) -> str:
    """The folder of the converted model, which is removed when the program ends."""
    try:
        import ctranslate2
    except ImportError:
        raise BildError(f"{name} needs the package ctranslate2: pip install ctranslate2") from None
    folder = tempfile.mkdtemp(prefix="ctranslate2-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    languages = {"source_lang": task.cfg.source_lang, "target_lang": task.cfg.target_lang}
    try:
        ctranslate2.converters.FairseqConverter(checkpoint, task.cfg.data, **languages).convert(folder, force=True)
    except Exception as error:  # it raises all kinds for models that it does not know
        raise BildError(f"{name} cannot convert {checkpoint}: {' '.join(str(error).split())}") from error
    return folder


def _start(
    name: str, folder: str, search: SearchOptions, worker: Path, options: Mapping[str, Any]
) -> subprocess.Popen[str]:
    limits = {
        "max_decoding_length": int(search.max_len_b),
        "min_decoding_length": search.min_len,
        "no_repeat_ngram_size": search.no_repeat_ngram_size,
    }
    process = subprocess.Popen(
        [
            *(sys.executable, str(worker), folder, "--device", options["device"]),
            *("--compute-type", options["compute_type"], "--threads", str(options["threads"])),
            *("--options", json.dumps(limits)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process
