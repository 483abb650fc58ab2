"""What the measuring scripts share: loading, batches, systems that translate, timing in turns, and scoring."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import math
import os
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bild_fairseq.plugin.trace import replay, traced
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe import DEFAULT_ENCODER_JSON, DEFAULT_VOCAB_BPE, GPT2BPE, GPT2BPEConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask
from sacremoses import MosesDetokenizer

import bild_fairseq  # noqa: F401
from bild_fairseq.decoding.counters import Counters
from bild_fairseq.decoding.decode import Policy
from bild_fairseq.engines.precision import PRECISIONS
from bild_fairseq.errors import BildError
from bild_fairseq.models.exits import EarlyExitTransformerDecoder
from bild_fairseq.plugin.checkpoints import check_positions, load_small
from bild_fairseq.plugin.generator import BildGenerator, SearchOptions

Run = Callable[[dict[str, Any]], list[list[int]]]
METRIC_NAMES = {"bleu": "BLEU", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}


@dataclass
class System:
    """One way to translate a batch, and what came of it."""

    name: str
    run: Run  # fairseq batch -> token numbers per sentence, end symbol included
    generator: BildGenerator | None = None
    seconds: list[float] = field(default_factory=list)  # per batch
    encoding: list[float] = field(default_factory=list)  # per batch: its encoders alone, if asked for
    floor: list[float] = field(default_factory=list)  # per batch: its bare forward passes, if asked for
    outputs: dict[int, list[int]] = field(default_factory=dict)  # by sentence
    counters: list[Counters] = field(default_factory=list)
    encode: Callable[[dict[str, Any]], Any] | None = None  # runs the encoders alone
    clock: Callable[[], float] | None = None  # seconds of the last run, for a system that measures itself
    rest: float = 0.0  # seconds to wait after its turn, for threads that keep a core busy for a while


def add_data_arguments(parser: argparse.ArgumentParser, subset: str, sentences: int = 100) -> None:
    """Data, large model, device and which sentences; ``subset`` and ``sentences`` are defaults."""
    parser.add_argument("data", help="binarized data (fairseq-preprocess)")
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
        choices=["subword_nmt", "gpt2", "none"],
        default="subword_nmt",
        help="subwords of the data (default: subword_nmt)",
    )
    parser.add_argument("--gpt2-encoder-json", default=DEFAULT_ENCODER_JSON, help="encoder.json, for --bpe gpt2")
    parser.add_argument("--gpt2-vocab-bpe", default=DEFAULT_VOCAB_BPE, help="vocab.bpe, for --bpe gpt2")


def search_options(args: argparse.Namespace) -> SearchOptions:
    return SearchOptions(
        max_len_a=args.max_len_a,
        max_len_b=args.max_len_b,
        min_len=args.min_len,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )


def load(args: argparse.Namespace) -> tuple[FairseqTask, torch.nn.Module]:
    """The task with its data, and the large model.

    Raises:
        BildError: the data, the subset, the checkpoint or the GPU is missing.
    """
    if not Path(args.data).is_dir():
        raise BildError(f"{args.data}: no such folder; give one that fairseq-preprocess has made")
    if not Path(args.large).is_file():
        raise BildError(f"--large {args.large}: no such file")
    if args.cuda and not torch.cuda.is_available():
        raise BildError("--cuda: torch finds no GPU")
    for name in ("sentences", "threads"):
        if getattr(args, name) < 1:
            raise BildError(f"--{name} {getattr(args, name)}: must be 1 or more")
    words = [args.data, "--path", args.large]
    if args.truncate_source:
        words += ["--truncate-source", "--max-source-positions", str(args.truncate_source)]
    parsed = options.parse_args_and_arch(options.get_generation_parser(), words)
    try:
        task = tasks.setup_task(convert_namespace_to_omegaconf(parsed).task)
        task.load_dataset(args.subset)
    except Exception as error:  # fairseq raises bare Exceptions here
        raise BildError(f"{args.data}: cannot load {args.subset}: {str(error).strip().splitlines()[0]}") from error
    return task, load_model(args.large, task, args)


def load_model(path: str, task: FairseqTask, args: argparse.Namespace) -> torch.nn.Module:
    models, _ = checkpoint_utils.load_model_ensemble([path], task=task)
    model = models[0].eval()
    if args.fp16:
        model.half()
    return model.cuda() if args.cuda else model


def make_batches(task: FairseqTask, args: argparse.Namespace, batch_size: int) -> list[dict[str, Any]]:
    """Batches of sentences of like length, in random order so that no system meets them sorted."""
    dataset = task.dataset(args.subset)
    ids = sorted(range(min(args.sentences, len(dataset))), key=lambda i: (dataset.src_sizes[i], i))
    chunks = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
    random.Random(0).shuffle(chunks)
    batches = [dataset.collater([dataset[i] for i in chunk]) for chunk in chunks]
    return [utils.move_to_cuda(batch) for batch in batches] if args.cuda else batches


def stock(models: Sequence[torch.nn.Module], task: FairseqTask, beam: int, search: SearchOptions) -> System:
    """fairseq's own generator."""
    generator = SequenceGenerator(
        models,
        task.target_dictionary,
        beam_size=beam,
        max_len_a=search.max_len_a,
        max_len_b=search.max_len_b,
        min_len=search.min_len,
        no_repeat_ngram_size=search.no_repeat_ngram_size,
    )

    def run(batch: dict[str, Any]) -> list[list[int]]:
        return [hypos[0]["tokens"].tolist() for hypos in generator.generate(models, batch)]

    @torch.no_grad()
    def encode(batch: dict[str, Any]) -> Any:
        net_input = {name: value for name, value in batch["net_input"].items() if name != "prev_output_tokens"}
        return [model.encoder.forward_torchscript(net_input) for model in models]

    return System(f"fairseq --beam {beam}", run, encode=encode)


