"""What an alignment has changed: agreement with the large model, rates, quality and speed, before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairseq import utils
from fairseq.data import FairseqDataset

from ..decoding.counters import total
from .scoring import Scorer
from .systems import System
from .timing import ratio
from .token_batches import token_batches

WHEN = ("before", "after")


@torch.no_grad()
def agreement(model: torch.nn.Module, dataset: FairseqDataset, cuda: bool) -> float:
    """The share of target tokens that are a model's first choice, given the source and the tokens before: 0 to 1."""
    right = count = 0
    for ids in token_batches(dataset, range(len(dataset)), max_tokens=4000):
        batch = dataset.collater([dataset[i] for i in ids])
        batch = utils.move_to_cuda(batch) if cuda else batch
        choice = model(**batch["net_input"])[0].argmax(-1)
        real = batch["target"].ne(dataset.tgt_dict.pad())
        right += int((choice.eq(batch["target"]) & real).sum())
        count += int(real.sum())
    return right / count


def figures(
    greedy: System, systems: dict[tuple[str, str], System], agreements: dict[str, float], scorer: Scorer
) -> dict[str, Any]:
    """The report of systems that have been measured.

    Args:
        greedy: the large model alone.
        systems: by setting (``bild``, ``lossless``) and small model (``before``, ``after``).
        agreements: by small model.
        scorer: of the outputs.

    Returns:
        ``agreement``, 0 to 1, and for each setting: counters, rates, quality, seconds, and how much faster than lean
        greedy, with a 95 % interval.
    """
    report: dict[str, Any] = {
        "quality": scorer.name,
        "agreement": agreements,
        "greedy": {"quality": scorer.score(greedy.outputs), "seconds": sum(greedy.seconds)},
        "bild": {},
        "lossless": {},
    }
    for (setting, name), system in systems.items():
        report[setting][name] = total(system.counters).as_dict() | {
            "quality": scorer.score(system.outputs),
            "seconds": sum(system.seconds),
            "speedup_over_greedy": list(ratio(system.seconds, greedy.seconds)),
            "differ_from_greedy": sum(system.outputs[i] != greedy.outputs[i] for i in greedy.outputs),
        }
    return report


def table(report: dict[str, Any]) -> str:
    """The report as a table of before and after, and what to look at in it."""
    settings = report["settings"]
    end = ", verified end" if settings["verify_end"] else ""
    rate: Callable[[float], str] = "{:.1%}".format
    plain: Callable[[float], str] = "{:.2f}".format

    def speed(value: Sequence[float]) -> str:
        return "{:.2f} [{:.2f}, {:.2f}]".format(*value)

    def row(title: str, before: str, after: str) -> str:
        return f"{title:<48} {before:>18} {after:>18}"

    def rows(setting: str, *columns: tuple[str, str, Callable[[Any], str]]) -> list[str]:
        return [row(title, *(show(report[setting][when][name]) for when in WHEN)) for title, name, show in columns]

    length = ("  tokens per large call", "mean_accepted_length", plain)
    faster = ("  times faster than greedy", "speedup_over_greedy", speed)
    lines = [
        row("", *WHEN),
        row("agreement with the large model", *(rate(report["agreement"][when]) for when in WHEN)),
        f"fallback {settings['fallback']}, rollback {settings['rollback']}{end}:",
        *rows(
            "bild",
            ("  acceptance rate", "acceptance_rate", rate),
            ("  fallback rate", "fallback_rate", rate),
            ("  rollback rate", "rollback_rate", rate),
            length,
            (f"  {report['quality']} (greedy: {report['greedy']['quality']:.2f})", "quality", plain),
            faster,
        ),
        f"lossless, fallback {settings['lossless_fallback']}:",
        *rows("lossless", length, faster),
        f"Look at the tokens per large call (more is faster) and at {report['quality']} (it should not fall).",
        "The acceptance rate may fall while decoding gets faster: the aligned model is surer and drafts more tokens.",
    ]
    return "\n".join(lines)
