"""Binarized data and models from files, and batches of some of its sentences."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.data import FairseqDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import FairseqTask

from ..errors import BildError


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
    return task, load_model(args.large, task, cuda=args.cuda, fp16=args.fp16)


def load_model(path: str, task: FairseqTask, *, cuda: bool, fp16: bool = False) -> torch.nn.Module:
    """A model in eval mode, on the GPU with ``cuda``, in half precision with ``fp16``."""
    models, _ = checkpoint_utils.load_model_ensemble([path], task=task)
    model = models[0].eval()
    if fp16:
        model.half()
    return model.cuda() if cuda else model


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


def check_sources(task: FairseqTask, args: argparse.Namespace, models: Sequence[torch.nn.Module]) -> None:
    """Raises BildError if a sentence is longer than a model reads."""
    dataset = task.dataset(args.subset)
    limit = min(model.encoder.max_positions() for model in models)
    for i in first_sentences(task, args.subset, args.sentences):
        if dataset.src_sizes[i] > limit:
            raise BildError(
                f"sentence {i} of {args.subset} has {dataset.src_sizes[i]} source tokens, the models read {limit}; "
                f"add --truncate-source {limit}"
            )


def device_name(cuda: bool, threads: int) -> str:
    """The GPU, or the CPU with its threads, as results name it."""
    return torch.cuda.get_device_name() if cuda else f"CPU, {threads} threads"
