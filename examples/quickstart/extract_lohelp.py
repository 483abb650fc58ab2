"""Make German-English parallel text from the LibreOffice help.

The help is written in English and translated paragraph by paragraph, and every paragraph keeps
its identifier through the translation. Two Debian packages therefore hold a parallel corpus that
is small, free (MPL-2.0) and clean enough to train a translation model on a CPU.

    python extract_lohelp.py OUT                  # downloads the packages with apt-get
    python extract_lohelp.py OUT --packages DIR   # takes the two .deb files from DIR
"""

import argparse
import collections
import html.parser
import io
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator

LANGUAGES = {"de": ("libreoffice-help-de", "de"), "en": ("libreoffice-help-en-us", "en-US")}
PARAGRAPH_ID = re.compile(r"(par|hd)_id")
SEED = 1
MIN_WORDS = 4
MAX_WORDS = 120
MAX_LENGTH_RATIO = 2.0

Key = tuple[str, str, int]
Pair = tuple[str, str]


class ParagraphParser(html.parser.HTMLParser):
    """Collects (paragraph id, text) from one help page.

    Some phrases have variants for macOS, Windows or one of the programs. All variants stand in
    the page as hidden spans, and only the default one (the one without a class) belongs to the
    running text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[tuple[str, str]] = []
        self._id = ""
        self._tag = ""
        self._text: list[str] = []
        self._skipped_spans = 0
        self._open_choices = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if not self._tag:
            if PARAGRAPH_ID.match(values.get("id") or ""):
                self._id, self._tag, self._text = values["id"] or "", tag, []
                self._skipped_spans = self._open_choices = 0
        elif tag == "br":
            self._text.append(" ")
        elif tag == "span":
            if self._skipped_spans:
                self._skipped_spans += 1
            elif "hidden" in values:
                if values.get("class"):
                    self._skipped_spans = 1
                else:
                    self._open_choices -= 1
            elif values.get("class") == "switchinline":
                self._open_choices += 1

    def handle_endtag(self, tag: str) -> None:
        if not self._tag:
            return
        if tag == self._tag:
            # A choice without a default variant leaves a hole in the sentence.
            text = "" if self._open_choices > 0 else " ".join("".join(self._text).split())
            self.paragraphs.append((self._id, text))
            self._tag = ""
        elif tag == "span" and self._skipped_spans:
            self._skipped_spans -= 1

    def handle_data(self, data: str) -> None:
        if self._tag and not self._skipped_spans:
            self._text.append(data)


def find_packages(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the .deb file of each language; any Debian revision will do."""
    packages = {}
    for language, (name, _) in LANGUAGES.items():
        found = sorted(folder.glob(f"{name}_*.deb"))
        if not found:
            raise SystemExit(f"extract_lohelp.py: no {name}_*.deb in {folder}")
        packages[language] = found[-1]
    return packages


def download_packages(folder: pathlib.Path) -> None:
    """Download the packages of the configured Debian release, without installing them."""
    names = [name for name, _ in LANGUAGES.values()]
    if shutil.which("apt-get") is None:
        raise SystemExit(
            f"extract_lohelp.py: apt-get not found: get {' and '.join(names)} (.deb files) from "
            "any Debian mirror and pass their folder with --packages"
        )
    if subprocess.run(["apt-get", "download", *names], cwd=folder).returncode:
        raise SystemExit(
            "extract_lohelp.py: apt-get download failed: run 'apt-get update' first, or get "
            f"{' and '.join(names)} from any Debian mirror and pass their folder with --packages"
        )


def read_data_archive(package: pathlib.Path) -> bytes:
    """Return the data.tar.* member of a .deb file, which is an ar archive."""
    with package.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise SystemExit(f"extract_lohelp.py: {package} is not a Debian package")
        while header := file.read(60):
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                return file.read(size)
            file.seek(size + size % 2, io.SEEK_CUR)
    raise SystemExit(f"extract_lohelp.py: {package} has no data archive")


def read_pages(package: pathlib.Path, folder: str) -> Iterator[tuple[str, str]]:
    """Yield (page path without its language, HTML) for each help page in a package."""
    page_path = re.compile(rf"/libreoffice/help/{re.escape(folder)}/(.+\.html)$")
    try:
        with tarfile.open(fileobj=io.BytesIO(read_data_archive(package))) as archive:
            for member in archive:
                match = page_path.search(member.name)
                content = archive.extractfile(member) if match and member.isfile() else None
                if match and content:
                    yield match[1], content.read().decode("utf-8", "replace")
    except (tarfile.TarError, EOFError):
        raise SystemExit(f"extract_lohelp.py: {package} is damaged or not compressed with xz, bzip2 or gzip") from None


