"""fairseq's generator: samples in, hypotheses out."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from ..decoding.constraints import Constraints
from ..decoding.counters import Counters, summary, total
from ..decoding.decode import decode
from ..decoding.policies import Policy
from ..decoding.sentence import Sentence
from ..errors import BildError
from .files import write_text, writing
from .large_batches import useful_batch
from .pair import Pair
from .search import SearchOptions

logger = logging.getLogger(__name__)


class BildGenerator:
    """Generates with a large model and, if there is one, a small model that drafts for it.

    Takes the place of fairseq's ``SequenceGenerator``: ``generate(models, sample)``.

    Args:
        pair: the models.
        tgt_dict: target dictionary.
        policy: thresholds and rules.
        options: length limits, penalties and the like.
        source_lengths: length of every source in a batch, for ``match_source_len``.
        eos: end symbol; the dictionary's unless given.
        symbols_to_strip_from_output: symbols that fairseq leaves out of printed hypotheses.
        stats_path: where :meth:`finish` writes the counters; every sentence's are kept for it.
        max_batch: while more sentences of a batch than this are unfinished, nothing is drafted; None: that of
            :func:`~bild_fairseq.plugin.large_batches.useful_batch`.

    Raises:
        BildError: the pair's draft vocabulary lacks the end symbol.
    """

    def __init__(
        self,
        pair: Pair,
        tgt_dict: Dictionary,
        policy: Policy,
        options: SearchOptions | None = None,
        source_lengths: Callable[[dict[str, Any]], Tensor] | None = None,
        eos: int | None = None,
        symbols_to_strip_from_output: set[int] | None = None,
        stats_path: str | None = None,
        max_batch: float | None = None,
    ):
        self.pair = pair
        self.policy = policy
        self.options = options or SearchOptions()
        self.pad, self.unk = tgt_dict.pad(), tgt_dict.unk()
        self.eos = tgt_dict.eos() if eos is None else eos
        if pair.draft_vocabulary is not None and self.eos not in pair.draft_vocabulary.types:
            raise BildError(f"--bild-draft-vocab lacks the end symbol of this task, {tgt_dict[self.eos]}; add it")
        self.symbols_to_strip_from_output = (symbols_to_strip_from_output or set()) | {self.eos}
        self._max_batch = useful_batch(pair, policy) if max_batch is None else max_batch
        self._source_lengths = source_lengths
        self._stats_path = stats_path
        self._records: list[dict[str, Any]] = []
        self._sentences, self._total = 0, Counters()
        self._counting = threading.Lock()

    @torch.no_grad()
    def generate(
        self,
        models: Sequence[nn.Module],
        sample: dict[str, Any],
        prefix_tokens: Tensor | None = None,
        constraints: Tensor | None = None,
        bos_token: int | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Generates a batch.

        Args:
            models: ignored, as in fairseq; the generator was made with its models.
            sample: fairseq's batch; ``net_input`` with ``src_tokens`` (batch, source) and ``src_lengths``, and
                ``id`` if the sentences have names.
            prefix_tokens: (batch, length) tokens to start each hypothesis with; padding ends a row's prefix.
            constraints: not supported.
            bos_token: symbol that hypotheses start from; the end symbol unless given, as in fairseq.

        Returns:
            for each sentence a list of one hypothesis: ``tokens`` (length,), ``score``, ``positional_scores``
            (length,) in nats, ``steps`` (large-model calls), ``counters``, ``rounds``, and what fairseq's programs
            expect.

        Raises:
            BildError: lexical constraints, a minimum length above the maximum, a source that is longer than what the
                models can write where both must be of one length, or too few types to draft among.
        """
        if constraints is not None:
            raise BildError("lexical constraints are not supported; leave --constraints out")
        batch, width = sample["net_input"]["src_tokens"].shape
        limits, source_lengths = self._limits(sample["net_input"], width)
        prefixes = [prefix[: limits.max_len] for prefix in self._prefixes(prefix_tokens, batch)]
        if any(prefixes):
            limits = dataclasses.replace(limits, prefix_lengths=[len(prefix) for prefix in prefixes])
        large, small = self.pair.readers(sample["net_input"], limits, self.options.temperature)
        start = self.eos if bos_token is None else bos_token
        sentences = decode(large, small, start, prefixes, self.policy, self.eos, self._max_batch)
        self._record(sample, sentences)
        return [
            [self._hypothesis(sentence, None if source_lengths is None else source_lengths[row])]
            for row, sentence in enumerate(sentences)
        ]

    def counters(self) -> Counters:
        """The sum over all sentences generated so far."""
        return self._total

    def summary(self) -> str:
        """A readable account of all sentences generated so far."""
        alone = self.pair.alone and self.pair.exit_layer is not None
        model = f"exit {self.pair.exit_layer}" if alone else "large model"
        return summary(self._sentences, self.counters(), model)

    def stats(self) -> dict[str, Any]:
        """What ``--bild-stats`` writes: ``{"summary": {..}, "sentences": [{"id": .., ..}, ..]}``.

        Without a file to write them to, no sentences are recorded, so that memory does not grow with their number.
        """
        return {
            "summary": {"sentences": self._sentences, **self.counters().as_dict()},
            "sentences": self._records,
        }

    def finish(self) -> None:
        """Writes the statistics file, if one was asked for.

        Raises:
            BildError: it cannot be written.
        """
        if self._stats_path is None:
            return
        with writing(f"--bild-stats {self._stats_path}"):
            write_text(self._stats_path, json.dumps(self.stats(), indent=1) + "\n")

    def _limits(self, net_input: dict[str, Any], width: int) -> tuple[Constraints, list[int] | None]:
        options = self.options
        lengths = None
        if options.match_source_len:
            lengths = self._source_lengths(net_input).tolist()
            max_len = max(lengths)
            if max_len > self.pair.max_positions - 1:
                raise BildError(
                    f"--match-source-len: a source has {max_len} tokens, the models write at most "
                    f"{self.pair.max_positions - 1}; leave longer sources out"
                )
        else:
            max_len = options.longest(width, self.pair.max_positions)
        if options.min_len > max_len:
            raise BildError(f"--min-len {options.min_len} is above the maximum length, {max_len}; lower it")
        self._check_enough_types(max_len)
        limits = Constraints(
            pad=self.pad,
            unk=self.unk,
            eos=self.eos,
            max_len=max_len,
            min_len=options.min_len,
            exact_lengths=lengths,
            unk_penalty=options.unk_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
        )
        return limits, lengths

    def _check_enough_types(self, max_len: int) -> None:
        """Refuses a draft vocabulary of which blocked n-grams could leave nothing to draft."""
        size, vocabulary = self.options.no_repeat_ngram_size, self.pair.draft_vocabulary
        if size and vocabulary is not None and len(vocabulary.types) <= max_len:
            raise BildError(
                f"--no-repeat-ngram-size {size} could forbid all {len(vocabulary.types)} types of --bild-draft-vocab "
                f"within {max_len} tokens; give it more than that"
            )

    def _prefixes(self, prefix_tokens: Tensor | None, batch: int) -> list[list[int]]:
        if prefix_tokens is None:
            return [[] for _ in range(batch)]
        prefixes = []
        for tokens in prefix_tokens.tolist():
            length = next((i for i, token in enumerate(tokens) if token == self.pad), len(tokens))
            end = next((i + 1 for i, token in enumerate(tokens[:length]) if token == self.eos), length)
            prefixes.append(tokens[:end])
        return prefixes

    def _record(self, sample: dict[str, Any], sentences: Sequence[Sentence]) -> None:
        with self._counting:
            ids = range(self._sentences, self._sentences + len(sentences))
            self._sentences += len(sentences)
            self._total = total([self._total, *(sentence.counters for sentence in sentences)])
            if sample.get("id") is not None:
                ids = sample["id"].tolist()
            for name, sentence in zip(ids, sentences, strict=True):
                if sentence.failed:
                    logger.warning("sentence %s: %s; it ends there, with score -inf", name, sentence.failed)
                if self._stats_path is not None:
                    self._records.append({"id": name, **sentence.counters.as_dict()})

    def _hypothesis(self, sentence: Sentence, source_length: int | None) -> dict[str, Any]:
        score = sum(sentence.scores)
        if self.options.normalize_scores:
            # With torch's numbers a penalty without bounds gives 0 or infinity, as in fairseq, and no error.
            length = torch.tensor(sentence.generated, dtype=torch.float64)
            score = float(torch.tensor(score, dtype=torch.float64) / length**self.options.len_penalty)
        if source_length is not None and sentence.generated - 1 > source_length:
            score = -torch.inf
        return {
            "tokens": torch.tensor(sentence.tokens[1:]),
            "score": torch.tensor(score),
            "attention": torch.empty(0),
            "alignment": torch.empty(0),
            "positional_scores": torch.tensor(sentence.scores),
            "steps": sentence.counters.large_calls,
            "counters": sentence.counters,
            "rounds": sentence.rounds,
        }
