"""T5 decoders in every engine against their full forward pass, and BiLD against one over `transformers`' passes."""

import copy
import functools
import logging
import random
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import build_model
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from hypothesis import given, settings
from reference import SMALL, Rules, bild
from support import LIMITS, NGRAMS, POLICY, any_rules, assert_close, assert_like_reference, assert_same_hypothesis
from support import generator as any_generator
from t5_support import TIED, VARIANTS, hf_model, in_fairseq, source_batch, sources, to_fairseq
from test_engines import read_at_random
from torch import Tensor, nn

from bild_fairseq.engines import choose
from bild_fairseq.engines.base import Engine
from bild_fairseq.engines.choose import engine_for, remember
from bild_fairseq.engines.native import NativeEngine, missing_option
from bild_fairseq.engines.native.build import library
from bild_fairseq.engines.precision import PRECISIONS, rounded_copy
from bild_fairseq.engines.proof import prove
from bild_fairseq.engines.torch.engine import TorchEngine
from bild_fairseq.errors import BildError

PAD, EOS = 1, 2  # fairseq's
DEPTH = 3
KINDS = {"torch": TorchEngine, "graphed": functools.partial(TorchEngine, graphs=True)}
KINDS |= {"native": NativeEngine} if library() else {}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
needs_kernels = pytest.mark.skipif(library() is None, reason="no C compiler here")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


class Theirs:
    """A model of `transformers` behind the two calls that the reference makes, with fairseq's numbers for tokens."""

    def __init__(self, model: nn.Module):
        self._model = model

    def encoder(self, tokens: Tensor, src_lengths: Tensor) -> Tensor:
        return self._model.encoder(input_ids=tokens - 1).last_hidden_state

    def decoder(self, history: Tensor, encoder_out: Tensor) -> tuple[Tensor]:
        """(1, time, vocab): the row of `<s>`, which T5 has not, then T5's own; its padding stands at `<pad>`."""
        ids = history - 1
        ids[:, 0] = 0
        logits = self._model(encoder_outputs=(encoder_out,), decoder_input_ids=ids, use_cache=False).logits
        return (torch.cat([torch.full_like(logits[..., :1], -torch.inf), logits], dim=-1),)


def ours(theirs: nn.Module) -> tuple[nn.Module, Dictionary]:
    with tempfile.TemporaryDirectory() as folder:
        return in_fairseq(Path(folder), theirs)


def noisy(theirs: nn.Module, noise: float) -> nn.Module:
    """A model that often agrees with another: its weights plus noise."""
    made, dice = copy.deepcopy(theirs), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=dice)
    return made


Models = tuple[list[nn.Module], list[nn.Module], list[Theirs], list[Theirs], Dictionary, dict[str, Any]]


@functools.cache
def two_models(variant: str) -> Models:
    """A large and a small model here and there, their dictionary, and what else a pair of them needs."""
    large = hf_model(variant)
    small = noisy(large, 0.1)
    mine, dictionary = ours(large)
    return [mine], [ours(small)[0]], [Theirs(large)], [Theirs(small)], dictionary, {}


@functools.cache
def early_exit(variant: str, own: bool = False) -> tuple[nn.Module, nn.Module, Dictionary]:
    """A model with exits at layers 1 and 2 of 3 that often agree with the last layer, there without exits."""
    theirs = hf_model(variant, num_decoder_layers=DEPTH)
    with torch.no_grad():
        for block in theirs.decoder.block[1:]:
            for projection in (block.layer[0].SelfAttention.o, block.layer[1].EncDecAttention.o):
                projection.weight *= 0.15
            block.layer[2].DenseReluDense.wo.weight *= 0.15
    plain, dictionary = ours(theirs)
    task = TranslationTask(TranslationConfig(source_lang="x", target_lang="y"), dictionary, dictionary)
    exits = {
        "arch": "early_exit_t5",
        "_name": "early_exit_t5",
        "exit_layers": "1,2",
        "exit_share_output_projection": not own,
    }
    full = build_model(Namespace(**{**vars(plain.args), **exits}), task)
    full.load_state_dict(plain.state_dict())
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in full.decoder.exit_parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    return full.eval(), theirs, dictionary


