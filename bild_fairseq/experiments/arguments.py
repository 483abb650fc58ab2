"""Flags that several scripts share, and what they mean."""

from __future__ import annotations

import argparse

from ..engines.precision import PRECISIONS
from ..errors import require
from .scoring import DEFAULT_ENCODER_JSON, DEFAULT_VOCAB_BPE, METRIC_NAMES, ScoreOptions
from .subwords import SUBWORDS


def add_data_arguments(parser: argparse.ArgumentParser, subset: str, sentences: int = 100) -> None:
    """Data, large model, device and which sentences; ``subset`` and ``sentences`` are defaults."""
    parser.add_argument("data", help="binarized data (fairseq-preprocess)")
    add_language_arguments(parser)
    parser.add_argument("--large", required=True, help="checkpoint of the large model")
    parser.add_argument("--subset", default=subset)
    parser.add_argument(
        "--sentences", type=int, default=sentences, help=f"how many, from the first on (default: {sentences})"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every system (default: 2)")
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument("--fp16", action="store_true", help="half precision")
    parser.add_argument(
        "--truncate-source", type=int, metavar="TOKENS", help="cut longer sources, as fairseq does for summarization"
    )


def add_language_arguments(parser: argparse.ArgumentParser) -> None:
    """The direction of translation, with fairseq's names."""
    for side in ("source", "target"):
        parser.add_argument(
            f"-{side[0]}",
            f"--{side}-lang",
            metavar="LANGUAGE",
            help=f"{side} language (default: from the data's files)",
        )


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Length limits and n-gram blocking, with fairseq's names and defaults."""
    parser.add_argument("--max-len-a", type=float, default=0)
    parser.add_argument("--max-len-b", type=int, default=200)
    parser.add_argument("--min-len", type=int, default=1)
    parser.add_argument("--no-repeat-ngram-size", type=int, default=0)


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Metric, reference, and how tokens become text."""
    parser.add_argument("--metric", choices=list(METRIC_NAMES), default="bleu", help="quality (default: bleu)")
    parser.add_argument("--reference", help="raw reference text, to score detokenized output against")
    parser.add_argument(
        "--bpe",
        choices=SUBWORDS,
        default="subword_nmt",
        help="subwords of the data (default: subword_nmt)",
    )
    parser.add_argument("--gpt2-encoder-json", default=DEFAULT_ENCODER_JSON, help="encoder.json, for --bpe gpt2")
    parser.add_argument("--gpt2-vocab-bpe", default=DEFAULT_VOCAB_BPE, help="vocab.bpe, for --bpe gpt2")
    parser.add_argument("--sentencepiece-model", help="spiece.model, for --bpe sentencepiece")


def add_drafting_arguments(parser: argparse.ArgumentParser) -> None:
    """What drafts for the large model, and the precision of all models' weights."""
    parser.add_argument(
        "--small",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a small model, and what to call it; repeat for several, aligned and unaligned for instance",
    )
    parser.add_argument(
        "--early-exit",
        action="append",
        default=[],
        metavar="NAME=PATH[:LAYER]",
        help="an early-exit model that drafts from its exit (default layer: the lowest); repeat for several",
    )
    parser.add_argument(
        "--precision",
        default="float32",
        help=f"of the models' weights: {', '.join(PRECISIONS)}, or two joined by + for the large model and the small "
        "one (default: float32)",
    )
    parser.add_argument(
        "--draft-vocab", metavar="FILE", help="target types to draft among, as --bild-draft-vocab (default: all)"
    )


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuses numbers below 1.

    Args:
        names: of the flags, with underscores.

    Raises:
        BildError: naming the first of them.
    """
    for name in names:
        value = getattr(args, name)
        require(value is None or value >= 1, name, value, "1 or more")


def score_options(args: argparse.Namespace) -> ScoreOptions:
    return ScoreOptions(
        metric=args.metric,
        reference=args.reference,
        bpe=args.bpe,
        gpt2_encoder_json=args.gpt2_encoder_json,
        gpt2_vocab_bpe=args.gpt2_vocab_bpe,
        sentencepiece_model=args.sentencepiece_model,
    )
