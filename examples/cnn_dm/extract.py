"""Make the text of CNN/DailyMail (articles, their highlights) from the archives of stories.

    python ../common/extract.py . OUT --downloads FOLDER

Cased and not tokenized, as for BART; the highlights of an article follow each other on one line.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Iterator

import corpus
from download import Published

LANGUAGES = ("source", "target")
# Checksums and counts are those of the Hugging Face data set cnn_dailymail, whose copies of the archives these are;
# the lists of addresses are Abigail See's.
STORIES = "https://huggingface.co/datasets/abisee/cnn_dailymail/resolve/11343c3752184397d56efc19a8a7cceb68089318/data"
LISTS = "https://raw.githubusercontent.com/abisee/cnn-dailymail/master/url_lists"
ARCHIVES = [
    Published(
        "cnn_stories.tgz",
        (f"{STORIES}/cnn_stories.tgz",),
        "sha256:e8fbc0027e54e0a916abd9c969eb35f708ed1467d7ef4e3b17a56739d65cb200",
    ),
    Published(
        "dailymail_stories.tgz",
        (f"{STORIES}/dailymail_stories.tgz",),
        "sha256:ad69010002210b7c406718248ee66e65868b9f6820f163aa966369878d14147e",
    ),
]
SPLIT = {
    "train": Published(
        "all_train.txt",
        (f"{LISTS}/all_train.txt",),
        "sha256:a5cee49f3a6c862c26ce29308236d2a99625ab6c86a43be22d5206b2790d8029",
    ),
    "valid": Published(
        "all_val.txt",
        (f"{LISTS}/all_val.txt",),
        "sha256:81887e982b045083409c6ee838aede8ff4b97291605bcfb21bffc456a16991db",
    ),
    "test": Published(
        "all_test.txt",
        (f"{LISTS}/all_test.txt",),
        "sha256:c4f5efb5ec2126430a5c156efbd13d0e9c4cb490169e552c38b4a51981a009bd",
    ),
}
FILES = [*ARCHIVES, *SPLIT.values()]
PUBLISHED = {"train": 287_113, "valid": 13_368, "test": 11_490}
HIGHLIGHT = "@highlight"
SENTENCE_ENDS = (".", "!", "?", "'", "`", '"', ")", "\u2019", "\u201d")


def parse(text: str) -> corpus.Pair:
    """Return article and highlights of a story: paragraphs, those after @highlight being highlights."""
    article, highlights = [], []
    into = article
    for line in filter(None, map(str.strip, text.split("\n"))):
        if line == HIGHLIGHT:
            into = highlights
        else:
            # Many headlines and all highlights come without a full stop.
            into.append(line if line.endswith(SENTENCE_ENDS) else line + ".")
    return " ".join(article), " ".join(highlights)


def file_name(address: str) -> str:
    """Return the name that the archives give to the story from a web address."""
    return hashlib.sha1(address.encode("utf-8"), usedforsecurity=False).hexdigest()


def read(downloads: pathlib.Path) -> Iterator[tuple[str, Iterable[corpus.Pair]]]:
    pairs = {}
    for archive in ARCHIVES:
        for name, content in corpus.read_members(downloads / archive.name, lambda name: name.endswith(".story")):
            pairs[pathlib.PurePosixPath(name).stem] = parse(content.decode("utf-8"))
    for part, addresses in SPLIT.items():
        names = map(file_name, (downloads / addresses.name).read_text(encoding="utf-8").split())
        yield part, (pairs[name] for name in names if name in pairs)
