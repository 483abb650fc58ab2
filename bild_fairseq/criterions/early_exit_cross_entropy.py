"""Trains every exit of an early-exit model, and its last layer, from one forward pass.

The loss of Kim et al., *Speculative Decoding with Big Little Decoder* (NeurIPS 2023), for early
exit: the mean of the losses at the exit and at the last layer. Weights, more than one exit and
distillation from the last layer are additions of this project.
"""

import math
import re
from dataclasses import dataclass, field

import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    label_smoothed_nll_loss,
)
from fairseq.dataclass import FairseqDataclass
from omegaconf import II

from ..errors import BildError
from .logged import log_bits, log_head

NAME = "early_exit_label_smoothed_cross_entropy"

_SUMS = {"loss", "final_loss", "nll_loss", "n_correct", "total", "ntokens", "sample_size"}
_EXIT_KEY = re.compile(r"exit(\d+)_(?:loss|nll_loss|n_correct|kl)")


@dataclass
class EarlyExitLabelSmoothedCrossEntropyConfig(FairseqDataclass):
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "weight of the uniform distribution in the targets, 0 to 1"},
    )
    report_accuracy: bool = field(
        default=False,
        metadata={"help": "report accuracy metric, as for fairseq's own criterion; this one always does"},
    )
    ignore_prefix_size: int = field(
        default=0,
        metadata={"help": "leave the first N target tokens out of the loss"},
    )
    exit_loss_weights: str = field(
        default="",
        metadata={
            "help": "weights of the losses, such as 1,1,2: one for each exit in order, then one"
            " for the last layer (default: equal weights)"
        },
    )
    exit_distill: float = field(
        default=0.0,
        metadata={
            "help": "0 to 1: how much of each exit's loss is its divergence from the last layer's"
            " distribution rather than from the targets"
        },
    )
    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion(NAME, dataclass=EarlyExitLabelSmoothedCrossEntropyConfig)
