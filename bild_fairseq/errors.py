"""The error that a person at the terminal reads."""


class BildError(ValueError):
    """Something the user can mend: one line, what is wrong and what to do.

    The command line prints it without a traceback.
    """
