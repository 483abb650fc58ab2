"""Who wrote which token: the rounds of each sentence, as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fairseq.tasks import FairseqTask

from ..decoding.policies import Policy
from ..decoding.sentence import Round
from ..plugin.generator import BildGenerator
from ..plugin.pair import Pair
from ..plugin.search import SearchOptions
from .sample import Sample
from .scoring import Scorer
from .settings import threshold_columns


def record(
    pair: Pair,
    policy: Policy,
    task: FairseqTask,
    search: SearchOptions,
    sample: Sample,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """The rounds of every sentence under one setting.

    Args:
        pair: of models.
        policy: thresholds and rules.
        task: with its data.
        search: length limits.
        sample: the sentences, and what turns tokens into text.
        progress: called with the number of sentences after each batch.

    Returns:
        ``policy``, and in ``rounds`` by sentence a list of its rounds, see :func:`readable`.
    """
    generator = BildGenerator(pair, task.target_dictionary, policy, search)
    sentences = {}
    for batch in sample.batches:
        hypotheses = generator.generate([], batch)
        for i, (hypothesis,) in zip(batch["id"].tolist(), hypotheses, strict=True):
            sentences[i] = [readable(one, sample.scorer) for one in hypothesis["rounds"]]
        progress(len(batch["id"]))
    return {"policy": asdict(policy) | threshold_columns(policy), "rounds": sentences}


def readable(one: Round, scorer: Scorer) -> dict[str, Any]:
    """A round with each token as the text that it is shown as, and the space that belongs to it."""
    drafted = [scorer.piece(token) for token in one.drafted]
    return asdict(one) | {"drafted": drafted, "large": None if one.large is None else scorer.piece(one.large)}


def texts(task: FairseqTask, subset: str, outputs: dict[int, list[int]], scorer: Scorer) -> dict[int, dict[str, str]]:
    """Source, reference and the large model's own translation of each sentence.

    Args:
        outputs: of greedy decoding, by sentence.
    """
    dataset = task.dataset(subset)
    return {
        i: {
            "source": scorer.plain(task.source_dictionary, dataset[i]["source"].tolist()),
            "reference": scorer.reference(i),
            "greedy": scorer.text(tokens),
        }
        for i, tokens in sorted(outputs.items())
    }
