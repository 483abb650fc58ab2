"""Loading checkpoints: what fairseq writes opens under torch's safe unpickler, what could run code does not."""

import os
import pickle
import subprocess
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from bild_fairseq.errors import BildError
from bild_fairseq.plugin.checkpoints import load_small

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


BROKEN = [text, html, nothing, truncated, half, other_zip, number, sequence, tensor, weights_alone, pickled]


@pytest.mark.parametrize("write", BROKEN, ids=lambda write: write.__name__)
def test_files_that_are_no_checkpoints_are_explained_in_one_line(task, tmp_path, write):
    """As the small model and, as fairseq's programs load it, as the large one; without advice to load unsafely."""
    path = tmp_path / "model.pt"
    write(path)
    like = task.build_model(Namespace(arch="transformer_tiny", **SIZE))
    for load in (
        lambda: load_small([str(path)], task, like),
        lambda: checkpoint_utils.load_model_ensemble([str(path)], task=task),
    ):
        with pytest.raises(BildError) as caught:
            load()
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        assert "weights_only" not in message and "arbitrary code" not in message


def test_configuration_objects_are_refused(task, tmp_path):
    """They are data in the end, but reading them takes classes that are not on the list."""
    path, state = tmp_path / "model.pt", state_of(task, "cfg")
    state["more"] = OmegaConf.create({"a": 1})
    torch.save(state, path)
    with pytest.raises(BildError, match="omegaconf"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
