"""The command line from end to end: fairseq's programs with the plugin against the same programs without it."""

import itertools
import json
import os
import re
import subprocess
import sysconfig
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from cli_support import POSITIONS, SENTENCES, USER_DIR, Run, assert_same_hypotheses, joined, save
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel

from bild_fairseq.plugin.flags import BildGenerationConfig

COUNTERS = ["tokens", "large_calls", "small_calls", "drafted", "accepted", "unverified", "discarded"]
COUNTERS += ["fallbacks", "rollbacks"]
RATES = ["fallback_rate", "rollback_rate", "acceptance_rate", "mean_accepted_length"]
EVERY = set(range(SENTENCES))


@pytest.fixture(scope="module")
def stock(corpus) -> Run:
    """fairseq's own greedy search over the test set."""
    return corpus.stock("--batch-size", 32)


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("generator", ["lossless", "greedy"])
def test_lossless_and_greedy_are_stock_greedy_search(corpus, stock, generator, batch_size):
    options = ["--generator", "greedy"] if generator == "greedy" else corpus.lossless()
    run = corpus.generate(*options, "--batch-size", batch_size)
    assert_same_hypotheses(run, stock)
    assert run.fields("S") == stock.fields("S") and run.fields("T") == stock.fields("T")
    assert "with beam=1:" in run.out


@pytest.mark.parametrize("limit", [("--batch-size", 5), ("--max-tokens", 20), ()])
def test_every_sentence_comes_out_once(corpus, limit):
    """Without --required-batch-size-multiple, which fairseq's main branch needs to keep the last batch."""
    run = corpus.generate(*corpus.bild(), *limit)
    assert run.fields("H").keys() == EVERY


def test_shards_share_the_sentences(corpus, stock):
    texts, counted = {}, 0
    for rank in range(2):
        shard = ["--batch-size", 4, "--distributed-world-size", 2, "--distributed-rank", rank]
        run = corpus.generate(*corpus.lossless(), *shard)
        assert not texts.keys() & run.texts().keys()
        assert len(run.texts()) > SENTENCES // 3
        texts |= run.texts()
        counted += int(re.search(r"^(\d+) sentences,", run.err, re.MULTILINE)[1])
    assert texts == stock.texts()
    assert counted == SENTENCES


def test_beam_search_is_untouched(corpus):
    """Line for line."""
    options = ["--beam", 3, "--nbest", 2, "--batch-size", 16, "--required-batch-size-multiple", 1]
    wanted = corpus.stock(*options).out
    assert wanted.count("\nH-") > SENTENCES
    assert corpus.generate(*options).out == wanted


@pytest.mark.parametrize("program", ["generate", "interactive"])
def test_help_lists_every_flag_with_default_and_unit(corpus, program):
    text = " ".join(corpus.programs(program, "--user-dir", USER_DIR, "--help").out.split())
    expected = {
        "generator {beam,bild,greedy}": ["default: beam"],
        "bild-small-path": ["default: none"],
        "bild-small-overrides": ["default: {}"],
        "bild-exit-layer": ["default: the lowest trained exit"],
        "bild-fallback-threshold": ["probability, 0 to 1", "default: 0.6"],
        "bild-rollback-threshold": ["nats, 0 to inf", "default: 2.0"],
        "bild-max-draft": ["tokens, 1 or more", "default: 10"],
        "bild-start {large,small}": ["default: large"],
        "bild-verify-end": ["default: off"],
        "bild-draft-vocab": ["dict.txt", "default: all types"],
        "bild-stats": ["JSON"],
    }
    for flag, words in expected.items():
        # The last occurrence is the description; the first may be the usage line.
        entry = text.rpartition(f"--{flag}")[2].split(" --bild-")[0]
        for word in words:
            assert word in entry, flag


