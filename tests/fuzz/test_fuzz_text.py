"""Random lines of Unicode on the way through fairseq-interactive: stock fairseq's text, and the naive reference's."""

import functools
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from cli_support import POSITIONS, WORDS, Corpus
from fairseq import checkpoint_utils, utils
from fairseq_cli.interactive import buffered_read, make_batches
from fuzzing import Fuzzer, assert_same_text, configured
from reference import SMALL, Rules, bild

from bild_fairseq import BildGenerationConfig
from bild_fairseq.plugin.pair import Pair

MAX_LEN = 12
SPACES = ["\t", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u200b", "\u3000", "\ufeff", "  "]
MARKS = ["@@", "@-@", "<unk>", "<pad>", "</s>", "<s>", "<mask>", "S-0\t", "H-1\t-0.5\tA", "\x00", "\x1b[0m", "\\n"]
CATEGORIES = ["Lu", "Mn", "Nd", "So", "Zs", "Cf", "Cc", "Co"]

LOOSE = [
    (
        Rules(0.5, 3.0, 10, SMALL, max_len=MAX_LEN),
        {"bild_fallback_threshold": 0.5, "bild_rollback_threshold": 3.0, "bild_start": "small"},
    ),
    (
        Rules(0.7, 1.0, 3, verify_end=True, max_len=MAX_LEN),
        {"bild_fallback_threshold": 0.7, "bild_rollback_threshold": 1.0, "bild_max_draft": 3, "bild_verify_end": True},
    ),
]


@functools.cache
def characters() -> list[str]:
    return [chr(number) for number in range(sys.maxunicode + 1) if unicodedata.category(chr(number)) in CATEGORIES]


def word(dice: random.Random) -> str:
    """A known word, or anything that can stand in a line."""
    what = dice.random()
    if what < 0.6:
        return dice.choice(WORDS)
    if what < 0.7:
        return dice.choice(MARKS)
    return "".join(dice.choice(characters()) for _ in range(dice.choice([1, 1, 2, 5, 200]))).replace("\n", "")


def line(dice: random.Random) -> str:
    """Up to more words than a source may have."""
    count = dice.choice([0, 1, 2, 3, 5, 8, 8, 20, POSITIONS - 1, POSITIONS, 3 * POSITIONS])
    space = dice.choice([" "] * 6 + SPACES)
    return space.join(word(dice) for _ in range(count))


class Lines:
    """Translates a file of lines as fairseq-interactive does."""

    def __init__(self, corpus: Corpus, folder: Path):
        skip = "--skip-invalid-size-inputs-valid-test"
        self.config, self.task = configured(corpus, "--max-source-positions", POSITIONS, skip)
        self.file, self.small_path = folder / "lines", str(corpus.small)
        (self.large,), (self.small,) = (
            checkpoint_utils.load_model_ensemble_and_task([str(path)], task=self.task)[0]
            for path in (corpus.large, corpus.small)
        )
        self.large.eval()
        self.small.eval()
        self.max_positions = utils.resolve_max_positions(self.task.max_positions(), self.large.max_positions())
        self.stock = self.generator(generator="beam", beam=1)
        # Built once: what they remember of one batch must not show in another.
        self.lossless = [
            self.generator(generator="greedy"),
            self.drafting(bild_rollback_threshold=0.0, bild_verify_end=True, bild_start="small"),
            self.drafting(bild_rollback_threshold=0.0, bild_verify_end=True, bild_fallback_threshold=0.2),
        ]
        self.loose = [(rules, self.drafting(**options)) for rules, options in LOOSE]

    def generator(self, **options: Any) -> Any:
        return self.task.build_generator([self.large], BildGenerationConfig(max_len_b=MAX_LEN, **options))

    def drafting(self, **options: Any) -> Any:
        return self.generator(generator="bild", bild_small_path=self.small_path, **options)

    def translated(self, generator: Any) -> dict[int, tuple[list[int], dict[str, Any]]]:
        """Number of a line in the file -> its source tokens and its hypothesis."""
        found, start = {}, 0
        for lines in buffered_read(str(self.file), self.config.interactive.buffer_size):
            for batch in make_batches(lines, self.config, self.task, self.max_positions, lambda text: text):
                sample = {"net_input": {"src_tokens": batch.src_tokens, "src_lengths": batch.src_lengths}}
                translations = self.task.inference_step(generator, [self.large], sample)
                rows = zip(batch.ids.tolist(), batch.src_tokens, translations, strict=True)
                for number, source, (hypothesis, *_) in rows:
                    assert start + number not in found
                    source = utils.strip_pad(source, self.task.target_dictionary.pad()).tolist()
                    found[start + number] = source, hypothesis
            start += len(lines)
        return found

    def __call__(self, dice: random.Random) -> str:
        lines = [line(dice) for _ in range(dice.randint(1, 8))]
        self.file.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8", newline="")
        self.config.interactive.buffer_size = dice.choice([1, 3, 8])
        self.config.dataset.batch_size = dice.randint(1, self.config.interactive.buffer_size)
        if dice.random() < 0.7:
            found, wanted = self.translated(dice.choice(self.lossless)), self.translated(self.stock)
            assert found.keys() == wanted.keys()
            for number, (_, hypothesis) in found.items():
                assert_same_text(hypothesis, wanted[number][1])
            return "like stock" if found else "nothing left"
        rules, generator = dice.choice(self.loose)
        found = self.translated(generator)
        for source, hypothesis in found.values():
            wanted = bild([self.large], [self.small], source, self.task.target_dictionary, rules)
            assert hypothesis["tokens"].tolist() == wanted.tokens
            assert vars(hypothesis["counters"]) == wanted.counters
        return "like reference" if found else "nothing left"


@pytest.fixture(scope="module")
def lines(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    return Lines(corpus, tmp_path_factory.mktemp("fuzz"))


def test_text(lines: Lines, fuzzer: Fuzzer):
    outcomes = fuzzer(lines)
    assert min(outcomes["like stock"], outcomes["like reference"]) > 0.1 * outcomes.total(), outcomes


def test_a_sentence_that_depends_on_its_batch_is_found(lines: Lines, fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch):
    """Planted: padding is read as an unknown word."""
    readers, symbols = Pair.readers, lines.task.source_dictionary

    def reading_padding(pair: Pair, net_input: dict[str, Any], *more: Any) -> Any:
        tokens = net_input["src_tokens"]
        tokens = tokens.masked_fill(tokens == symbols.pad(), symbols.unk())
        return readers(pair, {**net_input, "src_tokens": tokens}, *more)

    monkeypatch.setattr(Pair, "readers", reading_padding)
    with pytest.raises(AssertionError, match=r"^seed \d+ "):
        fuzzer(lines)
