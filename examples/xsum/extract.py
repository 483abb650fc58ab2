"""Make the text of XSUM (BBC articles, one-sentence summaries) from its authors' archive.

    python ../common/extract.py . OUT --downloads FOLDER

An article is the body of the page, its summary the first sentence, as the authors define them; the title is not used.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Iterator

import corpus
from download import Published

LANGUAGES = ("source", "target")
# Checksums and counts are those of the Hugging Face data set xsum.
ARTICLES = Published(
    "XSUM-EMNLP18-Summary-Data-Original.tar.gz",
    (
        "http://bollin.inf.ed.ac.uk/public/direct/XSUM-EMNLP18-Summary-Data-Original.tar.gz",
        "https://huggingface.co/datasets/EdinburghNLP/xsum/resolve/main/data/XSUM-EMNLP18-Summary-Data-Original.tar.gz",
    ),
    "sha256:10b48aa187fc9c904b30f76ca97e2da0de8d3a1238acc26acadef93e2001af90",
)
SPLIT = Published(
    "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json",
    (
        "https://raw.githubusercontent.com/EdinburghNLP/XSum/master/XSum-Dataset/"
        "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json",
    ),
    "sha256:9c0c5d8f048a90bd68b19a34e4c30577ed270d3247b2119fa06a04ef46292068",
)
FILES = [ARTICLES, SPLIT]
PUBLISHED = {"train": 204_045, "valid": 11_332, "test": 11_334}
NAMES = {"train": "train", "valid": "validation", "test": "test"}
# Buttons of the page.
NOT_TEXT = {
    "Share this with",
    "Email",
    "Facebook",
    "Messenger",
    "Twitter",
    "Pinterest",
    "WhatsApp",
    "Linkedin",
    "LinkedIn",
    "Copy this link",
    "These are external links and will open in a new window",
}


def parse(text: str) -> corpus.Pair:
    """Return article and summary of a file whose sections begin with [SN]NAME[SN]."""
    pieces = re.split(r"\[SN\]([A-Z-]+)\[SN\]", text)
    sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    body = [line for line in sections["RESTBODY"].split("\n") if line.strip() not in NOT_TEXT]
    return "\n".join(body), sections["FIRST-SENTENCE"]


def read(downloads: pathlib.Path) -> Iterator[tuple[str, Iterable[corpus.Pair]]]:
    split = json.loads((downloads / SPLIT.name).read_text(encoding="utf-8"))
    members = corpus.read_members(downloads / ARTICLES.name, lambda name: name.endswith(".summary"))
    pairs = {pathlib.PurePosixPath(name).stem: parse(content.decode("utf-8")) for name, content in members}
    for part, name in NAMES.items():
        yield part, (pairs[number] for number in split[name] if number in pairs)
