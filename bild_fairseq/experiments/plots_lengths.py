"""How many drafted tokens a call of the large model accepts, for some settings of a file of rounds.

These are the accepted drafts of a call; the tokens per large call of other reports also count what the large model
writes.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from ..errors import BildError
from .plots import pyplot, setting_name, style

HATCHES = ["", "////", "....", "\\\\\\\\", "xx", "--"]


def accepted_drafts(setting: dict[str, Any]) -> list[int]:
    """For each large call to which the small model had its turn before, the drafted tokens that it accepted."""
    return [
        one["accepted"]
        for rounds in setting["rounds"].values()
        for one in rounds
        if one["verified"] and (one["drafted"] or one["fallback"])
    ]


def draw(settings: Sequence[dict[str, Any]], title: str) -> Any:
    """The figure.

    Args:
        settings: of files of ``scripts/rounds.py``.
        title: over the figure.

    Returns:
        a matplotlib figure.

    Raises:
        BildError: more settings than one figure can hold, or one without a draft that was verified.
    """
    if len(settings) > len(HATCHES):
        raise BildError(f"{len(settings)} settings are too many for one figure; draw at most {len(HATCHES)}")
    figure, axes = pyplot().subplots(figsize=(7.2, 3.8), layout="constrained")
    width = 0.84 / len(settings)
    longest = 0
    for number, setting in enumerate(settings):
        accepted = accepted_drafts(setting)
        if not accepted:
            raise BildError(f"{setting_name(setting)}: the large model was never called after a draft")
        counts = collections.Counter(accepted)
        longest = max(longest, *counts)
        mean = sum(accepted) / len(accepted)
        color = style(number)["color"]
        axes.bar(
            [length + (number - (len(settings) - 1) / 2) * width for length in range(longest + 1)],
            [100 * counts[length] / len(accepted) for length in range(longest + 1)],
            width,
            label=f"{setting_name(setting)}: mean {mean:.2f} accepted drafts a call",
            facecolor=color if not number else "white",
            edgecolor=color,
            hatch=HATCHES[number],
            linewidth=1,
        )
    axes.set_xticks(range(longest + 1))
    axes.set_xlabel("accepted drafts: drafted tokens that a call of the large model accepts")
    axes.set_ylabel("calls (%)")
    axes.set_title(title)
    axes.legend(fontsize=8, frameon=False)
    return figure
