"""MODELS=paper: the paper's checkpoints, from Hugging Face's folders to the table; here tiny ones with their names."""

import functools
import http.server
import importlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import t5_support
import torch
from example_support import EXAMPLES, error_line
from sentencepiece import SentencePieceProcessor
from t5_support import TIED, hf_model, save_folder
from torch import nn

IWSLT = ("mT5-large-iwslt2017-de-en", "mT5-small-iwslt2017-de-en", "mT5-small-iwslt2017-de-en-bild-aligned")
CNN_DM = ("T5-large-cnndm", "T5-small-cnndm", "T5-small-cnndm-bild-aligned")
PREFIX = "summarize: "
# The large model is deeper than the small ones.
LARGE = {"num_layers": 4, "num_decoder_layers": 3}
SMALL = {"d_model": 12, "num_decoder_layers": 2}


def write_models(folder: Path, names: tuple[str, str, str], variant: str) -> nn.Module:
    """Folders of tiny models with these names; the large one, which is returned, in the authors' kind of file."""
    models = [hf_model(variant, seed, **size) for seed, size in ((1, LARGE), (2, SMALL), (3, SMALL))]
    for name, model in zip(names, models, strict=True):
        save_folder(folder / name, model)
    (folder / names[0] / "model.safetensors").unlink()
    torch.save(models[0].state_dict(), folder / names[0] / "pytorch_model.bin")
    return models[0]


def theirs(model: nn.Module, pieces: SentencePieceProcessor, line: str, longest: int) -> tuple[str, int]:
    """The text of `transformers` with the limits of the authors' script, and how many tokens it has.

    0 if it is cut behind a token that is no text.
    """
    ids = [*pieces.encode(line)[: longest - 1], 1]
    # fairseq never chooses padding.
    (found,) = model.generate(torch.tensor([ids]), do_sample=False, max_length=128, suppress_tokens=[0]).tolist()
    # Rows without a piece, the end and what is unknown are no text.
    known = [2 < number < pieces.get_piece_size() for number in found]
    text = pieces.decode([number for number, is_known in zip(found, known, strict=True) if is_known])
    return text, len(found) if known[-1] or found[-1] == 1 else 0


def write_text(
    raw: Path, languages: tuple[str, str], model: nn.Module, spiece: Path, prefix: str = "", longest: int = 1024
) -> list[str]:
    """Raw text whose validation references are what the model writes; returns the validation sources.

    Only if our large model reads the same pieces and stops where `transformers` does, its score is 100. One text is as
    long as it may be.
    """
    pieces = SentencePieceProcessor(model_file=str(spiece))
    raw.mkdir()
    lines = list(dict.fromkeys(t5_support.text()))
    valid: dict[str, str] = {}
    lengths: list[int] = []
    for line in lines[:40]:
        text, length = theirs(model, pieces, prefix + line, longest)
        if len(text.split()) > 4 and 0 < length and (length < 60 or 128 not in lengths) and len(valid) < 3:
            valid[line] = text
            lengths.append(length)
        if len(valid) == 3 and 128 in lengths:
            break
    assert len(valid) == 3 and 128 in lengths, lengths
    for part, sources in (("train", lines[40:60]), ("valid", list(valid)), ("test", lines[60:63])):
        (raw / f"{part}.{languages[0]}").write_text("".join(f"{line}\n" for line in sources))
        (raw / f"{part}.{languages[1]}").write_text("".join(f"{valid.get(line, line)}\n" for line in sources))
    return list(valid)


def tiny_flags(steps: int) -> list[object]:
    """Flags of fairseq-train for the small model's size."""
    size = t5_support.SIZE | SMALL | {"relative_attention_max_distance": 20}
    flags = [word for name, value in size.items() for word in (f"--{name.replace('_', '-')}", value)]
    return [*flags, "--max-update", steps, "--num-workers", 0, "--log-format", "none"]


