"""Loading checkpoints: what fairseq writes opens under torch's safe unpickler, what could run code does not."""

import copy
import os
import pickle
import shutil
import subprocess
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from cli_support import assert_same_hypotheses, save
from fairseq import checkpoint_utils, tasks
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from bild_fairseq.errors import BildError
from bild_fairseq.plugin.checkpoints import Loading, load_large, load_small
from bild_fairseq.plugin.light import last_epochs, write_light

SIZE = {
    "encoder_layers": 1,
    "encoder_embed_dim": 8,
    "encoder_ffn_embed_dim": 8,
    "encoder_attention_heads": 2,
    "decoder_layers": 1,
    "decoder_embed_dim": 8,
    "decoder_ffn_embed_dim": 8,
    "decoder_attention_heads": 2,
}


@pytest.fixture
def task(tmp_path):
    """A translation task over ten words."""
    symbols = Dictionary()
    for number in range(10):
        symbols.add_symbol(f"w{number}")
    for language in ("x", "y"):
        symbols.save(str(tmp_path / f"dict.{language}.txt"))
    return tasks.setup_task(Namespace(task="translation", data=str(tmp_path), source_lang="x", target_lang="y"))


def state_of(task, kind):
    """What fairseq-train saves: options as a namespace (up to 0.9) or as a configuration with a namespace in it."""
    model = Namespace(arch="transformer_tiny", _name="transformer_tiny", **SIZE)
    options = {"args": None, "cfg": None}
    if kind == "args":
        command = {"task": "translation", "data": task.cfg.data, "source_lang": "x", "target_lang": "y"}
        options["args"] = Namespace(criterion="cross_entropy", **command, **vars(model))
    else:
        translation = {"_name": "translation", "data": task.cfg.data, "source_lang": "x", "target_lang": "y"}
        options["cfg"] = {"model": model, "task": translation}
    return {
        **options,
        "model": task.build_model(model).state_dict(),
        "optimizer_history": [
            {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": np.float64(4.5)},
                "num_updates": np.int64(7),
            }
        ],
        "task_state": {},
        "extra_state": {
            "best": np.float64(31.25),
            "val_loss": np.float32(2.5),
            "metrics": [("default", [(np.int64(1), "loss", "AverageMeter", {"val": np.float64(3), "round": 3})])],
            "train_iterator": {"epoch": 2, "iterations_in_epoch": 0, "shuffle": True},
        },
        "last_optimizer_state": {"state": {0: {"step": 7, "exp_avg": torch.ones(2)}}, "param_groups": []},
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
@pytest.mark.parametrize("kind", ["args", "cfg"])
def test_checkpoints_of_every_age_load(task, tmp_path, kind, zipped):
    """With NumPy scalars where fairseq-train has them, in torch's formats before and since 1.6."""
    path, state = tmp_path / "model.pt", state_of(task, kind)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    loaded = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert loaded["extra_state"] == state["extra_state"]
    (model,) = load_small([str(path)], task, task.build_model(Namespace(arch="transformer_tiny", **SIZE)))
    assert not model.training
    # Encoder layers of fairseq 0.12.2 have parameters that they fill as they are loaded.
    for name, weight in model.decoder.named_parameters():
        assert torch.equal(weight, state["model"][f"decoder.{name}"]), name


def test_numpy_scalars_of_another_numpy_load(task, tmp_path):
    """NumPy 2 renamed a module whose name the checkpoints of NumPy 1 hold, and the other way round."""
    path, state = tmp_path / "model.pt", state_of(task, "args")
    torch.save(state, path, _use_new_zipfile_serialization=False)
    here, there = b"numpy.core.multiarray\n", b"numpy._core.multiarray\n"
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        here, there = there, here
    content = path.read_bytes()
    assert here in content
    path.write_bytes(content.replace(here, there))
    loaded = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert loaded["extra_state"] == state["extra_state"]


def arrays():
    """What the meters of a training with --eval-bleu hold, and other numbers."""
    return {
        "counts": np.array([5, 4, 3, 2]),
        "matrix": np.array([[1.5, 2.0], [3.0, -0.25]], order="F"),
        "other byte order": np.array([1, 2, 3], dtype=">i4"),
        "booleans": np.array([True, False]),
        "complex": np.array([1 + 2j]),
        "no dimension": np.array(7.0),
        "nothing": np.zeros((0, 3), dtype=np.float16),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
def test_arrays_of_numbers_load(task, tmp_path, zipped):
    """With their type, and so that what is saved of them is an ordinary array to everyone."""
    path, state = tmp_path / "model.pt", state_of(task, "cfg")
    state["extra_state"]["metrics"] = arrays()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    loaded = checkpoint_utils.load_checkpoint_to_cpu(str(path))["extra_state"]["metrics"]
    torch.save(loaded, path)
    saved = torch.load(path, weights_only=False)
    for name, wanted in arrays().items():
        for found in (loaded[name], saved[name]):
            assert found.dtype.newbyteorder("=") == wanted.dtype.newbyteorder("="), name
            assert np.array_equal(found, wanted), name
        assert type(saved[name]) is np.ndarray


class Reduced:
    """Pickled as the call of a function with arguments, and a state that is set afterwards."""

    def __init__(self, function, arguments, state):
        self.parts = function, arguments, state

    def __reduce__(self):
        return self.parts


def crafted(shape, kind, data):
    """An array as NumPy pickles it, with a state that NumPy would not write."""
    function, arguments, _ = np.zeros(1).__reduce__()
    return Reduced(function, arguments, (1, shape, kind, False, data))


HOSTILE_ARRAYS = {
    "objects": lambda: np.array([None, "text"], dtype=object),
    "text": lambda: np.array(["text"]),
    "records": lambda: np.zeros(2, dtype=[("a", "i4"), ("b", "f4")]),
    "objects without their type's state": lambda: crafted((1,), Reduced(np.dtype, ("O8", False, True), None), [None]),
    "a type in a string": lambda: crafted((1,), "O", [None]),
    "a negative size": lambda: crafted((-1, -1), np.dtype("f8"), b"8 bytes."),
    "too large a size": lambda: crafted((1 << 40,), np.dtype("f8"), b"8 bytes."),
    "no bytes": lambda: crafted((1,), np.dtype("f8"), [1.0]),
}


@pytest.mark.parametrize("make", HOSTILE_ARRAYS.values(), ids=HOSTILE_ARRAYS)
def test_arrays_of_anything_else_are_refused(task, tmp_path, make):
    path = tmp_path / "model.pt"
    torch.save({**state_of(task, "cfg"), "more": make()}, path)
    with pytest.raises(BildError, match="not opened|damaged") as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["args", "cfg"])
def test_a_model_with_its_options_alone_loads(task, tmp_path, kind):
    """Stripped by hand of all that inference does not need."""
    path, state = tmp_path / "model.pt", state_of(task, kind)
    torch.save({name: state[name] for name in ("model", kind)}, path)
    (large,) = load_large([str(path)], task)
    (small,) = load_small([str(path)], task, large)
    for model in (large, small):
        for name, parameter in model.decoder.named_parameters():
            assert torch.equal(parameter, state["model"][f"decoder.{name}"]), name


class Payload:
    """Unpickled without care, it calls a function of its choice."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "eval"), (subprocess.Popen, "Popen"), (getattr, "getattr")],
    ids=["system", "eval", "Popen", "getattr"],
)
@pytest.mark.parametrize("place", ["args", "extra_state", "model"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
def test_code_is_refused_by_name_and_does_not_run(task, tmp_path, function, name, place, zipped):
    marker = tmp_path / "ran"
    arguments = {
        "system": [f"touch {marker}"],
        "eval": [f"open({str(marker)!r}, 'w').close()"],
        "Popen": [["touch", str(marker)]],
        "getattr": [marker, "touch"],
    }
    path, state = tmp_path / "model.pt", state_of(task, "args")
    payload = Payload(function, *arguments[name])
    state[place] = payload if place == "args" else {**state[place], "more": payload}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BildError) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    message = str(caught.value)
    assert str(path) in message and name in message
    assert "\n" not in message
    assert not marker.exists()


def test_classes_are_refused_too(task, tmp_path):
    """Not only functions: an instance of any class that fairseq does not put there."""
    path = tmp_path / "model.pt"
    torch.save({**state_of(task, "args"), "more": Dictionary()}, path)
    with pytest.raises(BildError, match=r"fairseq\.data\.dictionary\.Dictionary"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def text(path):
    path.write_text("This is no checkpoint.\n")


def html(path):
    path.write_text("<!DOCTYPE html>\n<html>404</html>\n")


def nothing(path):
    path.write_bytes(b"")


def truncated(path):
    torch.save({"model": {"weight": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-100])


def half(path):
    torch.save({"model": {"weight": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


def number(path):
    torch.save(3, path)


def sequence(path):
    torch.save([1, 2], path)


def tensor(path):
    torch.save(torch.ones(3), path)


def weights_alone(path):
    torch.save({"encoder.embed_tokens.weight": torch.ones(3, 2)}, path)


def pickled(path):
    path.write_bytes(pickle.dumps({"model": {}}))


def folder(path):
    path.mkdir()


def pipe(path):
    os.mkfifo(path)


def missing(path):
    """No file at all."""


BROKEN = [text, html, nothing, truncated, half, other_zip, number, sequence, tensor, weights_alone, pickled]
BROKEN += [folder, pipe, missing]


def messages(task, path, like):
    """What is said of a checkpoint as the large model, as fairseq's programs load it, and as the small one."""
    said = []
    for load in (
        lambda: checkpoint_utils.load_model_ensemble([str(path)], task=task),
        lambda: load_small([str(path)], task, like),
    ):
        with pytest.raises(BildError) as caught:
            load()
        said.append(str(caught.value))
        assert "\n" not in said[-1]
        assert said[-1].count(str(path)) == 1 and said[-1].startswith(f"{path}: ")
        assert "weights_only" not in said[-1] and "arbitrary code" not in said[-1]
        assert "[Errno" not in said[-1] and "torch.Size" not in said[-1]
    return said


@pytest.mark.parametrize("write", BROKEN, ids=lambda write: write.__name__)
def test_files_that_are_no_checkpoints_are_explained_in_one_line(task, tmp_path, write):
    """The same one for both models; without advice to load unsafely."""
    path = tmp_path / "model.pt"
    write(path)
    large, small = messages(task, path, task.build_model(Namespace(arch="transformer_tiny", **SIZE)))
    assert large == small
    words = {folder: "folder", pipe: "pipe", missing: "no such file", sequence: "no checkpoint at all"}.get(write)
    assert words is None or words in large


def option(name, value):
    return lambda state: vars(state["cfg"]["model"]).update({name: value})


def weight(name, value):
    return lambda state: state["model"].update({name: value})


WRONG = {
    "a weight is missing": (lambda state: state["model"].pop("decoder.layers.0.fc1.weight"), "fc1.weight is missing"),
    "a weight too many": (weight("decoder.more", torch.ones(1)), "decoder.more"),
    "an embedding of one dimension": (weight("decoder.embed_tokens.weight", torch.ones(14)), "embed_tokens"),
    "an embedding of none": (weight("encoder.embed_tokens.weight", torch.tensor(1.0)), "embed_tokens"),
    "fewer symbols": (weight("encoder.embed_tokens.weight", torch.ones(9, 8)), "another source dictionary"),
    "a sparse weight": (weight("decoder.layers.0.fc1.weight", torch.eye(8).to_sparse()), "fc1.weight"),
    "more layers": (option("decoder_layers", 3), "decoder.layers.1"),
    "fewer layers": (option("decoder_layers", 0), "decoder.layers.0"),
    "heads that do not divide": (option("decoder_attention_heads", 3), "num_heads"),
    "no heads": (option("decoder_attention_heads", 0), "options"),
    "layers in words": (option("decoder_layers", "many"), "options"),
    "another width": (option("decoder_ffn_embed_dim", 12), "fc1"),
    "a huge width": (option("decoder_ffn_embed_dim", 10**12), "decoder_ffn_embed_dim 1000000000000"),
    "a wide model": (option("decoder_embed_dim", 10**6), "decoder_embed_dim 1000000"),
    "huge positions": (option("max_source_positions", 10**11), "max_source_positions"),
    "a million layers": (option("encoder_layers", 10**6), "encoder_layers 1000000"),
    "another architecture": (option("_name", "lstm"), "options"),
    "an unknown architecture": (option("_name", "transformer_of_tomorrow"), "transformer_of_tomorrow"),
    "an unknown activation": (option("activation_fn", "step"), "step"),
    "weights in a list": (lambda state: state.update(model=[torch.ones(2)]), "no model"),
    "no weights": (lambda state: state.update(model=None), "no model"),
    "weights of numbers": (lambda state: state.update(model={"a": 1}), "no model"),
    "no options": (lambda state: state.update(cfg=None), "no options"),
    "options in a list": (lambda state: state.update(cfg=[1]), "no options"),
    "options of no model": (lambda state: state.update(cfg={"task": {}}), "no options"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_models_that_cannot_be_built_are_explained_in_one_line(task, tmp_path, change, words):
    """The same one for both models; sizes without bounds are noticed before anything is allocated."""
    path, state = tmp_path / "model.pt", copy.deepcopy(state_of(task, "cfg"))
    change(state)
    torch.save(state, path)
    large, small = messages(task, path, task.build_model(Namespace(arch="transformer_tiny", **SIZE)))
    assert large == small
    assert words in large


def test_files_that_may_not_be_read(task, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch.save(state_of(task, "cfg"), path)
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)  # root may read everything
    large, small = messages(task, path, task.build_model(Namespace(arch="transformer_tiny", **SIZE)))
    assert large == small and "Permission denied" in large


def test_one_member_of_an_ensemble_is_named(task, tmp_path):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save(state_of(task, "cfg"), good)
    bad.write_text("This is no checkpoint.\n")
    with pytest.raises(BildError) as caught:
        checkpoint_utils.load_model_ensemble([str(good), str(bad)], task=task)
    assert str(bad) in str(caught.value) and str(good) not in str(caught.value)


def test_configuration_objects_are_refused(task, tmp_path):
    """They are data in the end, but reading them takes classes that are not on the list."""
    path, state = tmp_path / "model.pt", state_of(task, "cfg")
    state["more"] = OmegaConf.create({"a": 1})
    torch.save(state, path)
    with pytest.raises(BildError, match="omegaconf"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def trained(task, folder, epochs):
    """The checkpoints of a training, each with other weights; the oldest first."""
    paths = []
    for epoch in range(1, epochs + 1):
        state = state_of(task, "cfg")
        state["extra_state"]["train_iterator"]["epoch"] = epoch
        state["cfg"]["task"].update(data="/home/someone/data-bin")
        state["cfg"]["model"].save_dir = "/home/someone/models"
        state["model"]["decoder.output_projection.weight"] = state["model"]["decoder.embed_tokens.weight"]
        paths.append(folder / f"checkpoint{epoch}.pt")
        torch.save(state, paths[-1])
    return paths


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_light_checkpoints(task, tmp_path, half, count):
    """The mean of the last epochs; without an optimizer, without folders, tied weights once; fairseq loads it."""
    paths, out = trained(task, tmp_path, 4)[-count:], tmp_path / "more" / "light.pt"
    assert last_epochs(tmp_path, count) == paths[::-1]
    write_light(paths[::-1], out, half)
    states = [torch.load(path, weights_only=False)["model"] for path in paths]
    light = torch.load(out, weights_only=False)
    for name, found in light["model"].items():
        if name.endswith("_float_tensor"):
            continue  # fairseq fills it with whatever lies in memory
        wanted = torch.stack([state[name].float() for state in states]).mean(0)
        torch.testing.assert_close(found, wanted.half() if half else wanted.to(states[0][name].dtype))
    embedding, projection = (light["model"][f"decoder.{name}.weight"] for name in ("embed_tokens", "output_projection"))
    assert embedding.data_ptr() == projection.data_ptr()
    assert "someone" not in repr({name: value for name, value in light.items() if name != "model"})
    assert out.stat().st_size < paths[0].stat().st_size
    assert [path.name for path in out.parent.iterdir()] == ["light.pt"]
    (model,) = load_large([str(out)], task)
    assert torch.equal(model.decoder.embed_tokens.weight, embedding.float())


def test_a_light_checkpoint_of_different_models(task, tmp_path):
    one, other = trained(task, tmp_path, 2)
    state = torch.load(other, weights_only=False)
    state["model"].pop("decoder.layers.0.fc1.bias")
    torch.save(state, other)
    with pytest.raises(BildError, match=str(other)):
        write_light([one, other], tmp_path / "light.pt")
    assert not list(tmp_path.glob("light*"))


def test_names_of_shards_and_suffixes(corpus, tmp_path):
    """Found as stock fairseq finds them; the small model's may be a shard's as well."""
    wanted = corpus.generate(*corpus.bild()).fields("H")
    for name, model in (("large-shard0", corpus.large), ("large-best", corpus.large), ("small-shard0", corpus.small)):
        shutil.copy(model, tmp_path / f"{name}.pt")
    large, small = tmp_path / "large.pt", tmp_path / "small.pt"
    sharded = corpus.generate(*corpus.bild("--path", large, "--bild-small-path", small))
    assert sharded.fields("H") == wanted
    (tmp_path / "large-shard0.pt").unlink()
    suffixed = ["--path", large, "--checkpoint-suffix=-best"]
    assert corpus.generate(*corpus.bild(*suffixed)).fields("H") == wanted
    assert corpus.stock(*suffixed).texts() == corpus.stock().texts()


def test_the_small_model_has_suffix_and_shards_of_the_large_one(corpus, tmp_path):
    """If there are such files, and unless its own flags say otherwise."""
    wanted = corpus.generate(*corpus.bild()).fields("H")
    for name, model in (("large", corpus.large), ("small", corpus.small)):
        shutil.copy(model, tmp_path / f"{name}-best.pt")
        for shard in range(2):
            shutil.copy(model, tmp_path / f"{name}-x-shard{shard}.pt")
    paths = ["--path", tmp_path / "large.pt", "--bild-small-path", tmp_path / "small.pt"]
    suffix, shards = "--checkpoint-suffix=-best", ["--checkpoint-suffix=-x", "--checkpoint-shard-count", 2]
    own = ["--bild-small-path", corpus.small, "--bild-small-suffix", "", "--bild-small-shard-count", 1]
    plain = ["--bild-small-path", corpus.small]
    (tmp_path / "small.pt").write_text("This is no checkpoint.")
    for options in ([suffix], shards, [suffix, *own], [*shards, *plain]):
        assert corpus.generate(*corpus.bild(*paths, *options)).fields("H") == wanted, options


def halves(task, tmp_path):
    """A model's state, and the names of two files that have half of the weights each."""
    state = state_of(task, "cfg")
    names = sorted(state["model"])
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, part in enumerate(parts):
        weights = {name: state["model"][name] for name in part}
        torch.save({**state, "model": weights}, tmp_path / f"model-shard{shard}.pt")
    return state


def test_shards_that_nothing_joins_are_refused(task, tmp_path):
    """Of such shards fairseq takes the last one and leaves all other weights at random."""
    halves(task, tmp_path)
    like = task.build_model(Namespace(arch="transformer_tiny", **SIZE))
    path, said = str(tmp_path / "model.pt"), []
    for load in (
        lambda: checkpoint_utils.load_model_ensemble([path], task=task, strict=False, num_shards=2),
        lambda: load_small([path], task, like, Loading(shards=2)),
    ):
        with pytest.raises(BildError, match="is missing") as caught:
            load()
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_shards_that_fairseq_joins(task, tmp_path, monkeypatch):
    """As it joins those of the large model; what joins them, fairscale, is stood in for."""
    state = halves(task, tmp_path)
    for shard in range(2):
        path = tmp_path / f"model-shard{shard}.pt"
        torch.save({**torch.load(path, weights_only=False), "fsdp_metadata": {"shard": shard}}, path)
    like = task.build_model(Namespace(arch="transformer_tiny", **SIZE))
    path = str(tmp_path / "model.pt")
    with pytest.raises(BildError, match="needs a package that is not there"):
        load_small([path], task, like, Loading(shards=2))

    class Joining:
        @staticmethod
        def consolidate_shard_weights(shard_weights, shard_metadata):
            assert [one["shard"] for one in shard_metadata] == [0, 1]
            return {name: weight for part in shard_weights for name, weight in part.items()}

    monkeypatch.setattr(checkpoint_utils, "FSDP", Joining)
    monkeypatch.setattr(checkpoint_utils, "has_FSDP", True)
    (small,) = load_small([path], task, like, Loading(shards=2))
    for name, weight in small.decoder.named_parameters():
        assert torch.equal(weight, state["model"][f"decoder.{name}"]), name
    state["cfg"]["task"]["source_lang"] = "z"
    for shard in range(2):
        path = tmp_path / f"model-shard{shard}.pt"
        torch.save({**torch.load(path, weights_only=False), "cfg": state["cfg"]}, path)
    with pytest.raises(BildError, match="source language is z"):
        load_small([str(tmp_path / "model.pt")], task, like, Loading(shards=2))


# The small model writes alone, so that what it says shows.
SMALL_ALONE = ["--bild-start", "small", "--bild-fallback-threshold", 0, "--bild-rollback-threshold", "inf"]


def test_options_that_replace_those_of_the_small_model(corpus, tmp_path):
    """Equal to a checkpoint that holds them; the large model's own overrides leave the small model as it is."""
    alone = corpus.bild(*SMALL_ALONE, "--bild-max-draft", 1000)
    plain = corpus.generate(*alone).fields("H")
    state = torch.load(corpus.small, weights_only=False)
    state["cfg"]["model"].no_scale_embedding = True
    other = save(tmp_path / "other.pt", state)
    wanted = corpus.generate(*alone, "--bild-small-path", other).fields("H")
    overrides = "{'no_scale_embedding': True}"
    assert corpus.generate(*alone, "--bild-small-overrides", overrides).fields("H") == wanted != plain
    assert corpus.generate(*alone, "--model-overrides", overrides).fields("H") == plain


# Stock fairseq 0.12.2 fails on padded batches with today's PyTorch.
UNPADDED = ("--batch-size", 1)


def test_models_of_bart_with_a_row_for_the_mask(corpus, tmp_path):
    """Pre-trained models have one, a translation task's dictionary has none; fairseq drops the row."""
    masked = corpus.task()
    size = {"share_all_embeddings": False, "share_decoder_input_output_embed": True}
    for dictionary in (masked.source_dictionary, masked.target_dictionary):
        dictionary.add_symbol("<mask>")
    paths = [
        corpus.checkpoint(tmp_path / f"{name}.pt", masked, arch="bart_base", dropout=0.0, **size)
        for name in ("large", "small")
    ]
    wanted = corpus.stock("--path", paths[0], *UNPADDED)
    run = corpus.generate(*corpus.lossless("--path", paths[0], "--bild-small-path", paths[1]))
    assert_same_hypotheses(run, wanted)


@pytest.mark.parametrize("tokens", [[], ["--decoder-langtok"]], ids=["plain", "symbols that the task adds"])
def test_models_of_several_language_pairs(corpus, tmp_path, tokens):
    """Their weights lie below the pair's name; the dictionaries beside them lack the symbols of the task."""
    given = {"lang_pairs": "x-y,y-x", "encoder_langtok": None, "decoder_langtok": bool(tokens)}
    options = {"source_lang": "x", "target_lang": "y", "left_pad_source": "True", "left_pad_target": "False"}
    task = tasks.setup_task(Namespace(task="multilingual_translation", data=str(corpus.data), **given, **options))
    task.model_lang_pairs = task.lang_pairs = ["x-y", "y-x"]
    paths = []
    for name in ("large", "small"):
        torch.manual_seed(len(paths))
        paths.append(
            corpus.checkpoint(tmp_path / f"{name}.pt", task, **given, arch="multilingual_transformer", dropout=0.0)
        )
    for language in ("x", "y"):
        shutil.copy(corpus.data / f"dict.{language}.txt", tmp_path)
    several = ["--task", "multilingual_translation", "--lang-pairs", "x-y,y-x", *tokens, "--path", paths[0]]
    wanted = corpus.stock(*several, *UNPADDED)
    run = corpus.generate(*corpus.lossless(*several, "--bild-small-path", paths[1]))
    assert_same_hypotheses(run, wanted)
