"""Which engine runs a model, and why."""

from __future__ import annotations

import logging

from torch import nn

from ..errors import BildError
from .base import Engine
from .native import NativeEngine, missing_option
from .supported import unsupported_decoder
from .torch.engine import TorchEngine

logger = logging.getLogger(__name__)


def engine_for(model: nn.Module, precision: str, role: str) -> Engine:
    """The fastest engine that runs a model exactly.

    Args:
        model: a fairseq encoder-decoder model; it is put into eval mode.
        precision: of the weights of matrix products, see :mod:`bild_fairseq.engines.precision`.
        role: what messages call the model: ``"large"``, ``"small"``.

    Raises:
        BildError: no engine can run it; one line with the reason.
    """
    model.eval()
    if not hasattr(model, "encoder"):
        raise BildError(f"the {role} model has no encoder, so it is not an encoder-decoder Transformer")
    reason = unsupported_decoder(model.decoder)
    if reason is not None:
        raise BildError(f"the {role} model cannot be decoded from a cache: {reason}")
    missing = missing_option(model.decoder)
    if missing is None:
        return NativeEngine(model, precision)
    logger.info("the %s decoder runs on PyTorch's operators: %s", role, missing)
    return TorchEngine(model, precision)