def ours(
    name: str, models: Sequence[torch.nn.Module], task: FairseqTask, search: SearchOptions, **kwargs: Any
) -> System:
    """A system of this package; ``kwargs`` are those of ``BildGenerator``."""
    kwargs.setdefault("policy", Policy())
    return system_of(name, BildGenerator(models, task.target_dictionary, options=search, **kwargs))


def system_of(name: str, generator: BildGenerator, policy: Policy | None = None) -> System:
    """A system that runs a generator, which several may share, with a policy of its own if one is given."""

    def run(batch: dict[str, Any]) -> list[list[int]]:
        if policy is not None:
            generator.policy = policy
        hypotheses = generator.generate([], batch)
        system.counters += [hypos[0]["counters"] for hypos in hypotheses]
        return [hypos[0]["tokens"].tolist() for hypos in hypotheses]

    system = System(name, run, generator, encode=lambda batch: replay(generator, batch, []))
    return system


def parse_policy(setting: str, max_draft: int) -> Policy:
    """Reads ``FALLBACK,ROLLBACK[,end]``.

    Raises:
        BildError: it reads otherwise, or a threshold is out of range.
    """
    fallback, *rest = setting.split(",")
    if len(rest) not in (1, 2) or rest[1:] not in ([], ["end"]):
        raise BildError(f"{setting}: write FALLBACK,ROLLBACK or FALLBACK,ROLLBACK,end")
    (fallback,), (rollback,) = parse_fallbacks(fallback), parse_rollbacks(rest[0])
    return Policy(fallback, rollback, max_draft, verify_end=len(rest) == 2)


def parse_fallbacks(text: str) -> list[float]:
    """Reads fallback thresholds joined by commas; see :func:`parse_policy` for errors."""
    return _numbers(text, "fallback threshold", float, lambda value: 0 <= value <= 1, "a probability, 0 to 1")


def parse_rollbacks(text: str) -> list[float]:
    """Reads rollback thresholds joined by commas; see :func:`parse_policy` for errors."""
    return _numbers(text, "rollback threshold", float, lambda value: value >= 0, "a number of nats, 0 to inf")


def parse_drafts(text: str) -> list[int]:
    """Reads maximum draft lengths joined by commas; see :func:`parse_policy` for errors."""
    return _numbers(text, "draft length", int, lambda value: value >= 1, "a number of tokens, 1 or more")


def _numbers(text: str, what: str, kind: type, holds: Callable[[Any], bool], wanted: str) -> list:
    values = []
    for item in text.split(","):
        try:
            value = kind(item)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise BildError(f"{what} {item!r}: must be {wanted}")
        values.append(value)
    return sorted(set(values))


