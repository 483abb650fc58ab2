"""Models whose text is not what their weights say: refused if the decoder is one, run as it is if the encoder is."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fairseq.modules import LayerDropModuleList, MultiheadAttention
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.sequence_generator import SequenceGenerator
from reference import Rules
from support import assert_same_hypothesis, generator, model, sample, source, symbols
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from bild_fairseq.errors import BildError

RULES = Rules(max_len=12)
SENTENCES = [source(words) for words in ([3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], [8, 9, 7, 9])]


def with_method(made: nn.Module, name: str) -> None:
    """Gives a module a class of its own, which computes one method twice as large."""
    stock = getattr(type(made), name)
    made.__class__ = type("Custom", (type(made),), {name: doubled(stock)})


def doubled(function: Callable) -> Callable:
    @functools.wraps(function)
    def own(*args, **kwargs):
        return twice(function(*args, **kwargs))

    return own


def twice(result):
    """Twice a tensor; of several things, the first one that is there."""
    if isinstance(result, Tensor):
        return result * 2 if result.is_floating_point() else result
    if isinstance(result, tuple):
        return (twice(result[0]), *result[1:])
    return result


class Double(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Backwards(nn.ModuleList):
    """Layers from the last to the first."""

    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def layer(made: nn.Module) -> nn.Module:
    return made.decoder.layers[1]


def replace_first_projection(made: nn.Module) -> None:
    layer(made).fc1 = nn.Sequential(layer(made).fc1, nn.Tanh())


def reverse_layers(made: nn.Module) -> None:
    made.decoder.layers = Backwards(made.decoder.layers)


def put_in_place(module: nn.Module, name: str) -> None:
    """Computes a method twice as large in one object, whose class stays the stock one."""
    setattr(module, name, doubled(getattr(module, name)))


def put_callable_in_place(module: nn.Module, name: str) -> None:
    """The same as a callable that is no function."""
    setattr(module, name, functools.partial(doubled(getattr(module, name))))


def checkpoint_another_pass(made: nn.Module) -> None:
    """Looks like a layer that ``--checkpoint-activations`` wraps."""
    put_in_place(layer(made), "forward")
    checkpoint_wrapper(layer(made))


def other_heads(made: nn.Module) -> None:
    layer(made).self_attn = MultiheadAttention(16, 4, self_attention=True)


def no_source_in_one_layer(made: nn.Module) -> None:
    layer(made).encoder_attn = layer(made).encoder_attn_layer_norm = None


METHODS = ("forward", "extract_features", "extract_features_scriptable", "output_layer", "get_normalized_probs")
METHODS += ("get_normalized_probs_scriptable",)
CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    **{
        f"decoder class's {name}": (lambda made, name=name: with_method(made.decoder, name), f"computes {name}")
        for name in METHODS
    },
    **{
        f"decoder's {name}": (lambda made, name=name: put_in_place(made.decoder, name), f"computes {name}")
        for name in METHODS
    },
    **{
        f"model{kind} {name}": (lambda made, name=name, change=change: change(made, name), f"computes {name}")
        for name in METHODS[-2:]
        for kind, change in (("'s", put_in_place), (" class's", with_method), ("'s callable", put_callable_in_place))
    },
    "embedding's class": (lambda made: with_method(made.decoder.embed_tokens, "forward"), "type Custom"),
    "positions' class": (lambda made: with_method(made.decoder.embed_positions, "forward"), "type Custom"),
    "output projection's class": (lambda made: with_method(made.decoder.output_projection, "forward"), "type Custom"),
    "layer norm's class": (lambda made: with_method(layer(made).final_layer_norm, "forward"), "type Custom"),
    "layer's class": (lambda made: with_method(layer(made), "forward"), "Custom computes forward"),
    "attention's class": (lambda made: with_method(layer(made).self_attn, "forward"), "Custom computes forward"),
    "dropout's class": (lambda made: with_method(layer(made).dropout_module, "forward"), "Custom computes forward"),
    "list's class": (reverse_layers, "type Backwards"),
    "output projection's method": (lambda made: put_in_place(made.decoder.output_projection, "forward"), "forward"),
    "norm's method": (lambda made: put_callable_in_place(layer(made).final_layer_norm, "forward"), "forward"),
    "layer's callable": (lambda made: put_callable_in_place(layer(made), "forward"), "computes forward"),
    "checkpointed": (checkpoint_another_pass, "computes forward"),
    "hook": (lambda made: layer(made).fc2.register_forward_hook(lambda part, given, out: out * 2), "hook"),
    "hook before": (lambda made: layer(made).register_forward_pre_hook(lambda part, given: None), "hook"),
    "parametrized": (lambda made: parametrize.register_parametrization(layer(made).fc1, "weight", Double()), "fc1"),
    "weight norm": (lambda made: nn.utils.weight_norm(layer(made).fc1), "hook"),
    "spectral norm": (lambda made: nn.utils.spectral_norm(layer(made).self_attn.q_proj), "hook"),
    "pruned": (lambda made: prune.l1_unstructured(layer(made).fc1, "weight", 0.5), "hook"),
    "replaced module": (replace_first_projection, "type Sequential"),
    "embedding's norm": (lambda made: setattr(made.decoder.embed_tokens, "max_norm", 0.1), "maximum norm"),
    "other heads": (other_heads, "layers differ"),
    "no attention to the source": (no_source_in_one_layer, "layers differ"),
}


def refusals(made: nn.Module) -> list[str]:
    """What generators say of a model as large and as small one, in one line each; empty where they take it."""
    reasons = []
    for large, small, more in (([made], [], {"alone": True}), ([model(100)], [made], {})):
        try:
            generator(large, small, RULES, **more)
        except BildError as error:
            assert "\n" not in str(error)
            reasons.append(str(error))
    return reasons


@pytest.mark.parametrize("change", CHANGES)
def test_a_decoder_that_computes_something_else_is_refused(change):
    """By its modules, as a large and as a small model, and no less after a generator took it as it was before."""
    made = model(0)
    assert not refusals(made)
    apply, named = CHANGES[change]
    apply(made)
    large, small = refusals(made)
    assert named in large and "large" in large
    assert named in small and "small" in small


def test_a_name_is_no_proof_of_what_it_names():
    """An activation that calls itself relu, and is none, runs as it is."""

    def relu(x: Tensor) -> Tensor:
        return F.relu(x) + 1

    made = model(0)
    for part in (*made.decoder.layers, *made.encoder.layers):
        part.activation_fn = relu
    assert_like_stock(made)


def subclass_without_methods(made: nn.Module) -> None:
    """What a user's architecture looks like that only builds its modules in another way."""
    for part in (made.encoder, made.decoder, made.decoder.layers[0], made.decoder.layers[0].self_attn):
        part.__class__ = type("Custom", (type(part),), {"build_self_attention": lambda self: None})


