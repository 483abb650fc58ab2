"""The sentences that an experiment runs on, as its flags choose them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fairseq.tasks import FairseqTask

from ..plugin.pair import Pair
from .arguments import score_options
from .data import check_sources, first_sentences, make_batches
from .scoring import Scorer


@dataclass(frozen=True)
class Sample:
    """Sentences of a subset, ready to be translated and scored.

    Attributes:
        ids: their numbers.
        batches: fairseq's, of sentences of like length, in random order.
        scorer: of what is written for them.
    """

    ids: range
    batches: list[dict[str, Any]]
    scorer: Scorer


def load_sample(task: FairseqTask, args: argparse.Namespace, pairs: Iterable[Pair], batch_size: int) -> Sample:
    """The first sentences of a subset.

    Args:
        task: with the subset loaded.
        args: of ``add_data_arguments`` and ``add_score_arguments``.
        pairs: that will read the sources.
        batch_size: sentences a batch.

    Raises:
        BildError: a source is too long for a model; the references, a vocabulary or a package does not fit.
    """
    ids = first_sentences(task, args.subset, args.sentences)
    check_sources(task, args.subset, ids, pairs)
    batches = make_batches(task.dataset(args.subset), ids, batch_size, cuda=args.cuda)
    return Sample(ids, batches, Scorer(task, args.subset, ids, score_options(args)))
