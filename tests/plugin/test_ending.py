"""However a generation ends: its output stays, statistics are written or one line says why not, no traceback."""

import gc
import json
import os
import shlex
import signal
import stat
import subprocess
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import support
from cli_support import SENTENCES, USER_DIR
from reference import Rules

from bild_fairseq.decoding.counters import total
from bild_fairseq.errors import BildError
from bild_fairseq.plugin import generator as plugin_generator

SAMPLE = support.sample([support.source([1, 2]), support.source([3])])


def generator(max_len=20, **more):
    large, small = support.pair("agreeing", 0)
    made = support.generator([large], [small], Rules(max_len=max_len), **more)
    made.generate([], SAMPLE)
    return made


def test_statistics_go_to_the_file_that_a_link_leads_to(tmp_path):
    (tmp_path / "there").mkdir()
    for name, old in (("there/old.json", "old"), ("there/new.json", None)):
        link = tmp_path / f"link to {name[6:]}"
        link.symlink_to(name)
        if old:
            (tmp_path / name).write_text(old)
        made = generator(stats_path=str(link))
        made.finish()
        assert link.is_symlink()
        assert json.loads((tmp_path / name).read_text()) == made.stats()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new.json", "old.json"]


def test_statistics_go_through_a_pipe(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    made = generator(stats_path=str(pipe))
    made.finish()
    reader.join()
    assert json.loads(read[0]) == made.stats()
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_stays_a_device(tmp_path):
    """Named by a link, so that no device of this machine is at stake."""
    link = tmp_path / "nothing"
    link.symlink_to("/dev/null")
    generator(stats_path=str(link)).finish()
    assert link.is_symlink() and os.listdir(tmp_path) == ["nothing"]


@pytest.mark.parametrize("case", ["full disk", "vanished folder", "folder in its place"])
def test_statistics_that_cannot_be_written(tmp_path, case):
    path = tmp_path / "folder" / "stats.json"
    path.parent.mkdir()
    made = generator(stats_path=str(path))
    if case == "full disk":
        path.symlink_to("/dev/full")
    elif case == "vanished folder":
        path.parent.rmdir()
    else:
        path.mkdir()
    with pytest.raises(BildError, match=f"--bild-stats {path}: it cannot be written: [A-Z]"):
        made.finish()
    assert list(tmp_path.glob("folder/*.tmp")) == []


STOPPED = """
import os, signal, sys
from fairseq_cli import generate, interactive
import bild_fairseq
from bild_fairseq.plugin.generator import BildGenerator

what = sys.argv.pop(1)
plain, calls = BildGenerator.generate, []

def stopped(*args, **kwargs):
    calls.append(1)
    if len(calls) == 4:
        if what.isdigit():
            os.kill(os.getpid(), int(what))
        elif what == "folder":
            os.rmdir(os.path.dirname(sys.argv[sys.argv.index("--bild-stats") + 1]))
        elif what == "error":
            raise RuntimeError("out of order")
    return plain(*args, **kwargs)

BildGenerator.generate = stopped
if what == "output":
    sys.stdout = None
if what == "log":
    sys.stderr = None
generate.cli_main()
"""


def stopped(corpus, what, path, status):
    options = corpus.bild("--bild-stats", path, "--batch-size", 5, "--user-dir", USER_DIR)
    return corpus.programs("python", STOPPED, "program", what, *corpus.arguments(*options), status=status)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -2), (signal.SIGTERM, 128 + 15), (signal.SIGHUP, 128 + 1)]
)
def test_a_signal_loses_nothing(corpus, tmp_path, number, status):
    run = stopped(corpus, int(number), tmp_path / "stats.json", status)
    assert "Traceback" not in run.out + run.err
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["summary"]["sentences"] == len(run.texts()) == 15
    assert "15 sentences, " in run.err


def test_an_error_in_the_middle_is_told_as_ever(corpus, tmp_path):
    run = stopped(corpus, "error", tmp_path / "stats.json", 1)
    assert "RuntimeError: out of order" in run.err
    assert json.loads((tmp_path / "stats.json").read_text())["summary"]["sentences"] == len(run.texts()) == 15


