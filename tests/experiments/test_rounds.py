"""Rounds as text: what a setting wrote, piece by piece; and bad input of scripts/rounds.py."""

import json
import re

from script_support import refused, run_script


def test_pieces_make_up_the_text(corpus, tmp_path):
    """They are the counters' events, and a lossless setting's text is greedy's."""
    file = tmp_path / "rounds.json"
    models = ["--large", corpus.large, "--small", f"<tiny> & co={corpus.small}", "--threads", 1]
    settings = ["--setting", "0.6,2", "--setting", "0.2,0,end", "--sentences", 5, "--max-len-b", 12]
    run = run_script(corpus, "rounds", corpus.data, *models, *settings, "--out", file)
    assert run.out == f"2 settings of 5 sentences in {file}\n"
    content = json.loads(file.read_text())
    assert [setting["method"] for setting in content["settings"]] == ["<tiny> & co"] * 2
    lossless = content["settings"][1]["rounds"]
    assert len(lossless) == len(content["sentences"]) == 5
    for name, texts in content["sentences"].items():
        assert texts["source"] and texts["reference"]
        pieces = [piece for one in lossless[name] for piece in [*one["drafted"][: one["accepted"]], one["large"]]]
        assert re.sub("</s> $", "", "".join(filter(None, pieces))).strip() == texts["greedy"]


def test_bad_input_gets_one_line(corpus, tmp_path):
    words = [corpus.data, "--large", corpus.large, "--small", f"small={corpus.small}", "--out"]
    assert "write FALLBACK,ROLLBACK" in refused(corpus, "rounds", *words, tmp_path / "rounds.json", "--setting", "1")
    assert "cannot write there" in refused(corpus, "rounds", *words, tmp_path / "no" / "rounds.json")
    assert not list(tmp_path.iterdir())
