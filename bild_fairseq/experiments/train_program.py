"""fairseq-train for ``align.py``: with this package loaded, quiet, and ended when the program that started it ends.

    python -m bild_fairseq.experiments.train_program PARENT FLAGS...

PARENT is the number of the process that starts it, FLAGS are those of fairseq-train without ``--user-dir``.
"""

from __future__ import annotations

import logging
import sys

from fairseq_cli.train import cli_main

from .processes import end_with

# The loggers by whose names fairseq says how a training gets on.
PROGRESS = {"train", "train_inner", "valid"}


def show_progress() -> None:
    """Writes progress and warnings to standard output; not the model and all options, which fairseq's log file has."""
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(lambda record: record.name in PROGRESS or record.levelno > logging.INFO)
    form = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
    logging.basicConfig(format=form, datefmt="%Y-%m-%d %H:%M:%S", level=logging.INFO, handlers=[handler], force=True)


if __name__ in ("__main__", "__mp_main__"):  # the second in the processes of a training on several GPUs
    show_progress()
if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    cli_main()
