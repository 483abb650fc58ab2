"""The table of what a forward pass costs: it times the passes that it says, of the model that is in the file."""

import runpy
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import support
import torch

from bild_fairseq.engines.choose import engine_for
from bild_fairseq.errors import BildError
from bild_fairseq.experiments.passes import (
    NEW_TOKENS,
    Costs,
    Machine,
    load_without_data,
    measure_machine,
    measure_passes,
    megabytes,
    table_head,
    table_row,
)

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "passes.py"


def save(path, **options):
    """Writes the checkpoint of a random model, and returns the model."""
    made = support.model(3, **options)
    args = Namespace(arch="transformer", _name="transformer", **{**support.SIZE, **options})
    torch.save({"args": args, "cfg": None, "model": made.state_dict()}, path)
    return made


@pytest.mark.parametrize("options", [{}, {"share_all_embeddings": True}], ids=["", "tied"])
def test_models_load_without_their_dictionaries(tmp_path, options):
    made = save(tmp_path / "model.pt", **options)
    loaded = load_without_data(str(tmp_path / "model.pt"))
    # Encoder layers of fairseq 0.12.2 have parameters that they fill as they are loaded.
    weights = dict(loaded.decoder.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in made.decoder.named_parameters())


@pytest.mark.parametrize("content", [{"model": {}}, "text", None], ids=["no model", "no checkpoint", "no file"])
def test_files_that_hold_no_model_are_refused_by_name(tmp_path, content):
    path = tmp_path / "model.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(BildError, match="model.pt"):
        load_without_data(str(path))


class Recorder:
    """An engine that writes down what it is asked for, and takes two milliseconds a token."""

    depth = 2

    def __init__(self):
        self.batches, self.passes = [], []

    def start(self, net_input):
        self.batches.append(net_input)

    def run(self, state, step):
        self.passes.append(step)
        time.sleep(0.002 * sum(map(len, step.tokens)))


def test_passes_are_the_ones_that_the_table_names():
    engine, model = Recorder(), support.model(3)
    costs = measure_passes(engine, model, batch_size=3, repeats=2, new_tokens=(1, 4))
    assert costs.passes.keys() == {1, 4}
    assert costs.passes[1] >= 2 * 3 * 1 and costs.passes[4] >= 2 * 3 * 4
    assert all(batch["src_tokens"].shape[0] == len(batch["src_lengths"]) == 3 for batch in engine.batches)
    earlier, *timed = engine.passes
    assert [len(step.tokens[0]) for step in timed] == [1, 4] * 3  # one turn is not counted
    for step in timed:
        assert list(step.rows) == [0, 1, 2] and step.layers == (0, 2) and step.predict == "all"
        assert list(step.starts) == [len(tokens) for tokens in earlier.tokens]
        assert len({len(tokens) for tokens in step.tokens}) == 1


def test_real_engines_run_them():
    model = support.model(3)
    costs = measure_passes(engine_for(model, "float32", "large"), model, repeats=1)
    assert tuple(costs.passes) == NEW_TOKENS
    assert min(costs.encoder, *costs.passes.values()) > 0


@pytest.mark.parametrize("side", ["source", "target"])
def test_models_that_read_too_little_are_refused(side):
    model = support.model(3, **{f"max_{side}_positions": 10})
    with pytest.raises(BildError, match=f"{side} tokens, and the model reads at most 10"):
        measure_passes(Recorder(), model)


@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_megabytes_are_those_of_the_matrices_that_a_pass_reads(precision, size):
    model = support.model(3)
    layers, dim, ffn, words = 2, 16, 24, len(support.symbols())
    # Self-attention has four matrices; encoder-decoder attention projects keys and values once a sentence.
    weights = layers * ((4 + 2) * dim * dim + 2 * dim * ffn) + dim * words
    assert megabytes(model, precision) == pytest.approx(weights * size / 1e6)


def test_rows_say_how_many_times_the_first_pass_the_others_are():
    row = table_row("int8", 2, 8, Machine(75.2, 29.04), Costs(20.0, {1: 7.6, 4: 15.2}), read=109)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["int8", "2", "8", "75", "29.0", "20", "7.6 (1.00)", "15.2 (2.00)", "14.3"]
    assert all(line.count("|") == row.count("|") for line in table_head((1, 4)).splitlines())


def test_script(tmp_path, monkeypatch, capsys):
    save(tmp_path / "model.pt")
    arguments = [tmp_path / "model.pt", "--precision", "int8", "--threads", 1, "--batch-size", "1,2", "--repeats", 1]
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["passes.py", *map(str, arguments)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| int8 | 1 |")]
    assert [row.split("|")[3].strip() for row in rows] == ["1", "2"]


@pytest.mark.parametrize(
    "arguments",
    [["--precision", "int4"], ["--threads", "0"], ["--batch-size", "1,x"], ["--repeats", "0"]],
    ids=lambda arguments: arguments[0],
)
def test_arguments_out_of_range_are_refused_in_one_line(tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["passes.py", str(tmp_path / "model.pt"), *arguments])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert str(ending.value).startswith(f"passes: {arguments[0]} ") and "\n" not in str(ending.value)


def test_a_machine_has_speeds():
    machine = measure_machine("cpu")
    assert machine.gflops > 0 and machine.gbytes > 0
