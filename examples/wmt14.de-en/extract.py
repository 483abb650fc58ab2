"""Make the German-English text of WMT 2014: Europarl v7, CommonCrawl, News Commentary v9.

    python ../common/extract.py . OUT --downloads FOLDER

Validation is newstest2013 (3,000 pairs, the number that the paper's results are on), test the full newstest2014.
"""

import pathlib
import re
from collections.abc import Iterable, Iterator

import corpus
from download import Published

LANGUAGES = ("de", "en")
# Addresses and checksums of the training text are those of the TensorFlow data set wmt14_translate; those of the
# evaluation sets are sacrebleu's.
TRAINING = {
    Published(
        "training-parallel-europarl-v7.tgz",
        ("https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz",),
        "sha256:0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
    ): "training/europarl-v7.de-en",
    Published(
        "training-parallel-commoncrawl.tgz",
        ("https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz",),
        "sha256:c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
    ): "commoncrawl.de-en",
    Published(
        "training-parallel-nc-v9.tgz",
        ("https://www.statmt.org/wmt14/training-parallel-nc-v9.tgz",),
        "sha256:cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485",
    ): "training/news-commentary-v9.de-en",
}
# Both archives are called test-something.tgz where they come from.
EVALUATION = {
    "valid": (
        Published("wmt13-test.tgz", ("https://statmt.org/wmt13/test.tgz",), "md5:48eca5d02f637af44e85186847141f67"),
        ("test/newstest2013-src.de.sgm", "test/newstest2013-src.en.sgm"),
    ),
    "test": (
        Published(
            "wmt14-test-full.tgz",
            ("https://statmt.org/wmt14/test-full.tgz",),
            "md5:a8cd784e006feb32ac6f3d9ec7eb389a",
        ),
        ("test-full/newstest2014-deen-src.de.sgm", "test-full/newstest2014-deen-ref.en.sgm"),
    ),
}
FILES = [*TRAINING, *(archive for archive, _ in EVALUATION.values())]
# Training: the same corpora in the Hugging Face data set wmt14/de-en, which leaves out a few pairs more.
PUBLISHED = {"train": 4_508_785, "valid": 3_000, "test": 3_003}
SEGMENT = re.compile(r"<seg[^>]*>(.*?)</seg>")


def training_pairs(downloads: pathlib.Path) -> Iterator[corpus.Pair]:
    for archive, prefix in TRAINING.items():
        sides = corpus.read_named(downloads / archive.name, [f"{prefix}.{language}" for language in LANGUAGES])
        yield from corpus.aligned(prefix, *sides)


def read(downloads: pathlib.Path) -> Iterator[tuple[str, Iterable[corpus.Pair]]]:
    yield "train", training_pairs(downloads)
    for part, (archive, names) in EVALUATION.items():
        texts = corpus.read_named(downloads / archive.name, names)
        sides = [[match[1] for line in lines if (match := SEGMENT.search(line))] for lines in texts]
        yield part, corpus.aligned(archive.name, *sides)
