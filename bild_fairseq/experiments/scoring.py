"""Quality of outputs: BLEU or ROUGE of a corpus, the statistics of its sentences, and paired differences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe import DEFAULT_ENCODER_JSON, DEFAULT_VOCAB_BPE
from fairseq.tasks import FairseqTask

from ..errors import BildError
from .bootstrap import bootstrap_weights, interval
from .subwords import GPT2, Marked, SentencePiece, Subwords

METRIC_NAMES = {"bleu": "BLEU", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}


@dataclass(frozen=True)
class ScoreOptions:
    """What outputs are scored with.

    Attributes:
        metric: one of :data:`METRIC_NAMES`.
        reference: file of raw reference text, a sentence a line; None for the data's targets.
        bpe: subwords of the data: one of :data:`~bild_fairseq.experiments.subwords.SUBWORDS`.
        gpt2_encoder_json: for ``gpt2``.
        gpt2_vocab_bpe: for ``gpt2``.
        sentencepiece_model: for ``sentencepiece``.
    """

    metric: str = "bleu"
    reference: str | None = None
    bpe: str = "subword_nmt"
    gpt2_encoder_json: str = DEFAULT_ENCODER_JSON
    gpt2_vocab_bpe: str = DEFAULT_VOCAB_BPE
    sentencepiece_model: str | None = None

    def subwords(self) -> Subwords:
        """What joins the data's subwords.

        Raises:
            BildError: a vocabulary is missing.
        """
        if self.bpe == "gpt2":
            return GPT2(self.gpt2_encoder_json, self.gpt2_vocab_bpe)
        if self.bpe == "sentencepiece":
            return SentencePiece(self.sentencepiece_model)
        return Marked("@@" if self.bpe == "subword_nmt" else "")


class Scorer:
    """Quality of outputs against the references, for a corpus and from statistics of its sentences.

    Without a reference file, references are the data's targets. Texts that are tokenized (all but those of GPT-2's
    subwords and SentencePiece) are detokenized if there is a reference file.

    Args:
        task: with the subset loaded.
        subset: whose sentences are scored.
        ids: the sentences that will be scored.
        options: metric, reference and subwords.

    Raises:
        BildError: the reference, a vocabulary or a package is missing or does not fit.
    """

    def __init__(self, task: FairseqTask, subset: str, ids: Sequence[int], options: ScoreOptions):
        self._dictionary = task.target_dictionary
        self._ids = sorted(ids)
        self._metric = options.metric
        self._subwords = options.subwords()
        tokenized = self._subwords.tokenized
        raw = bool(options.reference) or not tokenized
        self._detokenizer = None
        if options.reference and tokenized:
            from sacremoses import MosesDetokenizer  # its import compiles patterns for half a second

            self._detokenizer = MosesDetokenizer(lang=getattr(task.cfg, "target_lang", None) or "en")
        tokenizer = {} if raw else {"tokenize": "none", "force": True}
        self._bleu = sacrebleu.BLEU(**tokenizer)
        # The same counts; without this sacrebleu warns at each sentence that it has no score of its own.
        self._sentence_bleu = sacrebleu.BLEU(effective_order=True, **tokenizer)
        self._rouge = _rouge_scorer(self._metric) if self._metric != "bleu" else None
        self._references = self._read_references(task, subset, options)
        self._cache: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}

    @property
    def name(self) -> str:
        """The metric as a person writes it."""
        return METRIC_NAMES[self._metric]

    @property
    def signature(self) -> str:
        """What must be equal for scores to be comparable; of BLEU, after the first score."""
        if self._rouge is not None:
            return f"rouge-score {self._metric}, F1, stemmed"
        return str(self._bleu.get_signature())

    def text(self, tokens: Sequence[int]) -> str:
        """An output as text without subword marks, detokenized if the references are."""
        line = self.plain(self._dictionary, tokens)
        return self._detokenizer.detokenize(line.split()) if self._detokenizer else line

    def plain(self, dictionary: Dictionary, tokens: Sequence[int]) -> str:
        """Tokens of either side as text without subword marks."""
        return self._subwords.join(dictionary.string(torch.tensor(tokens, dtype=torch.long)))

    def piece(self, token: int) -> str:
        """One token of the target side with the space that belongs to it: the pieces of a text make it up."""
        return self._subwords.piece(self._dictionary[token])

    def texts(self, outputs: dict[int, list[int]]) -> list[str]:
        """Outputs as text, in order of the sentences."""
        return [self.text(outputs[i]) for i in self._ids]

    def reference(self, i: int) -> str:
        return self._references[i]

    def score(self, outputs: dict[int, list[int]]) -> float:
        """Of the corpus, 0 to 100."""
        if self._rouge is not None:
            return float(self.from_statistics(self.statistics(outputs).sum(axis=0)))
        return self._bleu.corpus_score(self.texts(outputs), [list(self._references.values())]).score

    def statistics(self, outputs: dict[int, list[int]]) -> np.ndarray:
        """Per sentence what the corpus score is made of: (sentences, k); rows add up."""
        return np.stack([self.sentence(i, outputs[i]) for i in self._ids])

    def sentence(self, i: int, tokens: Sequence[int]) -> np.ndarray:
        """The statistics (k,) of one sentence's output; repeated outputs cost nothing."""
        key = i, tuple(tokens)
        if key not in self._cache:
            self._cache[key] = self._compare(self._references[i], self.text(tokens))
        return self._cache[key]

    def from_statistics(self, total: np.ndarray) -> np.ndarray:
        """Corpus scores, 0 to 100, of summed statistics (..., k): (...)."""
        total = np.asarray(total, dtype=np.float64)
        return 100 * (total[..., 0] / total[..., 1] if self._rouge is not None else _bleu(total))

    def _compare(self, reference: str, text: str) -> np.ndarray:
        if self._rouge is not None:
            score = self._rouge.score(*(_split(line, self._metric) for line in (reference, text)))[self._metric]
            return np.array([score.fmeasure, 1.0])
        score = self._sentence_bleu.sentence_score(text, [reference])
        return np.array([score.sys_len, score.ref_len, *score.counts, *score.totals], dtype=np.float64)

    def _read_references(self, task: FairseqTask, subset: str, options: ScoreOptions) -> dict[int, str]:
        if not options.reference:
            dataset = task.dataset(subset)
            if dataset.tgt is None:
                raise BildError(f"{task.cfg.data}: {subset} has no target side to score against; give --reference")
            return {i: self.text(dataset[i]["target"].tolist()) for i in self._ids}
        try:
            lines = Path(options.reference).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BildError(f"--reference {options.reference}: cannot read it: {error}") from error
        if len(lines) <= self._ids[-1]:
            raise BildError(
                f"--reference {options.reference}: has {len(lines)} lines, sentence {self._ids[-1]} has none; "
                "give the raw text that the subset was made from"
            )
        return {i: lines[i] for i in self._ids}


