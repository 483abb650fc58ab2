"""The file of ``--bild-draft-vocab``: what is read from it, what is refused, and what a program makes of it."""

import json
import shlex
from argparse import Namespace

import pytest
from cli_support import SENTENCES
from support import symbols

from bild_fairseq.errors import BildError
from bild_fairseq.plugin.draft_vocabulary import DraftVocabulary
from bild_fairseq.plugin.pair import Pair

ALWAYS = {symbols().eos(), symbols().unk()}


def load(folder, content: bytes) -> DraftVocabulary:
    path = folder / "vocabulary.txt"
    path.write_bytes(content)
    return DraftVocabulary.load(path, symbols())


@pytest.mark.parametrize(
    "content",
    [
        "w3\nw1\n",
        "w3 12\nw1 7",
        "w3\r\nw1\r\n\r\n",
        "w1\nw1 5\nw3\n<pad>\n</s>\n",
        "w3 12 #fairseq:overwrite\nw1 1\n",
    ],
)
def test_one_type_a_line(tmp_path, content):
    """In any order, with or without a count; the end symbol and the unknown one are always in, padding never."""
    found = load(tmp_path, content.encode())
    assert found.types == tuple(sorted({symbols().index("w1"), symbols().index("w3"), *ALWAYS}))


def test_a_dictionary_is_one(tmp_path):
    symbols().save(str(tmp_path / "dict.txt"))
    found = DraftVocabulary.load(tmp_path / "dict.txt", symbols())
    assert set(found.types) == set(range(len(symbols()))) - {symbols().pad(), symbols().bos()}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"w1\nw2 4\nquark 3\n", "line 3: 'quark' is no type of the target dictionary"),
        (b"w1\nw2 w3\n", "line 2: 'w2 w3'"),
        (b"", "it is empty"),
        (b"\n \n", "it is empty"),
        (b"w1\n\xff\xfe\n", "it is no text in UTF-8"),
        (b"x" * 10000, "line 1: 'xxx"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, content, named):
    with pytest.raises(BildError) as caught:
        load(tmp_path, content)
    message = str(caught.value)
    assert message.startswith(f"--bild-draft-vocab {tmp_path / 'vocabulary.txt'}")
    assert named in message and "\n" not in message and len(message) < len(str(tmp_path)) + 200


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_what_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(BildError, match="--bild-draft-vocab"):
        DraftVocabulary.load(tmp_path / name, symbols())


def test_programs_draft_among_them(corpus, tmp_path):
    """The text is the large model's own with rollback 0, and what is drafted is other than without the file."""
    path, stats = tmp_path / "few words.txt", tmp_path / "stats.json"
    path.write_text("".join(f"{symbol}\n" for symbol in corpus.task().target_dictionary.symbols[4:8]))
    options = ["--bild-draft-vocab", path, "--bild-stats", stats, "--batch-size", 8]
    found = corpus.generate(*corpus.lossless(*options))
    assert found.texts() == corpus.generate("--generator", "greedy", "--batch-size", 8).texts()
    few = json.loads(stats.read_text())["summary"]
    corpus.generate(*corpus.lossless("--bild-stats", stats, "--batch-size", 8))
    assert few["sentences"] == SENTENCES
    assert 0 < few["accepted"] != json.loads(stats.read_text())["summary"]["accepted"]


def test_programs_refuse_it_before_work(corpus, tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_text("quark\n")
    run = corpus.generate(*corpus.bild("--bild-draft-vocab", path), status=None)
    assert "line 1: 'quark' is no type of the target dictionary" in run.error()


def test_the_flags_of_a_pair_name_it(corpus, tmp_path):
    path = tmp_path / "few words.txt"
    corpus.task().target_dictionary.save(str(path))
    args = Namespace(generator="bild", bild_small_path=str(corpus.small), bild_draft_vocab=str(path))
    large = Pair.load(str(corpus.large), task=corpus.task(), alone=True)
    words = shlex.split(Pair.from_args(large.large, corpus.task(), args).flags().replace("None", "large.pt"))
    assert words[-2:] == ["--bild-draft-vocab", str(path)]
