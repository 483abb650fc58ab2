"""What the losses of this package log: sums over many batches as means in bits."""

import math

from fairseq import utils
from fairseq.logging import metrics


def log_bits(name: str, total: float, count: float) -> None:
    """Logs a mean in bits, given its sum in nats."""
    metrics.log_scalar(name, total / count / math.log(2), count, round=3)


def log_head(prefix: str, loss: str, sums: dict[str, float]) -> None:
    """Logs a prediction head: its loss, cross-entropy, perplexity and accuracy.

    Args:
        prefix: of the names of all but the loss; empty for the last layer.
        loss: name of the loss.
        sums: the loss, ``nll_loss`` and ``n_correct`` by name, in nats and tokens; and what they were summed over,
            ``sample_size``, ``ntokens`` and ``total`` tokens that were predicted.
    """
    nll_loss = f"{prefix}nll_loss"
    log_bits(loss, sums[loss], sums["sample_size"])
    log_bits(nll_loss, sums[nll_loss], sums["ntokens"])
    metrics.log_derived(f"{prefix}ppl", lambda meters: utils.get_perplexity(meters[nll_loss].avg))
    if sums["total"] > 0:
        accuracy = 100 * sums[f"{prefix}n_correct"] / sums["total"]
        metrics.log_scalar(f"{prefix}accuracy", accuracy, sums["total"], round=3)
