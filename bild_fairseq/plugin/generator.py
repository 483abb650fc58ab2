"""fairseq's face of the decoding loop: samples in, hypotheses out."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from ..decoding.constraints import Constraints
from ..decoding.counters import Counters, summary, total
from ..decoding.decode import decode
from ..decoding.policies import Policy
from ..decoding.reader import Reader
from ..decoding.sentence import Sentence
from ..engines.choose import engine_for
from ..engines.readers import combined
from ..errors import BildError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchOptions:
    """fairseq's generation options that greedy decoding honours, with fairseq's defaults."""

    max_len_a: float = 0
    max_len_b: int = 200
    min_len: int = 1
    match_source_len: bool = False
    normalize_scores: bool = True
    len_penalty: float = 1.0
    unk_penalty: float = 0.0
    temperature: float = 1.0
    no_repeat_ngram_size: int = 0


class BildGenerator:
    """Generates with a large model and, if there is one, a small model that drafts for it.

    Takes the place of fairseq's ``SequenceGenerator``: ``generate(models, sample)``. The models' weights are laid
    out for decoding when the generator is made; later changes to them are not seen.

    Args:
        models: the large model, or the members of an ensemble; they are put into eval mode, as fairseq does.
        tgt_dict: target dictionary.
        policy: thresholds and rules.
        options: length limits, penalties and the like.
        small_models: the small model, or the members of an ensemble, on the same device; empty for none.
        exit_layer: decoder layer, counted from the bottom, whose exit in ``models`` drafts; with ``alone`` it
            decodes without the layers above. Not together with ``small_models``.
        alone: no drafting: ``models``, or their exit, decode greedily.
        source_lengths: length of every source in a batch, for ``match_source_len``.
        eos: end symbol; the dictionary's unless given.
        symbols_to_strip_from_output: symbols that fairseq leaves out of printed hypotheses.
        stats_path: where :meth:`finish` writes the counters.
        precision: of the models' weights, see :mod:`bild_fairseq.engines.precision`.
        small_precision: of the small models' weights; None for the same.

    Raises:
        BildError: a decoder has an option that is not supported; the message names it.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        tgt_dict: Dictionary,
        policy: Policy,
        options: SearchOptions | None = None,
        small_models: Sequence[nn.Module] = (),
        exit_layer: int | None = None,
        alone: bool = False,
        source_lengths: Callable[[dict[str, Any]], Tensor] | None = None,
        eos: int | None = None,
        symbols_to_strip_from_output: set[int] | None = None,
        stats_path: str | None = None,
        precision: str = "float32",
        small_precision: str | None = None,
    ):
        self.policy = policy
        self.options = options or SearchOptions()
        self.pad, self.unk = tgt_dict.pad(), tgt_dict.unk()
        self.eos = tgt_dict.eos() if eos is None else eos
        self.symbols_to_strip_from_output = (symbols_to_strip_from_output or set()) | {self.eos}
        self._large = [engine_for(model, precision, "large") for model in models]
        self._small = [engine_for(model, small_precision or precision, "small") for model in small_models]
        self._exit_layer = exit_layer
        self._alone = alone
        self._source_lengths = source_lengths
        self._max_positions = min(model.max_decoder_positions() for model in (*models, *small_models))
        self._stats_path = stats_path
        self._records: list[dict[str, Any]] = []
        self._counters: list[Counters] = []

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
            (length,) in nats, ``steps`` (large-model calls), ``counters``, and what fairseq's programs expect.

        Raises:
            BildError: lexical constraints, or a minimum length above the maximum.
        """
        if constraints is not None:
            raise BildError("lexical constraints are not supported; leave --constraints out")
        batch, width = sample["net_input"]["src_tokens"].shape
        limits, source_lengths = self._limits(sample["net_input"], width)
        prefixes = [prefix[: limits.max_len] for prefix in self._prefixes(prefix_tokens, batch)]
        if any(prefixes):
            limits = dataclasses.replace(limits, prefix_lengths=[len(prefix) for prefix in prefixes])
        large, small = self.readers(sample, limits)
        start = self.eos if bos_token is None else bos_token
        sentences = decode(large, small, start, prefixes, self.policy, self.eos)
        self._record(sample, sentences)
        return [
            [self._hypothesis(sentence, None if source_lengths is None else source_lengths[row])]
            for row, sentence in enumerate(sentences)
        ]

    @torch.no_grad()
    def readers(self, sample: dict[str, Any], constraints: Constraints) -> tuple[Reader, Reader | None]:
        """Runs the encoders; returns the large reader and the small one, if there is one, for ``decode``.

        Args:
            sample: as for :meth:`generate`.
            constraints: of the batch.
        """
        net_input = {name: value for name, value in sample["net_input"].items() if name != "prev_output_tokens"}
        small = [engine.reader(engine.start(net_input), (0, engine.depth), constraints) for engine in self._small]
        large = []
        for engine in self._large:
            state = engine.start(net_input)
            if self._exit_layer is None or self._alone:
                large.append(engine.reader(state, (0, self._exit_layer or engine.depth), constraints))
            else:
                shallow = engine.reader(state, (0, self._exit_layer), constraints, keep=True)
                small.append(shallow)
                large.append(engine.reader(state, (self._exit_layer, engine.depth), constraints, below=shallow))
        temperature = self.options.temperature
        return combined(large, constraints, temperature), combined(small, constraints, temperature) if small else None

    def counters(self) -> Counters:
        """The sum over all sentences generated so far."""
        return total(self._counters)

    def summary(self) -> str:
        """A readable account of all sentences generated so far."""
        return summary(len(self._records), self.counters())

    def stats(self) -> dict[str, Any]:
        """What ``--bild-stats`` writes: ``{"summary": {..}, "sentences": [{"id": .., ..}, ..]}``."""
        return {
            "summary": {"sentences": len(self._records), **self.counters().as_dict()},
            "sentences": self._records,
        }

    def finish(self) -> None:
        """Writes the statistics file, if one was asked for."""
        if self._stats_path is None:
            return
        temporary = Path(f"{self._stats_path}.tmp")
        temporary.write_text(json.dumps(self.stats(), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._stats_path)

    def _limits(self, net_input: dict[str, Any], width: int) -> tuple[Constraints, list[int] | None]:
        options = self.options
        lengths = None
        if options.match_source_len:
            lengths = self._source_lengths(net_input).tolist()
            max_len = max(lengths)
        else:
            max_len = min(int(options.max_len_a * width + options.max_len_b), self._max_positions - 1)
        if options.min_len > max_len:
            raise BildError(f"--min-len {options.min_len} is above the maximum length, {max_len}; lower it")
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
        ids = sample.get("id")
        if ids is None:
            ids = range(len(self._records), len(self._records) + len(sentences))
        else:
            ids = ids.tolist()
        for name, sentence in zip(ids, sentences, strict=True):
            if sentence.failed:
                logger.warning("sentence %s: %s; it ends there, with score -inf", name, sentence.failed)
            self._counters.append(sentence.counters)
            self._records.append({"id": name, **sentence.counters.as_dict()})

    def _hypothesis(self, sentence: Sentence, source_length: int | None) -> dict[str, Any]:
        score = sum(sentence.scores)
        if self.options.normalize_scores:
            score /= sentence.generated**self.options.len_penalty
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
        }
