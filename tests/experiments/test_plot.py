"""scripts/rounds.py and scripts/plot.py: rounds are what happened, figures and the page come out, bad input."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import support
from bild_fairseq.plugin.trace import traced
from cli_support import Corpus
from hypothesis import given
from hypothesis import strategies as st
from script_support import refused, run_script, script

from bild_fairseq.decoding.decode import Policy
from bild_fairseq.plugin.generator import BildGenerator, SearchOptions

plot, rounds = script("plot"), script("rounds")


@given(
    pair=support.ANY_PAIR,
    sources=support.SOURCES,
    policy=st.builds(
        Policy,
        support.POLICY["fallback_threshold"],
        support.POLICY["rollback_threshold"],
        support.POLICY["max_draft"],
        start_small=st.booleans(),
        verify_end=st.booleans(),
    ),
)
def test_rounds_explain_tokens_and_counters(pair, sources, policy):
    """What the rounds keep, in order, is the sentence, and their events are those that were counted."""
    large, small = pair
    options = SearchOptions(max_len_b=12)
    generator = BildGenerator([large], support.symbols(), policy, options, small_models=[small])
    batch = support.sample(sources)
    calls = traced(generator, batch)
    for row, (hypothesis,) in enumerate(generator.generate([], batch)):
        states = [(is_large, tokens[row][1:]) for is_large, tokens, rows, *_ in calls if row in rows]
        found = rounds.rounds_of(states, hypothesis["tokens"].tolist())
        kept = [[*one.drafted[: one.accepted], *([] if one.large is None else [one.large])] for one in found]
        assert sum(kept, []) == hypothesis["tokens"].tolist()
        counters = hypothesis["counters"]
        assert sum(one.verified for one in found) == counters.large_calls
        assert sum(len(one.drafted) for one in found) == counters.drafted
        assert sum(one.accepted for one in found if one.verified) == counters.accepted
        assert sum(one.accepted for one in found if not one.verified) == counters.unverified
        assert sum(one.accepted < len(one.drafted) for one in found) == counters.rollbacks
        assert sum(one.fallback for one in found) == counters.fallbacks


def models(corpus: Corpus) -> list[object]:
    pair = ["--large", corpus.large, "--small", f"<tiny> & co={corpus.small}", "--threads", 1]
    return [corpus.data, *pair, "--max-len-b", 12, "--sentences", 5]


@pytest.fixture(scope="module")
def rounds_file(corpus, tmp_path_factory) -> Path:
    """Two settings of five sentences."""
    file = tmp_path_factory.mktemp("rounds") / "rounds.json"
    run_script(corpus, "rounds", *models(corpus), "--setting", "0.6,2", "--setting", "0.2,0,end", "--out", file)
    return file


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """A sweep's results, made up: two methods, one of which has been ablated, and baselines."""
    folder = tmp_path_factory.mktemp("sweeps") / "first"
    folder.mkdir()

    def row(method: str, kind: str, quality: float, speedup: float, fallback: float | None = 0.5) -> dict:
        thresholds = {"fallback_threshold": fallback, "rollback_threshold": None if fallback is None else "inf"}
        return {
            "method": method,
            "kind": kind,
            "baseline": "large model",
            **thresholds,
            "verify_end": False,
            "quality": quality,
            "speedup": speedup,
            "ms_mean": 100 / speedup,
        }

    rows = [
        row("large model", "greedy", 30, 1, None),
        row("aligned", "small alone", 20, 4, None),
        *(row("aligned", "bild", 30.5 - x * x, 1 + x) for x in (0.1, 0.4, 0.8)),
        *(row("unaligned", "bild", 30.2 - x * x, 1 + x / 2) for x in (0.1, 0.4, 0.8)),
        row("unaligned", "bild", 25, 1.05),
        *(row("unaligned", "no rollback", 30 - 2 * x, 1 + x / 2) for x in (0.1, 0.4, 0.8)),
        *(row("unaligned", "no fallback", 30 - 3 * x, 1 + x / 2, 0.0) for x in (0.1, 0.4, 0.8)),
    ]
    (folder / "results.json").write_text(json.dumps({"origin": {"metric_name": "BLEU"}, "rows": rows}))
    return folder


def test_the_front_is_what_nothing_beats():
    row = {"verify_end": False}
    spots = [(1, 30), (1.5, 29), (1.2, 28), (2, 25), (1.1, 30), (0.5, 10)]
    points = [plot.Point(speedup, quality, speedup, row) for speedup, quality in spots]
    assert [(p.speedup, p.quality) for p in plot.front(points)] == [(1.1, 30), (1.5, 29), (2, 25)]


def test_points_are_where_they_were_measured(sweep):
    """Latency is greedy's over the speedup, so a slow spell of the machine does not move a setting."""
    groups, metric = plot.load_sweeps([str(sweep)], "latency")
    assert metric == "BLEU"
    assert [p.x for p in groups["aligned", "bild"]] == pytest.approx([100 / 1.1, 100 / 1.4, 100 / 1.8])
    groups, _ = plot.load_sweeps([str(sweep), str(sweep / "results.json")], "speedup")
    assert {method for method, _ in groups} == {
        *("large model", "aligned", "unaligned"),
        *("large model, first", "aligned, first", "unaligned, first"),
    }


