"""T5's SentencePiece vocabulary as a fairseq dictionary.

fairseq has `<s>`, `<pad>`, `</s>`, `<unk>` in rows 0 to 3. T5's padding, which starts every text, comes into the row of
`<s>`, and the row of `<pad>` stays empty; the other rows follow in T5's order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary
from torch import Tensor

from ..errors import BildError
from .subwords import sentencepiece_model

# How many sentinels T5's tokenizer adds behind the pieces unless tokenizer_config.json says otherwise.
SENTINELS = 100


@dataclass(frozen=True)
class Vocabulary:
    """Which of T5's rows lies in which row of fairseq's dictionary.

    Attributes:
        dictionary: fairseq's.
        ids: by row of the dictionary T5's id, or None where T5 has no such row.
    """

    dictionary: Dictionary
    ids: list[int | None]

    @property
    def missing_rows(self) -> int:
        """How many rows at the end of the dictionary T5 lacks."""
        return self.ids[self.dictionary.nspecial :].count(None)

    def to_fairseq(self, matrix: Tensor) -> Tensor:
        """T5's (vocab_size, dim) in the dictionary's order, (rows, dim); 0 in the rows that T5 lacks."""
        kept = [row for row, number in enumerate(self.ids) if number is not None]
        result = matrix.new_zeros(len(self.ids), matrix.size(1))
        result[kept] = matrix[[self.ids[row] for row in kept]]
        return result

    def to_t5(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_fairseq`."""
        rows = {number: row for row, number in enumerate(self.ids) if number is not None}
        return matrix[[rows[number] for number in range(len(rows))]]


def read_vocabulary(
    spiece: Path, config: Mapping[str, Any], sentinels: int = SENTINELS, rows: int | None = None
) -> Vocabulary:
    """Numbers the rows of a T5 model anew.

    Sentinels have the names `<extra_id_0>`, ...; a row that no text can produce is called `<unused_ID>`.

    Args:
        spiece: SentencePiece model.
        config: the model's config.json: `vocab_size`, `pad_token_id`, `eos_token_id`.
        sentinels: how many the tokenizer adds; ignored where the SentencePiece model has its own, as mT5's does.
        rows: at least `vocab_size`; where the other model of a pair has more rows, as many as it has.

    Raises:
        BildError: the SentencePiece model is none, or not this model's.
    """
    pieces, unknown = _read_pieces(spiece, config)
    size = config["vocab_size"]
    if len(pieces) > size:
        raise BildError(f"{spiece}: has {len(pieces)} pieces, the model {size} rows; it belongs to another model")
    rows = size if rows is None else rows
    if rows < size:
        raise BildError(f"--rows {rows}: the model has {size} rows; give at least as many")
    names = dict(enumerate(pieces))
    if not any("<extra_id_" in piece for piece in pieces):
        # In descending order: the last one is <extra_id_0>.
        end = len(pieces) + sentinels
        names |= {number: f"<extra_id_{end - 1 - number}>" for number in range(len(pieces), min(end, size))}
    special = [config["pad_token_id"], None, config["eos_token_id"], unknown]
    others = [number for number in range(rows) if number not in special]
    ids = special + [number if number < size else None for number in others]
    dictionary = _dictionary([(number, names.get(number, "")) for number in others])
    if len(dictionary) != len(ids):
        raise BildError(f"{spiece}: has pieces called <unused_...>, which here are names of rows without a piece")
    return Vocabulary(dictionary, ids)


def _dictionary(named: list[tuple[int, str]]) -> Dictionary:
    """The dictionary of T5's ids and their pieces, in this order, behind fairseq's own symbols."""
    dictionary = Dictionary()
    for number, symbol in named:
        # A line of dict.txt holds one symbol, and texts are split at white space.
        if symbol in dictionary or symbol.split() != [symbol]:
            symbol = f"<unused_{number}>"
        dictionary.add_symbol(symbol)
    return dictionary


def _read_pieces(spiece: Path, config: Mapping[str, Any]) -> tuple[list[str], int]:
    """The pieces by id, and the id of the unknown one."""
    processor = sentencepiece_model(str(spiece))
    for name, number in (("pad_token_id", processor.pad_id()), ("eos_token_id", processor.eos_id())):
        if config[name] != number:
            raise BildError(f"{spiece}: has {name} {number}, config.json {config[name]}; they belong to two models")
    pieces = [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
    return pieces, processor.unk_id()
