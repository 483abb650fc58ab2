"""What all tests share: the package loaded into fairseq, one thread, repeatable randomness, a task with models.

The process that hands out the tests to parallel workers runs none: it imports neither torch nor fairseq.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
from typing import TYPE_CHECKING

import pytest
from fork_server import Server

if TYPE_CHECKING:
    from cli_support import Corpus, Programs

# A suite that is started in the background inherits ignored signals, and so would the programs that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
SERVER = pytest.StashKey[Server]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzzers (tests/fuzz)")
    group.addoption("--fuzz-seconds", type=float, default=20, help="how long each runs")
    group.addoption("--fuzz-seed", type=int, default=0, help="the first seed; a fault is told with its own")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and config.getoption("dist", "no") != "no":
        return
    import torch
    from hypothesis import HealthCheck, settings

    torch.set_num_threads(1)
    settings.register_profile(
        "repeatable",
        derandomize=True,
        deadline=None,
        max_examples=25,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("repeatable")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Tells a worker the address of the one server that all workers have."""
    node.workerinput["fork_server"] = server_address(node.config)


def pytest_unconfigure(config: pytest.Config) -> None:
    if SERVER in config.stash:
        config.stash[SERVER].close()


def server_address(config: pytest.Config) -> str:
    """Of the server that runs programs; it is started if there is none."""
    if hasattr(config, "workerinput"):
        return config.workerinput["fork_server"]
    if SERVER not in config.stash:
        config.stash[SERVER] = Server()
    return config.stash[SERVER].address


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import numpy as np
    import torch

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """fairseq's programs, started from one warm interpreter."""
    from cli_support import Programs

    return Programs(tmp_path_factory.mktemp("streams"), server_address(request.config))


@pytest.fixture(scope="session")
def corpus(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A tiny translation task and models trained on it; tests change none of its files. Parallel workers share it."""
    from cli_support import corpus_in

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "corpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return corpus_in(folder / "corpus", programs)
