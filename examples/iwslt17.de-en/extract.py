"""Make the German-English text of IWSLT 2017 from the archive of WIT3 (TED talks).

    python ../common/extract.py . OUT --downloads FOLDER

Validation is dev2010 (888 pairs, the number that the paper's results are on), test is tst2010 to tst2015.
"""

import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator

import corpus
from download import Published

LANGUAGES = ("de", "en")
# Address and checksum are those that sacrebleu has for its data set iwslt17/dev2010.
ARCHIVE = Published(
    "de-en.tgz",
    ("https://raw.githubusercontent.com/hlt-mt/WIT3/master/archive/2017-01-trnted/texts/de/en/de-en.tgz",),
    "md5:ca2b94d694150d4d6c5dc64c200fa589",
)
FILES = [ARCHIVE]
# The counts of the same splits in the Hugging Face data set iwslt2017-de-en.
PUBLISHED = {"train": 206_112, "valid": 888, "test": 8_079}
EVALUATION = {"valid": ["dev2010"], "test": [f"tst{year}" for year in range(2010, 2016)]}
SEGMENT = re.compile(r"<seg[^>]*>(.*?)</seg>")


def training_lines(lines: Iterable[str]) -> list[str]:
    """Return the text between the lines that hold addresses, titles and other tags."""
    return [line for line in lines if not line.lstrip().startswith("<")]


def segments(lines: Iterable[str]) -> list[str]:
    """Return the sentences of an evaluation set."""
    return [match[1] for line in lines if (match := SEGMENT.search(line))]


def read(downloads: pathlib.Path) -> Iterator[tuple[str, Iterable[corpus.Pair]]]:
    archive = downloads / ARCHIVE.name
    sides = corpus.read_named(archive, [f"de-en/train.tags.de-en.{language}" for language in LANGUAGES])
    yield "train", corpus.aligned("the training text", *map(training_lines, sides))
    for part, names in EVALUATION.items():
        yield part, itertools.chain.from_iterable(evaluation_pairs(archive, name) for name in names)


def evaluation_pairs(archive: pathlib.Path, name: str) -> Iterator[corpus.Pair]:
    sides = corpus.read_named(archive, [f"de-en/IWSLT17.TED.{name}.de-en.{language}.xml" for language in LANGUAGES])
    return corpus.aligned(name, *map(segments, sides))