def _bleu(total: np.ndarray) -> np.ndarray:
    """BLEU, 0 to 1, for many corpora at once, as sacrebleu with its defaults computes it for one.

    Args:
        total: (..., 10) output length, reference length, n-gram matches (4), n-grams (4).
    """
    length, reference, matches, ngrams = total[..., 0], total[..., 1], total[..., 2:6], total[..., 6:]
    with np.errstate(divide="ignore", invalid="ignore"):
        # sacrebleu's "exp" smoothing: the k-th order without a match counts 1 / 2^k of one.
        smoothed = np.where(matches > 0, matches, 0.5 ** np.cumsum(matches == 0, axis=-1))
        score = np.exp(np.log(smoothed / ngrams).mean(axis=-1) + np.minimum(0, 1 - reference / length))
    return np.where((matches.sum(axis=-1) > 0) & (ngrams > 0).all(axis=-1), score, 0.0)


def quality_change(scorer: Scorer, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Paired difference of two outputs' corpus scores, and its 95 % bootstrap interval over sentences.

    Args:
        scorer: whose statistics these are.
        ours: (sentences, k).
        theirs: (sentences, k), what is compared with.
    """
    weights = bootstrap_weights(len(ours))
    resampled = scorer.from_statistics(weights @ ours) - scorer.from_statistics(weights @ theirs)
    change = scorer.from_statistics(ours.sum(axis=0)) - scorer.from_statistics(theirs.sum(axis=0))
    return float(change), *interval(resampled)


def _rouge_scorer(metric: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise BildError(f"--metric {metric} needs the package rouge-score: pip install rouge-score") from error
    return RougeScorer([metric], use_stemmer=True)


def _split(text: str, metric: str) -> str:
    """ROUGE-Lsum compares sentence by sentence and wants a line for each."""
    return re.sub(r"(?<=[.!?]) +", "\n", text) if metric == "rougeLsum" else text
