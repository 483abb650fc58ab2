"""Every mistake is told in one line, before any work starts."""

import dataclasses
import os
import shutil
from argparse import Namespace

import pytest
import torch
from cli_support import SENTENCES, USER_DIR, joined, save
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.configs import GenerationConfig
from fairseq.tasks.translation_from_pretrained_bart import TranslationFromPretrainedBARTTask
from fairseq.tasks.translation_lev import TranslationLevenshteinConfig, TranslationLevenshteinTask

from bild_fairseq.errors import BildError
from bild_fairseq.plugin.flags import BildGenerationConfig, check


def config(**chosen):
    return BildGenerationConfig(**{"generator": "bild", **chosen})


def message_of(function, *arguments):
    """The message of the BildError that a call raises; it is one line."""
    with pytest.raises(BildError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"bild_fallback_threshold": float("nan")}, "--bild-fallback-threshold nan"),
        ({"bild_fallback_threshold": -1.0}, "--bild-fallback-threshold -1"),
        ({"bild_fallback_threshold": 1.5}, "--bild-fallback-threshold 1.5"),
        ({"bild_fallback_threshold": float("inf")}, "--bild-fallback-threshold inf"),
        ({"bild_rollback_threshold": float("nan")}, "--bild-rollback-threshold nan"),
        ({"bild_rollback_threshold": -0.5}, "--bild-rollback-threshold -0.5"),
        ({"bild_max_draft": 0}, "--bild-max-draft 0"),
        ({"bild_max_draft": -3}, "--bild-max-draft -3"),
        ({"bild_exit_layer": 0}, "--bild-exit-layer 0"),
        ({"bild_max_batch": 0}, "--bild-max-batch 0"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"max_len_a": float("inf")}, "--max-len-a inf"),
        ({"max_len_a": float("nan")}, "--max-len-a nan"),
        ({"min_len": 9, "max_len_b": 8}, "--min-len 9"),
        ({"bild_small_path": "small.pt", "bild_exit_layer": 1}, "--bild-small-path and --bild-exit-layer"),
        ({"bild_small_path": "nowhere/small.pt"}, "nowhere/small.pt"),
        ({"bild_small_path": os.pathsep.join([__file__, "nowhere.pt"])}, "nowhere.pt"),
        ({"bild_small_path": USER_DIR}, "folder"),
        ({"bild_small_path": __file__, "bild_small_overrides": "dropout"}, "--bild-small-overrides dropout"),
        ({"bild_small_path": __file__, "bild_small_overrides": "[1]"}, "--bild-small-overrides [1]"),
        ({"bild_small_path": __file__, "bild_small_overrides": "{1: 2}"}, "--bild-small-overrides {1: 2}"),
        ({"bild_small_overrides": "{'dropout': 0.1}"}, "--bild-small-path"),
        ({"bild_small_suffix": "-best"}, "--bild-small-suffix"),
        ({"bild_small_shard_count": 2}, "--bild-small-shard-count"),
        ({"bild_small_path": "small.pt", "bild_small_shard_count": 0}, "--bild-small-shard-count 0"),
        ({"bild_small_path": "nowhere.pt", "bild_small_suffix": "-best"}, "nowhere-best.pt"),
        ({"bild_draft_vocab": "nowhere.txt"}, "--bild-draft-vocab nowhere.txt: no such file"),
        ({"bild_draft_vocab": ""}, "--bild-draft-vocab"),
        ({"bild_stats": "nowhere/stats.json"}, "--bild-stats nowhere/stats.json"),
        ({"bild_stats": USER_DIR}, f"--bild-stats {USER_DIR}"),
        ({"bild_stats": ""}, "--bild-stats"),
        ({"bild_stats": f"{__file__}/stats.json"}, f"{__file__} is no folder"),
        ({"bild_stats": f"{__file__}/below/stats.json"}, f"--bild-stats {__file__}/below/stats.json"),
        ({"bild_stats": "stats\0.json"}, "--bild-stats"),
        ({"bild_stats": "s" * 300}, "--bild-stats"),
    ],
)
def test_values_out_of_range(chosen, named):
    assert named in message_of(check, config(**chosen))


