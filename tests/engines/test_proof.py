"""The proof that an engine computes what its model does, made once for each model."""

import copy
import dataclasses
import random
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerDecoderBase
from fairseq.modules import LayerDropModuleList
from reference import Rules
from support import PRE_NORM, generator, model, task
from torch import nn

from bild_fairseq.engines import choose
from bild_fairseq.engines.base import Engine
from bild_fairseq.engines.native import NativeEngine
from bild_fairseq.engines.native.build import library
from bild_fairseq.engines.precision import PRECISIONS
from bild_fairseq.engines.proof import prove
from bild_fairseq.engines.supported import unsupported_model
from bild_fairseq.engines.torch.engine import TorchEngine
from bild_fairseq.errors import BildError

KINDS = {"torch": TorchEngine} | ({"native": NativeEngine} if library() else {})
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def early_exit(**options) -> nn.Module:
    """Exits at layers 1 and 2 of 3, each with a projection and a norm of its own."""
    options = {"exit_layers": "1,2", "decoder_layers": 3, "exit_share_output_projection": False, **PRE_NORM, **options}
    return model(5, "early_exit_transformer", **options)


def take(made: nn.Module) -> None:
    generator([made], [], Rules(), alone=True)


# ---- what gets past the check of modules


def scale_attention(made: nn.Module) -> None:
    """A scale that only token-by-token attention looks at, so that a pass over a whole sentence differs from it."""
    made.decoder.layers[1].self_attn.scaling *= 2


def scale_source_attention(made: nn.Module) -> None:
    made.decoder.layers[1].encoder_attn.scaling *= 2


def share_layers(made: nn.Module) -> None:
    """One layer twice: as fairseq generates, both keep their keys in the same place."""
    made.decoder.layers = nn.ModuleList([made.decoder.layers[0]] * 2)


class Scaled(TransformerDecoderBase):
    """Adds to what the stock method sees, without a method of its own."""

    @property
    def output_projection(self) -> Callable:
        return lambda x: self._modules["output_projection"](x) / 2


def scale_output(made: nn.Module) -> None:
    made.decoder.__class__ = Scaled


DISGUISED = [scale_attention, scale_source_attention, share_layers, scale_output]


@pytest.mark.parametrize("change", DISGUISED, ids=lambda change: change.__name__)
def test_catches_what_the_check_of_modules_does_not(change):
    """As a large and as a small model, in one line that names it."""
    made = model(0)
    change(made)
    assert unsupported_model(made) is None
    for role, large, small, more in (("large", made, [], {"alone": True}), ("small", model(1), [made], {})):
        with pytest.raises(BildError, match=rf"the {role} model \(TransformerModel\)") as caught:
            generator([large], small, Rules(), **more)
        assert "\n" not in str(caught.value)


def test_a_remembered_engine_is_not_that_of_a_changed_model():
    """Settings count beside weights: a new engine is made, or the model is refused."""
    made = model(0)
    before = choose.engine_for(made, "float32", "large")
    made.decoder.embed_scale *= 2
    after = choose.engine_for(made, "float32", "large")
    assert after is not before
    assert choose.engine_for(made, "float32", "large") is after
    scale_attention(made)
    with pytest.raises(BildError, match="cannot be decoded exactly"):
        choose.engine_for(made, "float32", "large")


def test_a_hook_of_all_modules_is_caught():
    made = model(0)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda part, given, out: out * 2 if isinstance(part, nn.Linear) else out
    )
    try:
        with pytest.raises(BildError, match="cannot be decoded exactly"):
            take(made)
    finally:
        handle.remove()
    take(made)


class Failing(nn.Module):
    """An encoder that needs more than tokens."""

    def max_positions(self) -> int:
        return 100

    def forward_torchscript(self, net_input: dict) -> dict:
        raise KeyError("speaker\nand more lines")


def test_a_model_that_fails_is_refused_in_one_line():
    made = model(0)
    made.encoder = Failing()
    with pytest.raises(BildError, match=r"the large model \(TransformerModel\) cannot be decoded: KeyError") as caught:
        take(made)
    assert "\n" not in str(caught.value)


# ---- early exit


@kinds
@pytest.mark.parametrize("exit_layer", [1, 2])
@pytest.mark.parametrize("part", ["exit_layer_norms", "exit_output_projections"])
@torch.no_grad()
def test_a_wrong_exit_is_named(kind, exit_layer, part):
    """An engine whose head of one exit is not the model's."""
    made = early_exit()
    engine = kind(copy.deepcopy(made))
    prove(engine, made, "float32", "large")
    getattr(made.decoder, part)[str(exit_layer)].weight.mul_(1.01)
    with pytest.raises(BildError, match=f"at exit layer {exit_layer}$"):
        prove(engine, made, "float32", "large")


def test_an_exit_that_computes_its_logits_in_its_own_way_is_named():
    made = early_exit()
    stock = type(made.decoder)
    made.decoder.__class__ = type("Own", (stock,), {"exit_logits": lambda *args: stock.exit_logits(*args) / 2})
    with pytest.raises(BildError, match="at exit layer 1$"):
        take(made)


@kinds
@pytest.mark.parametrize("exit_layer", [1, 2])
def test_a_wrong_resumed_pass_is_named(kind, exit_layer):
    """An engine that goes on from an exit with something else than the hidden states of the layers below."""
    made = early_exit()
    engine = kind(made)
    run = engine.run

    def resumed_one_position_off(state, step):
        if step.layers[0] == exit_layer:
            tokens = [row[:1] * len(row) for row in step.tokens]
            step = dataclasses.replace(step, starts=[max(0, start - 1) for start in step.starts], tokens=tokens)
        return run(state, step)

    engine.run = resumed_one_position_off
    with pytest.raises(BildError, match=f"above exit layer {exit_layer}$"):
        prove(engine, made, "float32", "large")


