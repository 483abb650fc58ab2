"""Big Little Decoder (Kim et al., NeurIPS 2023) for fairseq, as a user directory.

Importing the package, which ``--user-dir`` does, registers the ``bild`` and ``greedy`` generators, the early-exit
architectures and their training losses.
"""

import logging
import sys

# Where fairseq has not been imported yet, it would print that it recommends tensorboardX.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)


def _only_prints_the_folder() -> bool:
    """Whether this is ``python -m bild_fairseq``, which has no use for fairseq: importing that takes seconds."""
    # While Python looks for the module of -m, that is what stands in the place of the script's name.
    if sys.argv[:1] != ["-m"]:
        return False
    return sys.orig_argv[-len(sys.argv) :][:1] in ([__name__], [f"-m{__name__}"])


if not _only_prints_the_folder():
    from . import criterions, models  # noqa: F401
    from .plugin.flags import BildGenerationConfig
    from .plugin.hooks import install

    __all__ = ["BildGenerationConfig"]

    install()
