"""Programs end with what started them; folders are one run's at a time."""

import os
import signal
import threading
import time

import pytest

from bild_fairseq.errors import BildError
from bild_fairseq.experiments.processes import end_with, interrupted_by_signals, run_program
from bild_fairseq.experiments.work_folder import begin, locked


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


def test_a_step_goes_on_with_the_same_settings_only(tmp_path):
    begin(tmp_path / "step", {"a": 1, "b": None})
    begin(tmp_path / "step", {"a": 1, "b": None})
    with pytest.raises(BildError, match="step was made with a 1, not 2; b None, not x: remove it"):
        begin(tmp_path / "step", {"a": 2, "b": "x"})