class EarlyExitLabelSmoothedCrossEntropyCriterion(LabelSmoothedCrossEntropyCriterion):
    """Weighted mean of label-smoothed cross-entropies at the exits and at the last layer.

    With ``--exit-distill w`` an exit's loss is (1 - w) times its label-smoothed cross-entropy
    plus w times the Kullback-Leibler divergence from the last layer's distribution to the
    exit's. The last layer is the teacher only: no gradient reaches it through that term.

    Logged, in training and validation, for an exit at layer 1 and so on:

    - ``loss``, the weighted mean, of ``final_loss`` for the last layer and ``exit1_loss``: bits
      a token, or a sentence with ``--sentence-avg``;
    - ``nll_loss``, ``ppl`` and ``accuracy`` of the last layer, which mean what they do in a stock
      run, and ``exit1_nll_loss``, ``exit1_ppl`` and ``exit1_accuracy``: bits a token, 2 to the
      power of that, and the percentage of target tokens that are the most probable one;
    - with distillation ``exit1_kl``, the divergence, in bits a token.

    Raises:
        BildError: weights that are not numbers from 0 up with a positive sum, or a distillation
            weight outside 0 to 1.
    """

    def __init__(
        self,
        task,
        sentence_avg,
        label_smoothing,
        ignore_prefix_size=0,
        exit_loss_weights="",
        exit_distill=0.0,
        report_accuracy=False,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        if not 0 <= exit_distill <= 1:
            raise BildError(f"--exit-distill {exit_distill}: give a weight from 0 to 1")
        self.exit_distill = exit_distill
        self.loss_weights = parse_loss_weights(exit_loss_weights)

    def check_model(self, model) -> None:
        """What :meth:`forward` refuses, and a model of which nothing would be trained, before the first step.

        Raises:
            BildError: as of :meth:`forward`, or the only parts that are trained have no weight in the loss.
        """
        *exit_weights, _ = self._weights(_exit_layers(model))
        if getattr(model, "exit_freeze_model", False) and not any(exit_weights):
            raise BildError(
                f"--exit-loss-weights {','.join(map(str, self.loss_weights))} leaves nothing to train: with"
                " --exit-freeze-model only the exits learn, and their weights are 0"
            )

    def forward(self, model, sample, reduce=True):
        """One forward pass, all losses.

        Args:
            model: an early-exit model, which may be wrapped for distributed training.
            sample: a fairseq batch.
            reduce: sum the loss over the batch's tokens; otherwise (batch * time, 1).

        Returns:
            (loss, sample size, logging output), as of fairseq's criterions. The logging output
            holds sums over the batch, so that those of several batches or workers add up.

        Raises:
            BildError: the model is not an early-exit model, or has not as many exits as there
                are weights.
        """
        exits = _exit_layers(model)
        weights = self._weights(exits)
        net_output = model(**sample["net_input"], return_exit_logits=True)
        # (batch * time, vocab), (batch * time,)
        teacher, target = self.get_lprobs_and_target(model, net_output, sample)
        final_loss, nll_loss = self._smoothed_loss(teacher, target, reduce)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "final_loss": final_loss.data,
            "nll_loss": nll_loss.data,
            "n_correct": self._correct(teacher, target),
            "total": target.ne(self.padding_idx).sum(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }

        losses = [self._exit_loss(model, net_output, sample, layer, teacher, reduce, logging_output) for layer in exits]
        losses.append(final_loss)
        loss = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
        logging_output["loss"] = loss.data
        return loss, sample_size, logging_output

    def _exit_loss(self, model, net_output, sample, layer, teacher, reduce, logging_output):
        """The loss at one exit; its figures go into the logging output.

        Args:
            layer: whose exit.
            teacher: the last layer's log-probabilities, (batch * time, vocab).
        """
        exit_output = (net_output[1]["exit_logits"][layer], None)
        lprobs, target = self.get_lprobs_and_target(model, exit_output, sample)
        loss, nll_loss = self._smoothed_loss(lprobs, target, reduce)
        if self.exit_distill > 0:
            kl = self._divergence(teacher.detach(), lprobs, target, reduce)
            loss = (1 - self.exit_distill) * loss + self.exit_distill * kl
            logging_output[f"exit{layer}_kl"] = kl.data
        logging_output[f"exit{layer}_loss"] = loss.data
        logging_output[f"exit{layer}_nll_loss"] = nll_loss.data
        logging_output[f"exit{layer}_n_correct"] = self._correct(lprobs, target)
        return loss

    def _weights(self, exits: list[int]) -> list[float]:
        """One for each exit, then one for the last layer."""
        weights = self.loss_weights or [1.0] * (len(exits) + 1)
        if len(weights) != len(exits) + 1:
            raise BildError(
                f"--exit-loss-weights gives {len(weights)} weights, the model needs"
                f" {len(exits) + 1}: one for each exit ({', '.join(map(str, exits))}), then one"
                " for the last layer"
            )
        return weights

    def _smoothed_loss(self, lprobs, target, reduce):
        return label_smoothed_nll_loss(lprobs, target, self.eps, ignore_index=self.padding_idx, reduce=reduce)

    def _divergence(self, teacher, lprobs, target, reduce):
        """KL(teacher || exit) from log-probabilities; padding counts 0."""
        kl = F.kl_div(lprobs, teacher, reduction="none", log_target=True).sum(-1, keepdim=True)
        kl = kl.masked_fill(target.eq(self.padding_idx).unsqueeze(-1), 0.0)
        return kl.sum() if reduce else kl

    def _correct(self, lprobs, target):
        return (lprobs.argmax(-1).eq(target) & target.ne(self.padding_idx)).sum()

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Logs the metrics of the class's description from summed or separate outputs."""
        keys = set().union(*logging_outputs)
        sums = {
            key: utils.item(sum(log.get(key, 0) for log in logging_outputs))
            for key in keys
            if key in _SUMS or _EXIT_KEY.fullmatch(key)
        }
        log_bits("loss", sums["loss"], sums["sample_size"])
        log_head("", "final_loss", sums)
        for layer in sorted({int(m[1]) for m in map(_EXIT_KEY.fullmatch, keys) if m}):
            prefix = f"exit{layer}_"
            log_head(prefix, f"{prefix}loss", sums)
            if f"{prefix}kl" in sums:
                log_bits(f"{prefix}kl", sums[f"{prefix}kl"], sums["ntokens"])


def parse_loss_weights(text: str) -> list[float]:
    """Reads ``"1,1,2"``; an empty text gives an empty list.

    Raises:
        BildError: not finite numbers from 0 up with a positive sum.
    """
    if not text:
        return []
    try:
        weights = [float(item) for item in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
        raise BildError(f"--exit-loss-weights {text}: give numbers from 0 up, not all 0, such as 1,1,2")
    return weights


def _exit_layers(model) -> list[int]:
    exits = getattr(getattr(model, "decoder", None), "exit_layers", None)
    if exits is None:
        raise BildError(
            f"--criterion {NAME} trains early-exit models only; choose --arch"
            " early_exit_transformer or another early_exit_* architecture"
        )
    return exits
