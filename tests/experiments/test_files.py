"""What scripts share: files that are tried, how they end, and progress that is seen."""

import io
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from script_support import script

from bild_fairseq.errors import BildError
from bild_fairseq.experiments import commandline, progress
from bild_fairseq.experiments.files import check_outputs, file_digest, try_file, try_folder
from bild_fairseq.plugin.light import save


def test_what_can_be_written_is_not_touched(tmp_path):
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        try_file("--out", tmp_path / name)
    try_file("--out", None)
    try_file("--out", "/dev/null")
    try_folder("--out", tmp_path)
    try_folder("--out", tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize(
    ("check", "path"), [(try_file, "."), (try_file, "no/a"), (try_file, "f/a"), (try_folder, "f/a")]
)
def test_what_cannot_be_written_is_told_with_its_flag(tmp_path, check, path):
    (tmp_path / "f").write_text("")
    with pytest.raises(BildError, match=f"^--out {tmp_path / path}: cannot write there: "):
        check("--out", tmp_path / path)


@pytest.mark.parametrize("name", ["model.pt", "link.pt", "./model.pt", "data/dict.x.txt", "data/test.x-y.x.bin"])
def test_what_is_read_is_not_written_over(tmp_path, monkeypatch, name):
    """Whichever way it is named: a name or a layer stands beside it, a link leads to it, it is data in a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for file in ("model.pt", "data/dict.x.txt", "data/test.x-y.x.bin", "old.json"):
        (tmp_path / file).write_text(file)
    (tmp_path / "link.pt").symlink_to("model.pt")
    given = {"data": "data", "early_exit": ["exit=model.pt:2"], "subset": "old.json", "plot": None, "json": "old.json"}
    check_outputs(given, "json", "plot")
    with pytest.raises(BildError, match=f"^--json {name}: it would be written over "):
        check_outputs({**given, "json": name}, "json", "plot")
    with pytest.raises(BildError, match="^--plot ./old.json: --json names the same file"):
        check_outputs({**given, "plot": "./old.json"}, "json", "plot")
    check_outputs({**given, "json": "/dev/null", "plot": "/dev/null"}, "json", "plot")


@pytest.mark.parametrize(
    ("command", "flag", "file"),
    [
        ("plot curve results.json", "--out", "results.json"),
        ("plot lengths rounds.json", "--out", "rounds.json"),
        ("plot sizes results.json", "--out", "results.json"),
        ("plot tokens rounds.json", "--out", "rounds.json"),
        ("benchmark data --large large.pt --small small.pt", "--json", "large.pt"),
        ("benchmark data --large large.pt --small name=small.pt", "--plot", "small.pt"),
        ("calibrate data --large large.pt --small name=small.pt", "--record", "small.pt"),
        ("calibrate data --large large.pt --early-exit name=large.pt:1", "--json", "data/dict.x.txt"),
        ("rounds data --large large.pt --small name=small.pt", "--out", "data/test.x-y.x.bin"),
        ("align data --large large.pt --small small.pt", "--out", "small.pt"),
    ],
)
def test_scripts_refuse_to_write_over_what_they_read(tmp_path, monkeypatch, command, flag, file):
    """In one line, and before they read any of it: the files hold nothing that could be read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    files = [*map(tmp_path.joinpath, ("data/dict.x.txt", "data/test.x-y.x.bin", "large.pt", "small.pt"))]
    files += [*map(tmp_path.joinpath, ("results.json", "rounds.json"))]
    for path in files:
        path.write_text(path.name)
    name, *words = command.split()
    program = script(name)
    monkeypatch.setattr(program, "quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, flag, file])
    with pytest.raises(BildError, match=f"^{flag} {file}: it would be written over {file}, which is read; [^\n]*$"):
        program.main()
    assert [path.read_text() for path in files] == [path.name for path in files]


def test_only_files_are_replaced(tmp_path):
    """A device stays what it is, a link too: the file that it leads to is written."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    save({"new": 1}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and torch.load(tmp_path / "file") == {"new": 1}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BildError, match="pipe: that is no file"):
        save({"new": 1}, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 3


def test_digests_tell_contents_apart(tmp_path):
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / name).write_text(text)
    a, b, c = (file_digest(tmp_path / name) for name in "abc")
    assert a == c != b
    with pytest.raises(BildError, match="missing: cannot read it: No such file"):
        file_digest("missing")


def test_a_script_ends_with_one_line():
    """For what the user can mend and for Ctrl-C; other errors are not hidden, and success has no line."""

    def refuse() -> None:
        raise BildError("give a model")

    with pytest.raises(SystemExit, match="^name: give a model$"):
        commandline.run("name", refuse)
    with pytest.raises(SystemExit, match="^name: interrupted; go on$"):
        commandline.run("name", lambda: signal.raise_signal(signal.SIGINT), "interrupted; go on")
    with pytest.raises(ZeroDivisionError):
        commandline.run("name", lambda: 1 / 0)
    commandline.run("name", lambda: None)


LIMITED = """
import resource, signal, sys, torch
from bild_fairseq.experiments.commandline import run
from bild_fairseq.plugin.light import save
sys.dont_write_bytecode = True  # other programs would find what the limit leaves of it
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
run("name", lambda: save({"weights": torch.zeros(10000)}, sys.argv[1]))
"""
LATE = """
import resource, signal, sys
from bild_fairseq.experiments.commandline import run
from bild_fairseq.experiments.files import write_output
def main():
    print("all that was measured")
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    write_output("--json", sys.argv[1], "x" * 10000)
run("name", main)
"""
PRINTING = """
from bild_fairseq.experiments.commandline import run
run("name", lambda: print("text" * 100000))
"""


@pytest.mark.parametrize(
    ("code", "redirection", "line"),
    [
        (LIMITED, "", "name: what it writes is lost: File too large"),
        (PRINTING, "> /dev/full", "name: what it writes is lost: No space left on device"),
        (PRINTING, "| head -c 1 > /dev/null", "name: what it writes is lost: Broken pipe"),
        (PRINTING, ">&-", "name: standard output is closed, so nothing can be printed; redirect it to a file"),
        (PRINTING, "> /dev/null 2>&-", ""),
    ],
    ids=["checkpoint", "full", "pipe", "closed", "no errors"],
)
def test_what_cannot_be_written_ends_a_script_with_one_line(programs, tmp_path, code, redirection, line):
    """No traceback, also where Python itself writes at its end, and nothing half written stays."""
    command = shlex.join([str(programs.interpreter), "-c", code, str(tmp_path / "out.pt")])
    shell = f"{command} {redirection}\nexit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", shell], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert (run.returncode, run.stderr.strip()) == (bool(line), line)
    assert not list(tmp_path.iterdir())


def test_what_was_printed_stays_when_a_file_cannot_be_written(programs, tmp_path):
    command = [programs.interpreter, "-c", LATE, str(tmp_path / "out.json")]
    with (tmp_path / "printed").open("w") as printed:
        run = subprocess.run(command, stdout=printed, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr.strip() == f"name: --json {tmp_path / 'out.json'}: it cannot be written: File too large"
    assert (tmp_path / "printed").read_text() == "all that was measured\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seen(monkeypatch: pytest.MonkeyPatch, out: io.StringIO, err: io.StringIO) -> tuple[str, str]:
    """What a bar of three units writes to standard output and to standard error."""
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with progress.progress_bar(3, "batch", desc="all") as bar:
        for _ in range(3):
            bar.update()
    return out.getvalue(), err.getvalue()


def test_progress_is_on_a_terminal_if_there_is_one(monkeypatch):
    """On standard output where standard error goes to a file."""
    out, err = seen(monkeypatch, Terminal(), Terminal())
    assert out == "" and "3/3" in err
    out, err = seen(monkeypatch, Terminal(), io.StringIO())
    assert "3/3" in out and err == ""


def test_progress_in_files_is_a_line_now_and_then(monkeypatch):
    """Short work leaves none, long work leaves whole lines that say how far it is."""
    assert seen(monkeypatch, io.StringIO(), io.StringIO()) == ("", "")
    monkeypatch.setattr(progress, "INTERVAL", 0)
    out, err = seen(monkeypatch, io.StringIO(), io.StringIO())
    assert out == "" and "\r" not in err
    counts = [line.split("|")[-1].split()[0] for line in err.splitlines()]
    assert list(dict.fromkeys(counts)) == ["0/3", "1/3", "2/3", "3/3"]