def measured(work: Path, name: str) -> dict[str, dict[str, float]]:
    """The rows of a run of benchmark.py by system."""
    rows = json.loads((work / f"paper/results/{name}.json").read_text())["rows"]
    return {row["system"]: row for row in rows}


def test_translation_from_the_authors_folders_to_the_papers_table(run_step, tmp_path):
    raw, work, folder = tmp_path / "mine", tmp_path / "work", tmp_path / "models"
    large = write_models(folder, IWSLT, "mT5")
    write_text(raw, ("de", "en"), large, folder / IWSLT[0] / "spiece.model")
    run = functools.partial(
        run_step, "iwslt17.de-en", work, MODELS="paper", PAPER_MODELS=folder, SUBSETS="valid", RAW=raw
    )

    run("prepare", "--workers", 1)
    assert (work / "raw/valid.en").exists() and (work / "paper/data/data-bin/test.de-en.en.idx").exists()
    run("train-early-exit", *tiny_flags(1))
    small = torch.load(work / "paper/small/model.pt", weights_only=False)["model"]
    exits = torch.load(work / "paper/early-exit.pt", weights_only=False)["model"]
    for name, tensor in small.items():  # one update later
        torch.testing.assert_close(exits[name].float(), tensor, rtol=0, atol=5e-3)
    assert "decoder.exit_layer_norms.1.weight" in exits

    run("evaluate", "--warmup", 0)
    for method, settings in (("unaligned", ("(0.6,2)", "(0.5,3)")), ("aligned", ("(0.9,3)", "(0.6,4)"))):
        rows = measured(work, f"valid-{method}")
        assert rows["greedy"]["bleu"] == rows["fairseq --beam 1"]["bleu"] == pytest.approx(100)
        assert {f"bild {setting}" for setting in settings} <= set(rows)
        assert all(row["bleu"] <= 100.01 for row in rows.values()) and rows["small alone"]["bleu"] < 90
    assert "exit 1 (0.6,2)" in measured(work, "valid-early-exit")

    table = run("table").stdout
    assert "the authors' as well" in table and "are others" not in table
    (careful,) = (line for line in table.split("\n") if "aligned | 3, 0.9 |" in line)
    assert [cell.strip() for cell in careful.split("|")[3:6]] == ["40.24 (-0.06)", "1.62", "40.09"]
    assert " x " not in careful and careful.count("[") == 2, "our speedups stand beside the paper's"
    # What is converted is there, and its source no longer needed.
    run("prepare", PAPER_MODELS=tmp_path)


def test_summaries_are_of_cut_articles_behind_the_prefix(run_step, tmp_path):
    raw, work, folder, longest = tmp_path / "mine", tmp_path / "work", tmp_path / "models", 16
    large = write_models(folder, CNN_DM, TIED)
    spiece = folder / CNN_DM[0] / "spiece.model"
    valid = write_text(raw, ("source", "target"), large, spiece, PREFIX, longest)
    pieces = SentencePieceProcessor(model_file=str(spiece))
    assert max(len(pieces.encode(PREFIX + line)) for line in valid) > longest, "no article is cut"
    run = functools.partial(run_step, "cnn_dm", work, MODELS="paper", PAPER_MODELS=folder, SUBSETS="valid", RAW=raw)

    run("prepare", "--workers", 1, "--longest", longest, "--longest-target", 10)
    for name, most in (("valid.bpe.source", longest - 1), ("train.bpe.target", 9)):  # the end is one more
        lines = (work / "paper/data" / name).read_text().splitlines()
        assert max(len(line.split()) for line in lines) == most
    run("evaluate", "--warmup", 0, "--systems", "greedy")
    assert measured(work, "valid-aligned")["greedy"]["rougeLsum"] == pytest.approx(100)
    assert r"--bild 0.3\,3 --bild 0.2\,6" in (work / "paper/results/valid-aligned.command").read_text()


