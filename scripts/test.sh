#!/usr/bin/env bash
# Installs what is missing, lints, and runs all tests.
#
#   bash scripts/test.sh [PYTEST ARGUMENTS]
#
# The tests run in as many processes as there are cores, four at most; `-n 0` makes it one.
# Runs in the active virtual environment, or makes one in .venv; scripts/setup.sh names the variables that choose
# the interpreter and the torch. With ALL_PYTHONS=1 the tests run once more with fairseq 0.12.2 on Python 3.10, in
# .venv-3.10, where that interpreter is found; that environment may take gigabytes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=setup.sh
source scripts/setup.sh

setup_python requirements-dev.txt
python -m ruff check .
python -m ruff format --check .
# A file's tests stay in one process, which makes what they share once.
parallel=(-n auto --maxprocesses 4 --dist loadfile)
python -m pytest -q "${parallel[@]}" "$@"

if [[ -n ${ALL_PYTHONS:-} ]]; then
    if ! PYTHON=$(find_python 3.10); then
        echo "test: Python 3.10 is not found; nothing more to run"
    elif python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))'; then
        echo "test: that was Python 3.10"
    else
        unset VIRTUAL_ENV CONDA_PREFIX
        VENV=$PWD/.venv-3.10
        setup_python requirements-dev.txt
        python -m pytest -q "${parallel[@]}" "$@"
    fi
fi