@dataclass(frozen=True)
class Method:
    """A large model with what drafts for it: a small model, or an exit of its own."""

    name: str
    large: torch.nn.Module
    large_path: str
    small: tuple[torch.nn.Module, ...] = ()
    small_path: str | None = None
    exit_layer: int | None = None
    precision: str = "float32"

    def generator(self, task: FairseqTask, search: SearchOptions) -> BildGenerator:
        """With the default policy."""
        drafting = {"small_models": self.small, "exit_layer": self.exit_layer}
        return self._generator([self.large], task, search, **drafting)

    def greedy(self, task: FairseqTask, search: SearchOptions) -> BildGenerator:
        """The large model alone."""
        return self._generator([self.large], task, search, alone=True)

    def small_alone(self, task: FairseqTask, search: SearchOptions) -> BildGenerator:
        """What drafts, decoding greedily without the large model."""
        return self._generator(self.small or [self.large], task, search, exit_layer=self.exit_layer, alone=True)

    def _generator(
        self, models: Sequence[torch.nn.Module], task: FairseqTask, search: SearchOptions, **kwargs: Any
    ) -> BildGenerator:
        precision, small_precision = parse_precision(self.precision)
        return BildGenerator(
            models,
            task.target_dictionary,
            Policy(),
            search,
            precision=precision,
            small_precision=small_precision,
            **kwargs,
        )

    def flags(self) -> str:
        """What selects it in fairseq-generate."""
        flags = f"--path {self.large_path} --generator bild"
        if self.exit_layer is None:
            flags += f" --bild-small-path {self.small_path}"
        else:
            flags += f" --bild-exit-layer {self.exit_layer}"
        precision, small_precision = parse_precision(self.precision)
        if precision != "float32":
            flags += f" --bild-precision {precision}"
        if small_precision != precision:
            flags += f" --bild-small-precision {small_precision}"
        return flags


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
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


def parse_precision(text: str) -> tuple[str, str]:
    """The large model's precision and the small one's.

    Args:
        text: as on the command line: one for both, or LARGE+SMALL.

    Raises:
        BildError: not one of :data:`PRECISIONS`.
    """
    precision, plus, small_precision = text.partition("+")
    for one in (precision, small_precision) if plus else (precision,):
        if one not in PRECISIONS:
            raise BildError(f"--precision {text}: choose from {', '.join(PRECISIONS)}, or two joined by +")
    return precision, small_precision or precision


def load_methods(task: FairseqTask, large: torch.nn.Module, args: argparse.Namespace) -> list[Method]:
    """The models of ``--small`` and ``--early-exit``, each loaded once.

    Raises:
        BildError: none is named, a name is used twice, a model does not fit or cannot read the sources.
    """
    precision, small_precision = parse_precision(args.precision)
    if args.early_exit and small_precision != precision:
        raise BildError(
            f"--precision {args.precision}: an exit has the large model's precision; leave +{small_precision} out"
        )
    if args.fp16 and args.precision != "float32":
        raise BildError("--fp16 and --precision both set the weights' precision; give one of them")
    methods = []
    for item in args.small:
        name, path = _named(item, "--small")
        small = load_small(path.split(os.pathsep), task, large)
        check_positions(small, min(task.max_positions()[0], large.max_positions()[0]))
        methods.append(Method(name, large, args.large, tuple(small), path, precision=args.precision))
    loaded = {args.large: large}
    for item in args.early_exit:
        name, path = _named(item, "--early-exit")
        head, _, layer = path.rpartition(":")
        if head and layer.isdigit():
            path = head
        if path not in loaded:
            loaded[path] = load_model(path, task, args)
        decoder = loaded[path].decoder
        if not isinstance(decoder, EarlyExitTransformerDecoder):
            raise BildError(f"--early-exit {path}: the model has no exits")
        exit_layer = int(layer) if head and layer.isdigit() else min(decoder.exit_layers)
        decoder.check_exit(exit_layer)
        methods.append(Method(name, loaded[path], path, exit_layer=exit_layer, precision=args.precision))
    if not methods:
        raise BildError("nothing drafts: give --small NAME=PATH or --early-exit NAME=PATH")
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise BildError(f"two models are called {name}; write NAME=PATH with another name")
    return methods


