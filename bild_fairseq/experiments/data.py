"""Binarized data, and batches of some of its sentences."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks, utils
from fairseq.data import FairseqDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import FairseqTask

from ..errors import BildError, first_line
from ..plugin.files import unreadable
from ..plugin.pair import Pair
from ..plugin.search import SearchOptions
from .arguments import check_positive


def load(args: argparse.Namespace) -> FairseqTask:
    """The task with its data, of the flags that ``add_data_arguments`` adds; torch gets as many threads as they say.

    Raises:
        BildError: the data, the subset, the large model's checkpoint or the GPU is missing, or a number out of range.
    """
    check_positive(args, "sentences", "threads", "truncate_source")
    SearchOptions.from_args(args)  # which refuses what is out of range, before anything is loaded
    if not Path(args.large).is_file():
        raise BildError(f"--large {args.large}: {unreadable(args.large)}")
    if args.cuda and not torch.cuda.is_available():
        raise BildError("--cuda: torch finds no GPU")
    torch.set_num_threads(args.threads)
    task = make_task(args.data, args.source_lang, args.target_lang, args.truncate_source)
    load_subset(task, args.subset)
    return task


def make_task(
    data: str | os.PathLike,
    source_lang: str | None = None,
    target_lang: str | None = None,
    truncate_source: int | None = None,
) -> FairseqTask:
    """The translation task of a data folder.

    Args:
        data: what fairseq-preprocess made.
        source_lang, target_lang: None for the languages that the files are named after.
        truncate_source: tokens that longer sources are cut to.

    Raises:
        BildError: there is no such folder, or it holds no binarized data of these languages.
    """
    if not Path(data).is_dir():
        raise BildError(f"{data}: no such folder; give one that fairseq-preprocess has made")
    if (source_lang is None) != (target_lang is None):
        raise BildError("give both -s and -t, or neither")
    words = [str(data), "--path", "-"]
    if source_lang is not None:
        words += ["--source-lang", source_lang, "--target-lang", target_lang]
    if truncate_source:
        words += ["--truncate-source", "--max-source-positions", str(truncate_source)]
    parsed = options.parse_args_and_arch(options.get_generation_parser(), words)
    try:
        return tasks.setup_task(convert_namespace_to_omegaconf(parsed).task)
    except Exception as error:  # fairseq raises bare Exceptions here
        hint = "" if source_lang else "; name the languages with -s and -t"
        raise BildError(f"{data}: no binarized data of two languages: {first_line(error)}{hint}") from error


def load_subset(task: FairseqTask, subset: str) -> None:
    """Loads a subset of a task's data.

    Raises:
        BildError: there is none of this name.
    """
    try:
        task.load_dataset(subset)
    except Exception as error:  # fairseq raises bare Exceptions here
        there = subsets(utils.split_paths(task.cfg.data)[0])
        hint = f"; there is: {', '.join(there)}" if there and subset not in there else ""
        raise BildError(f"{task.cfg.data}: cannot load {subset}: {first_line(error)}{hint}") from error


def subsets(folder: str) -> list[str]:
    """The names of the subsets in a folder of binarized data."""
    return sorted({path.name.partition(".")[0] for path in Path(folder).glob("*.idx")})


def first_sentences(task: FairseqTask, subset: str, count: int) -> range:
    """The numbers of the first sentences of a subset, at most ``count``."""
    return range(min(count, len(task.dataset(subset))))


def make_batches(
    dataset: FairseqDataset, ids: Sequence[int], batch_size: int, *, cuda: bool = False
) -> list[dict[str, Any]]:
    """Batches of sentences of like length, in random order so that no system meets them sorted.

    Args:
        dataset: has the sentences.
        ids: which of them.
        batch_size: sentences a batch.
        cuda: move the batches to the GPU.
    """
    ids = sorted(ids, key=lambda i: (dataset.src_sizes[i], i))
    chunks = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
    random.Random(0).shuffle(chunks)
    batches = [dataset.collater([dataset[i] for i in chunk]) for chunk in chunks]
    return [utils.move_to_cuda(batch) for batch in batches] if cuda else batches


def check_sources(task: FairseqTask, subset: str, ids: Sequence[int], pairs: Iterable[Pair]) -> None:
    """Refuses sentences that are longer than a model of some pairs reads.

    Raises:
        BildError: naming the first one.
    """
    sizes = task.dataset(subset).src_sizes
    limit = min(model.encoder.max_positions() for pair in pairs for model in (*pair.large, *pair.small))
    for i in ids:
        if sizes[i] > limit:
            raise BildError(
                f"sentence {i} of {subset} has {sizes[i]} source tokens, the models read {limit}; "
                f"add --truncate-source {limit}"
            )


def device_name(cuda: bool, threads: int) -> str:
    """The GPU, or the CPU with its threads, as results name it."""
    return torch.cuda.get_device_name() if cuda else f"CPU, {threads} threads"