def test_a_folder_that_vanishes(corpus, tmp_path):
    (tmp_path / "folder").mkdir()
    run = stopped(corpus, "folder", tmp_path / "folder/stats.json", 1)
    assert len(run.texts()) == SENTENCES and "Traceback" not in run.err
    assert run.err.splitlines()[-1].startswith("bild_fairseq: --bild-stats ")


def test_closed_output_is_noticed_before_the_work(corpus, tmp_path):
    run = stopped(corpus, "output", tmp_path / "stats.json", 1)
    assert "standard output is closed" in run.error()


def test_closed_error_output_takes_nothing_away(corpus, tmp_path):
    run = stopped(corpus, "log", tmp_path / "stats.json", 0)
    assert len(run.texts()) == SENTENCES and f"{SENTENCES} sentences, " not in run.out
    assert json.loads((tmp_path / "stats.json").read_text())["summary"]["sentences"] == SENTENCES


@pytest.mark.parametrize(
    ("program", "redirection", "status"),
    [
        ("generate", "> /dev/full", 1),
        ("interactive", "| head -c 1", 1),
        ("generate", "> out 2> /dev/full", 1),
        ("generate", "> out", 0),
    ],
)
def test_output_that_cannot_be_written(corpus, tmp_path, program, redirection, status):
    options = corpus.bild("--bild-stats", tmp_path / "stats.json", "--user-dir", USER_DIR)
    line = shlex.join(["fairseq-" + program, *map(str, corpus.arguments(*options))])
    code = f"{line} < in {redirection}\nexit ${{PIPESTATUS[0]}}"
    (tmp_path / "in").write_text("a b c\n" * 400)
    path = f"{corpus.programs.bin(tmp_path / 'bin')}:{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "-c", code], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert run.returncode == status
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr
    assert run.stderr.count("bild_fairseq: the output cannot be written: ") == (not redirection.startswith("> out"))
    stats = json.loads((tmp_path / "stats.json").read_text())
    if redirection.startswith("> out"):
        assert (tmp_path / "out").read_text().count("\nH-") == stats["summary"]["sentences"]


def test_threads_that_share_a_generator_are_all_counted(tmp_path, monkeypatch):
    """Each sentence has a record and a number of its own, and the sums are those of the records.

    Adding up takes so long that another thread would surely come between, if it could.
    """

    def slow_total(counters):
        added = total(counters)
        time.sleep(1e-3)
        return added

    made, batches = generator(stats_path=str(tmp_path / "stats.json")), 40
    sample = {"net_input": SAMPLE["net_input"]}
    monkeypatch.setattr(plugin_generator, "total", slow_total)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: made.generate([], sample), range(batches)))
    made.finish()
    stats = json.loads((tmp_path / "stats.json").read_text())
    count = 2 * (batches + 1)  # the generator has translated one batch before
    assert stats["summary"]["sentences"] == count
    assert sorted(record["id"] for record in stats["sentences"]) == list(range(count))
    for name in ("tokens", "large_calls", "drafted", "fallbacks"):
        assert stats["summary"][name] == sum(record[name] for record in stats["sentences"]), name
    texts = [[hypotheses[0]["tokens"].tolist() for hypotheses in batch] for batch in found]
    assert texts == [texts[0]] * batches


def test_memory_does_not_grow_with_the_number_of_sentences():
    """Unless a record of every sentence is wanted."""

    def growth(**more: object) -> float:
        """Bytes a sentence. What grows with every sentence grows in each span; what is made once, only in one."""
        made, batches, batch = generator(max_len=2, **more), 60, support.sample([support.source([1, 2])] * 8)
        for _ in range(10):
            made.generate([], batch)
        gc.collect()
        tracemalloc.start()
        sizes = [tracemalloc.get_traced_memory()[0]]
        for _ in range(4):
            for _ in range(batches):
                made.generate([], batch)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        return min(after - before for before, after in pairwise(sizes)) / (8 * batches)

    assert growth(stats_path="never written") > 300
    assert growth() < 30
