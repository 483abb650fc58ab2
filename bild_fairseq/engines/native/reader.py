"""A reader that drafts and verifies in one call into C."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from ...decoding.reader import Prediction, Tokens, Verdict
from ..readers import EngineReader


class NativeReader(EngineReader):
    """Some layers of a ``NativeEngine``. Where constraints depend on the sentence it works like other readers."""

    def draft(self, tokens: Tokens, rows: Sequence[int], limit: float, threshold: float) -> list[list[Prediction]]:
        if self.constraints.depend_on_sentence:
            return super().draft(tokens, rows, limit, threshold)
        step = self.next_pass(tokens, rows, "last", drafting=True)
        drafts = self.engine.draft(self.state, step, self.constraints, limit, threshold)
        for row, predictions in zip(rows, drafts, strict=True):
            self.consumed[row] += len(predictions) - 1
        return drafts

    def verify(self, tokens: Tokens, rows: Sequence[int]) -> list[list[Verdict]]:
        if self.constraints.depend_on_sentence:
            return super().verify(tokens, rows)
        step = self.next_pass(tokens, rows, "all")
        drafted = [
            token for row, start in zip(rows, step.starts, strict=True) for token in (*tokens[row][start + 1 :], -1)
        ]
        verdicts = iter(self.engine.verify(self.state, step, self.constraints, drafted))
        return [list(islice(verdicts, len(unread))) for unread in step.tokens]
