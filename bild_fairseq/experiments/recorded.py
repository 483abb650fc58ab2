"""Recorded predictions of two models, which ``decode`` reads instead of running the models.

What BiLD does next depends on few values only: the small model's best token after the tokens so far and its
probability, the large model's best token, and how likely the large model finds the small one's. All settings begin
alike and mostly write the same tokens, so few such predictions serve thousands of settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..decoding.decode import decode
from ..decoding.policies import Policy, falls_back
from ..decoding.reader import Prediction, Reader, Tokens, Verdict
from ..decoding.sentence import Sentence


@dataclass(slots=True)
class Node:
    """What the two models predict after some tokens, and what is recorded after each next token."""

    prediction: Prediction  # of the small model
    verdict: Verdict  # of the large model, on the small model's best token
    after: dict[int, Node] = field(default_factory=dict)


# Where nothing is recorded a prediction is not a number, and ``decode`` gives the sentence up.
_NOT_RECORDED = Prediction(-1, math.nan), Verdict(-1, math.nan, math.nan)


class RecordedReader(Reader):
    """One of the two models, on sentences whose predictions are recorded.

    Args:
        roots: for each sentence what is predicted for its first token; None if that is not recorded.
        eos: the end symbol.
    """

    def __init__(self, roots: Sequence[Node | None], eos: int):
        self._roots, self._eos = roots, eos
        # Per sentence, for each token that has been read, what is predicted after it; None where it is not recorded.
        self._paths: list[list[Node | None]] = [[] for _ in roots]

    def draft(self, tokens: Tokens, rows: Sequence[int], limit: float, threshold: float) -> list[list[Prediction]]:
        return [self._draft(self._read(tokens, row), limit, threshold) for row in rows]

    def _draft(self, path: list[Node | None], limit: float, threshold: float) -> list[Prediction]:
        predictions = []
        while True:
            node = path[-1]
            if node is None:
                return [*predictions, _NOT_RECORDED[0]]
            token, lprob = node.prediction
            predictions.append(node.prediction)
            if token == self._eos or falls_back(lprob, threshold) or len(predictions) >= limit:
                return predictions
            path.append(node.after.get(token))

    def verify(self, tokens: Tokens, rows: Sequence[int]) -> list[list[Verdict]]:
        verdicts = []
        for row in rows:
            begin = len(self._paths[row])
            new = self._read(tokens, row)[begin:]
            verdicts.append([_NOT_RECORDED[1] if node is None else node.verdict for node in new])
            if len(tokens[row]) > 1 and tokens[row][-1] == self._eos:
                verdicts[-1][-1] = Verdict(self._eos, 0.0, math.nan)  # nothing follows the end
        return verdicts

    def rollback(self, row: int, length: int) -> None:
        del self._paths[row][length:]

    def _read(self, tokens: Tokens, row: int) -> list[Node | None]:
        """What is predicted after each token of a sentence."""
        path = self._paths[row]
        if not path:
            path.append(self._roots[row])  # after the start symbol
        for token in tokens[row][len(path) :]:
            node = path[-1]
            path.append(node.after.get(token) if node is not None else None)
        return path


def walk(roots: Sequence[Node | None], policy: Policy, eos: int) -> list[Sentence]:
    """What BiLD makes of some sentences with recorded predictions.

    Returns:
        the sentences, in order. One that needs a prediction which is not recorded has ``failed``; it is needed after
        all tokens but the last, with which ``decode`` ended it.
    """
    readers = RecordedReader(roots, eos), RecordedReader(roots, eos)
    return decode(*readers, eos, [[]] * len(roots), policy, eos)


def insert(
    roots: dict[int, Node], sentence: int, prefix: Sequence[int], tokens: Sequence[int], nodes: Sequence[Node]
) -> None:
    """Adds predictions where there are none yet: after a prefix, and after each of the tokens behind it."""
    after, (*way, last) = roots, (sentence, *prefix)
    for token in way:
        after = after[token].after
    for token, node in zip((last, *tokens), nodes, strict=False):
        after = after.setdefault(token, node).after


def dump(roots: dict[int, Node]) -> dict[str, list]:
    """All predictions of sentences as plain lists, for JSON; each follows the one that it comes after."""
    return {str(sentence): list(_rows(root)) for sentence, root in roots.items()}


def _rows(root: Node) -> Iterator[list]:
    number, stack = 0, [(-1, -1, root)]
    while stack:
        parent, token, node = stack.pop()
        yield [parent, token, *node.prediction, *node.verdict]
        stack += [(number, after, child) for after, child in node.after.items()]
        number += 1


def restore(dumped: dict[str, list]) -> dict[int, Node]:
    """The predictions that :func:`dump` made lists of."""
    roots = {}
    for sentence, rows in dumped.items():
        nodes: list[Node] = []
        for parent, token, *values in rows:
            nodes.append(Node(Prediction(*values[:2]), Verdict(*values[2:])))
            if parent >= 0:
                nodes[parent].after[token] = nodes[-1]
        roots[int(sentence)] = nodes[0]
    return roots
