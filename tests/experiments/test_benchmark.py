"""scripts/benchmark.py and its modules: every system is measured, tables and pictures come out, bad input."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cli_support import Corpus, save
from fairseq import checkpoint_utils
from script_support import refused, run_script

from bild_fairseq.errors import BildError
from bild_fairseq.experiments import figures
from bild_fairseq.experiments.systems import System


def arguments(corpus: Corpus, *more: object) -> list[object]:
    limits = ["--threads", 1, "--max-len-b", 12, "--bpe", "none", "--sentences", 6]
    return [corpus.data, "--large", corpus.large, *limits, *more]


def test_every_system_is_measured(corpus, tmp_path):
    """Systems that must write the same text do, each is a row of the table, and files and pictures are written."""
    exits = corpus.checkpoint(
        tmp_path / "exits.pt", arch="early_exit_transformer_tiny", exit_layers="1", decoder_layers=2
    )
    figures_file, picture = tmp_path / "figures.json", tmp_path / "latency.svg"
    models = ["--small", corpus.small, "--early-exit", exits, "--bild", "0.6,2", "--bild", "0.3,1,end"]
    more = ["--precision", "float32,float32+int8", "--floor", "--json", figures_file, "--plot", picture]
    run = run_script(corpus, "benchmark", *arguments(corpus, *models, *more))
    written = json.loads(figures_file.read_text())
    rows = {row["system"]: row for row in written["rows"]}
    model = checkpoint_utils.load_model_ensemble([str(corpus.large)])[0][0]
    assert written["large_weights"] == sum(weight.numel() for weight in model.parameters())
    both = ["bild (0.6,2)", "bild (0.3,1,end)", "bild lossless"]
    exit_both = ["exit 1 lossless", "exit 1 (0.6,2)", "exit 1 (0.3,1,end)"]
    assert list(rows) == [
        *("fairseq --beam 1", "fairseq --beam 5", "greedy", "small alone"),
        *(name for one in both for name in (one, f"{one} float32+int8")),
        *("early-exit model, full depth", exit_both[0], f"{exit_both[0]} float32+int8", "exit 1 alone"),
        *(name for one in exit_both[1:] for name in (one, f"{one} float32+int8")),
    ]
    table = run.out.splitlines()
    assert [line.split("|")[1].strip() for line in table if line.startswith("| ")][2:] == list(rows)
    for name in ("fairseq --beam 1", "bild lossless", "bild lossless float32+int8"):
        assert rows[name]["differ_from_greedy"] == 0 and rows[name]["bleu"] == rows["greedy"]["bleu"]
    full, exact = rows["early-exit model, full depth"], rows["exit 1 lossless float32+int8"]
    assert full["tokens"] == exact["tokens"] and full["bleu"] == exact["bleu"]
    for name, row in rows.items():
        assert row["ms_per_sentence_median"] <= row["ms_per_sentence_p90"]
        assert (row.get("wall_over_floor", 1) >= 1) and ("wall_over_floor" in row) == (not name.startswith("fairseq"))
    assert picture.read_text().lstrip().startswith("<?xml")


def test_several_small_models_are_told_apart_by_their_names(corpus, tmp_path):
    """The large model as its own small one never hands over, so its rows show which model drafted in which row."""
    figures_file = tmp_path / "figures.json"
    models = ["--small", f"plain={corpus.small}", "--small", f"twin={corpus.large}", "--lossless-fallback", 0]
    systems = ["--systems", "greedy,lossless,small", "--json", figures_file]
    run_script(corpus, "benchmark", *arguments(corpus, *models, *systems))
    rows = {row["system"]: row for row in json.loads(figures_file.read_text())["rows"]}
    both = [f"{name}, {label}" for name in ("bild lossless", "small alone") for label in ("plain", "twin")]
    assert list(rows) == ["greedy", *both]
    assert rows["bild lossless, twin"]["rollbacks"] == 0 < rows["bild lossless, plain"]["rollbacks"]
    assert rows["small alone, twin"]["differ_from_greedy"] == rows["bild lossless, plain"]["differ_from_greedy"] == 0


def agreeing_exit(corpus: Corpus, path: Path) -> Path:
    """An early-exit model whose second layer adds nothing, so that the exit after the first one predicts the same."""
    options = {"exit_layers": "1", "decoder_layers": 2, "decoder_normalize_before": True}
    torch.manual_seed(0)
    corpus.checkpoint(path, arch="early_exit_transformer_tiny", **options)
    state = torch.load(path, weights_only=False)
    for name, weight in state["model"].items():
        if re.fullmatch(r"decoder\.layers\.1\.(self_attn\.out_proj|encoder_attn\.out_proj|fc2)\.(weight|bias)", name):
            weight.zero_()
    return save(path, state)


def test_draft_vocabularies_are_compared_with_none(corpus, tmp_path):
    """Whatever drafts does so with all types and with some; the text without loss is the same.

    What drafts predicts what the large model does, so with all types every draft is accepted. The file has one word,
    and each model writes another one where a draft is verified, so with these types a draft is rejected.
    """
    exits = agreeing_exit(corpus, tmp_path / "exits.pt")
    runs = [corpus.generate("--generator", "greedy", "--path", path).texts() for path in (corpus.large, exits)]
    drafted = [{word for number in range(6) for word in texts[number].split()[1:]} - {"<unk>"} for texts in runs]
    words = corpus.task().target_dictionary.symbols[4:]
    vocabulary, file = tmp_path / "few.txt", tmp_path / "figures.json"
    vocabulary.write_text(next(word for word in words if all(others - {word} for others in drafted)))
    models = ["--small", corpus.large, "--early-exit", exits, "--draft-vocab", vocabulary, "--json", file]
    systems = ["--systems", "greedy,lossless,bild,exit-full,exit-lossless", "--lossless-fallback", 0]
    run_script(corpus, "benchmark", *arguments(corpus, *models, *systems, "--bild", "0,0,end"))
    rows = {row["system"]: row for row in json.loads(file.read_text())["rows"]}
    for name in ("bild lossless", "bild (0,0,end)", "exit 1 lossless"):
        assert rows[name]["rollbacks"] == 0 < rows[f"{name}, 3 types"]["rollbacks"], name
    assert rows["bild lossless, 3 types"]["differ_from_greedy"] == 0
    assert rows["exit 1 lossless, 3 types"]["tokens"] == rows["early-exit model, full depth"]["tokens"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--draft-vocab", "DATA/dict.z.txt"], "--draft-vocab DATA/dict.z.txt: no such file"),
        (["--small", "SMALL", "--small", "other=SMALL", "--small", "other=SMALL"], "two models are called other"),
        (["--early-exit", "LARGE"], "LARGE: the model has no exits"),
        (["--systems", "greedy,bild"], "--systems bild: unknown, or its model was not given"),
        (["--precision", "float32,int4"], "--precision int4: choose from"),
        (["--bild", "0.6"], "write FALLBACK,ROLLBACK"),
        (["--lossless-fallback", "1.5"], "fallback threshold '1.5'"),
        (["--plot", "missing/picture.png"], "--plot missing/picture.png: cannot write there"),
        (["--plot", "picture.xyz"], "--plot picture.xyz: no format of pictures is called xyz"),
        (["--json", "."], "--json .: cannot write there"),
        (["--max-draft", "0"], "--max-draft 0: must be 1 or more"),
        (["--large", "DATA/dict.x.txt"], "DATA/dict.x.txt: "),
        (["--max-len-a", "nan"], "--max-len-a nan: must be a finite number"),
        (["--no-repeat-ngram-size", "-1"], "--no-repeat-ngram-size -1: must be 0 or more"),
    ],
)
def test_bad_input_gets_one_line_before_anything_is_measured(corpus, more, message):
    def filled(text: str) -> str:
        return text.replace("LARGE", str(corpus.large)).replace("DATA", str(corpus.data))

    assert filled(message) in refused(corpus, "benchmark", *arguments(corpus, *map(filled, more)))


def test_a_model_with_another_dictionary_gets_one_line(corpus, tmp_path):
    """Both as the large model and as the small one."""
    task = corpus.task()
    task.tgt_dict.add_symbol("new")
    other = corpus.checkpoint(tmp_path / "other.pt", task)
    assert "other.pt: " in refused(corpus, "benchmark", *arguments(corpus, "--large", other))
    assert "other.pt: " in refused(corpus, "benchmark", *arguments(corpus, "--small", other))


def test_a_plot_without_matplotlib_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BildError, match="--plot a.png: needs the package matplotlib: pip install matplotlib"):
        figures.check_plot("a.png")


def system(name: str, seconds: Sequence[float], output: list[int]) -> System:
    """A system that has been measured on batches of one sentence."""
    outputs = {i: output for i in range(len(seconds))}
    return System(name, run=lambda batch: [], seconds=list(seconds), outputs=outputs)


def test_speedups_are_ratios_of_total_times():
    batches = [{"id": [i]} for i in range(4)]
    systems = [system("greedy", [0.2, 0.4, 0.2, 0.4], [5, 6, 2]), system("bild (1,1)", [0.1, 0.2, 0.1, 0.2], [5, 2])]
    greedy, bild = figures.rows_of(systems, [30.0, 29.0], "bleu", batches)
    assert greedy["speedup_over_greedy"] == pytest.approx((1, 1, 1))
    assert bild["speedup_over_greedy"] == pytest.approx((2, 2, 2))
    assert bild["differ_from_greedy"] == 4 and greedy["differ_from_greedy"] == 0
    assert bild["ms_per_token"] == pytest.approx(75)
    assert bild["tokens_per_second"] == pytest.approx(8 / 0.6)


def test_the_line_through_points_is_that_of_their_medians():
    """Every point is in one group, and one that took very long does not move the line."""
    lengths = list(range(1, 25))
    x, y = figures.medians(lengths, [10.0 * length for length in lengths])
    assert x == [2, 5, 8, 11, 14, 17, 20, 23] and y == [10 * one for one in x]
    assert figures.medians(lengths, [10.0 * length + 1e6 * (length == 9) for length in lengths])[1] == y
    assert figures.medians([3, 1], [30.0, 10.0]) == ([1, 3], [10.0, 30.0])


def test_the_conclusion_is_of_lossless_decoding():
    """Other settings may write greedy decoding's text by chance, and lossless decoding in float16 another one."""

    def row(name: str, speedup: float, differ: int = 0) -> dict[str, object]:
        return {
            "system": name,
            "differ_from_greedy": differ,
            "speedup_over_greedy": [speedup, 0, 9],
            "ms_per_token": 9 / speedup,
        }

    rows = [row("greedy", 1.0), row("bild (0.6,2)", 3.0), row("bild lossless", 1.75), row("exit 1 lossless", 1.25)]
    sentence = "BiLD wrote the same text as greedy decoding 1.8 times as fast (bild lossless)."
    assert figures.conclusion_of(rows) == sentence
    rows[2] = row("bild lossless float16", 1.75, differ=1)
    assert "1.2 times as fast (exit 1 lossless)" in figures.conclusion_of(rows)
    assert figures.conclusion_of(rows[:3]) is None
