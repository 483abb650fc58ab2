"""How every script ends: one line for an error that the user can mend, and for an interruption."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable

from ..errors import BildError
from .processes import interrupted_by_signals


def run(name: str, main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a script, and ends it with one line and exit status 1 if it cannot go on.

    Args:
        name: of the script, first word of that line.
        main: reads the command line and does the work.
        interrupted: what an interruption leaves behind: Ctrl-C, or the signals TERM and HUP.
    """
    try:
        with interrupted_by_signals():
            main()
    except BildError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {interrupted}")


def quiet() -> None:
    """Keeps fairseq, Hydra and matplotlib from filling the terminal; warnings of this package stay."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.WARNING)
