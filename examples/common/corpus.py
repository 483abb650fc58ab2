"""Raw text: the six files {train,valid,test}.{SOURCE,TARGET}, one sentence or document a line.

    python corpus.py FOLDER OUT --languages de en

takes the six files from a folder of the user's; extract.py makes them from the published archives of a benchmark.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

PARTS = ("train", "valid", "test")
# What others call the validation part.
ALIASES = {"train": ("train",), "valid": ("valid", "val", "dev", "validation"), "test": ("test",)}

Pair = tuple[str, str]


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[TextIO]:
    """Open a text file that appears under its name only once it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        yield file
    os.replace(temporary, path)


def raw_files(folder: pathlib.Path, part: str, languages: tuple[str, str]) -> tuple[pathlib.Path, pathlib.Path]:
    return folder / f"{part}.{languages[0]}", folder / f"{part}.{languages[1]}"


def is_complete(folder: pathlib.Path, languages: tuple[str, str]) -> bool:
    return all(path.exists() for part in PARTS for path in raw_files(folder, part, languages))


def write_part(folder: pathlib.Path, part: str, languages: tuple[str, str], pairs: Iterable[Pair]) -> int:
    """Write both sides of a part, white space normalized so that a line is a line for every program.

    Pairs that lack a side are left out of the training part and kept elsewhere, where scores are
    compared with those of others.

    Returns:
        the number of pairs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source_file, target_file = raw_files(folder, part, languages)
    count = 0
    with writing(source_file) as sources, writing(target_file) as targets:
        for pair in pairs:
            source, target = (" ".join(text.split()) for text in pair)
            if part == "train" and not (source and target):
                continue
            sources.write(source + "\n")
            targets.write(target + "\n")
            count += 1
    return count


def read_members(archive: pathlib.Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of those files in a tar archive whose names are wanted, in one pass.

    Raises:
        SystemExit: the archive is damaged.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() and wanted(member.name) else None
                if content:
                    yield member.name, content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SystemExit(f"corpus: {archive} is damaged ({error}): remove it and run this step again") from None


def read_named(archive: pathlib.Path, names: Iterable[str]) -> list[list[str]]:
    """Return the lines of the named files in a tar archive.

    Raises:
        SystemExit: a file is not there.
    """
    names = list(names)
    found = dict(read_members(archive, names.__contains__))
    for name in names:
        if name not in found:
            raise SystemExit(f"corpus: {archive} has no {name}: is it the right archive?")
    return [found[name].decode("utf-8").removesuffix("\n").split("\n") for name in names]


def aligned(what: str, sources: list[str], targets: list[str]) -> Iterator[Pair]:
    """Return pairs of lines.

    Raises:
        SystemExit: there are more lines on one side.
    """
    if len(sources) != len(targets):
        raise SystemExit(f"corpus: {what} has {len(sources)} source lines, but {len(targets)} target lines")
    return zip(sources, targets, strict=True)


def find_side(folder: pathlib.Path, part: str, language: str) -> pathlib.Path:
    """Return the user's file for one side of a part.

    Raises:
        SystemExit: there is none.
    """
    for alias in ALIASES[part]:
        if (path := folder / f"{alias}.{language}").is_file():
            return path
    raise SystemExit(f"corpus: {folder} has no {part}.{language}")


def read_text(path: pathlib.Path) -> list[str]:
    """Return the lines of a text file, split at newlines only.

    Raises:
        SystemExit: it is no UTF-8, or empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise SystemExit(f"corpus: {path} is not UTF-8 text") from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise SystemExit(f"corpus: {path} is empty")
    return lines


def take(folder: pathlib.Path, out: pathlib.Path, languages: tuple[str, str]) -> None:
    """Copy the user's six files.

    Raises:
        SystemExit: one is missing, or two that belong together differ in length.
    """
    found = {part: [find_side(folder, part, language) for language in languages] for part in PARTS}
    for part, paths in found.items():
        sides = [read_text(path) for path in paths]
        if len(sides[0]) != len(sides[1]):
            lengths = " and ".join(f"{path} {len(side)}" for path, side in zip(paths, sides, strict=True))
            raise SystemExit(f"corpus: these should have equally many lines: {lengths}")
        count = write_part(out, part, languages, zip(*sides, strict=True))
        print(f"{part}: {count} pairs", file=sys.stderr)


def main() -> None:
    """Read the command line and copy the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="folder with the six files; val and dev stand for valid")
    parser.add_argument("out", type=pathlib.Path, help="folder to write")
    parser.add_argument("--languages", nargs=2, required=True, metavar=("SOURCE", "TARGET"), help="suffixes")
    args = parser.parse_args()
    take(args.folder, args.out, tuple(args.languages))


if __name__ == "__main__":
    main()
