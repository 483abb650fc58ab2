"""Programs end with what started them; folders are one run's at a time."""

import os
import signal
import threading
import time

import pytest

from bild_fairseq.errors import BildError
from bild_fairseq.experiments import commandline
from bild_fairseq.experiments.processes import end_with, interrupted_by_signals, run_program
from bild_fairseq.experiments.work_folder import begin, locked, locked_file


def test_lines_and_status_of_a_program_come_back():
    lines: list[str] = []
    assert run_program(["sh", "-c", "echo one; echo two $WORD; exit 3"], lines.append, {"WORD": "more"}) == 3
    assert lines == ["one", "two more"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_program_and_all_that_it_has_started(number):
    before = signal.getsignal(number)
    pids: list[int] = []
    command = ["sh", "-c", "sleep 60 & echo $$ $!; wait"]
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    with pytest.raises(KeyboardInterrupt), interrupted_by_signals():
        run_program(command, lambda line: pids.extend(map(int, line.split())), os.environ)
    timer.join()
    assert len(pids) == 2 and all(has_ended(pid) for pid in pids)
    assert signal.getsignal(number) is before


def has_ended(pid: int) -> bool:
    """Waits a little; a process that nobody has asked for its status counts as ended."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_a_process_ends_when_its_parent_is_killed():
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        me = os.getpid()
        child = os.fork()
        if not child:
            end_with(me)
            os.write(write, b"ready")
            time.sleep(60)
            os._exit(0)
        os.read(read, 5)
        os.write(write, str(child).encode())
        os.kill(me, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert has_ended(int(os.read(read, 20)))


def test_a_process_without_its_parent_ends_at_once():
    child = os.fork()
    if not child:
        try:
            end_with(os.getpid())
        except SystemExit:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_ignored_signals_stay_ignored():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    folder = tmp_path / "below" / "work"
    with locked(folder, "--work"):
        with pytest.raises(BildError, match="--work .*work: another run is at work there"), locked(folder, "--work"):
            pass
    with locked(folder, "--work"):
        pass


def test_a_file_is_one_runs_at_a_time(tmp_path):
    """Nothing is left beside it; without a file there is nothing to wait for."""
    path = tmp_path / "record.json"
    with locked_file(path, "--record"):
        path.write_text("replaced while it is locked")
        with pytest.raises(BildError, match="--record .*record.json: another run"), locked_file(path, "--record"):
            pass
        with locked_file(tmp_path / "other.json", "--record"), locked_file(None, "--record"):
            pass
    with locked_file(path, "--record"), locked_file("/dev/null", "--record"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_lock_ends_with_its_process(tmp_path):
    """Killed, it leaves a file behind that stops nobody."""
    child = os.fork()
    if not child:
        with locked_file(tmp_path / "record.json", "--record"), locked(tmp_path / "work", "--work"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "record.json.lock").exists()
    with locked_file(tmp_path / "record.json", "--record"), locked(tmp_path / "work", "--work"):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_script_with_one_line(number):
    """And what it has open is closed in order."""
    closed = []

    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            closed.append(True)

    with pytest.raises(SystemExit) as ended:
        commandline.run("name", main, "interrupted; nothing is lost")
    assert ended.value.code == "name: interrupted; nothing is lost" and closed


def test_a_step_goes_on_with_the_same_settings_only(tmp_path):
    begin(tmp_path / "step", {"a": 1, "b": None})
    begin(tmp_path / "step", {"a": 1, "b": None})
    with pytest.raises(BildError, match="step was made with a 1, not 2; b None, not x: remove it"):
        begin(tmp_path / "step", {"a": 2, "b": "x"})
