"""What all tests share: the package loaded into fairseq, one thread, repeatable randomness, a task with models."""

import fcntl
import os
import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cli_support import Corpus, Programs, corpus_in
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# A suite that is started in the background inherits ignored signals, and so would the programs that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzzers (tests/fuzz)")
    group.addoption("--fuzz-seconds", type=float, default=20, help="how long each runs")
    group.addoption("--fuzz-seed", type=int, default=0, help="the first seed; a fault is told with its own")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """fairseq's programs, started from one warm interpreter."""
    made = Programs(tmp_path_factory.mktemp("streams"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def corpus(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A tiny translation task and models trained on it; tests change none of its files. Parallel workers share it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "corpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return corpus_in(folder / "corpus", programs)
