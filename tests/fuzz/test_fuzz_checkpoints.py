"""Checkpoints with changed bytes, changed contents and hostile pickles, in both roles.

Each is refused in one line that names the file, or decodes like stock fairseq. None runs code.
"""

import copy
import functools
import io
import os
import random
import subprocess
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import Corpus
from fairseq import checkpoint_utils
from fairseq.models import FairseqEncoderDecoderModel
from fairseq.sequence_generator import SequenceGenerator
from fuzzing import Fuzzer, assert_same_text, configured, refused

from bild_fairseq import BildGenerationConfig

NUMBERS = [-1, 0, 1, 2, 3, 7, 33, 10**6, 10**12, 2**63, 0.5, -0.5, 1e300, float("nan"), float("inf"), True, False]
WORDS = ["", "x", "0", "relu", "transformer", "transformer_tiny", "bart_base", "lstm", "../../etc", "a" * 200, "\n"]
OTHER = [None, [], {}, (), [1, "x"], {"a": None}, Namespace(), b"bytes", {1: 2}, 1j]


class Hostile:
    """Runs something when it is unpickled: it makes a folder, by which it is found out."""

    def __init__(self, dice: random.Random, canary: Path):
        code = f"__import__('os').mkdir({str(canary)!r})"
        ways = [(os.mkdir, (str(canary),)), (exec, (code,)), (eval, (code,)), (subprocess.call, (["mkdir", canary],))]
        ways.append((functools.partial(os.mkdir, str(canary)), ()))
        self._reduced = dice.choice(ways)

    def __reduce__(self) -> tuple:
        return self._reduced


def containers(value: Any) -> list[Any]:
    """All dictionaries, lists and namespaces inside a value, as dictionaries or lists that can be changed."""
    if isinstance(value, Namespace):
        value = vars(value)
    found = [value] if isinstance(value, (dict, list)) else []
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found += containers(inner)
    return found