def test_statistics_are_the_printed_summary_and_the_sum_of_the_sentences(corpus, tmp_path):
    path = tmp_path / "stats.json"
    run = corpus.generate(*corpus.bild("--bild-stats", path, "--print-step"), "--batch-size", 8)
    stats = json.loads(path.read_text())
    total, sentences = stats["summary"], {record["id"]: record for record in stats["sentences"]}
    assert len(stats["sentences"]) == total["sentences"] == SENTENCES
    assert sentences.keys() == EVERY
    for name in COUNTERS:
        assert total[name] == sum(record[name] for record in sentences.values()), name
    # The models agree often, not always; without both, little is proved here.
    assert total["accepted"] and total["discarded"] and total["unverified"]
    for record in (total, *sentences.values()):
        assert set(record) >= {*COUNTERS, *RATES}
        assert record["drafted"] == record["accepted"] + record["unverified"] + record["discarded"]
        assert record["fallback_rate"] == record["fallbacks"] / record["tokens"]
        assert record["rollback_rate"] == record["rollbacks"] / record["tokens"]

    scores = run.positional_scores()
    assert {number: record["tokens"] for number, record in sentences.items()} == {
        number: len(scores[number]) for number in scores
    }
    assert {number: [str(record["large_calls"])] for number, record in sentences.items()} == run.fields("I")

    printed = run.err[run.err.rindex(f"{SENTENCES} sentences, ") :]
    assert printed == (
        f"{SENTENCES} sentences, {total['tokens']} tokens\n"
        f"large model: {total['large_calls']} calls, "
        f"{total['tokens'] / total['large_calls']:.2f} tokens per large call\n"
        f"small model: {total['small_calls']} calls, {total['drafted']} tokens drafted: {total['accepted']} accepted, "
        f"{total['discarded']} discarded, {total['unverified']} never verified\n"
        f"acceptance rate {total['accepted'] / (total['accepted'] + total['discarded']):.1%}, "
        f"fallback rate {total['fallbacks'] / total['tokens']:.1%}, "
        f"rollback rate {total['rollbacks'] / total['tokens']:.1%}\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["stats.json"]


def test_statistics_of_a_run_that_dies_midway(corpus, tmp_path):
    """A source beyond the position limit ends fairseq-interactive; what was translated before is counted."""
    path, too_long = tmp_path / "stats.json", "a " * (POSITIONS + 5)
    run = corpus.interactive(*corpus.bild("--bild-stats", path), text=f"a b\nc\n{too_long}\ne\n", status=None)
    assert run.status != 0
    assert "--skip-invalid-size-inputs-valid-test" in run.err
    stats = json.loads(path.read_text())
    assert stats["summary"]["sentences"] == 2 == len(run.texts())
    assert stats["summary"]["tokens"] == sum(map(len, run.positional_scores().values()))


OPTIONS = {
    "--max-len-a .5 --max-len-b 1 --lenpen 2": "length limits by the source, and length penalty",
    "--max-len-b 200 --min-len 39": "minimum length, up to the last position that the large model has",
    "--temperature 2.5 --unkpen -6": "temperature, and unknown words made likelier",
    "--prefix-size 2 --min-len 5 --unnormalized": "forced prefixes, minimum length, and scores as sums",
    "--match-source-len": "length of the source",
}


@pytest.mark.parametrize("options", [option.split() for option in OPTIONS], ids=OPTIONS.values())
def test_options_do_what_they_do_in_stock_greedy_search(corpus, stock, options):
    """With the lossless settings, where both models and every position must respect them."""
    wanted = corpus.stock("--batch-size", 8, *options)
    assert wanted.fields("H") != stock.fields("H"), "the options change nothing here, so they prove nothing"
    assert_same_hypotheses(corpus.generate(*corpus.lossless(), "--batch-size", 8, *options), wanted)


def repeats_a_pair(text: str) -> bool:
    pairs = list(itertools.pairwise(text.split()))
    return len(set(pairs)) < len(pairs)


def test_no_repeated_ngrams(corpus, stock):
    """Compared with greedy decoding: on a CPU stock fairseq looks for repeats of the wrong words and finds none."""
    options = ["--no-repeat-ngram-size", 2, "--batch-size", 8]
    greedy = corpus.generate("--generator", "greedy", *options)
    assert any(map(repeats_a_pair, stock.texts().values()))
    assert not any(map(repeats_a_pair, greedy.texts().values()))
    assert_same_hypotheses(corpus.generate(*corpus.lossless(), *options), greedy)
    drafted = corpus.generate(*corpus.bild("--bild-fallback-threshold", 0.1), *options)
    assert not any(map(repeats_a_pair, drafted.texts().values()))


def test_draft_that_nobody_verifies_respects_the_options(corpus):
    """The small model alone, which never asks the large one, decodes as it would under --path."""
    options = ["--batch-size", 8, "--min-len", 4, "--max-len-b", 9, "--unkpen", -2, "--prefix-size", 1]
    alone = ["--bild-start", "small", "--bild-fallback-threshold", 0, "--bild-rollback-threshold", "inf"]
    run = corpus.generate(*corpus.bild(*alone, "--bild-max-draft", 1000, "--print-step"), *options)
    assert_same_hypotheses(run, corpus.generate("--generator", "greedy", "--path", corpus.small, *options))
    assert {steps for (steps,) in run.fields("I").values()} == {"0"}


def test_score_reference(corpus):
    options = ["--score-reference", "--batch-size", 8]
    run, wanted = corpus.generate(*corpus.bild(*options)), corpus.stock(*options)
    assert_same_hypotheses(run, wanted)
    assert run.texts() == {number: text.replace("<<unk>>", "<unk>") for number, (text,) in wanted.fields("T").items()}


def test_output_options(corpus, tmp_path):
    """--remove-bpe, --results-path and --sacrebleu: the file that they make is stock fairseq's."""
    options = ["--batch-size", 8, "--remove-bpe", "--sacrebleu", "--scoring", "sacrebleu", "--results-path"]
    results = {}
    for name, run in (("bild", corpus.generate), ("stock", corpus.stock)):
        chosen = corpus.lossless() if name == "bild" else []
        assert "H-" not in run(*chosen, *options, tmp_path / name).out
        results[name] = Run(0, (tmp_path / name / "generate-test.txt").read_text(), "")
    ours, wanted = results.values()
    assert_same_hypotheses(ours, wanted)
    assert not any("@@" in text for text in ours.texts().values())
    assert ours.out.splitlines()[-1] == wanted.out.splitlines()[-1]
    assert "BLEU" in ours.out.splitlines()[-1]


def test_half_precision(corpus, stock):
    """--fp16, also where there is no GPU; rounding may change a word where two were almost as likely."""
    options = ["--fp16", "--cpu", "--batch-size", 8]
    reference = corpus.stock(*options, status=None)
    if reference.status:
        pytest.skip("this fairseq cannot decode in half precision on this machine")
    texts, wanted = corpus.generate(*corpus.lossless(), *options).texts(), reference.texts()
    assert texts.keys() == EVERY
    assert sum(texts[number] == wanted[number] for number in EVERY) > 0.9 * SENTENCES
    assert reference.fields("H") != stock.fields("H"), "this was not half precision"


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_rounded_weights(corpus, stock, precision):
    """Other scores than in float32, and for nearly all sentences the same text, from bild and greedy alike."""
    options = ["--batch-size", 8, "--bild-precision", precision]
    lossless = corpus.generate(*corpus.lossless(), *options)
    assert lossless.texts() == corpus.generate("--generator", "greedy", *options).texts()
    assert sum(lossless.texts()[number] == stock.texts()[number] for number in EVERY) > 0.8 * SENTENCES
    assert lossless.fields("H") != stock.fields("H"), "nothing was rounded"


def test_a_rounded_small_model_drafts_for_a_large_one_in_float32(corpus, stock):
    """The large model's verdicts are exact; only what it is offered differs."""
    options = ["--batch-size", 8, "--bild-small-precision", "int8"]
    lossless = corpus.generate(*corpus.lossless(), *options)
    assert_same_hypotheses(lossless, stock)
    drafted = [corpus.generate(*corpus.bild(*more)).fields("P") for more in (options, options[:2])]
    assert drafted[0] != drafted[1], "nothing was rounded"


def test_ensembles(corpus, tmp_path):
    """Of large models: stock fairseq's ensemble. Of small models: drafts other than one member's."""
    path = ["--path", joined([corpus.large, corpus.large_halfway]), "--batch-size", 8]
    wanted = corpus.stock(*path)
    counted = {}
    for name, small in (("one", corpus.small), ("two", joined([corpus.small, corpus.small_halfway]))):
        lossless = corpus.lossless("--bild-small-path", small, "--bild-stats", tmp_path / name)
        assert_same_hypotheses(corpus.generate(*lossless, *path), wanted)
        counted[name] = json.loads((tmp_path / name).read_text())["sentences"]
    assert counted["one"] != counted["two"]


LINES = ["c a b", "", "e", "unseen", "h g f e d@@ c b a", "a " * (POSITIONS - 1), "b d@@ b"]


@pytest.mark.parametrize("batching", [(), ("--buffer-size", 4, "--batch-size", 3)], ids=["single", "batched"])
def test_interactive_is_stock_greedy_search(corpus, batching):
    """An empty line, a single word, an unknown one, and a source at the position limit among the input."""
    text = "".join(f"{line}\n" for line in LINES)
    run = corpus.interactive(*corpus.lossless(), *batching, text=text)
    wanted = corpus.stock(*batching, program="interactive", text=text)
    assert_same_hypotheses(run, wanted)
    assert list(run.fields("H")) == list(range(len(LINES)))


def test_statistics_count_interactive_sentences(corpus, tmp_path):
    """fairseq-interactive does not tell a generator their numbers, so they are counted as they are translated."""
    path, text = tmp_path / "stats.json", "".join(f"{line}\n" for line in LINES)
    options = ["--bild-stats", path, "--buffer-size", 4, "--batch-size", 3]
    run = corpus.interactive(*corpus.bild(*options), text=text)
    sentences = json.loads(path.read_text())["sentences"]
    assert [record["id"] for record in sentences] == list(range(len(LINES)))
    lengths = sorted(len(scores) for scores in run.positional_scores().values())
    assert sorted(record["tokens"] for record in sentences) == lengths


def test_source_beyond_the_limit_is_skipped_on_request(corpus):
    text = f"c a\n{'a ' * POSITIONS}\nb\n"
    options = ["--skip-invalid-size-inputs-valid-test", "--buffer-size", 3, "--batch-size", 3]
    run = corpus.interactive(*corpus.lossless(), *options, text=text)
    wanted = corpus.stock(*options, program="interactive", text=text)
    assert_same_hypotheses(run, wanted)
    assert list(run.fields("H")) == [0, 2]


def test_sentences_with_logits_that_are_not_numbers_are_named(corpus, stock, tmp_path):
    """A large model that is broken for one source word: the sentences without it are translated as ever."""
    word = "h"
    symbols = Dictionary.load(str(corpus.data / "dict.x.txt"))
    state = torch.load(corpus.large, weights_only=False)
    state["model"]["encoder.embed_tokens.weight"][symbols.index(word)] = torch.nan
    broken = save(tmp_path / "broken.pt", state)
    for options in (["--generator", "greedy"], corpus.lossless()):
        run = corpus.generate("--path", broken, *options, "--batch-size", 8)
        bad = {number for number, (source,) in run.fields("S").items() if word in source.split()}
        assert bad and bad < EVERY == run.texts().keys()
        for number in EVERY - bad:
            assert run.texts()[number] == stock.texts()[number]
            assert run.scores()[number] == pytest.approx(stock.scores()[number], abs=1e-4)
            assert f"sentence {number}:" not in run.err
        for number in bad:
            assert run.scores()[number] == -torch.inf
            assert re.search(rf"sentence {number}: the large model's logits are not numbers", run.err)


def test_console_script(corpus, stock):
    """A program as a shell starts it, with a relative --user-dir."""
    program = Path(sysconfig.get_path("scripts")) / "fairseq-generate"
    options = [*corpus.lossless(), "--user-dir", Path(USER_DIR).name, "--batch-size", 8]
    command = [program, *corpus.arguments(*options)]
    run = subprocess.run(command, cwd=Path(USER_DIR).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_same_hypotheses(Run(0, run.stdout, run.stderr), stock)
    assert f"{SENTENCES} sentences, " in run.stderr


def test_interactive_reads_a_pipe(corpus, stock, tmp_path):
    """What comes in is written when the pipe ends, with a relative --user-dir."""
    lines = [source for (source,) in (stock.fields("S")[number] for number in range(4))]
    words = ["fairseq-interactive", *corpus.arguments(*corpus.lossless(), "--user-dir", Path(USER_DIR).name)]
    path = f"{corpus.programs.bin(tmp_path / 'bin')}:{os.environ['PATH']}"
    piped = subprocess.run(
        words,
        cwd=Path(USER_DIR).parent,
        env={**os.environ, "PATH": path},
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
    )
    assert piped.returncode == 0, piped.stderr
    assert Run(0, piped.stdout, "").texts() == {number: stock.texts()[number] for number in range(4)}


class TestFromPython:
    """``task.build_generator`` and ``generator.generate``, without a program."""

    @pytest.fixture(scope="class")
    def loaded(self, corpus):
        overrides = {"data": str(corpus.data)}
        models, config, task = checkpoint_utils.load_model_ensemble_and_task([str(corpus.large)], overrides)
        task.load_dataset("test")
        return [model.eval() for model in models], config, task

    @staticmethod
    def generate(task, models, generator):
        batches = task.get_batch_iterator(task.dataset("test"), max_sentences=6, required_batch_size_multiple=1)
        found = {}
        for sample in batches.next_epoch_itr(shuffle=False):
            for number, (hypothesis,) in zip(sample["id"].tolist(), generator.generate(models, sample), strict=True):
                found[number] = hypothesis
        return found

    @pytest.mark.parametrize("given", ["config", "namespace"])
    def test_hypotheses_and_counters(self, corpus, loaded, given):
        """With the dataclass of all options, or a namespace of some of them."""
        models, _, task = loaded
        kind = BildGenerationConfig if given == "config" else Namespace
        args = kind(generator="bild", bild_small_path=str(corpus.small), max_len_b=12)
        generator = task.build_generator(models, args)
        found = self.generate(task, models, generator)
        wanted = corpus.generate(*corpus.bild())
        texts = {number: task.target_dictionary.string(hypothesis["tokens"]) for number, hypothesis in found.items()}
        assert texts == wanted.texts()
        stats = generator.stats()["summary"]
        assert stats["tokens"] == sum(len(hypothesis["tokens"]) for hypothesis in found.values())
        assert stats["large_calls"] == sum(hypothesis["steps"] for hypothesis in found.values())
        assert generator.counters().tokens == stats["tokens"]
        assert generator.summary() in wanted.err

    @pytest.mark.parametrize(("lenpen", "score"), [(1e300, 0.0), (-1e300, -torch.inf)])
    def test_length_penalties_beyond_all_numbers(self, loaded, lenpen, score):
        models, _, task = loaded
        generator = task.build_generator(models, Namespace(generator="greedy", max_len_b=12, lenpen=lenpen))
        found = self.generate(task, models, generator).values()
        assert {hypothesis["score"].item() for hypothesis in found if len(hypothesis["tokens"]) > 1} == {score}

    def test_the_options_of_a_checkpoint(self, corpus, loaded, stock):
        """A configuration that a checkpoint carries, with the generator put in."""
        models, config, task = loaded
        args = config.generation
        args.generator, args.max_len_b = "greedy", 12
        found = self.generate(task, models, task.build_generator(models, args))
        texts = {number: task.target_dictionary.string(hypothesis["tokens"]) for number, hypothesis in found.items()}
        assert texts == stock.texts()

    def test_hub_interface(self, corpus, stock):
        hub = TransformerModel.from_pretrained(
            str(corpus.large.parent), corpus.large.name, str(corpus.data), source_lang="x", target_lang="y"
        )
        numbers = [number for number in sorted(stock.texts()) if "<unk>" not in stock.fields("S")[number][0]]
        sources = [stock.fields("S")[number][0] for number in numbers]
        options = {"bild_small_path": str(corpus.small), "bild_rollback_threshold": 0.0, "bild_verify_end": True}
        found = hub.translate(sources, beam=1, generator="bild", max_len_b=12, **options)
        assert found == [stock.texts()[number] for number in numbers]
