"""The README's commands and snippets run as printed, in a folder that has the files which they name, only smaller.

Every block of code is run: Python, if it is fenced as ``python``, and shell commands, if it is fenced as ``bash`` or
indented. Fenced as ``text`` it is nothing to run. Any other block that is not to be run stands behind a comment with
the reason, in a line of its own:

    <!-- not run: REASON -->
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_support import Corpus
from sentencepiece import SentencePieceProcessor
from t5_support import hf_model, save_folder, text

from bild_fairseq.experiments.convert_t5 import convert

ROOT = Path(__file__).resolve().parent.parent
# What makes a program short here, after the arguments that the README gives it.
SHORTER = {
    "fairseq-train": "--cpu --max-update 2 --encoder-layers 1 --decoder-layers 2 --batch-size 8 --num-workers 0"
    + "".join(f" --{side}-embed-dim 32 --{side}-ffn-embed-dim 48" for side in ("encoder", "decoder")),
    "fairseq-generate": "--max-len-b 12 --num-workers 0",
    "fairseq-interactive": "--max-len-b 12",
    "scripts/align.py": "--cpu --epochs 1 --sample 40 --valid-sample 10 --sentences 4 --max-len-b 12",
    "scripts/benchmark.py": "--sentences 4 --max-len-b 12",
    "scripts/calibrate.py": "--sentences 10 --max-len-b 12",
    "scripts/sweep.py": "--sentences 4 --max-len-b 12 --fallback 0.6 --rollback 2",
}


@dataclass
class Block:
    """A block of code of the README."""

    line: int
    language: str
    code: str
    not_run: str | None  # the reason

    def __str__(self) -> str:
        return f"line {self.line}: {self.code.strip().splitlines()[0][:60]}"


def blocks_of(text: str) -> list[Block]:
    """The blocks of code of a text in Markdown, in order."""
    found: list[Block] = []
    lines, number, reason = text.splitlines(), 0, None
    while number < len(lines):
        line, start = lines[number], number + 1
        number += 1
        if comment := re.fullmatch(r"<!-- not run: (\S.*) -->", line):
            reason = comment[1]
        elif fence := re.fullmatch(r"(```+)(\w*)", line):
            end = lines.index(fence[1], number)
            found.append(Block(start, fence[2], "\n".join(lines[number:end]), reason))
            number, reason = end + 1, None
        elif line.startswith("    ") and not lines[start - 2].strip():
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            code = "\n".join(line[4:] for line in lines[start - 1 : number])
            found.append(Block(start, "bash", code.rstrip(), reason))
            reason = None
        elif line.strip():
            reason = None
    return found


BLOCKS = blocks_of((ROOT / "README.md").read_text())


def test_blocks_are_found():
    text = (
        "A\n\n    one \\\n        two\n\n    three\n\n<!-- not run: because -->\n```bash\nfour\n```\n\nB:\n\n    five\n"
    )
    assert blocks_of(text) == [
        Block(3, "bash", "one \\\n    two\n\nthree", None),
        Block(9, "bash", "four", "because"),
        Block(15, "bash", "five", None),
    ]
    assert any("fairseq-generate" in block.code for block in BLOCKS)
    assert any(block.language == "python" for block in BLOCKS)


@pytest.fixture(scope="module")
def files(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the README names -> what it stands for here."""
    made = tmp_path_factory.mktemp("readme")
    arch, size = "transformer_iwslt_de_en", {"decoder_layers": 2, "share_decoder_input_output_embed": False}
    steps = "--max-update 100 --batch-size 32 --optimizer adam --lr 0.005 --no-epoch-checkpoints --disable-validation"
    large = [*SHORTER["fairseq-train"].split(), "--arch", arch, "--dropout", 0, *steps.split(), "--save-dir", made]
    corpus.programs("train", corpus.data, *large, "--save-interval", 100)
    quickstart = ROOT / "examples/quickstart"
    for language in ("de", "en"):
        lines = (quickstart / f"data/test.{language}").read_text().splitlines(keepends=True)
        (made / f"test.{language}").write_text("".join(lines[:20]))
    return {
        "DATA-BIN": corpus.data,
        "large.pt": made / "checkpoint_last.pt",
        **t5_files(corpus, made),
        "small.pt": corpus.small,
        "early_exit.pt": corpus.checkpoint(made / "exits.pt", arch=f"early_exit_{arch}", exit_layers=[1], **size),
        **{f"test.raw.{language}": made / f"test.{language}" for language in ("de", "en")},
        **{name: quickstart / "models" / name for name in ("codes", "dict.de.txt", "dict.en.txt")},
        **{folder: ROOT / folder for folder in ("bild_fairseq", "scripts", "examples")},
    }


def t5_files(corpus: Corpus, made: Path) -> dict[str, Path]:
    """Two T5 folders of `transformers`, and text in the pieces of their vocabulary."""
    folders = {
        f"HF-{name}": save_folder(made / name, hf_model("mT5", seed)) for name, seed in (("LARGE", 1), ("SMALL", 2))
    }
    convert(folders["HF-LARGE"], made / "converted")
    pieces = SentencePieceProcessor(model_file=str(made / "converted/spiece.model"))
    for language in ("x", "y"):
        lines = [" ".join(pieces.encode(line, out_type=str)) for line in text()[:6]]
        (made / f"t5.{language}").write_text("\n".join(lines) + "\n")
    dictionary = ["--srcdict", made / "converted/dict.txt", "--joined-dictionary"]
    corpus.programs(
        "preprocess", "-s", "x", "-t", "y", *dictionary, "--testpref", made / "t5", "--destdir", made / "t5-bin"
    )
    return {**folders, "T5-BIN": made / "t5-bin"}


@pytest.fixture
def folder(files: dict[str, Path], tmp_path: Path) -> Path:
    """A new folder with a copy of each of these; the repository's own folders are links."""
    for name, original in files.items():
        if original.parent == ROOT:
            (tmp_path / name).symlink_to(original)
        elif original.is_dir():
            shutil.copytree(original, tmp_path / name)
        else:
            shutil.copy(original, tmp_path / name)
    return tmp_path


def shortened(corpus: Corpus, folder: Path) -> Path:
    """A folder of programs that give themselves the arguments of ``SHORTER``."""
    wrapped = folder / "bin"
    wrapped.mkdir()
    for program in corpus.programs.bin(folder / "quick").iterdir():
        cases = "".join(f'{name}) set -- "$@" {more};;\n' for name, more in SHORTER.items())
        which = "$1" if program.name == "python" else program.name
        (wrapped / program.name).write_text(f'#!/bin/sh\ncase "{which}" in\n{cases}esac\nexec {program} "$@"\n')
        (wrapped / program.name).chmod(0o755)
    return wrapped


RUN = [block for block in BLOCKS if block.language != "text" and not block.not_run]


@pytest.mark.parametrize("block", RUN, ids=str)
def test_block_runs(corpus: Corpus, folder: Path, tmp_path_factory: pytest.TempPathFactory, block: Block):
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    if block.language == "python":
        command = ["python", "-c", block.code]
    assert block.language in ("python", "bash"), f"{block}: fence it as bash, python or text"
    programs = shortened(corpus, tmp_path_factory.mktemp("programs"))
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    run = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, f"{block}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    assert "Traceback" not in run.stderr, run.stderr
