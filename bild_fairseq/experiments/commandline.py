"""How every script ends: one line for an error that the user can mend, and for an interruption."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

from ..errors import BildError
from ..plugin.ending import LOST_OUTPUT
from ..plugin.files import cause
from .processes import interrupted_by_signals


def run(name: str, main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a script, and ends it with one line and exit status 1 if it cannot go on.

    Args:
        name: of the script, first word of that line.
        main: reads the command line and does the work.
        interrupted: what an interruption leaves behind: Ctrl-C, or the signals TERM and HUP.
    """
    if sys.stdout is None:
        sys.exit(f"{name}: standard output is closed, so nothing can be printed; redirect it to a file")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    try:
        with interrupted_by_signals():
            main()
            if sys.stdout is not None:
                sys.stdout.flush()
    except BildError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {interrupted}")
    except OSError as error:
        if error.errno not in LOST_OUTPUT:
            raise
        _drop_output()
        sys.exit(f"{name}: what it writes is lost: {cause(error)}")


def _drop_output() -> None:
    """Keeps Python from writing at its end what could not be written before. What can be written is."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


def quiet() -> None:
    """Keeps fairseq, Hydra and matplotlib from filling the terminal; warnings of this package stay."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.WARNING)
