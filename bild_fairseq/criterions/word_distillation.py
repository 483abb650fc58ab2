"""Trains a small model on a text and on a large model's distribution at each of its positions.

Word-level distillation (Kim and Rush, *Sequence-Level Knowledge Distillation*, EMNLP 2016). With the large model's own
greedy output as the text, the small model learns what the large one writes and how sure it is: the prediction
alignment of Kim et al., *Speculative Decoding with Big Little Decoder* (NeurIPS 2023), with softer targets.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from fairseq import checkpoint_utils, utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from omegaconf import II

from ..errors import BildError
from .logged import log_bits, log_head

NAME = "word_distillation_cross_entropy"

_SUMS = ("loss", "nll_loss", "teacher_kl", "n_correct", "ntokens", "sample_size")


@dataclass
class WordDistillationCrossEntropyConfig(FairseqDataclass):
    teacher_path: str = field(
        default="",
        metadata={"help": "checkpoint of the large model, with the same dictionaries"},
    )
    teacher_weight: float = field(
        default=0.5,
        metadata={"help": "0 to 1: how much is learned from the large model's distribution rather than from the text"},
    )
    teacher_top: int = field(
        default=0,
        metadata={
            "help": "learn from so many of the large model's most probable words only, and keep them in memory, six "
            "bytes each, so that the large model reads every sentence once (0: all words, read in every epoch)"
        },
    )
    teacher_choice: bool = field(
        default=False,
        metadata={
            "help": "learn the large model's first choice at each position instead of the text's word: for texts that "
            "the large model has not written itself"
        },
    )
    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion(NAME, dataclass=WordDistillationCrossEntropyConfig)
class WordDistillationCrossEntropyCriterion(FairseqCriterion):
    """(1 - w) times the cross-entropy with the targets plus w times the divergence from the teacher.

    With ``--teacher-choice`` the target at each position is the teacher's most probable word after the text so far. A
    text that the trained model has written then shows where it goes, and is not learned itself: on-policy distillation
    (Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024).

    The divergence is that of Kullback and Leibler from the teacher's distribution, given the source and the target
    words so far, to the trained model's. With ``--teacher-top`` the teacher's distribution is that of its most
    probable words, made to sum to 1. The teacher stays as it is, runs in evaluation mode next to the trained model, and
    is no part of its checkpoints.

    Logged, in training and validation: ``loss``, bits a token, or a sentence with ``--sentence-avg``; ``nll_loss``,
    the cross-entropy with the targets, and ``teacher_kl``, the divergence, both in bits a token; ``ppl``, 2 to the
    power of ``nll_loss``; ``accuracy``, the percentage of target tokens that are the most probable one.

    Raises:
        BildError: the weight is outside 0 to 1, the number of words is negative, or the teacher is missing or does not
            fit the data.
    """

    def __init__(self, task, sentence_avg, teacher_path, teacher_weight, teacher_top=0, teacher_choice=False):
        super().__init__(task)
        if not 0 <= teacher_weight <= 1:
            raise BildError(f"--teacher-weight {teacher_weight}: give a weight from 0 to 1")
        if teacher_top < 0:
            raise BildError(f"--teacher-top {teacher_top}: give a number of words, 0 for all")
        if not Path(teacher_path).is_file():
            raise BildError(f"--teacher-path {teacher_path}: no such file; name the large model's checkpoint")
        self.sentence_avg = sentence_avg
        self.teacher_weight = teacher_weight
        self.teacher_top = min(teacher_top, len(task.target_dictionary))
        self.teacher_choice = teacher_choice
        # Sentence pair -> the teacher's most probable words and their probabilities, (time, top) each.
        self._remembered: dict[tuple[bytes, bytes], tuple[torch.Tensor, torch.Tensor]] = {}
        # Held in a list, so that it is no submodule: its weights are neither trained nor saved.
        self._teacher = _load_teacher(teacher_path, task)

    def check_model(self, model) -> None:
        """What :meth:`forward` refuses, before the first step.

        Raises:
            BildError: a model, or its teacher, without a plain softmax.
        """
        for one in (model, *self._teacher):
            _check_softmax(one)

    def forward(self, model, sample, reduce=True):
        """One forward pass of each model.

        Args:
            model: the model to train, which may be wrapped for distributed training.
            sample: a fairseq batch.
            reduce: sum the loss over the batch's tokens; otherwise (batch * time,).

        Returns:
            (loss, sample size, logging output), as of fairseq's criterions. The logging output holds sums over the
            batch, in nats, so that those of several batches or workers add up.
        """
        target = sample["target"]
        kept = target.ne(self.padding_idx)  # (batch, time)
        logits = _logits(model, sample, kept)
        normalizer = logits.logsumexp(-1)
        words, probs, negative_entropy = self._teacher_words(model, sample, kept)
        wanted = _first_choice(words, probs) if self.teacher_choice else target[kept][:, None]
        target_logits = logits.gather(1, wanted).squeeze(1)
        nll_loss = normalizer - target_logits
        learned = logits if words is None else logits.gather(1, words)
        kl = negative_entropy + normalizer * probs.sum(-1) - (probs * learned).sum(-1)
        loss = (1 - self.teacher_weight) * nll_loss + self.teacher_weight * kl
        sample_size = target.size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.detach().sum(),
            "nll_loss": nll_loss.detach().sum(),
            "teacher_kl": kl.detach().sum(),
            "n_correct": target_logits.detach().eq(logits.detach().amax(-1)).sum(),
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": sample_size,
        }
        if reduce:
            return loss.sum(), sample_size, logging_output
        return loss.new_zeros(target.numel()).masked_scatter(kept.flatten(), loss), sample_size, logging_output

    @torch.no_grad()
    def _teacher_words(self, model, sample, kept):
        """What to learn from at each position: words (tokens, k), None for all; their probabilities; sum of p log p."""
        if self.teacher_top:
            words, probs = self._top_words(model, sample, kept)
            return words, probs, torch.xlogy(probs, probs).sum(-1)
        lprobs = self._teacher_lprobs(model, sample, kept)
        probs = lprobs.exp()
        return None, probs, (probs * lprobs).sum(-1)

    @torch.no_grad()
    def _teacher_lprobs(self, model, sample, kept):
        (teacher,) = self._teacher
        parameter = next(model.parameters())
        teacher.to(device=parameter.device, dtype=parameter.dtype)
        return _logits(teacher, sample, kept).log_softmax(-1)

    def _top_words(self, model, sample, kept):
        """The teacher's most probable words after each token that is no padding, and their probabilities."""
        target = sample["target"]
        sources = _without(sample["net_input"]["src_tokens"], self.padding_idx)
        targets = _without(target, self.padding_idx)
        keys = [(source.tobytes(), words.tobytes()) for source, words in zip(sources, targets, strict=True)]
        if not all(key in self._remembered for key in keys):
            probs, words = self._teacher_lprobs(model, sample, kept).exp().topk(self.teacher_top)
            probs = probs / probs.sum(-1, keepdim=True)
            lengths = list(map(len, targets))
            for key, *parts in zip(keys, words.int().split(lengths), probs.half().split(lengths), strict=True):
                self._remembered[key] = tuple(part.to("cpu", copy=True) for part in parts)
        words, probs = zip(*(self._remembered[key] for key in keys), strict=True)
        return torch.cat(words).long().to(target.device), torch.cat(probs).float().to(target.device)

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Logs the metrics of the class's description from summed or separate outputs."""
        sums = {key: utils.item(sum(log.get(key, 0) for log in logging_outputs)) for key in _SUMS}
        log_head("", "loss", {**sums, "total": sums["ntokens"]})
        log_bits("teacher_kl", sums["teacher_kl"], sums["ntokens"])

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def _first_choice(words, probs):
    """The most probable word at each position, (tokens, 1), of what :meth:`_teacher_words` gives."""
    return probs.argmax(-1, keepdim=True) if words is None else words[:, :1]  # remembered words begin with the best


def _without(tokens, padding):
    """The rows of (batch, time) without padding, as NumPy arrays."""
    return [row[row != padding] for row in tokens.cpu().numpy()]


def _logits(model, sample, kept):
    """What a model predicts where ``kept`` (batch, time) is true: float32 (tokens, vocab)."""
    _check_softmax(model)
    features, _ = model(**sample["net_input"], features_only=True)  # (batch, time, dim)
    return model.decoder.output_layer(features[kept]).float()


def _check_softmax(model):
    if getattr(model.decoder, "adaptive_softmax", None) is not None:
        raise BildError("--adaptive-softmax-cutoff: a model with it cannot be distilled")


def _load_teacher(path, task):
    models, _ = checkpoint_utils.load_model_ensemble([path], task=task)
    return [model.eval().requires_grad_(False) for model in models]
