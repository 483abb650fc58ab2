"""What a checkpoint must hold before a model is made of it, and its options."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from typing import Any

from fairseq import models
from torch import Tensor

from ..errors import BildError


def check_content(state: Any) -> None:
    """Refuses what is no model with its options, and options that ask for a far larger model than the weights are of.

    A size without bounds would be allocated, and a number of layers without bounds built, before it is noticed.
    """
    weights = state.get("model") if isinstance(state, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise BildError("it holds no model (an entry model with named weights)")
    options = _model_options(state)
    known = {*models.MODEL_REGISTRY, *models.ARCH_MODEL_REGISTRY}
    name = options.get("_name") or options.get("arch")
    if name not in known:
        raise BildError(f"its architecture, {name}, is not known here; is it defined by a package for --user-dir?")
    columns = max((weight.size(-1) for weight in weights.values() if weight.dim()), default=1)
    longest = max((size for weight in weights.values() for size in weight.shape), default=1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for option, value in options.items():
        if type(value) is not int or value <= 0:
            continue
        layers = option.endswith("_layers") and value > max(len(weights), 1000)
        dimension = option.endswith("_dim") and value > 16 * longest  # 16: an option that the model does not use
        rows = option.endswith(("_dim", "_positions")) and 4 * value * columns > memory / 4
        if layers or dimension or rows:
            raise BildError(f"its options declare {option} {value}, which its weights do not have")


def _model_options(state: dict) -> dict[str, Any]:
    if isinstance(state.get("args"), argparse.Namespace):
        return vars(state["args"])
    options = option_in(state.get("cfg"), "model")
    if options is None:
        raise BildError("it holds no options of its model (an entry args, or model in an entry cfg)")
    return vars(options) if isinstance(options, argparse.Namespace) else dict(options)


def check_parts(state: dict) -> None:
    """Refuses a model of another kind."""
    for part in ("encoder", "decoder"):
        if not any(re.match(rf"(models\.[^.]+\.)?{part}\.", name) for name in state["model"]):
            raise BildError(f"it has no {part}, so it is not an encoder-decoder Transformer")


def task_options(state: dict) -> Any:
    """Options of the task that the model was trained in."""
    return state["args"] if state.get("args") is not None else option_in(state["cfg"], "task")


def option_in(options: Any, name: str) -> Any:
    """An option, of a configuration of any age; None where it is not."""
    if isinstance(options, Mapping):
        return options[name] if name in options else None
    return getattr(options, name, None)