def read_paragraphs(package: pathlib.Path, folder: str) -> dict[Key, str]:
    """Return the text of each paragraph, keyed by page, identifier and occurrence.

    A page that includes parts of other pages can hold an identifier twice, so the occurrence
    takes part in the key.
    """
    paragraphs: dict[Key, str] = {}
    for page, content in read_pages(package, folder):
        parser = ParagraphParser()
        parser.feed(content)
        seen: collections.Counter[str] = collections.Counter()
        for identifier, text in parser.paragraphs:
            paragraphs[page, identifier, seen[identifier]] = text
            seen[identifier] += 1
    return paragraphs


def is_usable(source: str, target: str) -> bool:
    """Keep translated prose: no labels, code, untranslated text or text of unequal content."""
    if source == target:
        return False
    for text in (source, target):
        if not text.endswith((".", ":", "?", "!")):
            return False
        if not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return False
    shorter, longer = sorted((len(source), len(target)))
    return longer <= MAX_LENGTH_RATIO * shorter


def fold(text: str) -> str:
    """Return what two lines have in common that differ in case, numbers or punctuation only."""
    return re.sub(r"[\W\d_]+", " ", text.casefold())


def split_pairs(pairs: list[Pair], valid: int, test: int) -> dict[str, list[Pair]]:
    """Split into train, valid and test so that no held-out line has a copy in another part."""
    held_out: list[Pair] = []
    rest: list[Pair] = []
    sources: set[str] = set()
    targets: set[str] = set()
    for source, target in pairs:
        is_new = fold(source) not in sources and fold(target) not in targets
        if is_new and len(held_out) < valid + test:
            held_out.append((source, target))
            sources.add(fold(source))
            targets.add(fold(target))
        else:
            rest.append((source, target))
    train = [(source, target) for source, target in rest if fold(source) not in sources and fold(target) not in targets]
    return {"train": train, "valid": held_out[:valid], "test": held_out[valid:]}


def extract(packages: dict[str, pathlib.Path], valid: int, test: int) -> dict[str, list[Pair]]:
    """Read both languages, pair their paragraphs and split the pairs."""
    texts = {}
    for language, (_, folder) in LANGUAGES.items():
        print(f"reading {packages[language].name}", file=sys.stderr)
        texts[language] = read_paragraphs(packages[language], folder)
    german, english = texts["de"], texts["en"]
    candidates = {(german[key], english[key]) for key in german.keys() & english.keys()}
    # A set has no stable order, so the shuffle starts from a sorted list.
    pairs = sorted(pair for pair in candidates if is_usable(*pair))
    random.Random(SEED).shuffle(pairs)
    if len(pairs) < 2 * (valid + test):
        raise SystemExit(f"extract_lohelp.py: only {len(pairs)} usable pairs: are these the help packages?")
    return split_pairs(pairs, valid, test)


def write_parts(parts: dict[str, list[Pair]], out: pathlib.Path) -> None:
    """Write PART.de and PART.en, one sentence or paragraph a line."""
    for part, pairs in parts.items():
        for column, language in enumerate(LANGUAGES):
            lines = "".join(pair[column] + "\n" for pair in pairs)
            (out / f"{part}.{language}").write_text(lines, encoding="utf-8")
        print(f"{part}: {len(pairs)} pairs", file=sys.stderr)


def main() -> None:
    """Read the command line and write the three parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, help="folder for {train,valid,test}.{de,en}")
    parser.add_argument("--packages", type=pathlib.Path, help="folder that has the two .deb files")
    parser.add_argument("--valid", type=int, default=1000, help="validation pairs (%(default)s)")
    parser.add_argument("--test", type=int, default=1000, help="test pairs (%(default)s)")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"extract_lohelp.py: {args.out}: {error.strerror}") from None
    if args.packages:
        parts = extract(find_packages(args.packages), args.valid, args.test)
    else:
        with tempfile.TemporaryDirectory() as folder:
            download_packages(pathlib.Path(folder))
            parts = extract(find_packages(pathlib.Path(folder)), args.valid, args.test)
    write_parts(parts, args.out)


if __name__ == "__main__":
    main()
