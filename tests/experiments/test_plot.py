"""scripts/plot.py and the modules that draw: figures and the page say what the files hold; bad input gets one line."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from script_support import refused, run_script

from bild_fairseq.errors import BildError
from bild_fairseq.experiments import plots, plots_curve, plots_lengths, plots_sizes, plots_tokens

Row = dict[str, Any]


def row(method: str, kind: str, quality: float, speedup: float, fallback: float | None = 0.5) -> Row:
    """A setting as sweep.py writes it: quality within half a point, speedup within a tenth."""
    return {
        "method": method,
        "kind": kind,
        "baseline": "large model",
        "fallback_threshold": fallback,
        "rollback_threshold": None if fallback is None else "inf",
        "verify_end": False,
        "quality": quality,
        "quality_change": quality - 30,
        "quality_change_low": quality - 30.5,
        "quality_change_high": quality - 29.5,
        "speedup": speedup,
        "speedup_low": speedup - 0.1,
        "speedup_high": speedup + 0.1,
        "ms_mean": 100 / speedup,
    }


ROWS = [
    row("large model", "greedy", 30, 1, None),
    row("aligned", "small alone", 20, 4, None),
    *(row("aligned", "bild", 30.5 - x * x, 1 + x) for x in (0.1, 0.4, 0.8)),
    *(row("unaligned", "bild", 30.2 - x * x, 1 + x / 2) for x in (0.1, 0.4, 0.8)),
    row("unaligned", "bild", 25, 1.05),
    *(row("unaligned", "no rollback", 30 - 2 * x, 1 + x / 2) for x in (0.1, 0.4, 0.8)),
    *(row("unaligned", "no fallback", 30 - 9 * x, 1 + x / 2, 0.0) for x in (0.1, 0.4, 0.8)),
]


@pytest.fixture
def sweep(tmp_path) -> Path:
    """The folder of a sweep, made up: two methods, one of which has been ablated, and baselines."""
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"origin": {"metric_name": "BLEU"}, "rows": ROWS}))
    return folder


def part(drafted: str, accepted: int, large: str | None, *, fallback: bool = False, verified: bool = True) -> Row:
    """A round as rounds.py writes it, of words with the space that follows them."""
    words = [f"{word} " for word in drafted.split()]
    large = None if large is None else f"{large} "
    return {"drafted": words, "accepted": accepted, "fallback": fallback, "verified": verified, "large": large}


ROUNDS = {
    "7": [
        part("", 0, "The"),
        part("dog", 1, "&apos;s", fallback=True),
        part("old cat", 1, "tail"),
        part("is <b>", 2, "long"),
        part("", 0, ".", fallback=True),
        part("</s>", 1, None, verified=False),
    ],
    "8": [part("", 0, "Yes"), part("&quot; . </s>", 3, None)],
}


@pytest.fixture
def rounds_file(tmp_path) -> Path:
    """Two sentences under one setting, written in every way that there is."""
    policy = {"fallback_threshold": 0.5, "rollback_threshold": "inf", "verify_end": True, "max_draft": 2}
    setting = {"method": "<tiny> & co", "policy": policy, "rounds": ROUNDS}
    texts = {"source": "Der Hund &lt;", "reference": "The dog&apos;s tail", "greedy": "The dog &apos;s tail"}
    file = tmp_path / "rounds.json"
    file.write_text(json.dumps({"sentences": {"7": texts, "8": texts}, "settings": [setting]}))
    return file


def point(speedup: float, quality: float) -> plots_curve.Point:
    return plots_curve.Point(speedup, quality, speedup, (speedup, speedup), (quality, quality), {"verify_end": False})


def test_the_front_is_what_nothing_beats():
    points = [point(*spot) for spot in [(1, 30), (1.5, 29), (1.2, 28), (2, 25), (1.1, 30), (0.5, 10)]]
    assert [(p.speedup, p.quality) for p in plots_curve.front(points)] == [(1.1, 30), (1.5, 29), (2, 25)]


def test_points_are_at_what_was_measured(sweep):
    """Time is greedy's over the speedup, so a slow spell of the machine does not move a setting."""
    groups, metric = plots_curve.load_sweeps([str(sweep)], "latency")
    assert metric == "BLEU"
    aligned = groups["aligned", "bild"]
    assert [p.x for p in aligned] == pytest.approx([100 / 1.1, 100 / 1.4, 100 / 1.8])
    assert aligned[0].x_interval == pytest.approx((100 / 1.2, 100 / 1.0))
    assert aligned[0].quality_interval == pytest.approx((aligned[0].quality - 0.5, aligned[0].quality + 0.5))
    groups, _ = plots_curve.load_sweeps([str(sweep), str(sweep / "results.json")], "speedup")
    assert groups["aligned", "bild"][0].x_interval == pytest.approx((1.0, 1.2))
    assert {method for method, _ in groups} == {
        *("large model", "aligned", "unaligned"),
        *("large model, first", "aligned, first", "unaligned, first"),
    }