def their_exit(full: nn.Module, theirs: nn.Module, layer: int) -> nn.Module:
    """The exit of a model here as a model there of few layers."""
    small = copy.deepcopy(theirs)
    small.decoder.block = small.decoder.block[:layer]
    small.config.num_decoder_layers = small.decoder.config.num_layers = layer
    small.decoder.final_layer_norm.weight = full.decoder.exit_layer_norm(layer).weight
    if str(layer) in full.decoder.exit_output_projections:
        weight = full.decoder.exit_output_projection(layer).weight
        small.lm_head.weight = nn.Parameter(weight[PAD:].detach())  # T5's padding lies in the row of <s>
        with torch.no_grad():
            small.lm_head.weight[0] = weight[0]
    return small


@functools.cache
def one_model(variant: str, own: bool = False) -> Models:
    """The same for an early-exit model whose first layer drafts."""
    full, theirs, dictionary = early_exit(variant, own)
    small = their_exit(full, theirs, 1)
    return [full], [], [Theirs(theirs)], [Theirs(small)], dictionary, {"exit_layer": 1}


def run_with(kind: Callable[[nn.Module], Engine], models: Models) -> None:
    """Has a kind of engine run the models here."""
    for made in (*models[0], *models[1]):
        remember(made, "float32", kind(made))