@kinds
def test_hidden_states_that_are_not_kept_are_missed(kind):
    """The layers above find nothing, or what an earlier pass left: wrong, whichever it is."""
    made = early_exit()
    engine = kind(made)
    run, passes = engine.run, []

    def forgetful(state, step):
        passes.append(step)
        return run(state, dataclasses.replace(step, keep=step.keep and step.starts[0] == 0))

    engine.run = forgetful
    with pytest.raises((BildError, IndexError, RuntimeError)):
        prove(engine, made, "float32", "large")
    assert any(step.keep for step in passes)


# ---- precisions


@kinds
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounded_weights_are_proved_against_rounded_weights(kind, precision):
    """Every precision passes, and none for another one: rounding is no excuse."""
    made = early_exit()
    engine = kind(made, precision)
    prove(engine, made, precision, "large")
    for other in set(PRECISIONS) - {precision}:
        with pytest.raises(BildError, match="cannot be decoded exactly"):
            prove(engine, made, other, "large")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("change", [None, scale_attention, scale_output], ids=["fine", "attention", "output"])
def test_models_in_other_precisions(dtype, change):
    """Half precision rounds more, which is not refused; a model that computes something else is."""
    made = early_exit(encoder_layers=3).to(dtype)
    if change is None:
        take(made)
        return
    made = model(0).to(dtype)
    change(made)
    with pytest.raises(BildError, match="cannot be decoded"):
        take(made)


@pytest.mark.parametrize("layers", [1, 12])
def test_rounding_alone_is_not_refused(layers):
    """Deep models, with weights as they are when training starts and with large ones."""
    for scale in (0.05, 1, 3):
        made = model(3, encoder_layers=layers, decoder_layers=layers, **PRE_NORM)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(scale)
        take(made)


# ---- what it must bear, and what it must leave alone


@pytest.mark.parametrize("positions", [1, 2, 3, 5])
@kinds
def test_few_positions(kind, positions):
    learned = {"decoder_learned_pos": True, "encoder_learned_pos": True}
    made = model(1, max_source_positions=positions, max_target_positions=positions, **learned)
    prove(kind(made), made, "float32", "large")


@pytest.mark.parametrize("words", [0, 1, 2])
def test_few_words(words, monkeypatch):
    """Dictionaries with hardly a word, and one that has grown since the model was made."""
    few = Dictionary()
    for word in range(words):
        few.add_symbol(f"w{word}")
    monkeypatch.setattr(task(), "src_dict", few)
    monkeypatch.setattr(task(), "tgt_dict", few)
    made = model(1)
    few.add_symbol("new")
    few.add_symbol("newer")
    take(made)


@pytest.mark.parametrize("where", ["encoder.embed_tokens", "decoder.embed_tokens", "decoder.layers.1.fc1"])
@pytest.mark.parametrize("row", [1, 5, slice(None)], ids=["padding", "word", "all"])
@kinds
@torch.no_grad()
def test_weights_that_are_no_numbers_prove_nothing(kind, where, row):
    made = model(1)
    made.get_submodule(where).weight[row] = torch.nan
    prove(kind(made), made, "float32", "large")


def test_leaves_model_and_random_numbers_alone():
    """Modes, gradients, weights, and every generator of random numbers, which layer dropping draws from."""
    made = early_exit()
    made.encoder.layers = LayerDropModuleList(0.5, made.encoder.layers)
    made.requires_grad_(False)
    for parameter in made.decoder.parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.ones_like(parameter)
    weights = copy.deepcopy(made.state_dict())
    before = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    take(made)
    assert before == [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    assert all(not module.training for module in made.modules())
    assert not any(parameter.requires_grad for parameter in made.encoder.parameters())
    assert all(parameter.requires_grad for parameter in made.decoder.parameters())
    assert all(bool((parameter.grad == 1).all()) for parameter in made.decoder.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in made.state_dict().items())


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[nn.Module, str]]]:
    """The models and precisions that have been proved so far; grows in place."""
    made: list[tuple[nn.Module, str]] = []

    def counted(engine: Engine, proved: nn.Module, precision: str, role: str) -> None:
        made.append((proved, precision))
        prove(engine, proved, precision, role)

    monkeypatch.setattr(choose, "prove", counted)
    yield made


def test_once_a_model_and_not_once_a_generator(proofs):
    """And once more for another precision, int8 in float32 first, or after the weights have changed."""
    large, small = model(1), model(2)
    for _ in range(3):
        generator([large], [small], Rules())
        generator([small], [large], Rules())
        take(large)
    assert proofs == [(large, "float32"), (small, "float32")]
    generator([large], [small], Rules(), small_precision="int8")
    assert proofs[2:] == [(small, "float32"), (small, "int8")]
    with torch.no_grad():
        large.decoder.layers[0].fc1.bias[0] += 1
    generator([large], [small], Rules())
    assert proofs[4:] == [(large, "float32")]


@kinds
def test_takes_less_than_a_twentieth_of_a_second(kind):
    """For a model of a small model's size: of six layers and 2.6 million weights."""
    options = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SMALL_SIZE.items()}
    made = model(1, **options)
    engine = kind(made)
    prove(engine, made, "float32", "large")
    times = []
    for _ in range(5):
        begin = time.process_time()
        prove(engine, made, "float32", "large")
        times.append(time.process_time() - begin)
    assert min(times) < 0.05


SMALL_SIZE = {"embed_dim": 192, "ffn_embed_dim": 768, "layers": 3, "attention_heads": 4}
