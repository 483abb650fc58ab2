"""A page that shows who wrote which token of each sentence, from a file of rounds."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .plots import setting_name

# What Moses' tokenizer writes for characters that mean something to it.
ENTITY = "&(?:amp|lt|gt|quot|apos|#124|#91|#93);"

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --gone: light-dark(#666, #aaa);
  --small: light-dark(#1f4e8c, #9cc4ff); --large: light-dark(#a34a00, #ffb366); }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }}
section {{ border-top: 1px solid var(--line); padding: .6rem 0; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; margin: 0; }}
dt {{ color: var(--gone); font-size: .85rem; line-height: 1.75; }}
dd {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
.output {{ line-height: 1.9; }}
.count {{ color: var(--gone); font-size: .8rem; }}
.small {{ color: var(--small); }}
.unread {{ color: var(--small); font-style: italic; border-bottom: 1px dotted; }}
.large {{ color: var(--large); font-weight: 700; border-bottom: 2px solid; }}
del {{ color: var(--gone); font-size: .9em; }}
del.first {{ text-decoration-thickness: 2px; }}
.why {{ color: var(--gone); font-size: .65em; vertical-align: super; margin-left: .2em; user-select: none; }}
.call {{ color: var(--gone); margin: 0 .15em; user-select: none; }}
</style>
<h1>{title}</h1>
<p><span class="small">small model's, kept</span> &nbsp;
<span class="unread">small model's, never verified</span> &nbsp;
<del class="first">small model's, rolled back</del> &nbsp; <span class="large">large model's</span> &nbsp;
<span class="call">|</span> end of a large call</p>
<p class="count">Beside a large model's token is the reason for the call: <b>fallback</b>, the small model was unsure;
<b>rollback</b>, the large model took drafted tokens back; <b>full draft</b>, the draft had its full length;
<b>first</b>, the large model writes the first token; <b>no draft</b>, the small model had no turn.</p>
{sentences}
</html>
"""


def page(content: dict[str, Any], count: int, title: str) -> str:
    """The page: one file of HTML that needs no other.

    Args:
        content: of a file of ``scripts/rounds.py``.
        count: how many of its sentences, from the first on.
        title: over the page; empty for a general one.
    """
    names = list(content["sentences"])[:count]
    sections = [section(name, content["sentences"][name], content["settings"]) for name in names]
    return PAGE.format(title=html.escape(title or "Who wrote which token"), sentences="\n".join(sections))


def section(name: str, texts: dict[str, str], settings: Sequence[dict[str, Any]]) -> str:
    """One sentence with what each setting made of it."""
    lines = []
    for label in ("source", "reference", "greedy"):
        lines.append(f"<dt>{label}</dt><dd>{html.escape(''.join(unescape([texts[label]])))}</dd>")
    for setting in settings:
        rounds = setting["rounds"][name]
        lines.append(f"<dt>{html.escape(setting_name(setting))}</dt><dd class=output>{''.join(spans(rounds))}")
        lines.append(f"<div class=count>{account(rounds)}</div></dd>")
    return f"<section><h2 class=count>sentence {html.escape(name)}</h2><dl>{''.join(lines)}</dl></section>"


def spans(rounds: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The tokens of one sentence in the order in which they were written, and a bar after each large call."""
    kept = iter(unescape([piece for one in rounds for piece in kept_pieces(one)]))
    for number, one in enumerate(rounds):
        for _ in range(one["accepted"]):
            yield span(next(kept), "span", "small" if one["verified"] else "unread")
        for index, piece in enumerate(unescape(one["drafted"][one["accepted"] :])):
            yield span(piece, "del", "" if index else "first")
        if one["large"] is not None:
            yield span(next(kept), "span", "large", reason(one, number))
        if one["verified"]:
            yield "<span class=call>|</span>"


def kept_pieces(one: dict[str, Any]) -> list[str]:
    """The tokens of the text that a round wrote: the drafted ones that were kept, then the large model's."""
    return one["drafted"][: one["accepted"]] + ([] if one["large"] is None else [one["large"]])


def unescape(pieces: Sequence[str]) -> list[str]:
    """The pieces of a text with characters for entities; the piece where an entity begins gets its character."""
    owners = [number for number, piece in enumerate(pieces) for _ in piece]
    shown = [""] * len(pieces)
    for match in re.finditer(f"{ENTITY}|.", "".join(pieces), re.DOTALL):
        shown[owners[match.start()]] += html.unescape(match[0]) if len(match[0]) > 1 else match[0]
    return shown


def span(piece: str, tag: str, kind: str, why: str = "") -> str:
    """A token with why it is there; the space at its ends stays outside, where it is not stroked."""
    text = piece.strip() or piece
    start = piece.index(text)
    before, after = piece[:start], piece[start + len(text) :]
    attributes = f' class="{kind}"' * bool(kind)
    note = f'<span class="why">{why}</span>' if why else ""
    return f"{before}<{tag}{attributes}>{html.escape(text)}</{tag}>{note}{after}"


def reason(one: dict[str, Any], number: int) -> str:
    """Why the large model was called, or took a token back, in a word or two that the page explains.

    Args:
        one: the round that the large model ended.
        number: of the round in its sentence, from 0 on.
    """
    if one["accepted"] < len(one["drafted"]):
        return "rollback"
    if one["fallback"]:
        return "fallback"
    return "full draft" if one["drafted"] else "no draft" if number else "first"


def account(rounds: Sequence[dict[str, Any]]) -> str:
    """A sentence's counts in words."""
    small = sum(one["accepted"] for one in rounds)
    large = sum(one["large"] is not None for one in rounds)
    calls = sum(one["verified"] for one in rounds)
    fallbacks = sum(one["fallback"] for one in rounds)
    rollbacks = sum(one["accepted"] < len(one["drafted"]) for one in rounds)
    return (
        f"{small + large} tokens: {small} of the small model, {large} of the large one in {calls} calls; "
        f"{fallbacks} fallbacks, {rollbacks} rollbacks"
    )