def sample(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    return {"id": torch.arange(len(rows)), "nsentences": len(rows), **source_batch(rows)}


def generate(models: Models, rules: Rules, rows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    large, small, _, _, dictionary, more = models
    made = any_generator(large, small, rules, dictionary=dictionary, **more)
    return [one for (one,) in made.generate([], sample(rows))]


# ---- passes


def sentences(dictionary: Dictionary, lengths: Sequence[int], dice: random.Random) -> list[list[int]]:
    return [[EOS, *(dice.randrange(EOS, len(dictionary)) for _ in range(length - 1))] for length in lengths]


def full_pass(made: nn.Module, rows: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits after every token, by one full forward pass of the model."""
    previous = torch.full((len(tokens), max(map(len, tokens))), PAD)
    for row, one in enumerate(tokens):
        previous[row, : len(one)] = torch.tensor(one)
    logits = made.decoder(previous, made.encoder(**source_batch(rows)["net_input"]))[0]
    return [row[: len(one)] for row, one in zip(logits, tokens, strict=True)]


@torch.no_grad()
@each_kind
@each_variant
def test_equals_the_full_forward_pass(kind, variant):
    """In ragged batches, over subsets of rows, after rollbacks, beyond the reserved cache and where biases end."""
    (made,), *_, dictionary, _ = two_models(variant)
    tokens, rows = sentences(dictionary, (13, 270, 41), random.Random(7)), sources(3)
    engine = kind(made)
    state = engine.start(source_batch(rows)["net_input"])
    reserved = state.length
    found = read_at_random(engine, state, tokens, random.Random(8))
    assert state.length > reserved
    for got, wanted in zip(found, full_pass(made, rows, tokens), strict=True):
        assert_close(got, wanted)


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
@each_kind
@each_variant
def test_rounded_weights(variant, kind, precision):
    """The same as a full pass of the model with rounded matrices; embeddings tied to one are not rounded."""
    (made,), *_, dictionary, _ = two_models(variant)
    tokens, rows = sentences(dictionary, (8, 11, 5), random.Random(1)), sources(3)
    engine = kind(made, precision)
    found = read_at_random(engine, engine.start(source_batch(rows)["net_input"]), tokens, random.Random(2))
    for got, wanted in zip(found, full_pass(rounded_copy(made, precision), rows, tokens), strict=True):
        assert_close(got, wanted)


# ---- the algorithm


ROWS = st.builds(sources, st.integers(1, 3), st.integers(0, 9))
PAIRS = {"two models": two_models, "early exit": one_model, "early exit, own": functools.partial(one_model, own=True)}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


@each_kind
@each_pair
@settings(max_examples=8)
@given(st.sampled_from(list(VARIANTS)), any_rules(**POLICY, **LIMITS, **NGRAMS), ROWS)
def test_bild_equals_the_reference_over_transformers(pair, kind, variant, rules, rows):
    """Tokens, scores and counters, whatever shares a sentence's batch."""
    models = pair(variant)
    run_with(kind, models)
    _, _, large, small, dictionary, _ = models
    for one, hypothesis in zip(rows, generate(models, rules, rows), strict=True):
        assert_like_reference(hypothesis, bild(large, small, to_fairseq(one), dictionary, rules))


@each_kind
@each_variant
def test_a_draft_vocabulary_equals_transformers(kind, variant):
    """With types in it that T5 lacks, whose probability stays 0: `<s>`, and rows at the end of a dictionary."""
    models = two_models(variant)
    run_with(kind, models)
    _, _, large, small, dictionary, _ = models
    rows = sources(4)
    types = tuple(sorted({dictionary.bos(), EOS, dictionary.unk(), *range(4, len(dictionary), 2), len(dictionary) - 1}))
    rules = Rules(fallback_threshold=0.2, start=SMALL, draft_types=types)
    drafted = 0
    for one, hypothesis in zip(rows, generate(models, rules, rows), strict=True):
        assert_like_reference(hypothesis, bild(large, small, to_fairseq(one), dictionary, rules))
        drafted += hypothesis["counters"].drafted
    assert drafted


@each_pair
@each_variant
def test_lossless_is_fairseqs_greedy_text(pair, variant):
    """Rollback threshold 0 with a verified end, whatever is drafted."""
    models = pair(variant)
    (large,), _, _, _, dictionary, _ = models
    rules = Rules(fallback_threshold=0.2, rollback_threshold=0.0, verify_end=True, start=SMALL, max_len=40)
    rows = sources(8, seed=3)
    stock = SequenceGenerator([large], dictionary, beam_size=1, max_len_b=rules.max_len)
    wanted = [one for (one, *_) in stock.generate([large], sample(rows))]
    for kind in KINDS.values():
        run_with(kind, models)
        for hypothesis, greedy in zip(generate(models, rules, rows), wanted, strict=True):
            assert_same_hypothesis(hypothesis, greedy)


@each_pair
def test_drafted_tokens_have_every_fate(pair):
    """Guards the tests above: with these models drafts are accepted, discarded and left unverified."""
    seen = dict.fromkeys(("fallbacks", "rollbacks", "accepted", "discarded", "unverified"), 0)
    rules = Rules(fallback_threshold=0.4, rollback_threshold=1.0, max_draft=4)
    for variant in VARIANTS:
        for hypothesis in generate(pair(variant), rules, sources(12)):
            for name in seen:
                seen[name] += getattr(hypothesis["counters"], name)
    assert all(seen.values()), seen


# ---- what may run


def with_method(module: nn.Module, name: str) -> None:
    """Gives a module a class of its own, which computes one method in its own way."""
    stock = getattr(type(module), name)
    module.__class__ = type("Custom", (type(module),), {name: lambda *args, **more: stock(*args, **more)})


def layer(made: nn.Module) -> nn.Module:
    return made.decoder.layers[1]


def change_source_heads(made: nn.Module) -> None:
    """Other heads for one layer's attention to the source: the check of modules lets them pass."""
    layer(made).encoder_attn.num_heads, layer(made).encoder_attn.head_dim = 5, 4


def share_layers(made: nn.Module) -> None:
    """One layer twice: as fairseq generates, both keep their keys in the same place."""
    made.decoder.layers = nn.ModuleList([layer(made)] * 2)


METHODS = ("forward", "extract_features", "embed", "position_bias", "project_to_vocabulary", "output_layer")
METHODS += ("get_normalized_probs",)
CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    **{name: (lambda made, name=name: with_method(made.decoder, name), f"computes {name}") for name in METHODS},
    "layer's forward": (lambda made: with_method(layer(made), "forward"), "Custom computes forward"),
    "layer's feed-forward": (lambda made: with_method(layer(made), "feed_forward"), "Custom computes feed_forward"),
    "attention": (lambda made: with_method(layer(made).self_attn, "forward"), "Custom computes forward"),
    "biases": (lambda made: with_method(made.decoder.relative_attention_bias, "forward"), "Custom computes forward"),
    "norm": (lambda made: with_method(layer(made).final_layer_norm, "forward"), "type Custom"),
    "layer norm": (lambda made: setattr(layer(made), "final_layer_norm", nn.LayerNorm(24)), "type LayerNorm"),
    "hook": (lambda made: layer(made).fc2.register_forward_hook(lambda part, given, out: out), "hook"),
    "foreign layer": (lambda made: made.decoder.layers.append(nn.Identity()), "type Identity"),
    "heads": (lambda made: setattr(layer(made).self_attn, "num_heads", 2), "differ in attention heads"),
    "other heads over the source": (change_source_heads, "something else than its weights say"),
    "a layer twice": (share_layers, "cannot be decoded"),
}


@pytest.mark.parametrize("in_c", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_decoder_that_computes_something_else_is_refused(change, in_c, monkeypatch):
    """By its modules or by the comparison with its own passes; and it is taken before the change."""
    if not in_c:
        monkeypatch.setattr(choose, "missing_option", lambda module: "not wanted here")
    (made,), *_ = two_models("mT5")
    made = copy.deepcopy(made)
    engine_for(made, "float32", "large")
    apply, named = CHANGES[change]
    apply(made)
    with pytest.raises(BildError, match=named) as refused:
        engine_for(made, "float32", "large")
    assert "\n" not in str(refused.value)


def change_activation(made: nn.Module) -> None:
    for part in (*made.encoder.layers, *made.decoder.layers):
        part.activation_fn = torch.tanh


def change_heads(made: nn.Module) -> None:
    for part in made.decoder.layers:
        part.self_attn.num_heads = 2


def change_one_width(made: nn.Module) -> None:
    layer(made).fc1, layer(made).fc2 = nn.Linear(24, 8, bias=False), nn.Linear(8, 24, bias=False)
    layer(made).fc1_linear = nn.Linear(24, 8, bias=False)


LACKS = {
    "activation": (change_activation, "an activation"),
    "heads": (change_heads, "attention heads"),
    "widths": (change_one_width, "layers that differ"),
    "double": (lambda made: made.double(), "float32"),
}


@needs_kernels
@each_variant
def test_t5_runs_in_c(variant):
    (made,), *_ = two_models(variant)
    assert missing_option(made.decoder) is None and missing_option(made.encoder) is None
    assert isinstance(engine_for(copy.deepcopy(made), "float32", "large"), NativeEngine)


@needs_kernels
@pytest.mark.parametrize("change", LACKS)
def test_the_kernels_say_what_they_lack(change, caplog):
    """And read no weights of another shape; what is still a T5 runs on PyTorch's operators."""
    (made,), *_ = two_models("mT5")
    made = copy.deepcopy(made)
    apply, named = LACKS[change]
    apply(made)
    assert named in missing_option(made.decoder)
    if change == "heads":
        with pytest.raises(BildError):
            engine_for(made, "float32", "large")
        return
    with caplog.at_level(logging.INFO):
        assert isinstance(engine_for(made, "float32", "large"), TorchEngine)
    assert named in caplog.text


@torch.no_grad()
@each_kind
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("variant", [TIED, "mT5"])
def test_a_wrong_bucket_is_refused(kind, side, variant):
    """An engine whose bias of distance 3 is that of distance 4, as the engine in C would read it one place off."""
    (made,), *_ = two_models(variant)
    made = copy.deepcopy(made)
    engine = kind(copy.deepcopy(made))
    prove(engine, made, "float32", "large")
    table = getattr(made, side).relative_attention_bias.weight
    table[3] = table[4]
    engine_of_changed = kind(copy.deepcopy(made))
    prove(engine_of_changed, made, "float32", "large")
    with pytest.raises(BildError, match="cannot be decoded exactly"):
        prove(engine, made, "float32", "large")


@pytest.mark.parametrize(("dtype", "warned"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_float16_is_warned_of(caplog, dtype, warned):
    """T5 overflows there; bfloat16 is offered, in one line."""
    (made,), *_, dictionary, _ = two_models("mT5")
    task = TranslationTask(TranslationConfig(source_lang="x", target_lang="y"), dictionary, dictionary)
    task.build_generator([copy.deepcopy(made).to(dtype)], Namespace(beam=1, generator="greedy"))
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == warned
    assert all("--fp16" in message and "--bild-precision bfloat16" in message for message in messages)
