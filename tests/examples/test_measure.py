"""examples/measure.sh: the tables of a pair of models at several sizes, and the figure of them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

MEASURE = Path(__file__).resolve().parents[2] / "examples" / "measure.sh"


def measure(folder: Path, *arguments: object, status: int = 0, **variables: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "THREADS": 1, **variables}
    done = subprocess.run(
        ["bash", str(MEASURE), *map(str, arguments)],
        env={name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout[-1000:] + done.stderr[-3000:]
    return done


def test_every_size_has_its_table_and_the_figure_has_all(corpus, tmp_path):
    """A widened model writes what the one as trained does; lossless rows differ from greedy in no sentence."""
    pytest.importorskip("matplotlib")
    folder = corpus.programs.bin(tmp_path / "bin")
    early = corpus.checkpoint(
        tmp_path / "early.pt", arch="early_exit_transformer_tiny", exit_layers="1", decoder_layers=2
    )
    out, options = tmp_path / "out", ["--max-len-b", 12, "--bpe", "none", "--batch-size", 4, "--turn", 1]
    models = [corpus.data, corpus.large, corpus.small, corpus.small_halfway]
    variables = {"STEPS": "trained big figure", "SENTENCES": 4, "EARLY": early, "LOSSLESS": 0.1}
    done = measure(folder, *models, out, *options, **variables)
    trained, big = (json.loads((out / f"{name}.json").read_text()) for name in ("trained", "big"))
    assert big["large_weights"] > 8 * trained["large_weights"]
    narrow, wide = ({row["system"]: row for row in file["rows"]} for file in (trained, big))
    quick = " float32+int8"  # in the larger table all drafts are in float32 as well
    added = {name.removesuffix(quick) for name in narrow if name.endswith(quick)}
    added |= {f"bild {one}, aligned x2{precision}" for one in ("lossless", "(0.4,2)") for precision in ("", quick)}
    assert set(wide) - set(narrow) == added
    for name, row in narrow.items():
        assert row["bleu"] == wide[name]["bleu"] and row.get("tokens") == wide[name].get("tokens")
        assert "lossless" not in name or name.startswith("exit") or row["differ_from_greedy"] == 0
        assert f"| {name} " in (out / "big.md").read_text() and f"| {name} " in done.stdout
    assert (out / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_get_one_line_before_anything_is_made(tmp_path):
    assert measure(tmp_path, "DATA", status=1).stderr.startswith("usage: bash examples/measure.sh DATA-BIN LARGE ")
    refused = measure(tmp_path, "DATA", "L", "S", "A", tmp_path / "out", STEPS="big gib", status=1)
    assert refused.stderr == "measure: STEPS: no table is called gib\n" and not (tmp_path / "out").exists()
