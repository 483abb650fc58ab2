"""Languages and models of the scripts: named on the command line, checked against the checkpoints."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from cli_support import Corpus, save
from script_support import refused, run_script

from bild_fairseq.errors import BildError
from bild_fairseq.experiments.data import check_sources, first_sentences, load_subset, make_batches, make_task
from bild_fairseq.experiments.pairs import load_pairs, parse_precision
from bild_fairseq.plugin.pair import Pair


def renamed(corpus: Corpus, folder: Path, source: str, target: str) -> tuple[Path, Path]:
    """The data and the large model of the corpus, in languages of other names."""
    data = folder / "data"
    data.mkdir()
    names = {"x": source, "y": target}
    for path in corpus.data.glob("valid.x-y.*"):
        shutil.copy(path, data / f"valid.{source}-{target}.{names[path.name.split('.')[2]]}{path.suffix}")
    for old, new in names.items():
        shutil.copy(corpus.data / f"dict.{old}.txt", data / f"dict.{new}.txt")
    state = torch.load(corpus.large, weights_only=False)
    options = state["cfg"]["task"]
    options = options if isinstance(options, dict) else vars(options)
    options.update(source_lang=source, target_lang=target)
    return data, save(folder / "large.pt", state)


def test_languages_with_dashes_are_named(corpus, tmp_path):
    """fairseq cannot read zh-CN and en out of zh-CN-en; with -s and -t everything is as ever."""
    data, large = renamed(corpus, tmp_path, "zh-CN", "en")
    words = [data, "--large", large, "--subset", "valid", "--bpe", "none", "--sentences", 2, "--threads", 1]
    words += ["--systems", "greedy", "--max-len-b", 12]
    assert "name the languages with -s and -t" in refused(corpus, "benchmark", *words)
    named = run_script(corpus, "benchmark", *words, "-s", "zh-CN", "-t", "en").out
    plain = [corpus.data, "--large", corpus.large, *words[3:]]
    assert named.splitlines()[0].startswith("2 sentences")
    score = [line.split("|")[2] for line in named.splitlines() if line.startswith("| greedy")]
    other = run_script(corpus, "benchmark", *plain, "--source-lang", "x", "--target-lang", "y").out
    assert score == [line.split("|")[2] for line in other.splitlines() if line.startswith("| greedy")]


def test_a_model_of_the_other_direction_is_refused(corpus):
    """The data is there in both directions; the model says which one is its own."""
    task = make_task(corpus.data, "y", "x")
    load_subset(task, "valid")
    assert [task.cfg.source_lang, task.cfg.target_lang] == ["y", "x"]
    with pytest.raises(BildError, match="its source language is x, this data's is y"):
        Pair.load(str(corpus.large), task=task, alone=True)


def test_data_that_is_not_there_gets_one_line(corpus, tmp_path):
    for words, message in (
        ([tmp_path / "none"], "no such folder; give one that fairseq-preprocess has made"),
        ([tmp_path], "no binarized data of two languages: .*; name the languages with -s and -t"),
        ([corpus.data, "x"], "give both -s and -t, or neither"),
        ([corpus.data, "x", "z"], "no binarized data of two languages: "),
    ):
        with pytest.raises(BildError, match=message) as caught:
            make_task(*words)
        assert "\n" not in str(caught.value)
    with pytest.raises(BildError, match=f"{corpus.data}: cannot load dev: .*; there is: test"):
        load_subset(make_task(corpus.data), "dev")


def test_batches_hold_each_sentence_once(corpus):
    """Those of a batch are of like length, so that little is padding."""
    task = make_task(corpus.data)
    load_subset(task, "valid")
    ids = first_sentences(task, "valid", 13)
    assert ids == range(13) and len(first_sentences(task, "valid", 1000)) == len(task.dataset("valid"))
    batches = make_batches(task.dataset("valid"), ids, 4)
    assert sorted(i for batch in batches for i in batch["id"].tolist()) == list(ids)
    assert sorted(len(batch["id"]) for batch in batches) == [1, 4, 4, 4]
    spans = sorted(
        (min(lengths), max(lengths)) for lengths in (batch["net_input"]["src_lengths"].tolist() for batch in batches)
    )
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))


def test_sentences_that_a_model_cannot_read_are_told_first(corpus, tmp_path):
    task = make_task(corpus.data)
    load_subset(task, "valid")
    short = corpus.checkpoint(tmp_path / "short.pt", max_source_positions=5, no_token_positional_embeddings=True)
    pair = Pair.load(str(short), task=task, alone=True)
    check_sources(task, "valid", range(3), [pair])
    with pytest.raises(BildError, match="sentence 4 of valid has 6 source tokens, .* add --truncate-source 5"):
        check_sources(task, "valid", range(20), [pair])


def flags(corpus: Corpus, **changes: object) -> Namespace:
    defaults = {"large": str(corpus.large), "small": [], "early_exit": [], "precision": "float32"}
    return Namespace(**{**defaults, "cuda": False, "fp16": False, "draft_vocab": None, **changes})


def test_pairs_have_the_names_and_models_that_are_given(corpus, tmp_path):
    exits = corpus.checkpoint(
        tmp_path / "exits.pt", arch="early_exit_transformer_tiny", exit_layers="1,2", decoder_layers=3
    )
    small = [str(corpus.small), f"half={corpus.small_halfway}"]
    chosen = flags(corpus, small=small, early_exit=[f"low={exits}", f"high={exits}:2"])
    pairs = load_pairs(make_task(corpus.data), chosen)
    assert list(pairs) == [corpus.small.stem, "half", "low", "high"]
    assert [pair.exit_layer for pair in pairs.values()] == [None, None, 1, 2]
    first, second, low, high = pairs.values()
    assert first.large == second.large and low.large == high.large, "a model is loaded once"
    assert [pair.small_path for pair in pairs.values()] == [str(corpus.small), str(corpus.small_halfway), None, None]
    chosen = flags(corpus, small=small[:1], early_exit=[f"low={exits}"], precision="float32+int8")
    mixed = load_pairs(make_task(corpus.data), chosen)
    assert [(pair.precision, pair.small_precision) for pair in mixed.values()] == [("float32", "int8")] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing drafts: give --small NAME=PATH or --early-exit NAME=PATH"),
        ({"small": ["a=SMALL", "a=SMALL"]}, "two models are called a"),
        ({"small": ["a="]}, "--small a=: write NAME=PATH"),
        ({"early_exit": ["a=SMALL"]}, "SMALL: the model has no exits"),
        ({"small": ["a=SMALL"], "precision": "int8", "fp16": True}, "--fp16 and --precision both set"),
    ],
)
def test_pairs_that_cannot_be_are_refused(corpus, changes, message):
    named = {
        name: [item.replace("SMALL", str(corpus.small)) for item in value] if isinstance(value, list) else value
        for name, value in changes.items()
    }
    with pytest.raises(BildError, match=message.replace("SMALL", str(corpus.small))):
        load_pairs(make_task(corpus.data), flags(corpus, **named))


def test_precisions_are_read_as_meant():
    assert parse_precision("int8") == ("int8", "int8") and parse_precision("float32+int8") == ("float32", "int8")
    for bad in ("int4", "int8+", "+int8", "int8+int4"):
        with pytest.raises(BildError, match=f"--precision {bad.replace('+', '.')}: choose from"):
            parse_precision(bad)