@pytest.mark.parametrize(
    "chosen",
    [
        {"bild_fallback_threshold": 0.0, "bild_rollback_threshold": 0.0},
        {"bild_fallback_threshold": 1.0, "bild_rollback_threshold": float("inf"), "bild_max_draft": 1},
        {"min_len": 300, "max_len_a": 2.0},
        {"bild_exit_layer": 1, "bild_small_precision": "int8"},
    ],
)
def test_values_at_the_ends_of_the_ranges_are_accepted(chosen):
    check(config(**chosen))


FOR_BILD_ALONE = {
    "bild_small_path": __file__,
    "bild_small_overrides": "{'dropout': 0.1}",
    "bild_fallback_threshold": 0.0,
    "bild_rollback_threshold": 0.0,
    "bild_max_draft": 3,
    "bild_start": "small",
    "bild_verify_end": True,
    "bild_max_batch": 8,
    "bild_small_precision": "int8",
    "bild_draft_vocab": __file__,
}


@pytest.mark.parametrize("name", FOR_BILD_ALONE)
@pytest.mark.parametrize("generator", ["beam", "greedy"])
def test_flags_of_another_generator(name, generator):
    message = message_of(check, config(generator=generator, **{name: FOR_BILD_ALONE[name]}))
    assert "--" + name.replace("_", "-") in message and "--generator bild" in message


@pytest.mark.parametrize("name", ["bild_precision", "bild_small_precision"])
def test_half_precision_and_rounded_weights(name):
    chosen = config(bild_small_path=__file__, **{name: "int8"})
    check(chosen)
    assert "--fp16" in message_of(check, Namespace(**vars(chosen), fp16=True))


@pytest.mark.parametrize("chosen", [{"bild_exit_layer": 1}, {"bild_stats": "stats.json"}])
def test_flags_that_beam_search_would_ignore(chosen):
    (name,) = chosen
    assert "--" + name.replace("_", "-") in message_of(check, config(generator="beam", **chosen))
    check(config(generator="greedy", **chosen))


# Options that mean something for greedy decoding, and such that change nothing without another one.
HONOURED = {"beam", "max_len_a", "max_len_b", "min_len", "match_source_len", "unnormalized", "lenpen", "unkpen"}
HONOURED |= {"temperature", "no_repeat_ngram_size", "prefix_size", "score_reference", "sacrebleu", "print_step"}
HONOURED |= {"no_early_stop", "no_beamable_mm", "no_seed_provided", "lm_weight", "diverse_beam_strength", "_name"}


def another_value(default):
    if default is None:
        return "something"
    return not default if isinstance(default, bool) else default + 2


@pytest.mark.parametrize("generator", ["bild", "greedy"])
@pytest.mark.parametrize("name", [option.name for option in dataclasses.fields(GenerationConfig)])
def test_options_of_fairseq_are_honoured_or_refused(name, generator):
    """Each one that fairseq has, including those that later versions add."""
    if name.startswith("bild_") or name == "generator":
        return
    default = next(option.default for option in dataclasses.fields(GenerationConfig) if option.name == name)
    args = config(generator=generator, **{name: another_value(default)}) if name != "_name" else config()
    if name in HONOURED:
        check(args)
    else:
        assert "--" + name.replace("_", "-") in message_of(check, args)


@pytest.mark.parametrize(
    "flags",
    [
        ["--bild-fallback-threshold", "abc"],
        ["--bild-rollback-threshold", "high"],
        ["--bild-max-draft", "1.5"],
        ["--bild-exit-layer", "first"],
        ["--bild-start", "middle"],
        ["--bild-small-path"],
        ["--generator", "bld"],
    ],
    ids=" ".join,
)
def test_values_that_do_not_parse(flags, capsys):
    arguments = ["data", "--path", "large.pt", "--generator", "bild", *flags]
    with pytest.raises(SystemExit) as caught:
        options.parse_args_and_arch(options.get_generation_parser(), arguments)
    assert caught.value.code not in (0, None)
    message = capsys.readouterr().err
    assert message.startswith("bild_fairseq: ") and message.count("\n") == 1
    assert all(part in message for part in flags)


