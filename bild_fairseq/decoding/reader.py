"""What the algorithm asks of a model: draft, verify, roll back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

Tokens = Sequence[Sequence[int]]  # every sentence of the batch, the start symbol first


class Prediction(NamedTuple):
    """What a model would write next."""

    token: int  # its best token
    lprob: float  # the token's log-probability (nats); not a number if the model's logits are not


class Verdict(NamedTuple):
    """What the large model says after one token: what it would write next, and how likely the drafted token is."""

    token: int  # its best token
    lprob: float  # the best token's log-probability (nats); not a number if the model's logits are not
    drafted_lprob: float  # that of the token that follows in the sentence; of no use where none follows


class Reader(Protocol):
    """A model on one batch of sources. It remembers how much of each sentence it has read.

    It applies the limits of the generation to every prediction, so they hold for both models at every position.
    """

    def draft(self, tokens: Tokens, rows: Sequence[int], limit: float, threshold: float) -> list[list[Prediction]]:
        """Reads what it has not read of some sentences, and goes on with its own best tokens.

        Args:
            tokens: every sentence of the batch; they are not changed.
            rows: which sentences to go on with. Each has at least one unread token.
            limit: tokens to draft at most, 1 to inf.
            threshold: probability; see :func:`~bild_fairseq.decoding.policies.falls_back`.

        Returns:
            for each row its predictions, up to the first one that is the end symbol, falls back, is not a number or
            reaches the limit. All but the last one have been read.
        """
        ...

    def verify(self, tokens: Tokens, rows: Sequence[int]) -> list[list[Verdict]]:
        """Reads what it has not read of some sentences, in one forward pass.

        Args:
            tokens, rows: as for :meth:`draft`.

        Returns:
            for each row a verdict after every token that was read: on the token that follows it, and after the last
            one on what should follow.
        """
        ...

    def rollback(self, row: int, length: int) -> None:
        """Forgets all but the first ``length`` tokens of a sentence, the start symbol included."""
        ...
