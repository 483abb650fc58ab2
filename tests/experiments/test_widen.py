"""Widened and deepened checkpoints: the same predictions from larger, dense weights, in every kind of model."""

import resource
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import support
import torch
from fairseq import checkpoint_utils
from fairseq.models import build_model
from fairseq.sequence_generator import SequenceGenerator

from bild_fairseq.errors import BildError
from bild_fairseq.experiments.widen import widen, widen_file

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "widen.py"

PRE_NORM = support.PRE_NORM
TIED = {"share_all_embeddings": True}
LEARNED = {"encoder_learned_pos": True, "decoder_learned_pos": True}
NORMFORMER = {"scale_attn": True, "scale_heads": True, "scale_fc": True, "scale_resids": True}
EXIT = {"arch": "early_exit_transformer", "decoder_layers": 3, "exit_layers": [1, 2]}
KINDS = {
    "post-norm": {},
    "post-norm, tied": TIED,
    "post-norm, output projection tied": {"share_decoder_input_output_embed": True},
    "pre-norm": PRE_NORM,
    "pre-norm, tied": {**PRE_NORM, **TIED, "no_scale_embedding": True},
    "no final norm, tied": {**PRE_NORM, **TIED, "no_decoder_final_norm": True},
    "learned positions": {**LEARNED, "layernorm_embedding": True},
    "no positions": {"no_token_positional_embeddings": True},
    "learned positions on one side": {"decoder_learned_pos": True, "max_source_positions": 60},
    "sides of two widths": {"encoder_embed_dim": 24, "encoder_attention_heads": 3, "decoder_output_dim": 12},
    "cross+self-attention": {"cross_self_attention": True, "no_cross_attention": True},
    "NormFormer": {**PRE_NORM, **NORMFORMER},
    "exits": {**EXIT, **PRE_NORM},
    "exits, tied": {**EXIT, **PRE_NORM, **TIED},
    "exits with projections, tied": {**EXIT, **PRE_NORM, **TIED, "exit_share_output_projection": False},
    "post-norm exits, tied": {**EXIT, **TIED},
    "post-norm exits with projections, tied": {**EXIT, **TIED, "exit_share_output_projection": False},
    "exits with layers, tied": {**EXIT, **PRE_NORM, **TIED, "exit_own_layers": 1},
    "post-norm exits with layers": {**EXIT, "exit_own_layers": 2},
    "BART": {"arch": "bart_base"},
    "mBART with exits": {"arch": "early_exit_mbart_base", **PRE_NORM, "exit_layers": [1]},
}


def checkpoint(**options):
    """A random model with these options, and what fairseq-train would have saved of it."""
    arch = options.pop("arch", "transformer")
    made = support.model(5, arch, **options)
    args = Namespace(arch=arch, _name=arch, **{**support.SIZE, **options})
    return made, {"args": args, "cfg": None, "model": made.state_dict()}


def load(state):
    """The model of a checkpoint, built by fairseq."""
    made = build_model(state["args"], support.task())
    made.load_state_dict(state["model"], strict=True)
    return made.eval()


def predictions(model):
    """Logits after every target token of a batch, of the model and of each of its exits."""
    batch = support.sample([support.source(words) for words in ([1, 5, 2], [7, 3, 9, 4, 11, 2, 8])])
    targets = torch.tensor([[2, 6, 9, 14, 5, 5, 17], [2, 20, 4, 8, 1, 1, 1]])
    exits = {"return_exit_logits": True} if hasattr(model.decoder, "exit_layers") else {}
    with torch.no_grad():
        logits, extra = model(**batch["net_input"], prev_output_tokens=targets, **exits)
    every = torch.stack([logits, *extra.get("exit_logits", {}).values()])
    return every[:, targets.ne(1)]