def checkpointed(made: nn.Module) -> None:
    for part in (*made.decoder.layers, *made.encoder.layers):
        checkpoint_wrapper(part)


def layer_drop(made: nn.Module) -> None:
    for part in (made.encoder, made.decoder):
        part.layers = LayerDropModuleList(0.9, part.layers)


def encoder_method(made: nn.Module) -> None:
    """Twice what the stock encoder gives."""
    stock = made.encoder.forward

    def forward(*args, **kwargs):
        out = stock(*args, **kwargs)
        return {**out, "encoder_out": [x * 2 for x in out["encoder_out"]]}

    made.encoder.forward = forward


def other_positions(made: nn.Module) -> None:
    """A table that is none of sines."""
    for part in (made.encoder, made.decoder):
        part.embed_positions.weights = torch.randn_like(part.embed_positions.weights)


FINE = {
    "other positions": other_positions,
    "subclass without methods": subclass_without_methods,
    "checkpointed": checkpointed,
    "layer drop": layer_drop,
    "encoder's method": encoder_method,
    "encoder's hook": lambda made: made.encoder.layers[0].fc2.register_forward_hook(lambda part, given, out: out * 2),
    "encoder's embedding": lambda made: with_method(made.encoder.embed_tokens, "forward"),
    "encoder's positions": lambda made: with_method(made.encoder.embed_positions, "forward"),
    "encoder's parametrization": lambda made: parametrize.register_parametrization(
        made.encoder.layers[0].fc1, "weight", Double()
    ),
    "encoder's module": lambda made: setattr(made.encoder.layers[0], "final_layer_norm", nn.Identity()),
}


@pytest.mark.parametrize("change", FINE)
def test_what_computes_the_same_or_runs_as_it_is(change):
    made = model(0)
    FINE[change](made)
    assert_like_stock(made)


def assert_like_stock(made: nn.Module) -> None:
    """Greedy text and scores are stock fairseq's."""
    stock = SequenceGenerator([made], symbols(), beam_size=1, max_len_b=RULES.max_len)
    wanted = [one for (one, *_) in stock.generate([made], sample(SENTENCES))]
    found = generator([made], [], RULES, alone=True).generate([], sample(SENTENCES))
    for (one,), other in zip(found, wanted, strict=True):
        assert_same_hypothesis(one, other)
