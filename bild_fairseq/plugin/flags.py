"""The command-line flags, one dataclass, and what is checked about them before any work starts."""

import ast
import dataclasses
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum
from fairseq.dataclass.configs import GenerationConfig

from ..decoding.policies import Policy
from ..engines.precision import PRECISIONS
from ..errors import BildError, flag, require
from .checkpoints import Loading
from .files import unreadable, unwritable
from .search import SearchOptions


@dataclass
class BildGenerationConfig(GenerationConfig):
    """fairseq's generation options and this package's."""

    generator: ChoiceEnum(["beam", "bild", "greedy"]) = field(
        default="beam",
        metadata={
            "help": "beam: fairseq's own generator; bild: Big Little Decoder; greedy: the same lean decoder with "
            "the large model alone (default: beam)"
        },
    )
    bild_small_path: Optional[str] = field(
        default=None,
        metadata={"help": "small model's checkpoint, or several joined by ':' for an ensemble (default: none)"},
    )
    bild_small_overrides: str = field(
        default="{}",
        metadata={
            "help": "options of the small model that replace those in its checkpoint, as --model-overrides does for "
            "the large one: a Python dictionary (default: {})"
        },
    )
    bild_small_suffix: Optional[str] = field(
        default=None,
        metadata={
            "help": "suffix of the small model's file names (default: --checkpoint-suffix if there are such files)"
        },
    )
    bild_small_shard_count: Optional[int] = field(
        default=None,
        metadata={
            "help": "1 or more: in how many files each small model is (default: --checkpoint-shard-count if there are "
            "such files)"
        },
    )
    bild_exit_layer: Optional[int] = field(
        default=None,
        metadata={
            "help": "for an early-exit model in --path: the decoder layer, counted from the bottom, whose exit "
            "is the small model; with --generator greedy the exit decodes alone (default: the lowest trained exit)"
        },
    )
    bild_fallback_threshold: float = field(
        default=0.6,
        metadata={
            "help": "probability, 0 to 1: the small model hands over to the large one when its best token is "
            "less likely than this (default: 0.6)"
        },
    )
    bild_rollback_threshold: float = field(
        default=2.0,
        metadata={
            "help": "nats, 0 to inf: the large model goes back to the first drafted token whose negative "
            "log-probability exceeds this and that it would not have chosen (default: 2.0)"
        },
    )
    bild_max_draft: int = field(
        default=10,
        metadata={"help": "tokens, 1 or more: how many the small model drafts at most per round (default: 10)"},
    )
    bild_start: ChoiceEnum(["large", "small"]) = field(
        default="large",
        metadata={"help": "model that writes the first token (default: large)"},
    )
    bild_verify_end: bool = field(
        default=False,
        metadata={
            "help": "let the large model also verify the tokens drafted before the end of a sentence (default: off)"
        },
    )
    bild_max_batch: Optional[int] = field(
        default=None,
        metadata={
            "help": "sentences, 1 or more: while more of a batch are unfinished, nothing is drafted and the large "
            "model writes alone, as a pass over many sentences is no longer bound by reading weights (default: no "
            "limit; 6 for lossless decoding on a CPU with 20 million weights or more in the large decoder)"
        },
    )
    bild_precision: ChoiceEnum(PRECISIONS) = field(
        default="float32",
        metadata={
            "help": "weights of both models' matrices, for bild and greedy: the others read less memory and are faster "
            "on a CPU; float16 changes nothing if the checkpoints are in half precision; bfloat16 and int8 cost some "
            "quality (default: float32)"
        },
    )
    bild_small_precision: ChoiceEnum(["same", *PRECISIONS]) = field(
        default="same",
        metadata={
            "help": "weights of the matrices that draft, the small model's or the exit's, where they are to differ: in "
            "int8 they draft faster for a large model in float32, which verifies as exactly as ever (default: same)"
        },
    )
    bild_draft_vocab: Optional[str] = field(
        default=None,
        metadata={
            "help": "file with the target types that the small model, or the exit, drafts among, one a line as in "
            "dict.txt: drafts cost less, and the large model is as it was; scripts/align.py --draft-vocab writes one "
            "(default: all types)"
        },
    )
    bild_stats: Optional[str] = field(
        default=None,
        metadata={"help": "JSON file for the counters of the run and of every sentence, written at its end"},
    )


_DEFAULTS = {
    f.name: f.default for f in dataclasses.fields(BildGenerationConfig) if f.default is not dataclasses.MISSING
}
_OWN = [f.name for f in dataclasses.fields(BildGenerationConfig) if f.name.startswith("bild_")]

# fairseq's generation options that mean for greedy decoding what they mean for beam search, or nothing at all.
_HONOURED = {
    "beam",  # set to 1
    "max_len_a",
    "max_len_b",
    "min_len",
    "match_source_len",
    "unnormalized",
    "lenpen",
    "unkpen",
    "temperature",
    "no_repeat_ngram_size",
    "prefix_size",
    "score_reference",
    "sacrebleu",
    "print_step",
    "no_early_stop",
    "no_beamable_mm",
    "no_seed_provided",
    "lm_weight",  # without --lm-path, which is refused
    "diverse_beam_strength",  # without --diverse-beam-groups, which is refused
    "generator",
    *_OWN,
}


def option(args: Any, name: str) -> Any:
    """A generation option's value, or its default where ``args`` does not have it.

    Args:
        args: fairseq's generation config, or a namespace with some of its fields.
    """
    value = getattr(args, name, None)
    return _DEFAULTS[name] if value is None else value


