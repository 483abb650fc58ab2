"""Early-exit architectures: full depth is fairseq's model, an exit is its truncated model."""

import copy
from argparse import Namespace
from types import SimpleNamespace

import pytest
import support
import torch
from fairseq import options
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_INV_REGISTRY
from fairseq.models.transformer import TransformerDecoderBase
from fairseq.sequence_generator import SequenceGenerator
from hypothesis import given
from hypothesis import strategies as st

import bild_fairseq
from bild_fairseq.models import exit_model
from bild_fairseq.models.exits import parse_exit_layers

PRE_NORM = {"encoder_normalize_before": True, "decoder_normalize_before": True}
OWN = {"exit_share_output_projection": False}
VARIANTS = {
    "post-norm": ("transformer", {}),
    "pre-norm": ("transformer", PRE_NORM),
    "pre-norm, own projections": ("transformer", {**PRE_NORM, **OWN}),
    "own projections, tied embeddings": ("transformer", {"share_all_embeddings": True, **OWN}),
    "no final norm": ("transformer", {**PRE_NORM, "no_decoder_final_norm": True}),
    "output dimension": ("transformer", {**PRE_NORM, **OWN, "decoder_output_dim": 8}),
    "learned positions": ("transformer", {"decoder_learned_pos": True}),
    "own layers": ("transformer", {"exit_own_layers": 1}),
    "pre-norm, own layers": ("transformer", {**PRE_NORM, **OWN, "exit_own_layers": 2}),
    "BART": ("bart_base", {}),
    "BART, own projections": ("bart_base", OWN),
    "BART, own layers": ("bart_base", {"exit_own_layers": 1}),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(arch, **chosen):
    return support.model(3, arch, **{"decoder_layers": 3, "task": "translation", **chosen})


def early_exit(variant, exit_layers="1,2", **chosen):
    arch, variant_options = VARIANTS[variant]
    return build(f"early_exit_{arch}", exit_layers=exit_layers, **{**variant_options, **chosen})


def plain(variant, **chosen):
    """The stock model of a variant; it takes no notice of the exits' options."""
    arch, variant_options = VARIANTS[variant]
    return build(arch, **{**variant_options, **chosen})


def batch():
    """Two sentences: sources padded on the left, targets of different lengths padded right."""
    inputs = support.sample([support.source([3, 1, 4, 1]), support.source([5, 9])])["net_input"]
    previous = torch.full((2, 6), support.symbols().pad())
    previous[0] = torch.tensor([support.symbols().eos(), *support.source([2, 6, 5, 3, 5])[:-1]])
    previous[1, :4] = torch.tensor([support.symbols().eos(), *support.source([8, 9, 7])[:-1]])
    return {**inputs, "prev_output_tokens": previous}


@pytest.mark.parametrize("stock_model", ["transformer", "bart"])
def test_every_stock_architecture_has_an_early_exit_one_of_the_same_size(stock_model):
    stock = ARCH_MODEL_INV_REGISTRY[stock_model]
    ours = ARCH_MODEL_INV_REGISTRY[f"early_exit_{stock_model}"]
    assert ours == [f"early_exit_{arch}" for arch in stock]
    for arch in stock:
        wanted, got = Namespace(), Namespace()
        ARCH_CONFIG_REGISTRY[arch](wanted)
        ARCH_CONFIG_REGISTRY[f"early_exit_{arch}"](got)
        exits = {key: vars(got).pop(key) for key in list(vars(got)) if key.startswith("exit_")}
        assert got == wanted
        assert exits == {
            "exit_layers": [1],
            "exit_share_output_projection": True,
            "exit_own_layers": 0,
            "exit_freeze_model": False,
        }


@each_variant
def test_full_depth_is_the_stock_model(variant):
    stock, ours = plain(variant), early_exit(variant)
    ours.load_state_dict(stock.state_dict(), strict=True)
    inputs = batch()
    with torch.no_grad():
        wanted, got = stock(**inputs)[0], ours(**inputs)[0]
    assert torch.equal(got, wanted)


@each_variant
@pytest.mark.parametrize("half", [False, True])
def test_stock_beam_search_sees_the_stock_model(variant, half):
    stock, ours = plain(variant), early_exit(variant)
    ours.load_state_dict(stock.state_dict(), strict=True)
    inputs = batch()
    cfg = SimpleNamespace(generation=SimpleNamespace(beam=2, print_alignment=False))
    hypotheses = []
    for model in (stock, ours):
        model = model.half() if half else model
        model.prepare_for_inference_(cfg)
        generator = SequenceGenerator([model], support.symbols(), beam_size=2, max_len_b=8)
        found = generator.generate([model], {"net_input": inputs})
        hypotheses.append([(h["tokens"].tolist(), h["score"].item()) for s in found for h in s])
    assert hypotheses[0] == hypotheses[1]


@each_variant
@pytest.mark.parametrize("exit_layer", [1, 2])
def test_exit_is_a_stock_model_with_fewer_layers(variant, exit_layer):
    """Both ways to an exit's scores equal a stock model built and loaded with that many layers."""
    model = early_exit(variant)
    inputs = batch()
    own_layers = VARIANTS[variant][1].get("exit_own_layers", 0)
    reference = plain(
        variant,
        decoder_layers=exit_layer + own_layers,
        share_all_embeddings=False,
        share_decoder_input_output_embed=False,
    )
    weights = model.state_dict()
    for own, exit_own in (
        ("layer_norm", "exit_layer_norms"),
        ("output_projection", "exit_output_projections"),
    ):
        for parameter in ("weight", "bias"):
            name = f"decoder.{exit_own}.{exit_layer}.{parameter}"
            if name in weights:
                weights[f"decoder.{own}.{parameter}"] = weights[name]
    for number in range(own_layers):
        prefix = f"decoder.exit_own_layers.{exit_layer}.{number}."
        for name in [name for name in weights if name.startswith(prefix)]:
            weights[f"decoder.layers.{exit_layer + number}.{name.removeprefix(prefix)}"] = weights[name]
    wanted_names = reference.state_dict().keys()
    reference.load_state_dict({n: w for n, w in weights.items() if n in wanted_names})

    small = exit_model(model, exit_layer)
    with torch.no_grad():
        wanted = reference(**inputs)[0]  # (batch, time, vocab)
        heads = model(**inputs, return_exit_logits=True)[1]["exit_logits"]
        encoder_out = small.encoder(inputs["src_tokens"], inputs["src_lengths"])
        truncated = small.decoder(inputs["prev_output_tokens"], encoder_out=encoder_out)[0]
    assert list(heads) == [1, 2]
    torch.testing.assert_close(heads[exit_layer], wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(truncated, wanted, rtol=0, atol=1e-5)


@each_variant
def test_exit_model_is_stock_and_shares_everything(variant):
    model = early_exit(variant)
    small = exit_model(model, 2)
    assert type(small.decoder) is TransformerDecoderBase
    assert small.encoder is model.encoder
    assert small.max_positions() == model.max_positions()
    assert not small.training and not small.decoder.training
    assert small.decoder.num_layers == small.cfg.decoder.layers == len(small.decoder.layers)
    assert small.decoder.num_layers == 2 + VARIANTS[variant][1].get("exit_own_layers", 0)
    assert model.decoder.num_layers == model.cfg.decoder.layers == 3
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in owned for parameter in small.parameters())
    for name, module in model.decoder.named_children():
        replaced = ("layers", "layer_norm", "output_projection")
        if name not in replaced and not name.startswith("exit_"):
            assert getattr(small.decoder, name) is module


def test_exit_model_names_the_exits_there_are():
    with pytest.raises(ValueError, match=r"no exit at layer 3; its exits: 1, 2$"):
        exit_model(early_exit("post-norm"), 3)
    with pytest.raises(ValueError, match=r"no exits \(TransformerModel\)"):
        exit_model(plain("post-norm"), 1)


def test_exits_cost_nothing_unless_asked_for(monkeypatch):
    model = early_exit("pre-norm")
    monkeypatch.setattr(model.decoder, "exit_logits", None)
    assert "exit_logits" not in model(**batch())[1]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"exit_layers": "3"}, r"--exit-layers 3: with --decoder-layers 3 the highest exit is 2"),
        ({"exit_layers": "0,1"}, r"--exit-layers 0,1: give decoder layers counted from 1"),
        ({"exit_layers": "2,1"}, r"--exit-layers 2,1: .* ascending"),
        ({"exit_layers": "1,1"}, r"--exit-layers 1,1: .* ascending"),
        ({"exit_layers": "one"}, r"--exit-layers one: "),
        ({"exit_layers": ""}, r"--exit-layers : "),
        ({"decoder_layers": 1}, r"--decoder-layers 1 leaves no layer"),
        ({"decoder_layerdrop": 0.1}, r"--decoder-layerdrop"),
        ({"adaptive_softmax_cutoff": "5"}, r"--adaptive-softmax-cutoff"),
        ({"base_layers": 1}, r"--base-layers"),
        ({"exit_own_layers": -1}, r"--exit-own-layers -1: give a number of layers"),
        ({"exit_freeze_model": True}, r"--exit-freeze-model leaves nothing to train"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(chosen, message):
    with pytest.raises(ValueError, match=message) as caught:
        early_exit("post-norm", **{"exit_layers": "1", **chosen})
    assert "\n" not in str(caught.value)


@given(st.lists(st.integers(1, 40), min_size=1, unique=True).map(sorted))
def test_exit_layers_read_the_same_however_they_are_written(layers):
    assert parse_exit_layers(",".join(map(str, layers))) == layers
    assert parse_exit_layers(layers) == layers
    assert parse_exit_layers(layers[0]) == layers[:1]


def command_line(*exit_options):
    user_dir = bild_fairseq.__path__[0]
    arguments = ["data", "--user-dir", user_dir, "--arch", "early_exit_transformer_tiny"]
    return options.parse_args_and_arch(options.get_training_parser(), [*arguments, *exit_options])


def test_command_line_options(monkeypatch):
    # fairseq looks for --user-dir in sys.argv, which here belongs to the test runner.
    monkeypatch.setattr("sys.argv", ["fairseq-train"])
    default = command_line()
    assert (default.exit_layers, default.exit_share_output_projection) == ([1], True)
    assert default.exit_freeze_model is False
    chosen = command_line("--exit-layers", "1,2", "--no-exit-share-output-projection", "--exit-freeze-model")
    assert (chosen.exit_layers, chosen.exit_share_output_projection) == ([1, 2], False)
    assert chosen.exit_freeze_model is True
    with pytest.raises(ValueError, match="--exit-layers 2,1: give decoder layers"):
        command_line("--exit-layers", "2,1")


@pytest.mark.parametrize("variant", ["pre-norm", "own projections, tied embeddings", "own layers"])
def test_frozen_model_trains_its_exits_only_and_drops_nothing_out(variant):
    model = early_exit(variant, exit_freeze_model=True, dropout=0.5).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("decoder.exit_")}
    inputs = batch()
    logits, extra = model(**inputs, return_exit_logits=True)
    assert not logits.requires_grad
    assert all(scores.requires_grad for scores in extra["exit_logits"].values())
    assert torch.equal(logits, model(**inputs)[0])


