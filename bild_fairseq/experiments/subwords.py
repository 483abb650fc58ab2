"""How the words of a fairseq dictionary become text: subwords of subword-nmt, GPT-2 or SentencePiece, or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from fairseq.data.encoders.gpt2_bpe import GPT2BPE, GPT2BPEConfig

from ..errors import BildError, first_line

SUBWORDS = ("subword_nmt", "gpt2", "sentencepiece", "none")


class Subwords(ABC):
    """One kind of subwords.

    Attributes:
        tokenized: whether the joined text is tokenized as Moses does it, so that raw text has to be made of it.
    """

    tokenized = False

    @abstractmethod
    def join(self, line: str) -> str:
        """Words of a dictionary, separated by spaces, as text."""

    @abstractmethod
    def piece(self, word: str) -> str:
        """One word of a dictionary with the space that belongs to it: the pieces of a text make it up."""


class Marked(Subwords):
    """Words, or subwords of subword-nmt: all but a word's last one end in a mark.

    Args:
        mark: empty where there are no subwords.
    """

    tokenized = True

    def __init__(self, mark: str):
        self._mark = mark

    def join(self, line: str) -> str:
        return f"{line} ".replace(f"{self._mark} ", "").rstrip() if self._mark else line

    def piece(self, word: str) -> str:
        mark = self._mark
        return word[: -len(mark)] if mark and word.endswith(mark) else f"{word} "


class GPT2(Subwords):
    """GPT-2's byte-level subwords, written as numbers, as for BART.

    Raises:
        BildError: a file of the vocabulary is missing, or none.
    """

    def __init__(self, encoder_json: str, vocab_bpe: str):
        try:
            self._bpe = GPT2BPE(GPT2BPEConfig(gpt2_encoder_json=encoder_json, gpt2_vocab_bpe=vocab_bpe))
        except (OSError, ValueError, ImportError) as error:
            raise BildError(
                f"--bpe gpt2: {first_line(error)}; give --gpt2-encoder-json encoder.json --gpt2-vocab-bpe vocab.bpe"
            ) from error

    def join(self, line: str) -> str:
        # Dictionaries of BART hold a few words that fill them up and are no numbers.
        known = (word for word in line.split() if word.isdigit() or word in ("<unk>", "<mask>"))
        return self._bpe.decode(" ".join(known)).replace("\n", " ").strip()

    def piece(self, word: str) -> str:
        return self._bpe.decode(word) if word.isdigit() else word


class SentencePiece(Subwords):
    """Pieces of a SentencePiece model, as for T5. Bytes become characters; words that are no pieces are left out.

    Raises:
        BildError: the model is missing, or none, or the library is not installed.
    """

    def __init__(self, model: str | None):
        if model is None:
            raise BildError(
                "--bpe sentencepiece: needs the model of the pieces; give --sentencepiece-model spiece.model"
            )
        self._model = sentencepiece_model(model)

    def join(self, line: str) -> str:
        known = [word for word in line.split() if not self._model.is_unknown(self._model.piece_to_id(word))]
        return self._model.decode_pieces(known)

    def piece(self, word: str) -> str:
        return word.replace("\u2581", " ")


def sentencepiece_model(path: str) -> Any:
    """A SentencePiece model.

    Raises:
        BildError: it is missing, or none, or the library is not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise BildError("sentencepiece is not installed; pip install sentencepiece") from error
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise BildError(f"{path}: is no SentencePiece model") from error