def _named(item: str, option: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    if not equals:
        name, path = Path(item).stem, item
    if not name or not path:
        raise BildError(f"{option} {item}: write NAME=PATH")
    return name, path


def check_sources(task: FairseqTask, args: argparse.Namespace, models: Sequence[torch.nn.Module]) -> None:
    """Raises BildError if a sentence is longer than a model reads."""
    dataset = task.dataset(args.subset)
    limit = min(model.encoder.max_positions() for model in models)
    for i in range(min(args.sentences, len(dataset))):
        if dataset.src_sizes[i] > limit:
            raise BildError(
                f"sentence {i} of {args.subset} has {dataset.src_sizes[i]} source tokens, the models read {limit}; "
                f"add --truncate-source {limit}"
            )


def timed(args: argparse.Namespace, run: Callable[[], Any]) -> tuple[Any, float]:
    """What ``run`` returns, and its seconds."""
    if args.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if args.cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def measure(
    systems: Sequence[System],
    batches: Sequence[dict[str, Any]],
    args: argparse.Namespace,
    *,
    warmup: int,
    turn: int = 1,
    encoding: bool = False,
    floor: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Runs all systems over all batches in turns; a run that took very long is repeated, and the shorter time counts.

    Args:
        systems: each gets its seconds, outputs and counters.
        batches: fairseq's.
        args: ``cuda`` is read.
        warmup: batches that are run first and not counted.
        turn: batches that a system runs before the next one's turn.
        encoding: also time the encoders alone.
        floor: also time the bare forward passes of each run.
        progress: called with the number of batches done.
    """
    for batch in batches[:warmup]:
        for system in systems:
            system.run(batch)
    for system in systems:
        system.counters.clear()
    for number, begin in enumerate(range(0, len(batches), turn)):
        block = batches[begin : begin + turn]
        first = number % len(systems)
        for system in [*systems[first:], *systems[:first]]:
            for batch in block:
                _run(system, batch, args, floor)
            if encoding and system.encode:
                system.encoding += [timed(args, partial(system.encode, batch))[1] for batch in block]
            time.sleep(system.rest)
        progress(begin + len(block))


def _run(system: System, batch: dict[str, Any], args: argparse.Namespace, floor: bool) -> None:
    def run() -> tuple[list[list[int]], float]:
        outputs, seconds = timed(args, lambda: system.run(batch))
        return outputs, system.clock() if system.clock else seconds

    outputs, seconds = run()
    if len(system.seconds) >= 5 and seconds > 10 * statistics.median(system.seconds):
        # A very long batch, or a machine that was asleep meanwhile: a second run tells.
        counted = len(system.counters)
        seconds = min(seconds, run()[1])
        del system.counters[counted:]
    system.seconds.append(seconds)
    system.outputs.update(zip(batch["id"].tolist(), outputs, strict=True))
    if floor and system.generator is not None:
        calls = traced(system.generator, batch)
        system.floor.append(timed(args, lambda: replay(system.generator, batch, calls))[1])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """How many times faster: ratio of total times, and its 95 % bootstrap interval over batches."""
    generator = random.Random(0)
    pairs = list(zip(theirs, ours, strict=True))
    resampled = []
    for _ in range(1000):
        picked = generator.choices(pairs, k=len(pairs))
        resampled.append(sum(a for a, _ in picked) / sum(b for _, b in picked))
    resampled.sort()
    return sum(theirs) / sum(ours), resampled[25], resampled[974]


def percentile90(values: Sequence[float]) -> float:
    return sorted(values)[int(0.9 * (len(values) - 1))]


class Scorer:
    """Quality of outputs against the references, for a corpus and from statistics of its sentences.

    Without a reference file, references are the data's targets. Texts that are tokenized (all but GPT-2's) are
    detokenized if there is a reference file.

    Args:
        task: with the subset loaded.
        args: as of :func:`add_score_arguments`, and ``subset``.
        ids: the sentences that will be scored.

    Raises:
        BildError: the reference, a vocabulary or a package is missing or does not fit.
    """

    def __init__(self, task: FairseqTask, args: argparse.Namespace, ids: Sequence[int]):
        self._dictionary = task.target_dictionary
        self._ids = sorted(ids)
        self._metric = args.metric
        self._gpt2 = _gpt2_bpe(args) if args.bpe == "gpt2" else None
        self._subword_mark = "@@ " if args.bpe == "subword_nmt" else None
        raw = bool(args.reference) or self._gpt2 is not None
        self._detokenizer = None
        if args.reference and self._gpt2 is None:
            self._detokenizer = MosesDetokenizer(lang=getattr(task.cfg, "target_lang", None) or "en")
        tokenizer = {} if raw else {"tokenize": "none", "force": True}
        self._bleu = sacrebleu.BLEU(**tokenizer)
        # The same counts; without this sacrebleu warns at each sentence that it has no score of its own.
        self._sentence_bleu = sacrebleu.BLEU(effective_order=True, **tokenizer)
        self._rouge = _rouge_scorer(self._metric) if self._metric != "bleu" else None
        self._references = self._read_references(task, args)
        self._cache: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}

    @property
    def name(self) -> str:
        """The metric as a person writes it."""
        return METRIC_NAMES[self._metric]

    @property
    def signature(self) -> str:
        """What must be equal for scores to be comparable; of BLEU, after the first score."""
        if self._rouge is not None:
            return f"rouge-score {self._metric}, F1, stemmed"
        return str(self._bleu.get_signature())

    def text(self, tokens: Sequence[int]) -> str:
        """An output as text without subword marks, detokenized if the references are."""
        line = self.plain(self._dictionary, tokens)
        return self._detokenizer.detokenize(line.split()) if self._detokenizer else line

    def plain(self, dictionary: Dictionary, tokens: Sequence[int]) -> str:
        """Tokens of either side as text without subword marks."""
        line = dictionary.string(torch.tensor(tokens, dtype=torch.long), self._subword_mark)
        if self._gpt2 is None:
            return line
        # Dictionaries of BART hold a few words that fill them up and are no numbers.
        known = (word for word in line.split() if word.isdigit() or word in ("<unk>", "<mask>"))
        return self._gpt2.decode(" ".join(known)).replace("\n", " ").strip()

    def piece(self, token: int) -> str:
        """One token of the target side with the space that belongs to it: the pieces of a text make it up."""
        word = self._dictionary[token]
        if self._gpt2 is not None:
            return self._gpt2.decode(word) if word.isdigit() else word
        mark = (self._subword_mark or "").strip()
        return word[: -len(mark)] if mark and word.endswith(mark) else f"{word} "

    def texts(self, outputs: dict[int, list[int]]) -> list[str]:
        """Outputs as text, in order of the sentences."""
        return [self.text(outputs[i]) for i in self._ids]

    def reference(self, i: int) -> str:
        return self._references[i]

    def score(self, outputs: dict[int, list[int]]) -> float:
        """Of the corpus, 0 to 100."""
        if self._rouge is not None:
            return float(self.from_statistics(self.statistics(outputs).sum(axis=0)))
        return self._bleu.corpus_score(self.texts(outputs), [list(self._references.values())]).score

    def statistics(self, outputs: dict[int, list[int]]) -> np.ndarray:
        """Per sentence what the corpus score is made of: (sentences, k); rows add up."""
        return np.stack([self.sentence(i, outputs[i]) for i in self._ids])

    def sentence(self, i: int, tokens: Sequence[int]) -> np.ndarray:
        """The statistics (k,) of one sentence's output; repeated outputs cost nothing."""
        key = i, tuple(tokens)
        if key not in self._cache:
            self._cache[key] = self._compare(self._references[i], self.text(tokens))
        return self._cache[key]

    def from_statistics(self, total: np.ndarray) -> np.ndarray:
        """Corpus scores, 0 to 100, of summed statistics (..., k): (...)."""
        total = np.asarray(total, dtype=np.float64)
        return 100 * (total[..., 0] / total[..., 1] if self._rouge is not None else _bleu(total))

    def _compare(self, reference: str, text: str) -> np.ndarray:
        if self._rouge is not None:
            score = self._rouge.score(*(_split(line, self._metric) for line in (reference, text)))[self._metric]
            return np.array([score.fmeasure, 1.0])
        score = self._sentence_bleu.sentence_score(text, [reference])
        return np.array([score.sys_len, score.ref_len, *score.counts, *score.totals], dtype=np.float64)

    def _read_references(self, task: FairseqTask, args: argparse.Namespace) -> dict[int, str]:
        if not args.reference:
            dataset = task.dataset(args.subset)
            if dataset.tgt is None:
                raise BildError(f"{args.data}: {args.subset} has no target side to score against; give --reference")
            return {i: self.text(dataset[i]["target"].tolist()) for i in self._ids}
        try:
            lines = Path(args.reference).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BildError(f"--reference {args.reference}: cannot read it: {error}") from error
        if len(lines) <= self._ids[-1]:
            raise BildError(
                f"--reference {args.reference}: has {len(lines)} lines, sentence {self._ids[-1]} has none; "
                "give the raw text that the subset was made from"
            )
        return {i: lines[i] for i in self._ids}


def _bleu(total: np.ndarray) -> np.ndarray:
    """BLEU, 0 to 1, for many corpora at once, as sacrebleu with its defaults computes it for one.

    Args:
        total: (..., 10) output length, reference length, n-gram matches (4), n-grams (4).
    """
    length, reference, matches, ngrams = total[..., 0], total[..., 1], total[..., 2:6], total[..., 6:]
    with np.errstate(divide="ignore", invalid="ignore"):
        # sacrebleu's "exp" smoothing: the k-th order without a match counts 1 / 2^k of one.
        smoothed = np.where(matches > 0, matches, 0.5 ** np.cumsum(matches == 0, axis=-1))
        score = np.exp(np.log(smoothed / ngrams).mean(axis=-1) + np.minimum(0, 1 - reference / length))
    return np.where((matches.sum(axis=-1) > 0) & (ngrams > 0).all(axis=-1), score, 0.0)


def bootstrap_weights(sentences: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each sentence is drawn in each resample of all of them: (resamples, sentences)."""
    return np.random.default_rng(seed).multinomial(sentences, np.full(sentences, 1 / sentences), size=resamples)


def quality_change(scorer: Scorer, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Paired difference of two outputs' corpus scores, and its 95 % bootstrap interval over sentences.

    Args:
        scorer: whose statistics these are.
        ours: (sentences, k).
        theirs: (sentences, k), what is compared with.
    """
    weights = bootstrap_weights(len(ours))
    resampled = np.sort(scorer.from_statistics(weights @ ours) - scorer.from_statistics(weights @ theirs))
    change = scorer.from_statistics(ours.sum(axis=0)) - scorer.from_statistics(theirs.sum(axis=0))
    return float(change), float(resampled[25]), float(resampled[974])


def _gpt2_bpe(args: argparse.Namespace) -> GPT2BPE:
    config = GPT2BPEConfig(gpt2_encoder_json=args.gpt2_encoder_json, gpt2_vocab_bpe=args.gpt2_vocab_bpe)
    try:
        return GPT2BPE(config)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BildError(
            f"--bpe gpt2: {reason}; give --gpt2-encoder-json encoder.json --gpt2-vocab-bpe vocab.bpe"
        ) from error


def _rouge_scorer(metric: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise BildError(f"--metric {metric} needs the package rouge-score: pip install rouge-score") from error
    return RougeScorer([metric], use_stemmer=True)


def _split(text: str, metric: str) -> str:
    """ROUGE-Lsum compares sentence by sentence and wants a line for each."""
    return re.sub(r"(?<=[.!?]) +", "\n", text) if metric == "rougeLsum" else text


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replaces a file at once: it holds the old text or the new one, whatever happens."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def file_digest(path: str) -> str:
    """What tells a file from another: SHA-256 of its content, shortened."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise BildError(f"{path}: cannot read it: {error.strerror}") from error
    return digest.hexdigest()[:16]


def data_digest(task: FairseqTask, args: argparse.Namespace) -> str:
    """What tells the sentences in use, both sides, from others."""
    dataset = task.dataset(args.subset)
    digest = hashlib.sha256()
    for i in range(min(args.sentences, len(dataset))):
        item = dataset[i]
        digest.update(repr([item[side].tolist() for side in ("source", "target") if item[side] is not None]).encode())
    if args.reference:
        digest.update(file_digest(args.reference).encode())
    return digest.hexdigest()[:16]


def origin_of(task: FairseqTask, methods: Sequence[Method], args: argparse.Namespace) -> dict[str, Any]:
    """What the outputs of some methods depend on, by name; ``models`` has an entry for each method."""
    models = {}
    for method in methods:
        paths = method.small_path.split(os.pathsep) if method.small_path else [method.large_path]
        models[method.name] = "+".join(map(file_digest, paths))
        if method.exit_layer is not None:
            models[method.name] += f", exit {method.exit_layer}"
    return {
        "large model": file_digest(args.large),
        "models": models,
        "subset": args.subset,
        "number of sentences": args.sentences,
        "data set": data_digest(task, args),
        "search": dataclasses.asdict(search_options(args)),
        "source length": args.truncate_source,
        "precision": "float16" if args.fp16 else args.precision,
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The name of the first thing that two origins disagree on; models that only one has do not count."""
    for name, value in new.items():
        if name != "models" and old.get(name) != value:
            return name
    both = old["models"].keys() & new["models"].keys()
    return next((name for name in sorted(both) if old["models"][name] != new["models"][name]), None)


def device_name(args: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if args.cuda else f"CPU, {args.threads} threads"


def quiet() -> None:
    """Keeps fairseq, Hydra and matplotlib from filling the terminal; warnings of this package stay."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.WARNING)