@pytest.fixture(scope="module")
def large(corpus):
    """The large model with its task, as the programs load them."""
    task = corpus.task()
    models, _ = checkpoint_utils.load_model_ensemble([str(corpus.large)], task=task)
    return task, models


def refusal(large, **chosen):
    task, models = large
    return message_of(task.build_generator, models, config(**chosen))


def test_no_small_model(large):
    message = refusal(large)
    assert "--bild-small-path" in message and "early-exit" in message


def test_exit_of_a_model_without_exits(large):
    for generator in ("bild", "greedy"):
        assert "--bild-exit-layer" in refusal(large, generator=generator, bild_exit_layer=1)


def test_exit_that_was_not_trained(corpus, tmp_path):
    arch = {"arch": "early_exit_transformer_tiny", "decoder_layers": 3, "exit_layers": "1"}
    path = corpus.checkpoint(tmp_path / "early_exit.pt", **arch)
    task = corpus.task()
    models, _ = checkpoint_utils.load_model_ensemble([str(path)], task=task)
    task.build_generator(models, config())
    for generator in ("bild", "greedy"):
        message = refusal((task, models), generator=generator, bild_exit_layer=2)
        assert "--bild-exit-layer 2" in message and "1" in message.partition("2")[2]


def small_of(corpus, path, **changes):
    """A small checkpoint that differs from the good one as told."""
    state = torch.load(corpus.small, weights_only=False)
    for name, value in changes.items():
        state["cfg"]["task"][name] = value
    return save(path, state)


def test_small_model_of_another_dictionary(corpus, large, tmp_path):
    """With another number of symbols, on either side, in a checkpoint or in the middle of an ensemble."""
    for side, symbol in (("x", "more"), ("y", "MORE")):
        for language in ("x", "y"):
            text = (corpus.data / f"dict.{language}.txt").read_text()
            (tmp_path / f"dict.{language}.txt").write_text(text + f"{symbol} 1\n" * (language == side))
        path = corpus.checkpoint(tmp_path / side / "small.pt", corpus.task(tmp_path))
        sizes = [len(large[0].source_dictionary), len(large[0].target_dictionary)]
        for given in (path, joined([corpus.small, path])):
            message = refusal(large, bild_small_path=str(given))
            assert str(path) in message and "dictionary" in message
            assert ("source" if side == "x" else "target") in message
            size = sizes[side == "y"]
            assert str(size) in message and str(size + 1) in message