def test_one_line_says_where_the_models_are_and_how_large(run_step, tmp_path):
    work = tmp_path / "work"
    (work / "raw").mkdir(parents=True)
    for part in ("train", "valid", "test"):
        for language in ("de", "en"):
            (work / f"raw/{part}.{language}").write_text("one\n")
    run = functools.partial(run_step, "iwslt17.de-en", work, "prepare", status=1, MODELS="paper")
    message = error_line(run())
    assert "huggingface.co" in message and f"{work}/download/NAME" in message and "PAPER_MODELS" in message
    for name, size in zip(IWSLT, ("4.92 GB", "1.2 GB", "1.2 GB"), strict=True):
        assert f"kssteven/{name} ({size})" in message
    assert "3 of 3" in message and not (work / "paper/large").exists()

    for name in IWSLT[:2]:
        save_folder(tmp_path / "some" / name, hf_model("mT5"))
    message = error_line(run(PAPER_MODELS=tmp_path / "some"))
    assert "1 of 3" in message and IWSLT[0] not in message and f"kssteven/{IWSLT[2]} (1.2 GB)" in message
    assert "nowhere" in error_line(run(PAPER_MODELS="nowhere"))


def test_only_prepare_makes_the_papers_models(run_step, tmp_path):
    work = tmp_path / "work"
    assert "run.sh prepare" in error_line(run_step("xsum", work, "train-large", status=1, MODELS="paper"))
    assert "run.sh prepare" in error_line(run_step("xsum", work, "evaluate", status=1, MODELS="paper"))
    assert "run.sh prepare" in error_line(run_step("xsum", work, "train-early-exit", status=1, MODELS="paper"))
    assert "has no models" in error_line(run_step("lohelp.de-en", work, "prepare", status=1, MODELS="paper"))
    assert "must be 'paper'" in error_line(run_step("xsum", work, "prepare", status=1, MODELS="papers"))


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """The address of a server of this folder's files."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_what_is_not_there_is_downloaded(tmp_path, monkeypatch):
    """The pieces come from the published model where a checkpoint has none."""
    checkpoints = importlib.import_module("checkpoints")
    monkeypatch.setenv("no_proxy", "*")
    name = IWSLT[1]
    for path in (f"kssteven/{name}/resolve/main/config.json", f"kssteven/{name}/resolve/main/pytorch_model.bin"):
        (tmp_path / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / path).write_text(path)
    (tmp_path / "hub/google/mt5-small/resolve/main").mkdir(parents=True)
    (tmp_path / "hub/google/mt5-small/resolve/main/spiece.model").write_text("pieces")
    here = tmp_path / "here" / name
    here.mkdir(parents=True)
    (here / "config.json").write_text("mine")
    with hub(tmp_path / "hub") as address:
        monkeypatch.setattr(checkpoints, "HUB", address)
        checkpoints.take_all([name], tmp_path / "here")
        with pytest.raises(SystemExit, match=r"1 of 1 are missing \(File not found\).*4\.92 GB"):
            checkpoints.take_all([IWSLT[0]], tmp_path / "here")
    assert {path.name: path.read_text() for path in here.iterdir()} == {
        "config.json": "mine",
        "spiece.model": "pieces",
        "pytorch_model.bin": f"kssteven/{name}/resolve/main/pytorch_model.bin",
    }


@pytest.mark.parametrize("benchmark", ["iwslt17.de-en", "wmt14.de-en", "xsum", "cnn_dm"])
def test_the_readme_says_how(benchmark):
    readme = (EXAMPLES / benchmark / "README.md").read_text()
    assert "MODELS=paper bash run.sh prepare" in readme and "PAPER_MODELS" in readme
    settings = (EXAMPLES / benchmark / "settings.sh").read_text()
    (names,) = (line for line in settings.split("\n") if line.startswith("paper_models="))
    for name in names.removeprefix("paper_models=(").rstrip(")").split():
        assert f"kssteven/{name}" in readme