def test_a_good_ablation_is_inside_the_figure():
    """It may be faster than all settings with both policies; those of no use do not squeeze the rest."""
    both, good, bad = [point(1.0, 32.0), point(1.3, 30.0)], point(1.6, 31.0), point(3.0, 20.0)
    assert plots_curve.worth_showing([*both, good, bad], both) == [*both, good]
    assert plots_curve.worth_showing([good, bad], []) == [good, bad]


@pytest.mark.parametrize("x", ["latency", "speedup"])
def test_the_curve_comes_out(sweep, x):
    """Every curve, ablation, baseline and kind of marker is in the legend; lines and intervals are in the figure."""
    groups, metric = plots_curve.load_sweeps([str(sweep)], x)
    figure = plots_curve.draw(groups, metric, x=x, labels=x == "speedup", title="Two methods")
    (axes,) = figure.axes
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        "aligned",
        "unaligned",
        "unaligned, no rollback",
        "unaligned, no fallback (1 worse, left out)",
        "small: beaten by another of its curve",
        "Pareto front",
        "lean greedy",
        "aligned, small alone: 20.0 at 4.00x, outside",
        "95 % intervals",
    ]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    drawn = [line.get_xydata() for line in axes.lines if line.get_transform() == axes.transData]
    drawn += [path.vertices for bars in axes.collections for path in bars.get_paths()]
    spots = [spot for spots in drawn for spot in spots.tolist() if not np.isnan(spot).any()]
    assert len(spots) > 30
    assert all(left < spot[0] < right and low < spot[1] < high for spot in spots)
    assert axes.get_ylabel() == "BLEU" and axes.get_title() == "Two methods"
    assert ("speedup" in axes.get_xlabel()) and "latency" not in axes.get_xlabel()
    assert ("0.5, inf" in [text.get_text() for text in axes.texts]) == (x == "speedup")


def test_lengths_come_out(rounds_file):
    (setting,) = plots.read_rounds(str(rounds_file))["settings"]
    # A sentence's first call comes before any draft, and its last draft may come after all calls.
    assert plots_lengths.accepted_drafts(setting) == [1, 1, 2, 0, 3]
    figure = plots_lengths.draw([setting, setting], "Two settings")
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.containers[1]] == pytest.approx([20, 40, 20, 20])
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["<tiny> & co (0.5, inf, end; draft 2): mean 1.40 accepted drafts a call"] * 2
    with pytest.raises(BildError, match="7 settings are too many for one figure"):
        plots_lengths.draw([setting] * 7, "")


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers text and, by class, the tokens."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.tokens = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta",):
            self.open.append((tag, dict(attributes).get("class")))
        assert tag not in ("script", "link", "img"), "the page needs nothing but itself"

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1][0] in ("span", "del"):
            self.tokens.append((self.open[-1][1], data))


def test_the_page_shows_every_token_and_why_it_is_there(rounds_file):
    page = Page(plots_tokens.page(plots.read_rounds(str(rounds_file)), count=1, title=""))
    assert page.open == []
    first = page.tokens.index(("large", "The"))
    assert page.tokens[first:] == [
        *[("large", "The"), ("why", "first"), ("call", "|")],
        *[("small", "dog"), ("large", "'s"), ("why", "fallback"), ("call", "|")],
        *[("small", "old"), ("first", "cat"), ("large", "tail"), ("why", "rollback"), ("call", "|")],
        *[("small", "is"), ("small", "<b>"), ("large", "long"), ("why", "full draft"), ("call", "|")],
        *[("large", "."), ("why", "fallback"), ("call", "|"), ("unread", "</s>")],
    ]
    # Names, words and symbols are text, not markup; entities are characters.
    assert "<tiny> & co" in page.text and "The dog's tail" in page.text and "Der Hund <" in page.text
    assert "10 tokens: 5 of the small model, 5 of the large one in 5 calls; 2 fallbacks, 1 rollbacks" in page.text
    assert "sentence 7" in page.text and "sentence 8" not in page.text