def assert_same_predictions(wide, narrow):
    got, wanted = predictions(wide), predictions(narrow)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_same_predictions(kind, times):
    narrow, state = checkpoint(**KINDS[kind])
    wide = load(widen(state, times))
    assert_same_predictions(wide, narrow)
    assert wide.max_positions() == narrow.max_positions()
    assert wide.encoder.embed_tokens.embedding_dim == times * narrow.encoder.embed_tokens.embedding_dim


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_larger_and_dense(kind):
    """A matrix between units is 9 times as large, the rest 3 times, with no more zeros than before."""
    narrow, state = checkpoint(**KINDS[kind])
    wide = dict(load(widen(state, 3)).named_parameters())
    for name, weight in narrow.named_parameters():
        if name not in wide:  # copies that fairseq 0.12.2 makes
            continue
        units = weight.dim() == 2 and not any(part in name for part in ("embed", "output_projection"))
        assert wide[name].numel() == (9 if units else 3) * weight.numel(), name
        assert wide[name].count_nonzero() / wide[name].numel() == pytest.approx(
            float(weight.count_nonzero() / weight.numel())
        )


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("post-norm, tied", True),
        ("exits, tied", True),
        ("BART", True),
        ("no final norm, tied", False),
        ("post-norm exits, tied", False),
    ],
)
def test_output_projection_keeps_the_embeddings_where_it_can(kind, tied):
    wide = load(widen(checkpoint(**KINDS[kind])[1], 2))
    assert (wide.decoder.output_projection.weight is wide.decoder.embed_tokens.weight) is tied


def test_same_search():
    """Step by step, where positions count on from what has been read, fairseq's beam search finds the same."""
    narrow, state = checkpoint(**KINDS["exits, tied"])
    batch = support.sample([support.source(words) for words in ([1, 5, 2], [7, 3, 9, 4, 11, 2, 8], [])])
    found = [
        SequenceGenerator([model], support.symbols(), beam_size=3, max_len_b=25).generate([model], batch)
        for model in (load(widen(state, 2)), narrow)
    ]
    for got, wanted in zip(*found, strict=True):
        assert [one["tokens"].tolist() for one in got] == [one["tokens"].tolist() for one in wanted]


@pytest.mark.parametrize("kind", ["pre-norm, tied", "no final norm, tied", "exits", "NormFormer"])
def test_deeper_models_predict_the_same(kind):
    narrow, state = checkpoint(**KINDS[kind])
    deep = load(widen(state, 2, deepen=3))
    assert_same_predictions(deep, narrow)
    for side in ("encoder", "decoder"):
        layers = getattr(deep, side).layers
        assert len(layers) == 3 * len(getattr(narrow, side).layers)
        assert len({sum(p.numel() for p in layer.parameters()) for layer in layers}) == 1


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_deeper_post_norm_models_are_refused(side):
    _, state = checkpoint(**{**PRE_NORM, f"{side}_normalize_before": False})
    with pytest.raises(BildError, match=f"the {side} of this one"):
        widen(state, 1, deepen=2)


