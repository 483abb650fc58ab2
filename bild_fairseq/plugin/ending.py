"""How a generating program ends: with a summary, its statistics and an exit status that tells whether all went well.

It may end by itself, by an error, by a signal, or because nobody reads what it writes.
"""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from ..errors import BildError
from .files import cause
from .generator import BildGenerator

# What only a write can end with: the reader has gone, or the disk is full.
LOST_OUTPUT = {errno.EPIPE, errno.ECONNRESET, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Ending:
    """Of this process."""

    reports = False  # whether a generator is reported when it ends
    failed = False
    output_lost = False  # and said so


def report_at_exit(generator: BildGenerator) -> None:
    """Has the program print the generator's summary and write its statistics when it ends, however it ends."""
    if not _Ending.reports:
        _Ending.reports = True
        # Called after all reports, because the last one registered is called first.
        atexit.register(_exit_status)
        _catch_signals()
    atexit.register(_report, generator)


def _catch_signals() -> None:
    """Turns signals that would end the process at once into an ordinary exit; others, and ignored ones, stay."""
    process = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            sys.exit(128 + number)
        signal.signal(number, signal.SIG_DFL)  # a worker process, which has nothing to report
        os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        try:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, leave)
        except ValueError:  # not the main thread, where alone signals are handled
            return


def _report(generator: BildGenerator) -> None:
    try:
        _flush()
        if generator.counters().tokens:
            _say(generator.summary())
        generator.finish()
    except (KeyboardInterrupt, SystemExit):
        _fail("stopped before the statistics were written")
    except BildError as error:
        _fail(str(error))


def _flush() -> None:
    """Writes what is still to be printed, so that the summary comes after it."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        _lose_output(error)


def _lose_output(error: OSError) -> None:
    if not _Ending.output_lost:
        _fail(f"the output cannot be written: {cause(error)}")
    _Ending.output_lost = True


def _fail(message: str) -> None:
    _Ending.failed = True
    _say(f"bild_fairseq: {message}")


def _say(message: str) -> None:
    """Prints to standard error, if there is one."""
    try:
        if sys.stderr is not None:
            print(message, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _Ending.failed = True


def _exit_status() -> None:
    """Python has no other way to change the exit status once the program has ended."""
    _flush()
    if _Ending.failed:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(1)


def one_line_errors(previous: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``sys.excepthook``: one line for what the user can mend, and for how a generating program was stopped."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, BildError):
            # fairseq may still be reading batches ahead, in a thread that aborts when Python ends in the usual way.
            _fail(str(error))
        elif _Ending.reports and isinstance(error, KeyboardInterrupt):
            _say("bild_fairseq: interrupted")
        elif _Ending.reports and isinstance(error, OSError) and error.filename is None and error.errno in LOST_OUTPUT:
            _lose_output(error)
        else:
            previous(kind, error, trace)

    return hook
