"""Judges thresholds without running the models: what both models predict is recorded once, and BiLD is walked over it.

What a setting does next depends on five values only: the best token of the small model after the tokens so far and
its probability, the best token of the large model, and how unlikely the large model finds the small one's. All
settings start from the same place and mostly write the same tokens, so few such predictions serve thousands of
settings. They are read from a teacher-forced pass over what one setting has written, in which a position costs little.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from fairseq import utils
from fairseq.tasks import FairseqTask
from torch import Tensor

from ..decoding.constraints import Constraints
from ..decoding.counters import Counters
from ..decoding.decode import Policy, Reader, decode
from .arguments import search_options
from .methods import Method

LOGITS_BYTES = 1 << 28  # a pass over many sentences is cut so that its logits take less


@dataclass(slots=True)
class Prediction:
    """What the two models predict after some tokens, and what comes after their choices."""

    small_token: int
    small_probability: float
    large_token: int
    nats: float  # -log p_L of the small model's token
    after: dict[int, Prediction] = field(default_factory=dict)  # by token


class Missing(Exception):
    """A walk came to tokens whose predictions have not been recorded."""

    def __init__(self, tokens: list[int]):
        self.tokens = tokens


def walk(root: Prediction | None, policy: Policy, eos: int) -> tuple[list[int], Counters]:
    """What BiLD writes for one sentence, and its counters.

    Args:
        root: the predictions for the first token.
        policy: thresholds and rules; with infinite ``max_draft`` too.
        eos: the end symbol.

    Raises:
        Missing: predictions are needed that are not recorded.
    """
    tokens: list[int] = []
    places: list[Prediction | None] = [root]  # places[i]: the predictions after i tokens
    counters = Counters()
    verified = 0
    drafting = policy.start_small

    def append(token: int) -> None:
        tokens.append(token)
        places.append(places[-1].after.get(token))

    while True:
        while drafting and len(tokens) - verified < policy.max_draft:
            place = places[-1]
            if place is None:
                raise Missing(tokens)
            counters.small_calls += 1
            if place.small_probability < policy.fallback_threshold:
                counters.fallbacks += 1
                break
            append(place.small_token)
            counters.drafted += 1
            if tokens[-1] == eos:
                break
        if drafting and tokens[-1:] == [eos] and not policy.verify_end:
            break
        counters.large_calls += 1
        position = verified
        while position < len(tokens) and (
            places[position].nats <= policy.rollback_threshold or places[position].large_token == tokens[position]
        ):
            position += 1
        counters.accepted += position - verified
        counters.discarded += len(tokens) - position
        if position < len(tokens):
            counters.rollbacks += 1
            del tokens[position:], places[position + 1 :]
        if tokens[-1:] != [eos]:
            if places[-1] is None:
                raise Missing(tokens)
            append(places[-1].large_token)
        if tokens[-1] == eos:
            break
        verified = len(tokens)
        drafting = True
    counters.tokens = len(tokens)
    counters.unverified = counters.drafted - counters.accepted - counters.discarded
    return tokens, counters


class Recorder:
    """Runs a method's models over sentences and keeps what they predict at each place.

    Args:
        task: with the subset loaded.
        method: the two models.
        args: ``subset``, ``cuda`` and what ``add_search_arguments`` adds.
        ids: the sentences.
        batch_size: sentences in one pass.

    Attributes:
        roots: per sentence the predictions for its first token, once they are recorded.
    """

    def __init__(
        self, task: FairseqTask, method: Method, args: argparse.Namespace, ids: Sequence[int], batch_size: int
    ):
        self.roots: dict[int, Prediction] = {}
        self._ids = ids
        self.batch_size = batch_size
        self._dataset = task.dataset(args.subset)
        self._dictionary = task.target_dictionary
        self._search = search_options(args)
        self._cuda = args.cuda
        self._longest = min(model.max_decoder_positions() for model in (method.large, *method.small)) - 1
        self._generator = method.generator(task, self._search)

    def record_greedy(self, progress: Callable[[int], None] = lambda count: None) -> None:
        """Records every sentence along the large model's greedy output, from which most settings differ little.

        Args:
            progress: called with the number of sentences after each batch.
        """
        for chunk in self._chunks((i, ()) for i in self._ids if i not in self.roots):
            self._record(chunk, None)
            progress(len(chunk))

    def extend(self, missing: Iterable[tuple[int, Sequence[int]]], policy: Policy) -> None:
        """Records what is predicted after given tokens, and along what a policy writes from there.

        Args:
            missing: pairs of a sentence and its tokens so far.
            policy: one in the middle of those that will be walked, so that they often write the same.
        """
        for chunk in self._chunks({(i, tuple(tokens)) for i, tokens in missing}):
            self._record(chunk, policy)

    def dump(self) -> dict[str, list]:
        """All predictions as plain lists, for JSON; places follow the place that they come after."""
        found = {}
        for i, root in self.roots.items():
            rows, stack = [], [(-1, -1, root)]
            while stack:
                parent, token, place = stack.pop()
                values = (place.small_token, place.small_probability, place.large_token, place.nats)
                rows.append([parent, token, *values])
                stack += [(len(rows) - 1, after, child) for after, child in place.after.items()]
            found[str(i)] = rows
        return found

    def restore(self, dumped: dict[str, list]) -> None:
        """Takes over predictions that :meth:`dump` gave for the same sentences and models."""
        for i, rows in dumped.items():
            places = []
            for parent, token, *values in rows:
                places.append(Prediction(*values))
                if parent >= 0:
                    places[parent].after[token] = places[-1]
            self.roots[int(i)] = places[0]

    def _chunks(self, jobs: Iterable[tuple[int, tuple[int, ...]]]) -> list[list[tuple[int, tuple[int, ...]]]]:
        """Jobs with sources of like length together."""
        jobs = sorted(jobs, key=lambda job: (self._dataset.src_sizes[job[0]], job))
        return [jobs[start : start + self.batch_size] for start in range(0, len(jobs), self.batch_size)]

    @torch.no_grad()
    def _record(self, jobs: Sequence[tuple[int, tuple[int, ...]]], policy: Policy | None) -> None:
        """Completes sentences and keeps what both models predict along the new part.

        Args:
            jobs: pairs of a sentence and the tokens that it starts with.
            policy: what they are completed with; None for the large model's greedy choice.
        """
        batch = self._dataset.collater([{**self._dataset[i], "id": number} for number, (i, _) in enumerate(jobs)])
        jobs = [jobs[number] for number in batch["id"].tolist()]
        large, small = self._generator.readers(utils.move_to_cuda(batch) if self._cuda else batch)
        limits = [self._limits(i) for i, _ in jobs]
        written = decode(
            large,
            small if policy else None,
            self._dictionary.eos(),
            [tokens for _, tokens in jobs],
            policy or Policy(),
            max(limits, key=lambda limit: limit.max_len),
        )
        # Nothing follows the last token, the end symbol.
        tokens = [sentence.tokens[:-1] for sentence in written]
        rows = max(1, LOGITS_BYTES // (4 * max(map(len, tokens)) * len(self._dictionary)))
        for start in range(0, len(jobs), rows):
            chunk = range(start, min(start + rows, len(jobs)))
            for row in chunk:
                small.rollback(row, len(jobs[row][1]))
                large.rollback(row, len(jobs[row][1]))
            # An exit must have read before the layers above it go on.
            small_logits, large_logits = (
                self._predict(reader, tokens, chunk, jobs, limits) for reader in (small, large)
            )
            small_lprob, small_token = small_logits.max(dim=-1)
            nats = -large_logits.gather(-1, small_token[:, None]).squeeze(-1)
            columns = [x.tolist() for x in (small_token, small_lprob.exp(), large_logits.argmax(dim=-1), nats)]
            predictions = iter(zip(*columns, strict=True))
            for row in chunk:
                known = len(jobs[row][1])
                made = [Prediction(*values) for values in islice(predictions, len(tokens[row]) - known)]
                # After the longest length only the end symbol is left.
                self._insert(*jobs[row], tokens[row][1 + known :], made[: limits[row].max_len + 1 - known])

    def _predict(
        self,
        reader: Reader,
        tokens: Sequence[Sequence[int]],
        rows: Sequence[int],
        jobs: Sequence[tuple[int, tuple[int, ...]]],
        limits: Sequence[Constraints],
    ) -> Tensor:
        """Log-probabilities of what follows each token from a job's last one on: (predictions, vocab)."""
        firsts = [reader.consumed[row] for row in rows]
        logits, normalizers = reader.read(tokens, rows, last_only=False)
        kept, end = [], 0
        for row, first in zip(rows, firsts, strict=True):
            start, end = end, end + len(tokens[row]) - first
            start += len(jobs[row][1]) - first  # a reader that has not come as far reads more
            places = [(row, position) for position in range(len(jobs[row][1]), len(tokens[row]))]
            limits[row].apply(logits[start:end], normalizers[start:end], places, tokens, [0] * len(tokens))
            kept += range(start, end)
        return logits[kept] - normalizers[kept, None]

    def _limits(self, sentence: int) -> Constraints:
        search, words = self._search, self._dictionary
        longest = search.max_len_a * int(self._dataset.src_sizes[sentence]) + search.max_len_b
        return Constraints(
            pad=words.pad(),
            unk=words.unk(),
            eos=words.eos(),
            max_len=min(int(longest), self._longest),
            min_len=search.min_len,
            no_repeat_ngram_size=search.no_repeat_ngram_size,
        )

    def _insert(
        self, sentence: int, prefix: Sequence[int], tokens: Sequence[int], predictions: Sequence[Prediction]
    ) -> None:
        """Adds predictions where there are none yet: after the prefix, and after each of the tokens behind it."""
        after, (*way, last) = self.roots, (sentence, *prefix)
        for token in way:
            after = after[token].after
        for token, prediction in zip((last, *tokens), predictions, strict=False):
            after = after.setdefault(token, prediction).after