@each_variant
def test_plain_checkpoint_gives_the_exits_its_own_head(variant):
    stock, model = plain(variant), early_exit(variant)
    model.load_state_dict(stock.state_dict(), strict=True)
    decoder = model.decoder
    for layer in (1, 2):
        norm, projection = decoder.exit_layer_norm(layer), decoder.exit_output_projection(layer)
        assert torch.equal(projection.weight, stock.decoder.output_projection.weight)
        assert (norm is None) == (stock.decoder.layer_norm is None)
        if norm is not None:
            assert torch.equal(norm.weight, stock.decoder.layer_norm.weight)
            assert torch.equal(norm.bias, stock.decoder.layer_norm.bias)
        for number, own in enumerate(decoder.own_layers(layer)):
            if layer + number < len(stock.decoder.layers):
                above = stock.decoder.layers[layer + number].state_dict()
                assert all(torch.equal(weight, above[name]) for name, weight in own.state_dict().items())
    storages = [p.data_ptr() for p in decoder.exit_parameters()]
    assert len(set(storages)) == len(storages)


def test_exits_of_an_early_exit_checkpoint_are_kept():
    trained = early_exit("pre-norm, own projections")
    model = early_exit("pre-norm, own projections")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.load_state_dict(copy.deepcopy(trained.state_dict()), strict=True)
    for name, weight in trained.named_parameters():
        assert torch.equal(model.state_dict()[name], weight), name


def test_bart_checkpoint_with_a_mask_symbol_loads_without_it():
    """fairseq cuts the pre-training symbol <mask>; the exits start from what is left."""
    pretrained = plain("BART").state_dict()
    kept = pretrained["decoder.output_projection.weight"]
    for name, weight in pretrained.items():
        if name.endswith(("embed_tokens.weight", "output_projection.weight")):
            pretrained[name] = torch.cat([weight, torch.ones(1, weight.size(1))])
    ours = early_exit("BART, own projections")
    ours.load_state_dict(pretrained, strict=True)
    assert torch.equal(ours.decoder.exit_output_projections["1"].weight, kept)