@pytest.mark.parametrize("more", [[], ["--x", "speedup", "--labels", "--title", "Two methods"]])
def test_the_curve_comes_out(corpus, sweep, tmp_path, more):
    """A vector drawing holds its words: every curve, ablation and baseline is in the legend."""
    out = tmp_path / "curve.svg"
    code = "import runpy, matplotlib; matplotlib.rcParams['svg.fonttype'] = 'none'; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    corpus.programs("python", code, plot.__file__, "curve", sweep, "--out", out, *more)
    drawing = out.read_text()
    for name in (
        "aligned",
        "unaligned",
        "unaligned, no rollback",
        "unaligned, no fallback",
        "Pareto front",
        "lean greedy",
        "BLEU",
    ):
        assert f">{name}</text>" in drawing, name
    assert "aligned, small alone: 20.0 at 4.00x, outside" in drawing
    assert ("speedup over lean greedy" in drawing) == bool(more)
    assert (">0.5, inf</text>" in drawing) == bool(more)
    assert not list(tmp_path.glob(".*"))


def test_lengths_come_out(corpus, rounds_file, tmp_path):
    out = tmp_path / "lengths.png"
    run_script(corpus, "plot", "lengths", rounds_file, "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")
    setting = json.loads(rounds_file.read_text())["settings"][1]
    lengths = plot.accepted_lengths(setting)
    verified = [one for found in setting["rounds"].values() for one in found if one["verified"]]
    # The first call of each sentence comes before any draft.
    assert len(lengths) == len(verified) - 5
    assert sum(lengths) == sum(one["accepted"] for one in verified)


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers text and the classes of tokens."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.kinds = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta",):
            self.open.append(tag)
        assert tag not in ("script", "link", "img"), "the page needs nothing but itself"
        if tag in ("span", "del"):
            self.kinds.append(dict(attributes).get("class"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_every_token(corpus, rounds_file, tmp_path):
    out = tmp_path / "tokens.html"
    run_script(corpus, "plot", "tokens", rounds_file, "--out", out)
    text = out.read_text()
    page = Page(text)
    assert page.open == []
    content = json.loads(rounds_file.read_text())
    found = [one for setting in content["settings"] for sentence in setting["rounds"].values() for one in sentence]
    legend = {"small": 1, "unread": 1, "large": 1, "first": 1}
    assert page.kinds.count("large") == sum(one["large"] is not None for one in found) + legend["large"]
    assert page.kinds.count("unread") == sum(one["accepted"] for one in found if not one["verified"]) + 1
    assert page.kinds.count("small") == sum(one["accepted"] for one in found if one["verified"]) + 1
    assert page.kinds.count("first") == sum(one["accepted"] < len(one["drafted"]) for one in found) + 1
    # Names, words and symbols are text, not markup.
    assert "<tiny> & co" in page.text and "</s>" in page.text and "<tiny>" not in text
    for texts in content["sentences"].values():
        assert texts["source"] in page.text and texts["reference"] in page.text


def test_pieces_make_up_the_text(corpus, rounds_file):
    """What a setting wrote, piece by piece, is its text; a lossless setting's is greedy's."""
    content = json.loads(rounds_file.read_text())
    lossless = content["settings"][1]["rounds"]
    for name, texts in content["sentences"].items():
        pieces = [piece for one in lossless[name] for piece in [*one["drafted"][: one["accepted"]], one["large"]]]
        assert re.sub("</s> $", "", "".join(filter(None, pieces))).strip() == texts["greedy"]


def test_bad_input_gets_one_line(corpus, rounds_file, sweep, tmp_path):
    out = ["--out", tmp_path / "figure.png"]
    other = tmp_path / "other.json"
    other.write_text("{]")
    assert "No such file" in refused(corpus, "plot", "curve", tmp_path / "missing", *out)
    assert "is no JSON" in refused(corpus, "plot", "lengths", other, *out)
    assert "holds no origin and rows" in refused(corpus, "plot", "curve", rounds_file, *out)
    assert "holds no sentences and settings" in refused(corpus, "plot", "tokens", sweep / "results.json", *out)
    assert "--sentences 0" in refused(corpus, "plot", "tokens", rounds_file, *out, "--sentences", 0)
    assert "figure.xyz" in refused(corpus, "plot", "curve", sweep, "--out", tmp_path / "figure.xyz")
    other.write_text(json.dumps({"origin": {"metric_name": "ROUGE-L"}, "rows": []}))
    assert "different metrics, BLEU and ROUGE-L" in refused(corpus, "plot", "curve", sweep, other, *out)
    assert "no setting has been measured" in refused(corpus, "plot", "curve", other, *out)
    assert "write FALLBACK,ROLLBACK" in refused(corpus, "rounds", *models(corpus), "--setting", "1", *out)
    assert "cannot write there" in refused(corpus, "rounds", *models(corpus), "--out", tmp_path / "no" / "rounds.json")
    assert not (tmp_path / "figure.png").exists()


def test_a_good_ablation_is_inside_the_figure():
    """It may be faster than all settings with both policies; those of no use do not squeeze the rest."""
    both = [plot.Point(x, quality, x, {}) for x, quality in ((1.0, 32.0), (1.3, 30.0))]
    good, bad = plot.Point(1.6, 31.0, 1.6, {}), plot.Point(3.0, 20.0, 3.0, {})
    assert plot.worth_showing([*both, good, bad], both) == [*both, good]
    assert plot.worth_showing([good, bad], []) == [good, bad]
