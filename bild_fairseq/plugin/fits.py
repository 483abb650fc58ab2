"""Whether models fit what they are to run in: the task's languages and dictionaries, and one another's positions."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from fairseq import utils
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask
from torch import nn

from ..errors import BildError
from .content import option_in

logger = logging.getLogger(__name__)

# By model: the file that it was loaded from, and the options of the task that it was trained in.
_origins: WeakKeyDictionary[nn.Module, tuple[str, Any]] = WeakKeyDictionary()


def remember(loaded: Sequence[nn.Module], path: str, trained_in: Any) -> None:
    """Keeps for :func:`check_task` where models come from; see :func:`check_fits`."""
    _origins.update((model, (path, trained_in)) for model in loaded)


def check_task(loaded: Sequence[nn.Module], task: FairseqTask) -> None:
    """Refuses models that were trained for other languages or other dictionaries than a task's; looks once.

    Args:
        loaded: models; one that comes from no checkpoint fits.

    Raises:
        BildError: naming the checkpoint.
    """
    for model in loaded:
        if model in _origins:
            check_fits(*_origins[model], task)
            del _origins[model]


def check_fits(path: str, trained_in: Any, task: FairseqTask) -> None:
    """Refuses other languages than the task's, and a dictionary beside the checkpoint that is not the task's.

    Warns if the data that the checkpoint was trained on is still there and has another dictionary.

    Args:
        path: of the checkpoint.
        trained_in: options of the task that it was trained in.
        task: that it is to run in.

    Raises:
        BildError: naming the checkpoint.
    """
    given = task.cfg or getattr(task, "args", None)
    for side in ("source", "target"):
        language, trained_on = (option_in(options, f"{side}_lang") for options in (given, trained_in))
        if language and trained_on and language != trained_on:
            raise BildError(
                f"{path}: its {side} language is {trained_on}, this data's is {language}; choose data of its direction "
                "(-s, -t)"
            )
    for side in ("source", "target"):
        name, dictionary = f"dict.{option_in(given, f'{side}_lang')}.txt", getattr(task, f"{side}_dictionary", None)
        if not _is_beginning(Path(path).parent / name, dictionary):
            raise BildError(
                f"{path}: the dictionary beside it, {name}, is not this data's; give it to fairseq-preprocess with "
                "--srcdict and --tgtdict"
            )
        data = option_in(trained_in, "data")
        for folder in utils.split_paths(data) if isinstance(data, str) else ():
            if not _is_beginning(Path(folder) / name, dictionary):
                logger.warning(
                    "%s was trained on %s, whose %s is not this data's: the text is wrong if that is still the "
                    "dictionary that it was trained with",
                    *(path, folder, name),
                )


def _is_beginning(file: Path, dictionary: Dictionary | None) -> bool:
    """Whether a dictionary is one in a file, to whose end a task may have added symbols; or there is no such file."""
    if dictionary is None or not os.path.isfile(file):
        return True
    try:
        beginning = Dictionary.load(str(file))
    except Exception:  # fairseq raises bare ones where it is none
        return False
    return dictionary.symbols[: len(beginning)] == beginning.symbols


def check_positions(small: Sequence[nn.Module], source_limit: int) -> None:
    """Refuses a small model that cannot read every source that the large one may be given.

    Args:
        small: the members of the small model.
        source_limit: tokens of the longest source that will be translated.

    Raises:
        BildError: naming the option that shortens the sources.
    """
    readable = min(model.encoder.max_positions() for model in small)
    if readable < source_limit:
        raise BildError(
            f"the small model reads at most {readable} source tokens, the large one {source_limit}; "
            f"add --max-source-positions {readable}"
        )
