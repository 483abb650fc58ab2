"""Big Little Decoder (Kim et al., NeurIPS 2023) for fairseq, as a user directory.

Importing the package, which ``--user-dir bild_fairseq`` does, registers the ``bild`` and ``greedy`` generators,
the early-exit architectures and their training loss.
"""

from . import criterions, models  # noqa: F401
from .plugin.flags import BildGenerationConfig
from .plugin.hooks import install

__all__ = ["BildGenerationConfig"]

install()
