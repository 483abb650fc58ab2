"""Which engine runs a model, and why. A model's engines are made once and remembered with it."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..errors import BildError, first_line
from .base import Engine
from .changes import sum_of_bits, sums
from .native import NativeEngine, missing_option
from .precision import loses_nothing
from .proof import prove, prove_cut_head
from .supported import unsupported_model
from .torch.engine import TorchEngine

logger = logging.getLogger(__name__)

# By model and precision: what the weights were when the engine was made, and the engine.
_remembered: WeakKeyDictionary[nn.Module, dict[str, tuple[Hashable, Engine]]] = WeakKeyDictionary()
_lock = threading.Lock()


def engine_for(model: nn.Module, precision: str, role: str) -> Engine:
    """The fastest engine that runs a model exactly; a new one only if there is none for the model's present weights.

    Args:
        model: a fairseq encoder-decoder model; it is put into eval mode.
        precision: of the weights of matrix products, see :mod:`bild_fairseq.engines.precision`.
        role: what messages call the model: ``"large"``, ``"small"``.

    Raises:
        BildError: no engine can run it; one line with the reason.
    """
    model.eval()
    reason = unsupported_model(model)  # of a remembered one as well, which may have been given a hook since
    if reason is not None:
        raise BildError(f"the {role} model cannot be decoded from a cache: {reason}")
    with _lock:
        weights, engine = _remembered.get(model, {}).get(precision, (None, None))
        if engine is None or weights != fingerprint(model):
            engine = _make(model, precision, role)
            remember(model, precision, engine)
        return engine


def cut_head_for(
    engine: Engine, model: nn.Module, depth: int, types: tuple[int, ...], precision: str, role: str
) -> int:
    """The number of an engine's head over some types only, for :attr:`Pass.cut`; a new one only if there is none.

    Args:
        engine: of :func:`engine_for`, as are model, precision and role.
        depth, types: as for :meth:`Engine.cut_head`.

    Raises:
        BildError: the head is not exact; one line with the reason.
    """
    with _lock:
        if (depth, types) not in engine.cuts:
            with _explaining(model, role):
                cut = engine.cut_head(depth, types)
                prove_cut_head(engine, cut, model, depth, types, precision, role)
            engine.cuts[depth, types] = cut
        return engine.cuts[depth, types]


def remember(model: nn.Module, precision: str, engine: Engine) -> None:
    """Has :func:`engine_for` return an engine as long as the model's weights stay what they are."""
    _remembered.setdefault(model, {})[precision] = fingerprint(model), engine


def fingerprint(model: nn.Module) -> Hashable:
    """What changes with any weight of a model, its device or precision, and with its modules' classes and settings.

    Hooks are settings, too.
    """
    return (
        *((type(module), *_settings(module)) for module in model.modules()),
        *sums(model),
    )


def _settings(module: nn.Module) -> Iterator[Hashable]:
    """The numbers, words, functions, tables and hooks that a module keeps beside its weights."""
    yield "hooks", (*module._forward_pre_hooks, *module._forward_hooks)  # each has a number of its own
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor) and not name.startswith("_"):  # what begins so is made anew when needed
            yield name, sum_of_bits(value)
        # A method would keep its module alive, and with it what is remembered.
        if isinstance(value, (bool, int, float, str)) or (inspect.isroutine(value) and not inspect.ismethod(value)):
            yield name, value


def _make(model: nn.Module, precision: str, role: str) -> Engine:
    """A new engine, proved."""
    with _explaining(model, role):
        if precision == "int8":  # rounding of inputs hides much of what a model may compute beside its weights
            prove(_fastest(model, "float32", role), model, "float32", role)
        engine = _fastest(model, precision, role)
        prove(engine, model, precision, role)
        wide = precision == "float32" and isinstance(engine, NativeEngine) and role == "large"
        if wide and loses_nothing(model, "float16"):
            logger.info(
                "the weights are from a checkpoint in half precision; --bild-precision float16 gives the same text "
                "faster"
            )
        if next(model.parameters()).dtype in (torch.float16, torch.bfloat16):
            # Rounding in half precision hides much of what a model may compute beside its weights.
            exact = copy.deepcopy(model).float()
            floating = "float32" if precision == "int8" else precision
            prove(TorchEngine(exact, floating), exact, floating, role)
    return engine


@contextmanager
def _explaining(model: nn.Module, role: str) -> Iterator[None]:
    """Runs a model; torch's random numbers go on as if nothing had run, though layers are dropped with them.

    Raises:
        BildError: the model fails, in whatever way; one line.
    """
    weight = next(model.parameters())
    try:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            yield
    except BildError:
        raise
    except Exception as error:  # modules of a user's own may fail in any way
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise BildError(f"the {role} model ({type(model).__name__}) cannot be decoded: {reason}") from error


def _fastest(model: nn.Module, precision: str, role: str) -> Engine:
    missing = missing_option(model.decoder)
    if missing is None:
        return NativeEngine(model, precision)
    logger.info("the %s decoder runs on PyTorch's operators: %s", role, missing)
    return TorchEngine(model, precision)
