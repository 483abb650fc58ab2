"""Make the raw text of a benchmark from its published archives.

    python extract.py BENCHMARK OUT --downloads FOLDER

BENCHMARK is the folder of a benchmark. Its extract.py says what to download and how to read it:

    LANGUAGES     suffixes of the two sides
    FILES         what to download
    PUBLISHED     how many pairs the literature gives for each part
    read          from the folder of downloads, yields parts and their pairs
"""

import argparse
import importlib.util
import pathlib
import sys
from types import ModuleType

from corpus import write_part
from download import fetch


def load(benchmark: pathlib.Path) -> ModuleType:
    """Return a benchmark's extract.py as a module.

    Raises:
        SystemExit: there is none.
    """
    path = benchmark / "extract.py"
    if not path.is_file():
        raise SystemExit(f"extract: {path}: no such file; name the folder of a benchmark")
    spec = importlib.util.spec_from_file_location("benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Read the command line, download, and write the six files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=pathlib.Path, help="its folder")
    parser.add_argument("out", type=pathlib.Path, help="folder for {train,valid,test}.{SOURCE,TARGET}")
    parser.add_argument("--downloads", type=pathlib.Path, required=True, help="folder for the archives")
    args = parser.parse_args()
    text = load(args.benchmark)
    ends = ",".join(text.LANGUAGES)
    fetch(text.FILES, args.downloads, f"; or name a folder with {{train,valid,test}}.{{{ends}}} in RAW")
    for part, pairs in text.read(args.downloads):
        count = write_part(args.out, part, text.LANGUAGES, pairs)
        print(f"{part}: {count} pairs (published: {text.PUBLISHED[part]})", file=sys.stderr)


if __name__ == "__main__":
    main()
