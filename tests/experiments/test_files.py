"""What scripts share: files that are tried, how they end, and progress that is seen."""

import io
import signal
import sys

import pytest

from bild_fairseq.errors import BildError
from bild_fairseq.experiments import commandline, progress
from bild_fairseq.experiments.files import file_digest, try_file, try_folder


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