def test_small_model_of_a_dictionary_of_the_same_size(corpus, large, tmp_path):
    """Seen where the dictionary that it was trained with lies beside it."""
    path = small_of(corpus, tmp_path / "small.pt")
    for language in ("x", "y"):
        same = (corpus.data / f"dict.{language}.txt").read_text()
        (tmp_path / f"dict.{language}.txt").write_text(same)
        large[0].build_generator(large[1], config(bild_small_path=str(path)))
        lines = same.splitlines()
        (tmp_path / f"dict.{language}.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
        message = refusal(large, bild_small_path=str(path))
        assert str(path) in message and f"dict.{language}.txt" in message
        (tmp_path / f"dict.{language}.txt").unlink()


def test_small_model_of_other_languages(corpus, large, tmp_path):
    for name, side in (("source_lang", "source"), ("target_lang", "target")):
        path = small_of(corpus, tmp_path / "small.pt", **{name: "z"})
        message = refusal(large, bild_small_path=str(path))
        assert str(path) in message and f"{side} language" in message and "z" in message


def large_of(corpus, path, data=None, **changes):
    """A checkpoint of the large model that differs from the good one as told, as fairseq's programs load it."""
    state = torch.load(corpus.large, weights_only=False)
    for name, value in {"data": str(data or corpus.data), **changes}.items():
        state["cfg"]["task"][name] = value
    task = corpus.task()
    return task, checkpoint_utils.load_model_ensemble([str(save(path, state))], task=task)[0]


@pytest.mark.parametrize("generator", ["greedy", "bild"])
def test_large_model_of_other_languages(corpus, tmp_path, generator):
    """Of the reverse direction, for instance; fairseq's own search takes it, as ever."""
    path = tmp_path / "large.pt"
    for name, side in (("source_lang", "source"), ("target_lang", "target")):
        loaded = large_of(corpus, path, **{name: "z"})
        small = {"bild_small_path": str(corpus.small)} if generator == "bild" else {}
        message = refusal(loaded, generator=generator, **small)
        assert str(path) in message and f"{side} language is z" in message
        loaded[0].build_generator(loaded[1], config(generator="beam"))
        # The same language by another name.
        overrides = {"source_lang": "x", "target_lang": "y"}
        renamed, _ = checkpoint_utils.load_model_ensemble([str(path)], overrides, task=loaded[0])
        loaded[0].build_generator(renamed, config(generator="greedy"))


def other_dictionaries(corpus, folder):
    """The corpus's dictionaries in a folder, that of the target with two words exchanged."""
    folder.mkdir(exist_ok=True)
    lines = (corpus.data / "dict.y.txt").read_text().splitlines()
    (folder / "dict.x.txt").write_text((corpus.data / "dict.x.txt").read_text())
    (folder / "dict.y.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    return folder


def test_large_model_of_a_dictionary_of_the_same_size(corpus, tmp_path, caplog):
    """Refused where the dictionary beside it is another one; a warning if only its training's data has another one."""
    loaded = large_of(corpus, tmp_path / "large.pt")
    caplog.set_level("WARNING", "bild_fairseq")
    loaded[0].build_generator(loaded[1], config(generator="greedy"))
    assert "dict.y.txt" not in caplog.text
    loaded = large_of(corpus, tmp_path / "large.pt", data=other_dictionaries(corpus, tmp_path / "other"))
    loaded[0].build_generator(loaded[1], config(generator="greedy"))
    assert caplog.text.count("WARNING") == 1
    assert "dict.y.txt" in caplog.text and str(tmp_path / "other") in caplog.text
    loaded = large_of(corpus, other_dictionaries(corpus, tmp_path / "beside") / "large.pt")
    message = refusal(loaded, generator="greedy")
    assert str(tmp_path / "beside" / "large.pt") in message and "dict.y.txt" in message


def language_model(corpus, folder):
    """The checkpoint of a language model over the target words, and its task."""
    (folder / "dict.txt").write_text((corpus.data / "dict.y.txt").read_text())
    task = tasks.setup_task(Namespace(task="language_modeling", data=str(folder)))
    return corpus.checkpoint(folder / "lm.pt", task, arch="transformer_lm", tokens_per_sample=20), task


def test_small_model_without_encoder(corpus, large, tmp_path):
    path, _ = language_model(corpus, tmp_path)
    message = refusal(large, bild_small_path=str(path))
    assert str(path) in message and "encoder" in message


def test_small_model_with_fewer_source_positions(corpus, large, tmp_path):
    """The option that the message proposes helps."""
    path = corpus.checkpoint(tmp_path / "small.pt", max_source_positions=12)
    message = refusal(large, bild_small_path=str(path))
    assert "small model" in message and "--max-source-positions 12" in message
    short = corpus.task(max_source_positions=12)
    models, _ = checkpoint_utils.load_model_ensemble([str(corpus.large)], task=short)
    short.build_generator(models, config(bild_small_path=str(path)))


def test_weights_that_do_not_fit_the_options(corpus, large, tmp_path):
    state = torch.load(corpus.small, weights_only=False)
    del state["model"]["decoder.layers.0.fc1.weight"]
    path = save(tmp_path / "small.pt", state)
    assert str(path) in refusal(large, bild_small_path=str(path))


UNSUPPORTED = {
    "--adaptive-softmax-cutoff": {"adaptive_softmax_cutoff": "6,9", "share_decoder_input_output_embed": False},
    "--cross-self-attention": {"cross_self_attention": True, "no_cross_attention": True},
    "--quant-noise-pq": {"quant_noise_pq": 0.1},
    "LSTMDecoder": {"arch": "lstm", "decoder_hidden_size": 32, "decoder_out_embed_dim": 32, "encoder_hidden_size": 32},
}


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_decoder_that_the_cached_decoder_cannot_run(corpus, large, tmp_path, option):
    """As the small model and as the large one."""
    path = corpus.checkpoint(tmp_path / "model.pt", **UNSUPPORTED[option])
    message = refusal(large, bild_small_path=str(path))
    assert "small model" in message and option in message
    task = corpus.task()
    models, _ = checkpoint_utils.load_model_ensemble([str(path)], task=task)
    message = refusal((task, models), generator="greedy")
    assert "large model" in message and option in message


def bart_task(corpus):
    task = corpus.task()
    args = Namespace(**{**vars(task.cfg), "langs": "x,y"})
    task = TranslationFromPretrainedBARTTask(args, task.source_dictionary, task.target_dictionary)
    task.args = args  # it reads its options from there, where fairseq's tasks no longer put them
    return task


def levenshtein_task(corpus):
    task = corpus.task()
    return TranslationLevenshteinTask(TranslationLevenshteinConfig(), task.source_dictionary, task.target_dictionary)


@pytest.mark.parametrize("make", [bart_task, levenshtein_task])
@pytest.mark.parametrize("generator", ["bild", "greedy"])
def test_tasks_that_build_their_own_generator(corpus, large, make, generator):
    """They must not ignore the flag."""
    small = {"bild_small_path": str(corpus.small)} if generator == "bild" else {}
    message = message_of(make(corpus).build_generator, large[1], config(generator=generator, **small))
    assert "--task translation_" in message and f"--generator {generator}" in message


def test_model_without_encoder_as_the_large_one(corpus, tmp_path):
    """A language model, in a task that translates nothing."""
    path, task = language_model(corpus, tmp_path)
    models, _ = checkpoint_utils.load_model_ensemble([str(path)], task=task)
    message_of(task.build_generator, models, config(generator="greedy"))


def damaged(corpus, folder, kind):
    path = folder / f"{kind}.pt"
    if kind == "text":
        path.write_text("This is no checkpoint.\n")
    elif kind == "truncated":
        path.write_bytes(corpus.small.read_bytes()[:-50])
    elif kind == "malicious":
        state = torch.load(corpus.small, weights_only=False)
        save(path, {**state, "extra_state": {"x": Touch(folder / "ran")}})
    return path


class Touch:
    """Creates a file when it is unpickled without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("role", ["large", "small"])
@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "malicious"])
def test_program_with_a_bad_checkpoint(corpus, tmp_path, role, kind):
    path = damaged(corpus, tmp_path, kind)
    named = ["--path", path] if role == "large" else ["--bild-small-path", path]
    run = corpus.generate(*corpus.bild(*named), status=None)
    assert str(path) in run.error()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--generator bild --bild-fallback-threshold abc", "--bild-fallback-threshold"),
        ("--generator bild --bild-rollback-threshold nan", "--bild-rollback-threshold"),
        ("--generator bild --constraints", "--constraints"),
        ("--generator greedy --replace-unk", "--replace-unk"),
        ("--generator greedy --sampling", "--sampling"),
        ("--generator greedy --lm-path lm.pt", "--lm-path"),
        ("--bild-max-draft 3", "--bild-max-draft"),
        ("--generator bild", "--bild-small-path"),
        ("--generator bild --bild-exit-layer 1", "--bild-exit-layer"),
        ("--generator greedy --bild-stats nowhere/stats.json", "--bild-stats"),
        ("--generator greedy --model-overrides dropout=0", "--model-overrides dropout=0"),
        ("--generator greedy --checkpoint-suffix=-shard7", "-shard7.pt: no such file"),
        ("--generator greedy --checkpoint-shard-count 2", "_part0.pt: no such file"),
        ("--generator greedy --checkpoint-shard-count 0", "--checkpoint-shard-count 0"),
    ],
)
def test_program_with_bad_flags(corpus, flags, named):
    assert named in corpus.generate(*flags.split(), status=None).error()


@pytest.mark.parametrize("which", ["large", "small", "dictionary", "text", "a link to the large one"])
def test_statistics_over_a_file_that_is_read(corpus, tmp_path, which):
    """Refused, and the file stays as it is."""
    files = {"large": tmp_path / "large.pt", "small": tmp_path / "small.pt"}
    files |= {"dictionary": tmp_path / "data" / "dict.x.txt", "text": tmp_path / "data" / "test.x-y.x.bin"}
    shutil.copytree(corpus.data, tmp_path / "data")
    for name in ("large", "small"):
        shutil.copy(getattr(corpus, name), files[name])
    copy = dataclasses.replace(corpus, data=tmp_path / "data", large=files["large"], small=files["small"])
    path = files.get(which, tmp_path / "link")
    if which not in files:
        path.symlink_to(files["large"])
    before = path.read_bytes()
    message = copy.generate(*copy.bild("--bild-stats", path), status=None).error()
    assert f"--bild-stats {path}" in message and "which is read" in message
    assert path.read_bytes() == before


@pytest.mark.parametrize(("flag", "language", "found"), [("-s", "y", "x"), ("-t", "x", "y"), ("-s", "z", "x")])
def test_one_language_that_fairseq_would_ignore(corpus, flag, language, found):
    """It takes the direction of the data's files unless both are given, whatever the one says."""
    arguments = [corpus.data, "--path", corpus.large, "--user-dir", USER_DIR, "--generator", "greedy"]
    message = corpus.programs("generate", *arguments, flag, language, status=None).error()
    assert f"{flag} {language} alone has no effect, and the data's files are of {found}" in message


def test_swapped_models_are_warned_of(corpus):
    """They decode, and well, but the summary calls the small one the large one."""
    swapped = dataclasses.replace(corpus, large=corpus.small, small=corpus.large)
    assert (
        "are --path and --bild-small-path swapped?" in swapped.generate(*swapped.bild("--max-source-positions", 40)).err
    )
    assert "swapped?" not in corpus.generate(*corpus.bild()).err


def test_no_data_folder(corpus, tmp_path):
    folder = tmp_path / "none"
    arguments = [folder, "--path", corpus.large, "--user-dir", USER_DIR, "--generator", "greedy"]
    message = corpus.programs("generate", *arguments, status=None).error()
    assert message.endswith(f"{folder}: no such folder; give one that fairseq-preprocess has made")


def test_one_language_where_the_folder_names_none(corpus, tmp_path):
    """As with dictionaries alone, which are enough for fairseq-interactive."""
    for language in ("x", "y"):
        shutil.copy(corpus.data / f"dict.{language}.txt", tmp_path)
    arguments = [tmp_path, "--path", corpus.large, "--user-dir", USER_DIR, "--generator", "greedy"]
    message = corpus.programs("interactive", *arguments, "-s", "x", status=None).error()
    assert message.endswith(f"{tmp_path}: its files do not name the languages; give both -s and -t")


def test_one_language_that_is_that_of_the_data(corpus):
    arguments = [corpus.data, "--path", corpus.large, "--user-dir", USER_DIR, "--generator", "greedy", "-t", "y"]
    assert len(corpus.programs("generate", *arguments, "--max-len-b", 12).texts()) == SENTENCES


def test_statistics_over_the_input(corpus, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text("a b\n")
    run = corpus.interactive(*corpus.bild("--bild-stats", lines, "--input", lines), status=None)
    assert "which is read" in run.error() and lines.read_text() == "a b\n"


def test_interactive_program(corpus, tmp_path):
    """Before it waits for input."""
    run = corpus.interactive("--generator", "bild", "--nbest", 2, text="a\n", status=None)
    assert "--nbest" in run.error()
    path = corpus.checkpoint(tmp_path / "small.pt", quant_noise_pq=0.1)
    run = corpus.interactive(*corpus.bild("--bild-small-path", path), text="a\n", status=None)
    assert "--quant-noise-pq" in run.error()


def test_program_without_a_path(corpus):
    arguments = [corpus.data, "--user-dir", USER_DIR, "--generator", "greedy"]
    assert "--path" in corpus.programs("generate", *arguments, status=None).error()


def test_minimum_length_above_the_positions_of_a_model(corpus):
    """A limit that the options alone do not tell."""
    run = corpus.generate("--generator", "greedy", "--min-len", 100, "--max-len-b", 200, status=None)
    assert "--min-len 100" in run.error()
