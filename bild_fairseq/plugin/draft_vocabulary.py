"""The file of ``--bild-draft-vocab``: the types that the small model drafts among."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from fairseq.data import Dictionary

from ..errors import BildError
from .files import cause, unreadable

_OVERWRITE = " #fairseq:overwrite"  # as a line of dict.txt may end
_SHOWN = 60  # characters of a line that is no type


@dataclass(frozen=True)
class DraftVocabulary:
    """Types of the target dictionary; the end symbol and the unknown one are always among them, padding never.

    Args:
        types: token numbers in ascending order, each once.
        path: the file that they come from.
    """

    types: tuple[int, ...]
    path: str | None = None

    def __str__(self) -> str:
        return f"{len(self.types)} types" + (f" of {self.path}" if self.path else "")

    @classmethod
    def of(cls, types: Iterable[int], dictionary: Dictionary, path: str | None = None) -> DraftVocabulary:
        """Some types with those that are always in, without padding."""
        kept = {*types, dictionary.eos(), dictionary.unk()} - {dictionary.pad()}
        return cls(tuple(sorted(kept)), path)

    @classmethod
    def load(cls, path: str | os.PathLike, dictionary: Dictionary, flag: str = "--bild-draft-vocab") -> DraftVocabulary:
        """Reads a file with one type a line, as in dict.txt: a symbol, and a count if there is one.

        Args:
            dictionary: of the target side.
            flag: that names the file, for messages.

        Raises:
            BildError: it cannot be read, has no types, or one that the dictionary lacks; one line that names it.
        """
        where = f"{flag} {path}"
        reason = unreadable(path)
        if reason:
            raise BildError(f"{where}: {reason}")
        types = []
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if text := line.rstrip():
                        types.append(_type_of(text, dictionary, f"{where}, line {number}"))
        except OSError as error:
            raise BildError(f"{where}: it cannot be read: {cause(error)}") from error
        except UnicodeDecodeError as error:
            raise BildError(f"{where}: it is no text in UTF-8") from error
        if not types:
            raise BildError(f"{where}: it is empty; write one type of the target dictionary a line")
        return cls.of(types, dictionary, os.fspath(path))


def _type_of(text: str, dictionary: Dictionary, where: str) -> int:
    """The token number of a line."""
    text = text.removesuffix(_OVERWRITE)
    symbol, _, count = text.rpartition(" ")
    if text not in dictionary.indices and symbol and count.isdecimal():
        text = symbol
    if text not in dictionary.indices:
        shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
        raise BildError(f"{where}: {shown} is no type of the target dictionary")
    return dictionary.indices[text]
