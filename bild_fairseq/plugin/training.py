"""Training: what is checked before the first step, and what processes send one another."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.distributed import utils as distributed_utils
from torch import nn

from ..criterions.early_exit_cross_entropy import NAME, EarlyExitLabelSmoothedCrossEntropyCriterion
from ..errors import BildError
from ..models.exits import ExitHeads

logger = logging.getLogger(__name__)


def checking(make: Callable[..., None]) -> Callable[..., None]:
    """Wraps the trainer's constructor so that a criterion sees its model before the first step.

    An error in the first step, while other threads read the data, would end in "Aborted" after its message.
    """

    @functools.wraps(make)
    def checked(self: Any, cfg: Any, task: Any, model: nn.Module, criterion: nn.Module, *args: Any, **kwargs: Any):
        check(model, criterion)
        make(self, cfg, task, model, criterion, *args, **kwargs)

    return checked


def check(model: nn.Module, criterion: FairseqCriterion) -> None:
    """Checks that a criterion can train a model; warns where it leaves the model's exits as they are.

    Raises:
        BildError: it cannot.
    """
    if hasattr(criterion, "check_model"):
        criterion.check_model(model)
    decoder = getattr(model, "decoder", None)
    if not isinstance(decoder, ExitHeads) or isinstance(criterion, EarlyExitLabelSmoothedCrossEntropyCriterion):
        return
    name = type(criterion).__name__
    if getattr(model, "exit_freeze_model", False):
        raise BildError(f"--exit-freeze-model trains the exits alone, but {name} does not; choose --criterion {NAME}")
    logger.warning(
        "%s trains the last layer only, the exits (%s) learn nothing of their own; --criterion %s trains both",
        *(name, ", ".join(map(str, decoder.exit_layers)), NAME),
    )


def broadcasting(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps fairseq's way to send an object to other processes, so that they receive what the first one has loaded.

    fairseq saves it as a checkpoint, and ``torch.load`` refuses the classes in it from torch 2.6 on. The sender is a
    process of the same training, which has loaded the checkpoint safely, so it can be trusted.
    """

    @functools.wraps(plain)
    def broadcast_object(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
        if distributed_utils.use_xla():
            return plain(obj, src_rank, group, dist_device)
        sent = [obj]
        torch.distributed.broadcast_object_list(sent, src=src_rank, group=group, device=dist_device)
        return sent[0]

    return broadcast_object