def test_half_precision_rounds_no_more_than_the_checkpoint_does():
    narrow, state = checkpoint(**PRE_NORM, **TIED)
    state["model"] = {name: weight.half() for name, weight in state["model"].items()}
    narrow.load_state_dict(state["model"])
    wide = widen(state, 4, half=True)
    assert_same_predictions(load(wide), narrow)
    for name, weight in wide["model"].items():
        if weight.dim() == 2 and "positions" not in name:
            assert weight.dtype == torch.float16, name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"adaptive_softmax_cutoff": "10,20"}, "--adaptive-softmax-cutoff"),
        ({"quant_noise_pq": 0.1}, "--quant-noise-pq"),
        ({"quant_noise_scalar": 0.5}, "--quant-noise-scalar"),
        ({"base_layers": 1}, "--base-layers"),
        ({"encoder_layers_to_keep": "0"}, "--encoder-layers-to-keep"),
        ({"arch": "transformer_align"}, "transformer_align"),
        ({"arch": "no_such_model"}, "no_such_model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_widened_is_refused_by_name(options, named):
    state = checkpoint()[1]
    vars(state["args"]).update(options, _name=options.get("arch", "transformer"))
    with pytest.raises(BildError, match=named) as error:
        widen(state, 2)
    assert "\n" not in str(error.value)


def test_unknown_weights_are_refused_by_name():
    state = checkpoint()[1]
    state["model"]["decoder.layers.0.adapter.weight"] = torch.ones(16, 16)
    with pytest.raises(BildError, match="decoder.layers.0.adapter.weight"):
        widen(state, 2)


@pytest.mark.parametrize("options", [{"decoder_layers": 1}, {"encoder_layers": 2}, {"decoder_embed_dim": 24}])
def test_options_of_other_weights_are_refused(options):
    state = checkpoint()[1]
    vars(state["args"]).update(options)
    with pytest.raises(BildError, match=f"the weights of the {next(iter(options))[:7]}"):
        widen(state, 2)


def test_a_checkpoint_without_options_is_refused():
    with pytest.raises(BildError, match="options"):
        widen({"model": checkpoint()[1]["model"]}, 2)


@pytest.mark.parametrize(("times", "deepen"), [(0, 1), (-2, 1), (2, 0)])
def test_sizes_below_one_are_refused(times, deepen):
    with pytest.raises(BildError, match="1 or more"):
        widen(checkpoint()[1], times, deepen)


def test_the_checkpoint_given_stays_as_it_is():
    narrow, state = checkpoint(**TIED)
    before = dict(vars(state["args"]))
    widen(state, 2)
    assert vars(state["args"]) == before
    assert state["model"].keys() == narrow.state_dict().keys()


def in_configuration(args):
    return {"args": None, "cfg": {"model": args, "task": {"_name": "translation"}}}


def flat(args):
    return in_configuration(dict(vars(args)))


def nested(args):
    """As Hydra's configurations name the options of a side."""
    options = {"encoder": {}, "decoder": {}}
    for name, value in vars(args).items():
        side, _, rest = name.partition("_")
        if side in options:
            options[side][rest] = value
        else:
            options[name] = value
    return in_configuration(options)


@pytest.mark.parametrize("kind_of_options", [in_configuration, flat, nested])
def test_checkpoints_with_every_kind_of_options_load(tmp_path, kind_of_options):
    narrow, state = checkpoint(**PRE_NORM, **TIED)
    torch.save({**state, **kind_of_options(state["args"])}, tmp_path / "narrow.pt")
    counts = widen_file(tmp_path / "narrow.pt", tmp_path / "wide.pt", 2)
    (wide,), _ = checkpoint_utils.load_model_ensemble([str(tmp_path / "wide.pt")], task=support.task())
    assert_same_predictions(wide.eval(), narrow)
    # Sinusoidal tables are computed, and not weights, before.
    assert counts == (number_of_weights(narrow), number_of_weights(wide))


def number_of_weights(model):
    """Without the copies that fairseq 0.12.2 makes of some."""
    parts = [
        part for part in model.modules() if isinstance(part, torch.nn.Linear | torch.nn.Embedding | torch.nn.LayerNorm)
    ]
    return sum(weight.numel() for weight in {weight for part in parts for weight in part.parameters()})


def test_script(tmp_path, monkeypatch, capsys):
    narrow, state = checkpoint(**PRE_NORM)
    torch.save(state, tmp_path / "narrow.pt")
    files = [str(tmp_path / "narrow.pt"), str(tmp_path / "wide.pt")]
    monkeypatch.setattr(sys, "argv", ["widen.py", *files, "2", "--deepen", "2", "--half"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert files[1] in capsys.readouterr().out
    wide = torch.load(files[1], weights_only=True)
    assert wide["args"].decoder_layers == 2 * len(narrow.decoder.layers)
    assert wide["model"]["decoder.layers.3.fc1.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "out", "said"),
    [
        ("narrow.pt", "narrow.pt", "give another file"),
        ("narrow.pt", "missing/wide.pt", "missing/wide.pt: there is no folder"),
        ("missing.pt", "wide.pt", "missing.pt: no such file"),
        ("text.pt", "wide.pt", "text.pt: it is damaged"),
    ],
)
def test_files_that_cannot_be_used_are_named_in_one_line(tmp_path, monkeypatch, name, out, said):
    torch.save(checkpoint()[1], tmp_path / "narrow.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    monkeypatch.setattr(sys, "argv", ["widen.py", str(tmp_path / name), str(tmp_path / out), "2"])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert str(ending.value).startswith("widen: ") and said in str(ending.value) and "\n" not in str(ending.value)
    assert not (tmp_path / "wide.pt").exists()


def test_a_disk_that_gets_full_is_told_in_one_line(tmp_path):
    narrow, wide = tmp_path / "narrow.pt", tmp_path / "wide.pt"
    torch.save(checkpoint()[1], narrow)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(BildError, match=f"^{wide}: it cannot be written: File too large$"):
            widen_file(narrow, wide, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [narrow]
