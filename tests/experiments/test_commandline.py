"""What all scripts have in common when they start."""

import subprocess
import sys

from script_support import SCRIPTS


def test_a_script_prints_nothing_but_its_own():
    """In a process of its own, where fairseq is imported with the script."""
    run = subprocess.run([sys.executable, SCRIPTS / "plot.py", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout and not run.stderr