def changed_numbers(dice: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and type with other numbers in it."""
    ways = [
        lambda: tensor * dice.choice([0.0, -1.0, 1.1, 1e3, 1e30, float("nan"), float("inf")]),
        lambda: tensor.flatten().flip(0).view(tensor.shape),
        lambda: torch.where(torch.arange(tensor.numel()).view(tensor.shape) == dice.randrange(99), torch.nan, tensor),
    ]
    return dice.choice(ways)()


def changed_tensor(dice: random.Random, tensor: torch.Tensor) -> Any:
    """Something else in a tensor's place."""
    ways = [
        lambda: tensor[:-1] if tensor.dim() else tensor,
        lambda: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor,
        lambda: tensor.flatten(),
        lambda: tensor.t() if tensor.dim() == 2 else tensor[None],
        lambda: tensor.to(dice.choice([torch.half, torch.bfloat16, torch.double, torch.int, torch.bool, torch.cfloat])),
        lambda: torch.empty(0),
        lambda: tensor.to_sparse() if tensor.layout == torch.strided else tensor,
        lambda: tensor.to("meta"),
        lambda: tensor.tolist(),
    ]
    return dice.choice(ways)()


def changed_value(dice: random.Random, value: Any) -> Any:
    """A value in place of another one, often of the same kind."""
    if isinstance(value, torch.Tensor) and dice.random() < 0.9:
        return changed_tensor(dice, value)
    if isinstance(value, (bool, int, float)) and dice.random() < 0.8:
        return dice.choice(NUMBERS)
    if isinstance(value, str) and dice.random() < 0.8:
        return dice.choice(WORDS)
    return dice.choice([*NUMBERS, *WORDS, *OTHER])


def change_weights(dice: random.Random, state: dict[str, Any]) -> None:
    """Another model of the same kind, mostly a sound one."""
    weights = state["model"]
    for name in dice.sample(list(weights), dice.choice([1, 2, 5])):
        if weights[name].is_floating_point():
            weights[name] = changed_numbers(dice, weights[name])


def change_contents(dice: random.Random, state: dict[str, Any], canary: Path) -> None:
    """Replaces, removes, renames and adds, mostly among the options of the model and its weights."""
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        options = containers(state["cfg"].get("model")) if isinstance(state.get("cfg"), dict) else []
        weights = state.get("model")
        inside = dice.choice([containers(state), options, [weights] if isinstance(weights, dict) else []])
        place = dice.choice([one for one in inside if one] or [state])
        keys = list(place) if isinstance(place, dict) else range(len(place))
        sizes = [key for key in keys if str(key).endswith(("_layers", "_dim", "_heads", "_positions"))]
        key = dice.choice(sizes if sizes and dice.random() < 0.5 else keys)
        what = dice.random()
        if what < 0.65:
            place[key] = changed_value(dice, place[key])
        elif what < 0.8:
            del place[key]
        elif what < 0.9 and isinstance(place, dict):
            place[dice.choice([*map(str, place), "new", 3])] = place.pop(key)
        else:
            hostile = Hostile(dice, canary)
            place[key] = np.array([hostile, 1], dtype=object) if dice.random() < 0.3 else hostile


def change_bytes(dice: random.Random, content: bytearray) -> None:
    """Overwrites, cuts, repeats and inserts."""
    for _ in range(dice.choice([1, 1, 2, 8, 64])):
        at, count = dice.randrange(len(content) or 1), dice.choice([1, 2, 16, 1000])
        way = dice.randrange(4)
        if way == 0:
            content[at : at + count] = dice.randbytes(len(content[at : at + count]))
        elif way == 1:
            del content[at : at + count if dice.random() < 0.8 else None]
        elif way == 2:
            content[at:at] = content[at : at + count]
        else:
            content[at:at] = dice.randbytes(count)


def change_member(dice: random.Random, content: bytes) -> bytes:
    """Changes a file inside the archive, mostly the pickle, so that the archive itself is sound."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as written:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        chosen = dice.choice(names if dice.random() < 0.2 else pickles)
        for name in names:
            data = bytearray(archive.read(name))
            if name == chosen:
                change_bytes(dice, data)
            written.writestr(name, bytes(data))
    return out.getvalue()


class Loading:
    """Makes a damaged checkpoint from a seed, loads it as the large or the small model, and decodes with it."""

    def __init__(self, corpus: Corpus, folder: Path):
        self.folder, (_, self.task) = folder, configured(corpus)
        exits = {"arch": "early_exit_transformer_tiny", "exit_layers": [1], "decoder_layers": 2}
        self.states = []
        for path in (corpus.small, corpus.large, corpus.checkpoint(folder / "exits.pt", **exits)):
            state = torch.load(path, weights_only=False)
            self.states.append({key: state[key] for key in ("cfg", "model", "extra_state", "optimizer_history")})
        self.large = self.load(corpus.large)
        dataset = self.task.dataset("test")
        self.sample = dataset.collater([dataset[i] for i in range(5)])
        self.wanted = self.stock(self.large)

    def load(self, path: Path) -> FairseqEncoderDecoderModel:
        return checkpoint_utils.load_model_ensemble_and_task([str(path)], task=self.task)[0][0].eval()

    def stock(self, model: FairseqEncoderDecoderModel) -> list[dict[str, Any]]:
        """The hypotheses of fairseq's own greedy search."""
        generator = SequenceGenerator([model], self.task.target_dictionary, beam_size=1, max_len_b=12)
        return [hypotheses[0] for hypotheses in generator.generate([model], self.sample)]

    def ours(self, model: FairseqEncoderDecoderModel, **options: Any) -> list[dict[str, Any]]:
        generator = self.task.build_generator([model], BildGenerationConfig(max_len_b=12, **options))
        return [hypotheses[0] for hypotheses in generator.generate([model], self.sample)]

    def write(self, dice: random.Random, path: Path, canary: Path) -> None:
        """The damaged checkpoint."""
        state = copy.deepcopy(dice.choice(self.states))
        way = dice.choice(["contents", "contents", "weights", "bytes", "member"])
        if way == "contents":
            change_contents(dice, state, canary)
        elif way == "weights":
            change_weights(dice, state)
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=way == "member" or dice.random() < 0.8)
        content = bytearray(buffer.getvalue())
        if way == "bytes":
            change_bytes(dice, content)
        elif way == "member":
            content = change_member(dice, bytes(content))
        path.write_bytes(content)

    def __call__(self, dice: random.Random) -> str:
        path, canary = self.folder / f"{dice.getrandbits(64)}.pt", self.folder / "canary"
        self.write(dice, path, canary)
        try:
            outcome = (self.as_large if dice.random() < 0.6 else self.as_small)(path)
            assert not canary.exists(), "the checkpoint has run code"
        finally:
            path.unlink()
        return outcome

    def as_large(self, path: Path) -> str:
        model, line = refused(lambda: self.load(path))
        if model is None:
            assert str(path) in line, line
            return "refused"
        found, line = refused(lambda: self.ours(model, generator="greedy"))
        if found is None:
            return "refused"
        try:
            wanted = self.stock(model)
        except Exception:
            return "stock fails"
        for ours, stock in zip(found, wanted, strict=True):
            if stock["positional_scores"].isfinite().all():
                assert_same_text(ours, stock)
        return "decoded"

    def as_small(self, path: Path) -> str:
        """Whatever the small model is, the text is the large model's."""
        lossless = {"bild_rollback_threshold": 0.0, "bild_verify_end": True}
        found, line = refused(lambda: self.ours(self.large, generator="bild", bild_small_path=str(path), **lossless))
        if found is None:
            assert str(path) in line or "small model" in line, line
            return "refused"
        for ours, stock in zip(found, self.wanted, strict=True):
            if ours["score"] > -torch.inf:  # otherwise the small model's logits are not numbers, and the log says so
                assert_same_text(ours, stock)
        return "decoded"


@pytest.fixture(scope="module")
def loading(corpus, tmp_path_factory) -> Loading:
    return Loading(corpus, tmp_path_factory.mktemp("fuzz"))


def test_checkpoints(loading: Loading, fuzzer: Fuzzer):
    outcomes = fuzzer(loading)
    assert min(outcomes["refused"], outcomes["decoded"]) > 0.05 * outcomes.total(), outcomes


def test_a_checkpoint_that_runs_code_is_found(loading: Loading, fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch):
    """Planted: checkpoints are opened as pickles of anything."""
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False}))
    with pytest.raises(AssertionError, match=r"^seed \d+ .*the checkpoint has run code"):
        fuzzer(loading)


def test_an_error_that_nobody_explains_is_found(loading: Loading, fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch):
    """Planted: errors of reading reach the user as they are."""
    read = checkpoint_utils.load_checkpoint_to_cpu
    monkeypatch.setattr(checkpoint_utils, "load_checkpoint_to_cpu", read.__wrapped__)
    with pytest.raises(AssertionError, match=r"^seed \d+ "):
        fuzzer(loading)