def policy(args: Any) -> Policy:
    """The decoding policy that checked options ask for."""
    return Policy(
        fallback_threshold=option(args, "bild_fallback_threshold"),
        rollback_threshold=option(args, "bild_rollback_threshold"),
        max_draft=option(args, "bild_max_draft"),
        start_small=str(option(args, "bild_start")) == "small",
        verify_end=option(args, "bild_verify_end"),
    )


def small_paths(args: Any) -> list[str]:
    """The small model's checkpoint files."""
    joined = option(args, "bild_small_path")
    return utils.split_paths(joined) if joined else []


def like_the_large_model(args: Any) -> None:
    """Has the small model loaded with the suffix and the shards of the large one, if there are files of these names.

    Args:
        args: all that a program has parsed; it is changed unless the small model's own flags are given.
    """
    given = [option(args, name) for name in ("bild_small_suffix", "bild_small_shard_count")]
    loading = Loading(suffix=args.checkpoint_suffix, shards=args.checkpoint_shard_count)
    files = [file for path in small_paths(args) for file in loading.files(path)]
    if files and given == [None, None] and all(map(os.path.exists, files)):
        args.bild_small_suffix, args.bild_small_shard_count = loading.suffix, loading.shards


def small_loading(args: Any) -> Loading:
    """How the small model's checkpoints are read."""
    overrides = check_overrides("--bild-small-overrides", option(args, "bild_small_overrides"))
    suffix, shards = option(args, "bild_small_suffix"), option(args, "bild_small_shard_count")
    return Loading(overrides, suffix or "", 1 if shards is None else shards)


def check_overrides(flag: str, text: str) -> dict[str, Any]:
    """Reads a dictionary of options.

    Raises:
        BildError: it is none.
    """
    try:
        overrides = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        overrides = None
    if not isinstance(overrides, dict) or not all(isinstance(name, str) for name in overrides):
        raise BildError(f"{flag} {text}: write a Python dictionary, \"{{'dropout': 0.1}}\" for instance")
    return overrides


def check(args: Any) -> None:
    """Checks all that the options alone can tell.

    Raises:
        BildError: an option out of range, contradictory or not supported, or a file that is not there.
    """
    generator = str(option(args, "generator"))
    _check_use(args, generator)
    if generator == "beam":
        return
    for name, default in _DEFAULTS.items():
        if name not in _HONOURED and option(args, name) != default:
            raise BildError(f"{flag(name)} is not supported by --generator {generator}; leave it out")
    _check_ranges(args)
    read = {file: "--bild-small-path" for path in small_paths(args) for file in small_loading(args).files(path)}
    if option(args, "bild_draft_vocab") is not None:
        read[option(args, "bild_draft_vocab")] = "--bild-draft-vocab"
    for file, named_by in read.items():
        reason = unreadable(file)
        if reason:
            raise BildError(f"{named_by} {file}: {reason}")
    stats = option(args, "bild_stats")
    reason = None if stats is None else unwritable(stats)
    if reason:
        raise BildError(f"--bild-stats {stats}: {reason}")
    check_stats(args, read)


def check_stats(args: Any, files: Iterable[str | os.PathLike]) -> None:
    """Refuses to write the statistics over a file that is read.

    Args:
        files: that are read; some may not be there.

    Raises:
        BildError: naming it.
    """
    stats = option(args, "bild_stats")
    for file in files if stats is not None and os.path.exists(stats) else ():
        if os.path.exists(file) and os.path.samefile(stats, file):
            raise BildError(f"--bild-stats {stats}: it would be written over {file}, which is read; name another file")


def _check_use(args: Any, generator: str) -> None:
    """Refuses flags that the chosen generator would ignore."""
    used = {
        "beam": set(),
        "greedy": {"bild_exit_layer", "bild_precision", "bild_stats"},
        "bild": set(_OWN),
    }[generator]
    for name in _OWN:
        if name not in used and option(args, name) != _DEFAULTS[name]:
            raise BildError(f"{flag(name)} has no effect with --generator {generator}; add --generator bild")
    for name in ("bild_precision", "bild_small_precision"):
        if option(args, name) != _DEFAULTS[name] and getattr(args, "fp16", False):
            raise BildError(f"--fp16 and {flag(name)} both set the weights' precision; give one of them")
    own = {"bild_small_overrides": small_loading(args).overrides}
    own |= {name: option(args, name) is not None for name in ("bild_small_suffix", "bild_small_shard_count")}
    for name, given in own.items():
        if given and not option(args, "bild_small_path"):
            raise BildError(f"{flag(name)} is for the model in --bild-small-path; none is named")
    if option(args, "bild_small_path") and option(args, "bild_exit_layer") is not None:
        raise BildError("--bild-small-path and --bild-exit-layer both name a small model; give one of them")


def _check_ranges(args: Any) -> None:
    require = functools.partial(_require, args)
    fallback, rollback = (
        option(args, "bild_fallback_threshold"),
        option(args, "bild_rollback_threshold"),
    )
    require("bild_fallback_threshold", 0 <= fallback <= 1, "a probability, 0 to 1")
    require("bild_rollback_threshold", rollback >= 0, "a number of nats, 0 to inf")
    require("bild_max_draft", option(args, "bild_max_draft") >= 1, "1 or more")
    max_batch = option(args, "bild_max_batch")
    require("bild_max_batch", max_batch is None or max_batch >= 1, "1 or more")
    exit_layer = option(args, "bild_exit_layer")
    require("bild_exit_layer", exit_layer is None or exit_layer >= 1, "1 or more")
    shards = option(args, "bild_small_shard_count")
    require("bild_small_shard_count", shards is None or shards >= 1, "1 or more")
    SearchOptions.from_args(args)  # which refuses what is out of range


def _require(args: Any, name: str, holds: bool, wanted: str) -> None:
    require(holds, name, option(args, name), wanted)
