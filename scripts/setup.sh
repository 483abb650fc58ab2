# To be sourced by the scripts that run Python: `source scripts/setup.sh; setup_python`.
#
# Variables that a caller or a user may set:
#   PYTHON      the interpreter that a new environment is made with (default: the first of Python 3.11, 3.12
#               and 3.10 that is found and runs)
#   VENV        the environment's folder (default: .venv in the repository); not used inside an active environment
#   TORCH_SPEC  what pip is told to install where there is no torch yet, options included
#               (default: torch==2.13.0; pip takes a CPU build of it where one is at hand, and a later torch may
#               bring gigabytes of CUDA libraries)

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# find_python VERSION...: prints the first interpreter of one of these versions that runs and can make an
# environment. That a command exists is not enough: version managers put some in place that do not run.
find_python() {
    local version candidate
    for version in "$@"; do
        for candidate in "python$version" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
            if "$candidate" -c "import ensurepip, sys, venv
sys.exit('%d.%d' % sys.version_info[:2] != '$version')" >/dev/null 2>&1; then
                command -v "$candidate"
                return 0
            fi
        done
    done
    return 1
}

# setup_python [FILE...]: leaves an environment active in which everything in requirements.txt and in the given
# files is installed, and this clone's package: the active one, or $VENV, which it makes if need be. Fast where nothing
# is missing.
setup_python() {
    local files=("$_root/requirements.txt") file
    for file in "$@"; do
        files+=("$_root/$file")
    done
    if [[ -n ${VIRTUAL_ENV:-${CONDA_PREFIX:-}} ]]; then
        PATH="${VIRTUAL_ENV:-$CONDA_PREFIX}/bin:$PATH"
    else
        _activate_venv "${VENV:-$_root/.venv}" || return 1
    fi
    if ! python -m pip --version >/dev/null 2>&1; then
        echo "setup: the environment in $(python -c 'import sys; print(sys.prefix)') has no pip" >&2
        return 1
    fi
    _install_missing "${files[@]}" && _install_package
}

_activate_venv() {
    local folder=$1 python=${PYTHON:-}
    if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        if [[ -z $python ]] && ! python=$(find_python 3.11 3.12 3.10); then
            echo "setup: no Python 3.10, 3.11 or 3.12 that can make environments (Debian: apt install python3-venv)" >&2
            return 1
        fi
        echo "setup: making an environment in $folder with $python"
        "$python" -m venv --clear "$folder" || return 1
    fi
    # shellcheck disable=SC1091
    source "$folder/bin/activate"
}

# Prints those requirements in the given files that the active environment does not meet.
_missing() {
    python - "$@" <<'PYTHON'
import sys
from importlib import metadata

from pip._vendor.packaging.requirements import Requirement

for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            print(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            print(requirement.name)
PYTHON
}

_install_missing() {
    local file missing arguments=()
    missing=$(_missing "$@") || return 1
    if [[ -z $missing ]]; then
        return 0
    fi
    if ! python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))'; then
        echo "setup: $(python --version) is not supported; Python 3.10, 3.11 or 3.12 is needed" >&2
        return 1
    fi
    echo "setup: installing" $missing
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    # fairseq 0.12.2, for Python 3.10, needs omegaconf 2.0, whose metadata pip has refused since 24.1.
    if python -c 'import sys, pip
sys.exit(sys.version_info >= (3, 11) or tuple(map(int, pip.__version__.split(".")[:2])) < (24, 1))'; then
        python -m pip install 'pip<24.1' || return 1
    fi
    if ! python -c 'from importlib.metadata import version; version("torch")' 2>/dev/null; then
        # Unquoted: it may hold options of pip.
        python -m pip install ${TORCH_SPEC:-torch==2.13.0} || return 1
    fi
    for file in "$@"; do
        arguments+=(-r "$file")
    done
    # The torch that is there stays, whatever else would like another one.
    python -m pip install "${arguments[@]}" \
        -c <(python -c 'from importlib.metadata import version; print("torch==" + version("torch"))')
}

# Prints the folder that `import bild_fairseq` finds, if any, from outside of the repository.
_package() {
    (cd / && python -c 'from importlib.util import find_spec
spec = find_spec("bild_fairseq")
print(*(spec.submodule_search_locations if spec else ()))')
}

# Makes `import bild_fairseq` find this clone, also where the environment has another one.
_install_package() {
    local arguments=(--no-deps --quiet --disable-pip-version-check) found
    if [[ $(_package) -ef $_root/bild_fairseq ]]; then
        return 0
    fi
    echo "setup: installing bild_fairseq from $_root"
    # With the setuptools that torch has brought, nothing is downloaded.
    if python -c 'from importlib.metadata import version
import sys
sys.exit(int(version("setuptools").split(".")[0]) < 77)' 2>/dev/null; then
        arguments+=(--no-build-isolation)
    fi
    python -m pip install "${arguments[@]}" --editable "$_root" || return 1
    found=$(_package)
    if [[ ! $found -ef $_root/bild_fairseq ]]; then
        echo "setup: import bild_fairseq finds $found, not this clone; is PYTHONPATH set?" >&2
        return 1
    fi
}
