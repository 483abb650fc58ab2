"""What recorded results depend on, so that they are not mixed with those of other data or models."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from fairseq import utils
from fairseq.tasks import FairseqTask

from ..plugin.pair import Pair
from ..plugin.search import SearchOptions
from .data import first_sentences
from .files import file_digest


def data_digest(task: FairseqTask, args: argparse.Namespace) -> str:
    """What tells the sentences in use, both sides, from others."""
    dataset = task.dataset(args.subset)
    digest = hashlib.sha256()
    for i in first_sentences(task, args.subset, args.sentences):
        item = dataset[i]
        digest.update(repr([item[side].tolist() for side in ("source", "target") if item[side] is not None]).encode())
    if args.reference:
        digest.update(file_digest(args.reference).encode())
    return digest.hexdigest()[:16]


def origin_of(task: FairseqTask, pairs: Mapping[str, Pair], args: argparse.Namespace) -> dict[str, Any]:
    """What the outputs of some pairs depend on, by name; ``models`` has an entry for each pair."""
    models = {}
    for name, pair in pairs.items():
        paths = utils.split_paths(pair.small_path or pair.large_path)
        models[name] = "+".join(map(file_digest, paths))
        if pair.exit_layer is not None:
            models[name] += f", exit {pair.exit_layer}"
        if pair.draft_vocabulary is not None:
            models[name] += f", drafting among {file_digest(pair.draft_vocabulary.path)}"
    return {
        "large model": file_digest(args.large),
        "models": models,
        "subset": args.subset,
        "number of sentences": args.sentences,
        "data set": data_digest(task, args),
        "search": dataclasses.asdict(SearchOptions.from_args(args)),
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
