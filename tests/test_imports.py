"""The layout: imports go one way, functions fit on a screen, and so does the algorithm."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = [["scripts"], ["experiments"], ["plugin"], ["engines", "models", "criterions"], ["decoding"], ["errors"]]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# The package itself is what --user-dir imports: it registers everything.
BESIDES = {("criterions", "models"), ("scripts", "bild_fairseq"), ("experiments", "bild_fairseq")}
BESIDES |= {("bild_fairseq", room) for room in ("plugin", "models", "criterions", "errors")}


def room_of(name: str) -> str:
    """The folder or file of the package that a dotted name lies in; the package itself for what it exports."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else parts[0]


def imported(path: Path, package: str) -> Iterator[str]:
    """The dotted names that a file imports, wherever in the file; ``package`` is what its dots stand for."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_imports(root: Path) -> list[str]:
    """The imports below a folder that go against the order."""
    wrong = []
    for path in sorted([*root.glob("bild_fairseq/**/*.py"), *root.glob("scripts/*.py")]):
        package = ".".join(path.relative_to(root).parent.parts)
        room = room_of(".".join(path.relative_to(root).with_suffix("").parts))
        for name in imported(path, package):
            target = room_of(name)
            inside = name.split(".")[0] == "bild_fairseq"
            allowed = target == room or (room, target) in BESIDES or LEVEL.get(room, 99) < LEVEL.get(target, -1)
            if (inside and not allowed) or (target == "fairseq" and room in ("decoding", "errors")):
                wrong.append(f"{path.relative_to(root)}: {name}")
    return wrong


def test_imports_go_one_way():
    assert not wrong_imports(ROOT), "\n".join(wrong_imports(ROOT))


def test_transformers_is_for_tests_only():
    """T5 is converted and run without it."""
    for path in [*ROOT.glob("bild_fairseq/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("examples/**/*.py")]:
        package = ".".join(path.relative_to(ROOT).parent.parts)
        assert not [name for name in imported(path, package) if name.split(".")[0] == "transformers"], path


PLANTED = {
    "from ..engines import readers": "decoding/decode.py",
    "from bild_fairseq.plugin.flags import check": "engines/native/engine.py",
    "def later():\n    from ...models import exit_model": "engines/native/engine.py",
    "import bild_fairseq.criterions": "models/exits.py",
    "from .. import experiments": "plugin/hooks.py",
    "from .experiments.sweep import sweep": "__init__.py",
    "from bild_fairseq import BildGenerationConfig": "criterions/loss.py",
    "from .decoding import policies": "errors.py",
    "from fairseq import utils": "decoding/sentence.py",
}


@pytest.mark.parametrize(("code", "path"), PLANTED.items())
def test_a_planted_import_is_found(tmp_path, code, path):
    good = {"decoding/good.py": "from ..errors import BildError", "criterions/good.py": "from ..models import exits"}
    for name, text in {**good, path: f"import math\n{code}\n"}.items():
        (tmp_path / "bild_fairseq" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bild_fairseq" / name).write_text(text)
    (wrong,) = wrong_imports(tmp_path)
    assert wrong.startswith(f"bild_fairseq/{path}: ")


def test_functions_fit_on_a_screen():
    long = []
    for path in sorted(path for folder in ("bild_fairseq", "scripts") for path in ROOT.glob(f"{folder}/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 45:
                long.append(f"{path.relative_to(ROOT)}: {node.name}, {node.end_lineno - node.lineno + 1} lines")
    assert not long, "\n".join(long)


def test_the_algorithm_is_short():
    assert len((ROOT / "bild_fairseq/decoding/decode.py").read_text().splitlines()) < 150
