"""The error that a person at the terminal reads, and the words in it for options and for other errors."""

from typing import Any


class BildError(ValueError):
    """Something the user can mend: one line, what is wrong and what to do.

    The command line prints it without a traceback.
    """


def first_line(error: Exception) -> str:
    """What an error says, without what else it goes on about; its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def flag(name: str) -> str:
    """An option as it is spelt on the command line."""
    return "--" + name.replace("_", "-")


def require(holds: bool, name: str, value: Any, wanted: str) -> None:
    """Refuses an option's value unless something holds.

    Args:
        holds: what must be true of it.
        name: of the option.
        value: that it has.
        wanted: in words, after "must be".

    Raises:
        BildError: it does not hold.
    """
    if not holds:
        raise BildError(f"{flag(name)} {value}: must be {wanted}")
