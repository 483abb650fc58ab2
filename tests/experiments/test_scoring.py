"""Quality: statistics of sentences add up to scores of a corpus, and differences are paired."""

import random
from typing import Any

import numpy as np
import pytest
import sacrebleu
import sentencepiece
import support
from script_support import MemoryTask

from bild_fairseq.errors import BildError
from bild_fairseq.experiments.scoring import ScoreOptions, Scorer, quality_change
from bild_fairseq.experiments.subwords import SentencePiece


def scorer(references: list[str], **options: object) -> Any:
    """A scorer for references in words of the dictionary."""
    words = support.symbols()
    targets = [[*(words.index(word) for word in line.split()), words.eos()] for line in references]
    chosen = ScoreOptions(**{"bpe": "none", **options})
    return Scorer(MemoryTask(targets, targets), "valid", range(len(targets)), chosen)


def sentences(dice: random.Random, count: int, near: list[str] | None = None) -> list[str]:
    """Sentences at random, or like others with some words changed."""
    if near is None:
        return [" ".join(f"w{dice.randrange(20)}" for _ in range(dice.randint(1, 12))) for _ in range(count)]
    return [" ".join(f"w{dice.randrange(20)}" if dice.random() < 0.3 else w for w in line.split()) for line in near]


@pytest.mark.parametrize("seed", range(4))
def test_statistics_add_up_to_the_corpus_score(seed):
    """Summed statistics give sacrebleu's corpus score: short corpora without long matches, and none at all, too."""
    dice = random.Random(seed)
    references = sentences(dice, 8)
    outputs = sentences(dice, 8, near=references)
    words = support.symbols()
    tokens = {i: [words.index(word) for word in line.split()] for i, line in enumerate(outputs)}
    scores = scorer(references)
    statistics = scores.statistics(tokens)
    for chosen in ([0], [1, 2], list(range(8)), [3, 3, 3, 5]):
        metric = sacrebleu.BLEU(tokenize="none", force=True)
        wanted = metric.corpus_score([outputs[i] for i in chosen], [[references[i] for i in chosen]]).score
        assert scores.from_statistics(statistics[chosen].sum(axis=0)) == pytest.approx(wanted, abs=1e-9)
    assert scores.score(tokens) == pytest.approx(float(scores.from_statistics(statistics.sum(axis=0))))
    assert scores.from_statistics(np.array([4.0, 4, 0, 0, 0, 0, 4, 3, 2, 1])) == 0


def test_rouge_is_the_mean_over_sentences():
    pytest.importorskip("rouge_score")
    scores = scorer(["w1 w2 w3 w4", "w5 w6"], metric="rougeL")
    words = support.symbols()
    tokens = {0: [words.index(w) for w in ("w1", "w2", "w3", "w4")], 1: [words.index("w7")]}
    assert scores.score(tokens) == pytest.approx(50)


def test_rouge_without_its_package_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(BildError, match="pip install rouge-score"):
        scorer(["w1"], metric="rougeLsum")


def test_change_of_quality_is_paired():
    """Equal outputs differ by nothing in every resample, however different the sentences are."""
    dice = random.Random(3)
    references = sentences(dice, 20)
    words = support.symbols()
    outputs = {i: [words.index(w) for w in line.split()] for i, line in enumerate(sentences(dice, 20, references))}
    scores = scorer(references)
    statistics = scores.statistics(outputs)
    assert quality_change(scores, statistics, statistics) == (0, 0, 0)
    better = scores.statistics({i: [words.index(w) for w in line.split()] for i, line in enumerate(references)})
    change, low, high = quality_change(scores, better, statistics)
    assert 0 < low < change < high


def test_sentencepiece_text_is_that_of_its_library(tmp_path):
    """Bytes become characters, and what is no piece is no text."""
    model = tmp_path / "spiece.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab abc cab", "bca b a c"] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    subwords = SentencePiece(str(model))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode("cab abc é a", out_type=str)
    assert any(piece.startswith("<0x") for piece in pieces)
    assert subwords.join(" ".join([*pieces[:2], "<extra_id_3>", "<unk>", *pieces[2:]])) == "cab abc é a"
    assert "".join(map(subwords.piece, ["\u2581ca", "b", "\u2581a"])) == " cab a"

    with pytest.raises(BildError, match="give --sentencepiece-model spiece.model"):
        scorer(["w1"], bpe="sentencepiece")
    with pytest.raises(BildError, match="nowhere: is no SentencePiece model"):
        scorer(["w1"], bpe="sentencepiece", sentencepiece_model="nowhere")
