"""Programs that an experiment starts: they end with it, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

PATIENCE = 10  # seconds for a program to end after it was asked to
_PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent ends


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Inside it, TERM and HUP interrupt as Ctrl-C does. What somebody else handles or ignores stays as it is."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    handled = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL]
    for one in handled:
        signal.signal(one, interrupt)
    try:
        yield
    finally:
        for one in handled:
            signal.signal(one, signal.SIG_DFL)


def run_program(command: Sequence[str], show: Callable[[str], None], environment: Mapping[str, str]) -> int:
    """Runs a program; ends it, and what it has started, if this process is interrupted or fails.

    Args:
        command: program and arguments.
        show: gets each line of its standard output.
        environment: its variables.

    Returns:
        its exit status.
    """
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as child:
        try:
            for line in child.stdout:
                show(line.rstrip("\n"))
            return child.wait()
        finally:
            if child.poll() is None:
                _end(child)


def _end(child: subprocess.Popen) -> None:
    """Ends the process group of a program that was started in a session of its own."""
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)


def end_with(parent: int) -> None:
    """From now on this process ends when its parent does, even when that is killed. On Linux only.

    Args:
        parent: its process number. The process ends at once if that is no longer its parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the program that started this one has ended")
