"""Flags of fairseq-train: those that build a model like one that there is, and what fairseq makes of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairseq import options
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.tasks import FairseqTask

from ..errors import BildError
from ..models.early_exit import PREFIX

# A model's options that are chosen anew for its training, or that its weights make pointless.
NOT_TAKEN_OVER = {
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "encoder_embed_path",
    "decoder_embed_path",
}


def model_flags(config: argparse.Namespace) -> list[str]:
    """The flags of fairseq-train that build a model like that of a checkpoint.

    Args:
        config: the checkpoint's ``cfg["model"]``.

    Raises:
        BildError: not one of fairseq's Transformer or BART models.
    """
    arch = getattr(config, "arch", None)
    if arch not in ARCH_MODEL_REGISTRY or not arch.removeprefix(PREFIX).startswith(("transformer", "bart")):
        raise BildError(f"--small: its architecture is {arch}; it must be one of transformer* or bart*")
    parser = _model_parser(arch)
    flags: list[str] = []
    for action in _model_options(parser):
        # Parsed anew for each option, because the default of one may be the value of another.
        built = parser.parse_args(flags)
        ARCH_CONFIG_REGISTRY[arch](built)
        wanted = getattr(config, action.dest, None)
        if wanted is None or wanted == getattr(built, action.dest, False if action.nargs == 0 else None):
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            flags.append(action.option_strings[0 if wanted else 1])
        elif action.nargs != 0:
            value = ",".join(map(str, wanted)) if isinstance(wanted, list) else str(wanted)
            flags += [action.option_strings[0], value]
        elif wanted == action.const:
            flags.append(action.option_strings[0])
    return ["--arch", arch, *flags]


def check_model(parsed: argparse.Namespace, config: argparse.Namespace) -> None:
    """Refuses flags that build another model than a checkpoint's.

    Args:
        parsed: of :func:`parse`.
        config: the checkpoint's ``cfg["model"]``.

    Raises:
        BildError: naming an option that differs.
    """
    for action in _model_options(_model_parser(parsed.arch)):
        wanted = getattr(config, action.dest, None)
        if wanted is not None and not _same(getattr(parsed, action.dest, None), wanted):
            raise BildError(
                f"--small: has {action.option_strings[0]} {wanted}, which fairseq-train cannot be told with "
                f"--arch {parsed.arch} and these flags"
            )


def parse(flags: Sequence[str]) -> argparse.Namespace:
    """What fairseq-train makes of its flags.

    Raises:
        BildError: it refuses them.
    """

    def refuse(message: str) -> None:
        raise BildError(f"fairseq-train: {message}; see the flags after --")

    parser = options.get_training_parser()
    parser.error = refuse
    return options.parse_args_and_arch(parser, list(flags))


@dataclass(frozen=True)
class Plan:
    """What a run of fairseq-train will do with its data."""

    updates: int
    left_out: int  # training sentences of more than --max-tokens tokens, which fairseq-train leaves out
    longest_valid: int  # tokens of the longest validation sentence, which must fit into a batch


def plan(task: FairseqTask, parsed: argparse.Namespace) -> Plan:
    """What fairseq-train will do with a data folder.

    Args:
        task: of the folder.
        parsed: the flags, of :func:`parse`.

    Raises:
        BildError: no training sentence fits into a batch.
    """
    for subset in ("train", "valid"):
        task.load_dataset(subset)
    dataset, valid = task.dataset("train"), task.dataset("valid")
    ordered = dataset.ordered_indices()
    fitting = ordered
    if parsed.max_tokens is not None:
        fitting, _ = dataset.filter_indices_by_size(ordered, (parsed.max_tokens, parsed.max_tokens))
    if not len(fitting):
        raise BildError(f"--max-tokens {parsed.max_tokens}: all sentences of the calibration set are longer; raise it")
    batches = dataset.batch_by_size(
        fitting,
        max_tokens=parsed.max_tokens,
        max_sentences=parsed.batch_size,
        required_batch_size_multiple=parsed.required_batch_size_multiple,
    )
    updates = math.ceil(len(batches) / (parsed.distributed_world_size * parsed.update_freq[0])) * parsed.max_epoch
    if parsed.max_update:
        updates = min(updates, parsed.max_update)
    return Plan(updates, len(ordered) - len(fitting), int(max(map(valid.num_tokens, range(len(valid))))))


def _same(given: Any, wanted: Any) -> bool:
    """Whether two values of an option build the same model: fairseq leaves switches out, and some numbers as text."""
    if given is None:
        return wanted is False
    try:
        return float(given) == float(wanted)
    except (TypeError, ValueError):
        return str(given) == str(wanted)


def _model_parser(arch: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    ARCH_MODEL_REGISTRY[arch].add_args(parser)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest not in NOT_TAKEN_OVER]