def test_an_entity_of_several_pieces_is_one_character():
    assert plots_tokens.unescape(["a &am", "p; b", "&quot;&lt;", "&", "apos ;"]) == ["a &", " b", '"<', "&", "apos ;"]


def benchmark_file(path: Path, weights: int, **speedups: float) -> Path:
    """A file of benchmark.py, with the speedups of some systems over greedy decoding."""
    rows = [
        {
            "system": name,
            "large_calls": 1,
            "small_calls": 1,
            "speedup_over_greedy": [speedup, speedup - 0.1, speedup + 0.1],
        }
        for name, speedup in speedups.items()
    ]
    greedy = {"system": "greedy", "large_calls": 1, "small_calls": 0, "speedup_over_greedy": [1.0, 1.0, 1.0]}
    path.write_text(json.dumps({"large_weights": weights, "rows": [greedy, *rows]}))
    return path


def test_speedups_are_drawn_by_size_whatever_the_order_of_files(tmp_path):
    """Systems without a small model are left out, and those that a size lacks."""
    big = benchmark_file(tmp_path / "big.json", 149_000_000, bild=2.0, exit=1.5)
    assert plots_sizes.curves([str(big)]).keys() == {"bild", "exit"}
    small = benchmark_file(tmp_path / "small.json", 10_000_000, bild=0.9)
    found = plots_sizes.curves([str(big), str(small)])
    assert found == {"bild": [(10.0, (0.9, 0.8, 1.0)), (149.0, (2.0, 1.9, 2.1))]}
    axes = plots_sizes.draw(found, "title").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["bild"]
    assert any(list(line.get_xydata()[:, 1]) == [0.9, 2.0] for line in axes.get_lines())
    with pytest.raises(BildError, match="same size"):
        plots_sizes.curves([str(big), str(big)])
    with pytest.raises(BildError, match="beside greedy decoding at every size"):
        plots_sizes.curves([str(benchmark_file(tmp_path / "none.json", 1))])


def test_the_script_writes_what_is_drawn(corpus, sweep, rounds_file, tmp_path):
    figures = [("curve", sweep, "curve.svg", "--labels"), ("lengths", rounds_file, "lengths.png")]
    figures.append(("sizes", benchmark_file(tmp_path / "benchmark.json", 10, bild=2.0), "sizes.png"))
    for command, path, name, *more in [*figures, ("tokens", rounds_file, "tokens.html")]:
        out = tmp_path / name
        assert run_script(corpus, "plot", command, path, "--out", out, *more).out == f"{out}\n"
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "sentence 8" in (tmp_path / "tokens.html").read_text()
    assert "name a .html file" in refused(corpus, "plot", "tokens", rounds_file, "--out", tmp_path / "tokens.png")
    assert "--sentences 0" in refused(corpus, "plot", "tokens", rounds_file, "--out", out, "--sentences", 0)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.tmp"))


def test_bad_input_gets_one_line(sweep, rounds_file, tmp_path):
    def refuses(message: str, paths: list[Path]) -> None:
        with pytest.raises(BildError, match=message):
            plots_curve.load_sweeps([str(path) for path in paths], "latency")

    other = tmp_path / "other.json"
    refuses("No such file", [tmp_path / "missing"])
    other.write_text("{]")
    refuses("is no JSON", [other])
    refuses("holds no origin and rows", [rounds_file])
    with pytest.raises(BildError, match="holds no sentences and settings"):
        plots.read_rounds(str(sweep / "results.json"))
    other.write_text(json.dumps({"origin": {"metric_name": "ROUGE-L"}, "rows": []}))
    refuses("different metrics, BLEU and ROUGE-L", [sweep, other])
    refuses("no setting has been measured", [other])
    other.write_text(json.dumps({"origin": {"metric_name": "BLEU"}, "rows": ROWS[1:]}))
    refuses("has not measured greedy decoding yet", [other])
    for name, reason in {"figure.xyz": ".*'xyz'", "no/figure.png": "it cannot be written: No such file"}.items():
        with pytest.raises(BildError, match=f"^--out {tmp_path / name}: {reason}"):
            plots.save(plots.pyplot().figure(), "--out", str(tmp_path / name))
    assert not list(tmp_path.glob("*figure*"))
