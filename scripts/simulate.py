"""Judges thresholds without running the models: what both models predict is recorded once, and BiLD is walked over it.

What a setting does next depends on five values only: the best token of the small model after the tokens so far and
its probability, the best token of the large model, and how unlikely the large model finds the small one's. All
settings start from the same place and mostly write the same tokens, so few such predictions serve thousands of
settings. They are read from a teacher-forced pass over whole sentences, in which each position costs next to nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import Method, parse_precision, search_options
from fairseq import utils
from fairseq.tasks import FairseqTask
from torch import Tensor

from bild_fairseq.decode import Policy
from bild_fairseq.generator import BildGenerator
from bild_fairseq.precision import rounded_copy
from bild_fairseq.stats import Counters

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
        roots: per sentence the predictions for its first token; None until recorded.
    """

    def __init__(
        self, task: FairseqTask, method: Method, args: argparse.Namespace, ids: Sequence[int], batch_size: int
    ):
        models = [method.large, *method.small]
        self.roots: dict[int, Prediction | None] = dict.fromkeys(ids)
        self._dataset = task.dataset(args.subset)
        # The models that the generators decode with, as fairseq's own.
        self._exit_layer = method.exit_layer
        precision, small_precision = parse_precision(method.precision)
        self._large = rounded_copy(method.large, precision)
        self._small = [rounded_copy(model, small_precision) for model in method.small]
        self._dictionary = task.target_dictionary
        self._search = search_options(args)
        self._cuda = args.cuda
        self.batch_size = batch_size
        self._longest = min(model.max_decoder_positions() for model in models) - 1
        self._greedy = method.greedy(task, self._search)
        self._bild = method.generator(task, self._search)

    def record_greedy(self, progress: Callable[[int], None] = lambda count: None) -> None:
        """Records every sentence along the large model's greedy output, from which most settings differ little.

        Args:
            progress: called with the number of sentences after each batch.
        """
        for chunk in self._chunks([(i, ()) for i, root in self.roots.items() if root is None]):
            self._record(self._complete(self._greedy, chunk))
            progress(len(chunk))

    def extend(self, missing: Iterable[tuple[int, Sequence[int]]], policy: Policy) -> None:
        """Records what is predicted after given tokens, and along what a policy writes from there.

        Args:
            missing: pairs of a sentence and its tokens so far.
            policy: one in the middle of those that will be walked, so that they often write the same.
        """
        self._bild.policy = policy
        for chunk in self._chunks({(i, tuple(tokens)) for i, tokens in missing}):
            self._record(self._complete(self._bild, chunk))

    def dump(self) -> dict[str, list]:
        """All predictions as plain lists, for JSON; places follow the place that they come after."""
        found = {}
        for i, root in self.roots.items():
            rows, stack = [], [(-1, -1, root)] if root else []
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
            self.roots[int(i)] = places[0] if places else None

    def _chunks(self, jobs: Iterable[tuple[int, tuple[int, ...]]]) -> list[list[tuple[int, tuple[int, ...]]]]:
        """Jobs of like length together."""
        jobs = sorted(jobs, key=lambda job: (len(job[1]), self._dataset.src_sizes[job[0]], job))
        return [jobs[start : start + self.batch_size] for start in range(0, len(jobs), self.batch_size)]

    def _collate(self, jobs: Sequence[tuple[int, Sequence[int]]]) -> dict[str, Any]:
        """A batch whose ids number the jobs, with the jobs' tokens as targets."""
        items = [
            {**self._dataset[i], "id": number, "target": torch.tensor([*tokens] or [self._dictionary.eos()])}
            for number, (i, tokens) in enumerate(jobs)
        ]
        batch = self._dataset.collater(items)
        return utils.move_to_cuda(batch) if self._cuda else batch

    def _complete(
        self, generator: BildGenerator, jobs: Sequence[tuple[int, tuple[int, ...]]]
    ) -> list[tuple[int, list[int]]]:
        """Whole sentences that start with the jobs' tokens."""
        batch = self._collate(jobs)
        prefixes = batch["target"] if jobs[0][1] else None
        hypotheses = generator.generate([], batch, prefix_tokens=prefixes)
        numbers = batch["id"].tolist()
        return [(jobs[n][0], hypos[0]["tokens"].tolist()) for n, hypos in zip(numbers, hypotheses, strict=True)]

    @torch.no_grad()
    def _record(self, sentences: Sequence[tuple[int, list[int]]]) -> None:
        width = max(len(tokens) for _, tokens in sentences)
        rows = max(1, LOGITS_BYTES // (4 * width * len(self._dictionary)))
        for start in range(0, len(sentences), rows):
            chunk = sentences[start : start + rows]
            batch = self._collate(chunk)
            numbers = batch["id"].tolist()
            small, large = self._log_probabilities(batch["net_input"])
            for lprobs in (small, large):
                for row, number in enumerate(numbers):
                    self._limit(lprobs[row], *chunk[number])
            small_lprob, small_token = small.max(dim=-1)
            nats = -large.gather(-1, small_token[..., None]).squeeze(-1)
            columns = [x.tolist() for x in (small_token, small_lprob.exp(), large.argmax(dim=-1), nats)]
            for row, number in enumerate(numbers):
                self._insert(
                    *chunk[number],
                    [Prediction(*values) for values in zip(*(column[row] for column in columns), strict=True)],
                )

    def _log_probabilities(self, net_input: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Of the small model and the large one, each (batch, time, vocab) in float32."""
        if self._exit_layer is not None:
            logits, extra = self._large(**net_input, return_exit_logits=True)
            small = [extra["exit_logits"][self._exit_layer]]
        else:
            logits, _ = self._large(**net_input)
            small = [model(**net_input)[0] for model in self._small]
        members = torch.stack([torch.log_softmax(member.float(), dim=-1) for member in small])
        mean = members[0] if len(small) == 1 else torch.logsumexp(members, dim=0) - math.log(len(small))
        return mean, torch.log_softmax(logits.float(), dim=-1)

    def _limit(self, lprobs: Tensor, sentence: int, tokens: Sequence[int]) -> None:
        """What holds for both models at each place of a sentence, as in fairseq, in place.

        Args:
            lprobs: (time, vocab), the predictions for each token and perhaps padding.
            sentence: its number.
            tokens: that the predictions are for.
        """
        eos, search = self._dictionary.eos(), self._search
        longest, history = self._max_len(sentence), [eos, *tokens]
        only_end = lprobs[longest:, eos].clone()
        lprobs[:, self._dictionary.pad()] = -math.inf
        lprobs[: search.min_len, eos] = -math.inf
        if size := search.no_repeat_ngram_size:
            for position in range(len(tokens)):
                # Every token that has followed the last size - 1 ones before.
                last = tuple(history[position + 2 - size : position + 1])
                for start in range(position + 2 - size):
                    if tuple(history[start : start + size - 1]) == last:
                        lprobs[position, history[start + size - 1]] = -math.inf
        lprobs[longest:] = -math.inf
        lprobs[longest:, eos] = only_end

    def _max_len(self, sentence: int) -> int:
        length = self._search.max_len_a * int(self._dataset.src_sizes[sentence]) + self._search.max_len_b
        return min(int(length), self._longest)

    def _insert(self, sentence: int, tokens: Sequence[int], predictions: Sequence[Prediction]) -> None:
        """Adds the predictions for each of a sentence's tokens where there are none yet."""
        place = self.roots[sentence] = self.roots[sentence] or predictions[0]
        # After the longest length only the end symbol is left.
        for token, prediction in zip(tokens[: self._max_len(sentence)], predictions[1:], strict=False):
            place = place.after.setdefault(token, prediction)
