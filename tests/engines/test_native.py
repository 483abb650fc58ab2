"""The engine in C: how it is built, what its kernels compute, and that threads can share it.

That it equals fairseq's models is tested for every engine in test_engines.
"""

import copy
import functools
import logging
import math
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Rules
from support import PRE_NORM, T5, T5_GATED, assert_close, generator, model, related, sample, source, symbols
from torch import nn

from bild_fairseq.decoding.constraints import Constraints
from bild_fairseq.decoding.decode import decode
from bild_fairseq.decoding.policies import Policy
from bild_fairseq.engines.base import Pass
from bild_fairseq.engines.choose import engine_for
from bild_fairseq.engines.native import NativeEngine, build, missing_option, packing, structs
from bild_fairseq.engines.native.encoder import NativeEncoder
from bild_fairseq.engines.precision import (
    PRECISIONS,
    IntegerLinear,
    quantize,
    rounded,
    rounded_copy,
    rounded_rows,
)
from bild_fairseq.engines.readers import EngineReader
from bild_fairseq.engines.torch.engine import TorchEngine
from bild_fairseq.errors import BildError

needs_kernels = pytest.mark.skipif(build.library() is None, reason="no C compiler here")


# ---- How it is built -------------------------------------------------------------------------------------------------


@pytest.fixture
def reload():
    """Looks for the kernels anew; the ones that were loaded before stay what they are."""
    build.library.cache_clear()
    yield build.library.cache_clear
    build.library.cache_clear()


@pytest.fixture
def fresh(tmp_path, monkeypatch, reload):
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BILD_NATIVE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "bild_fairseq"


# What the tests of building prove holds for any flags, and these save nearly all of the time.
BUILD_QUICKLY = 'exec cc "$@" -O0'


def compiler(folder, text):
    """A program in the place of the C compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@needs_kernels
def test_kernels_are_built_once(fresh, tmp_path, monkeypatch):
    """A second process finds the first one's file, in a folder that nobody else can write to."""
    quick = compiler(tmp_path, BUILD_QUICKLY)
    monkeypatch.setenv("CC", quick)
    assert build.library() is not None
    (built,) = fresh.iterdir()
    assert stat.S_IMODE(fresh.stat().st_mode) & 0o022 == 0
    time = built.stat().st_mtime_ns
    build.library.cache_clear()
    assert build.library() is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [time]
    # Another compiler's file would not be this one.
    build.library.cache_clear()
    monkeypatch.setenv("CC", f"{quick} -DANOTHER")
    assert build.library() is not None
    assert len(list(fresh.iterdir())) == 2


@pytest.mark.parametrize("text", ["echo does not compile >&2; exit 1", "exit 0"], ids=["fails", "makes nothing"])
def test_a_broken_compiler_costs_speed_only(fresh, tmp_path, monkeypatch, caplog, text):
    """One line says so, and decoding goes on with PyTorch's operators."""
    monkeypatch.setenv("CC", compiler(tmp_path, text))
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
    (record,) = caplog.records
    assert "cannot build the C kernels" in record.getMessage()
    assert missing_option(model(0).decoder) == "no C kernels (BILD_NATIVE=0, or no compiler that works)"
    assert not list(fresh.iterdir())


@needs_kernels
def test_without_a_cache_folder_nothing_is_left_behind(fresh, tmp_path, monkeypatch):
    """The kernels are built in the temporary folder, and run; their file is gone before they do."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("CC", compiler(tmp_path, BUILD_QUICKLY))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert build.library().bild_panel() > 0
    assert not list(temporary.iterdir())


@needs_kernels
def test_structs_that_differ_are_refused(monkeypatch):
    """C code of another version would read the numbers from the wrong addresses."""
    wider = type("State", (structs.State,), {"_fields_": [("more", structs.ctypes.c_int64)]})
    monkeypatch.setattr(structs, "MIRRORED", (structs.Linear, wider))
    with pytest.raises(BildError, match=r"disagree on the size of State, \d+ and \d+ bytes") as caught:
        structs.check_sizes(build.library())
    assert "\n" not in str(caught.value)


def test_kernels_can_be_switched_off(reload, monkeypatch):
    monkeypatch.setenv("BILD_NATIVE", "0")
    assert build.library() is None


@needs_kernels
@pytest.mark.parametrize("options", [{}, PRE_NORM], ids=["post-norm", "pre-norm"])
def test_with_and_without_kernels_the_text_is_the_same(options, reload, monkeypatch):
    models = model(1, **options), model(2, **options)
    batch = sample([source([1, 2, 3]), source([4]), source(range(9))])
    rules = Rules(fallback_threshold=0.2, rollback_threshold=1.5)
    results = []
    for switch, kind in (("1", NativeEngine), ("0", TorchEngine)):
        monkeypatch.setenv("BILD_NATIVE", switch)
        reload()
        large, small = copy.deepcopy(models)
        assert isinstance(engine_for(large, "float32", "large"), kind)
        results.append(generator([large], [small], rules).generate([], batch))
    for (got,), (wanted,) in zip(*results, strict=True):
        assert got["tokens"].tolist() == wanted["tokens"].tolist()
        assert got["counters"] == wanted["counters"]
        assert_close(got["positional_scores"], wanted["positional_scores"])


# ---- What the kernels compute, in NumPy ------------------------------------------------------------------------------


def numbers(tensor):
    return tensor.detach().double().numpy()


def product(x, module):
    """y[r, o] = sum_i x[r, i] weight[o, i] + bias[o], with each row of x as integers times a scale in int8"""
    if isinstance(module, IntegerLinear):
        scale = np.abs(x).max(1, keepdims=True) / 127
        x = np.round(x / scale) * scale
    return x @ numbers(module.weight).T + (0 if module.bias is None else numbers(module.bias))


def norm(x, module):
    """Each row has mean 0 and variance 1 before it is scaled and moved; after T5's its mean square is 1."""
    if module is None:
        return x
    if isinstance(module, nn.RMSNorm):
        return x / np.sqrt((x**2).mean(1, keepdims=True) + module.eps) * numbers(module.weight)
    centred = x - x.mean(1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(1, keepdims=True) + module.eps)
    return scaled * numbers(module.weight) + numbers(module.bias)


def position_bias(module, queries, keys):
    """T5's bias of each head, query and key, (heads, queries, keys), from the buckets as the paper describes them."""
    buckets, table = module.num_buckets // (2 if module.bidirectional else 1), numbers(module.weight)
    bias = np.zeros((table.shape[1], queries, keys))
    for i, k in np.ndindex(queries, keys):
        distance = abs(i - k) if module.bidirectional else max(i - k, 0)
        exact = buckets // 2  # half of the buckets hold one distance, the others grow by the same factor
        bucket = distance
        if distance >= exact:
            share = np.log(np.float32(distance / exact)) / np.log(np.float32(module.max_distance / exact))
            bucket = min(exact + int(share * (buckets - exact)), buckets - 1)
        bias[:, i, k] = table[bucket + (buckets if module.bidirectional and k > i else 0)]
    return bias


def attention(queries, keys, values, heads, causal, scale, bias):
    """Of each head: the mean of the values, weighted by the softmax of query times key; a query sees no later key."""
    out = np.zeros_like(queries)
    size = queries.shape[1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i, query in enumerate(queries[:, part]):
            seen = i + 1 if causal else len(keys)
            weights = np.exp(keys[:seen, part] @ query * scale + bias[head, i, :seen])
            out[i, part] = weights / weights.sum() @ values[:seen, part]
    return out


def activation(x, name):
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gated-gelu":
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def sublayer(x, module, pre_norm, compute):
    """What a sublayer does to x, with its residual and its norm before or after."""
    return x + compute(norm(x, module)) if pre_norm else norm(x + compute(x), module)


def layer(x, module, source_states, name, bias):
    """One layer over one sentence: x (T, dim); source_states (source, dim) for a decoder's layer."""

    def attend(attention_module, queries_from, states, causal, bias):
        parts = (attention_module.q_proj, attention_module.k_proj, attention_module.v_proj)
        inputs = (queries_from, states, states)
        qkv = (product(*pair) for pair in zip(inputs, parts, strict=True))
        heads, scale = attention_module.num_heads, getattr(attention_module, "scaling", 1.0)
        if bias is None:
            bias = np.zeros((heads, len(queries_from), len(states)))
        return product(attention(*qkv, heads, causal, scale, bias), attention_module.out_proj)

    def feed_forward(y):
        inner, factor = activation(product(y, module.fc1), name), getattr(module, "fc1_linear", None)
        return product(inner if factor is None else inner * product(y, factor), module.fc2)

    pre, decodes = getattr(module, "normalize_before", True), source_states is not None
    x = sublayer(x, module.self_attn_layer_norm, pre, lambda y: attend(module.self_attn, y, y, decodes, bias))
    if decodes:
        cross = module.encoder_attn
        x = sublayer(x, module.encoder_attn_layer_norm, pre, lambda y: attend(cross, y, source_states, False, None))
    return sublayer(x, module.final_layer_norm, pre, feed_forward)


def stack(module, tokens, source_states, name):
    """Embeddings and layers of an encoder or a decoder of T5 or with learned positions: (T,) to (T, dim)."""
    table, bias = numbers(module.embed_tokens.weight), None
    if hasattr(module, "relative_attention_bias"):
        start = [] if source_states is None else [symbols().bos()]  # T5 starts every text with the same symbol
        x = table[start + tokens[len(start) :]]
        bias = position_bias(module.relative_attention_bias, len(tokens), len(tokens))
    else:
        first = module.padding_idx + 1
        x = module.embed_scale * table[tokens] + numbers(module.embed_positions.weight)[first : first + len(tokens)]
        x = norm(x, module.layernorm_embedding)
    for one in module.layers:
        x = layer(x, one, source_states, name, bias)
    return norm(x, module.layer_norm)


def vocabulary(x, decoder):
    """Logits. T5's padding lies in the row of the start symbol, whose own is one that T5 lacks."""
    if not hasattr(decoder, "output_scale"):
        return product(x, decoder.output_projection)
    logits = product(x * decoder.output_scale, decoder.output_projection)
    logits[:, symbols().pad()] = logits[:, symbols().bos()]
    logits[:, decoder.missing_rows] = decoder.missing_logit
    return logits


WIDE = {
    **{"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True, "encoder_layers": 2},
    **{f"{side}_embed_dim": 60 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_embed_dim": 300 for side in ("encoder", "decoder")},
}
SETS = {
    "this processor's": "",
    "without VNNI": "-mno-avx512vnni",
    "AVX2": "-mno-avx512f",
    "none": "-mno-avx512f -mno-avx2",
}


@pytest.fixture(scope="module", params=SETS.values(), ids=SETS)
def instructions(request, tmp_path_factory):
    """The kernels built for a set of instructions."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            folder = tmp_path_factory.mktemp("cache")
            patch.setenv("XDG_CACHE_HOME", str(folder))
            patch.setenv("CC", compiler(folder, f'exec cc "$@" {request.param}'))
            build.library.cache_clear()
            if build.library() is None:
                pytest.skip("this compiler has no such flags")
        yield
    build.library.cache_clear()


@needs_kernels
@torch.no_grad()
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [{**WIDE, **PRE_NORM, "activation_fn": "gelu"}, WIDE, T5, T5_GATED],
    ids=["pre-norm, gelu", "post-norm, relu", "T5", "T5, gated"],
)
def test_kernels_compute_what_numpy_does(options, precision):
    """Widths that fill no vector, one row, rows that fill no block, for every instruction set and precision."""
    made = model(5, **options)
    name = options.get("activation_fn", options.get("feed_forward_proj", "relu"))
    engine, plain = NativeEngine(made, precision), rounded_copy(made, precision)
    rng = random.Random(1)
    compared = []
    for lengths in ((0,), (1,), (2, 3), (9, 1, 30), (7, 6)):
        sources = [source(rng.choices(range(20), k=length)) for length in lengths]
        texts = [[symbols().eos(), *rng.choices(range(4, 24), k=length)] for length in lengths]
        state = engine.start(sample(sources)["net_input"])
        rows, starts = range(len(lengths)), [0] * len(lengths)
        logits, normalizers = engine.run(state, Pass(rows, starts, texts, (0, engine.depth), "all"))
        parts = (kind.split([len(text) for text in texts]) for kind in (logits, normalizers))
        for one, text, *found in zip(sources, texts, *parts, strict=True):
            states = stack(plain.encoder, one, None, name)
            wanted = vocabulary(stack(plain.decoder, text, states, name), plain.decoder)
            compared.append((*(part.double() for part in found), torch.tensor(wanted)))
    if precision == "int8":
        # An input between two integers may go to either; the sentence is then off by about what int8 costs.
        assert all((logits - wanted).abs().max() < 5e-2 * wanted.abs().max() for logits, _, wanted in compared)
        compared = [one for one in compared if torch.allclose(one[0], one[2], rtol=1e-4, atol=1e-4)]
        assert len(compared) >= 3
    for logits, normalizers, wanted in compared:
        assert_close(logits, wanted)
        assert_close(normalizers, wanted.logsumexp(1))


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, PRE_NORM, {"encoder_learned_pos": True, "layernorm_embedding": True}, {"arch": "bart_base"}, T5, T5_GATED],
    ids=["post-norm", "pre-norm", "learned positions", "BART", "T5", "T5, gated"],
)
def test_encoder(options):
    """Equals the stock encoder; a sentence's result is the same, to the last bit, alone and in a padded batch."""
    made = model(3, **options)
    encoder = NativeEncoder(made.encoder)
    sources = [source(range(6)), source([2]), source([*range(20), *range(13)])]
    together, lengths = encoder(sample(sources)["net_input"])
    assert lengths == [len(one) for one in sources]
    for one, found in zip(sources, together.split(lengths), strict=True):
        alone, _ = encoder(sample([one])["net_input"])
        assert torch.equal(found, alone)
        wanted = made.encoder(torch.tensor([one]), torch.tensor([len(one)]))["encoder_out"][0]
        assert_close(alone, wanted[:, 0])


@needs_kernels
@torch.no_grad()
def test_an_encoder_that_is_not_fairseqs_own_runs_as_it_is():
    """The engine takes what it computes, padded sentences included."""
    made = model(3, **PRE_NORM)
    own = copy.deepcopy(made)
    own.encoder.__class__ = type("Own", (type(made.encoder),), {"forward": lambda self, *args, **more: None})
    own.encoder.forward_torchscript = made.encoder.forward_torchscript
    assert "Own computes forward" in missing_option(own.encoder)
    net_input = sample([source(range(6)), source([2]), source(range(11))])["net_input"]
    logits = []
    for one in (made, own):
        engine = NativeEngine(one)
        step = Pass(range(3), [0] * 3, [[2, 5], [2], [2, 6, 7]], (0, engine.depth), "all")
        logits.append(engine.run(engine.start(net_input), step)[0].clone())
    assert_close(logits[1], logits[0])


# ---- Precisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding(precision):
    """Within half a step of the wanted precision, and nothing left to round the second time."""
    torch.manual_seed(2)
    weight = torch.randn(7, 5)
    weight[3] = 0
    step = {
        "float32": 0 * weight,
        "float16": weight.abs() / 1024,
        "bfloat16": weight.abs() / 128,
        "int8": weight.abs().amax(1, True) / 127 + 0 * weight,
    }
    once = rounded(weight, precision)
    assert ((once - weight).abs() <= step[precision] / 2 + 1e-7).all()
    assert_close(rounded(once, precision), once)
    values, scale = quantize(weight, precision)
    assert values.dtype is getattr(torch, precision) and (scale is not None) == (precision == "int8")


def test_rows_become_integers():
    """Within half a step, the largest being 127 of them, and nothing left to round the second time."""
    torch.manual_seed(2)
    x = torch.randn(2, 7, 5) * torch.logspace(-8, 8, 7)[:, None]
    x[0, 3] = 0
    step = x.abs().amax(-1, keepdim=True) / 127
    once = rounded_rows(x)
    assert ((once - x).abs() <= step * 0.5001).all()
    torch.testing.assert_close(rounded_rows(once), once, rtol=1e-5, atol=0)
    x[1, 0, 0] = math.nan
    assert rounded_rows(x).isnan().any(-1).nonzero().tolist() == [[1, 0]]


def test_weights_beyond_half_precision_are_refused():
    with pytest.raises(BildError, match="--bild-precision float16.*bfloat16"):
        quantize(torch.tensor([[1e5]]), "float16")


@needs_kernels
@torch.no_grad()
def test_half_precision_loses_nothing_of_a_half_checkpoint():
    """Its weights are halves, tiny ones included, so that the logits are those of float32 to the last bit."""
    made = model(1)
    for part in made.modules():
        if isinstance(part, nn.Linear):
            part.weight[0, ::2] *= 1e-6  # below the smallest normal half
            part.weight.copy_(part.weight.half().float())
    step = Pass([0], [0], [source(range(6))[:-1]], (0, len(made.decoder.layers)), "all")
    logits = []
    for precision in ("float32", "float16", "bfloat16"):
        engine = NativeEngine(made, precision)
        logits.append(engine.run(engine.start(sample([source(range(4))])["net_input"]), step)[0].clone())
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def _another_scale(values, scale):
    return values, scale * torch.where(torch.arange(len(scale)) == 1, 1.01, 1)


def _a_missing_input(values, scale):
    values[1, -1] += 1 if values[1, -1] < 0 else -1
    return values, scale


def _rows_in_another_order(values, scale):
    return values, scale.roll(1)


@needs_kernels
@pytest.mark.parametrize("fault", [_another_scale, _a_missing_input, _rows_in_another_order])
def test_int8_products_that_are_packed_wrongly_are_refused(monkeypatch, fault):
    """Faults of one output of one product, in int8 alone: at every other precision there are none to see."""
    quantized = packing.quantize

    def faulty(weight, precision):
        values, scale = quantized(weight, precision)
        return (values, scale) if scale is None or len(scale) != 300 else fault(values, scale)

    monkeypatch.setattr(packing, "quantize", faulty)
    made = model(5, **WIDE)
    engine_for(made, "float32", "large")
    with pytest.raises(BildError, match=r"int8 products go wrong .*\(300 outputs of 60 inputs, 1 at once\)"):
        engine_for(made, "int8", "large")


@pytest.fixture
def faulty_kernels(tmp_path, monkeypatch, reload):
    """The kernels with a fault that int8 alone has: inputs are rounded down instead of to the nearest integer."""
    source = Path(build.__file__).parent
    change = "sed -i 's/v \\* inverse + /v * inverse - 0.5f + /' integers.h"
    lines = [f"cp {source}/*.c {source}/*.h {tmp_path}", f"(cd {tmp_path} && {change})"]
    lines.append(f'exec cc $(echo "$@" | sed "s#{source}#{tmp_path}#g") -O0')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler(tmp_path, "\n".join(lines)))
    assert build.library() is not None
    assert (tmp_path / "integers.h").read_text() != (source / "integers.h").read_text()


@needs_kernels
@pytest.mark.usefixtures("faulty_kernels")
def test_int8_kernels_that_compute_wrongly_are_refused():
    """Though the text would hardly show it."""
    made = model(5)
    engine_for(made, "bfloat16", "large")
    with pytest.raises(BildError, match="int8 products go wrong on this machine"):
        engine_for(made, "int8", "large")


@needs_kernels
def test_a_checkpoint_in_half_precision_loses_nothing_in_float16(caplog):
    """The scores are equal to the bit, which a line of the log offers; other weights get no such line."""
    caplog.set_level(logging.INFO)
    batch = sample([source([5, 7, 9]), source([4])])
    hypotheses = []
    for precision in ("float32", "float16"):
        made = model(6).half().float()
        ((one,), (two,)) = generator([made], [], Rules(), alone=True, precision=precision).generate([], batch)
        hypotheses.append([(h["tokens"].tolist(), h["positional_scores"].tolist()) for h in (one, two)])
    assert hypotheses[0] == hypotheses[1]
    offered = [record.getMessage() for record in caplog.records if "float16" in record.getMessage()]
    assert len(offered) == 1
    caplog.clear()
    engine_for(model(6), "float32", "large")
    assert "float16" not in caplog.text


def test_a_rounded_copy_leaves_the_model_alone():
    """And the embedding that shares its weight with the output projection."""
    made = model(1, share_decoder_input_output_embed=True)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    copied = rounded_copy(made, "int8")
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(copied.decoder.embed_tokens.weight, made.decoder.embed_tokens.weight)
    projected = copied.decoder.output_projection.weight
    assert_close(projected, rounded(made.decoder.output_projection.weight, "int8"))
    assert not torch.equal(projected, made.decoder.output_projection.weight)
    assert rounded_copy(made, "float32") is made
    assert len(symbols()) == projected.size(0)


# ---- Draft and verify in one call ------------------------------------------------------------------------------------


FAMILIES = {
    "Transformer": {**PRE_NORM, "arch": "transformer", "decoder_layers": 3, "max_target_positions": 1000},
    "T5": {**T5_GATED, "num_decoder_layers": 3},
}
EXITS = {
    "Transformer": {"arch": "early_exit_transformer", "exit_layers": "1", "exit_own_layers": 1},
    "T5": {"arch": "early_exit_t5", "exit_layers": "1"},
}
each_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def early_exit_engine(family, precision="float32"):
    options = {**FAMILIES[family], **EXITS[family]}
    return NativeEngine(model(4, **options), precision)


ROWS = 3
ANY_CONSTRAINTS = st.builds(
    Constraints,
    pad=st.just(symbols().pad()),
    unk=st.just(symbols().unk()),
    eos=st.just(symbols().eos()),
    max_len=st.sampled_from([0, 1, 4, 9, 40]),
    min_len=st.sampled_from([0, 1, 4, 12]),
    unk_penalty=st.sampled_from([0.0, 2.5, -3.0]),
    prefix_lengths=st.sampled_from([(), (0, 2, 30)]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 0, 2]),
)
TEXTS = st.lists(st.lists(st.integers(4, 23), max_size=12), min_size=ROWS, max_size=ROWS)


def state_of(engine):
    return engine.start(sample([source(range(6)), source([2]), source(range(11))])["net_input"])


def assert_equal(got, wanted):
    """Predictions or verdicts of some rows: equal tokens, and log-probabilities up to rounding."""
    assert [[one.token for one in row] for row in got] == [[one.token for one in row] for row in wanted]
    for row, wanted_row in zip(got, wanted, strict=True):
        assert [one.lprob for one in row] == pytest.approx([one.lprob for one in wanted_row], abs=1e-5)


@needs_kernels
@torch.no_grad()
@each_family
@settings(max_examples=40)
@given(ANY_CONSTRAINTS, TEXTS, st.sampled_from([1, 2, 7, math.inf]), st.sampled_from([0.0, 0.3, 0.6]), st.data())
def test_one_call_does_what_the_general_reader_does(family, constraints, texts, limit, threshold, data):
    """Drafts, verdicts and what has been read, from any position, at and beyond the limits of length."""
    engine, rows = early_exit_engine(family), data.draw(st.permutations(range(ROWS)))[: data.draw(st.integers(1, ROWS))]
    tokens = [[symbols().eos(), *text] for text in texts]
    for layers, keep in (((0, 1), True), ((0, engine.depth), False)):
        readers = [
            make(engine, state_of(engine), layers, constraints, keep=keep)
            for make in (EngineReader, lambda *args, **more: args[0].reader(*args[1:], **more))
        ]
        general, native = readers
        assert_equal(native.draft(tokens, rows, limit, threshold), general.draft(tokens, rows, limit, threshold))
        assert list(native.consumed) == list(general.consumed)
        for reader in readers:
            for row in range(ROWS):
                reader.rollback(row, len(tokens[row]) // 2)
        verdicts, wanted = native.verify(tokens, rows), general.verify(tokens, rows)
        assert_equal(verdicts, wanted)
        for got_row, wanted_row in zip(verdicts, wanted, strict=True):
            drafted = [one.drafted_lprob for one in got_row[:-1]]
            assert drafted == pytest.approx([one.drafted_lprob for one in wanted_row[:-1]], abs=1e-5)
        assert list(native.consumed) == list(general.consumed)


@needs_kernels
@torch.no_grad()
@each_family
@settings(max_examples=20)
@given(ANY_CONSTRAINTS, TEXTS)
def test_layers_above_an_exit_read_what_it_has_left(family, constraints, texts):
    """Verdicts of the upper layers, from hidden states, are those of the whole decoder."""
    engine = early_exit_engine(family)
    tokens = [[symbols().eos(), *text] for text in texts]
    state = state_of(engine)
    below = engine.reader(state, (0, 1), constraints, keep=True)
    above = engine.reader(state, (1, engine.depth), constraints, below=below)
    whole = engine.reader(state_of(engine), (0, engine.depth), constraints)
    below.draft([text[: 1 + len(text) // 2] for text in tokens], [0, 1, 2], 3, 0.0)
    for row in range(ROWS):
        below.rollback(row, 1 + len(tokens[row]) // 2)
    assert_equal(above.verify(tokens, [0, 1, 2]), whole.verify(tokens, [0, 1, 2]))


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("broken_by", [math.nan, math.inf])
def test_logits_that_are_not_numbers_end_a_draft_and_stay_in_their_row(broken_by, precision):
    made = model(3)
    made.encoder.embed_tokens.weight[source([7])[0]] = broken_by
    engine = NativeEngine(made, precision)
    constraints = Constraints(symbols().pad(), symbols().unk(), symbols().eos(), max_len=9, min_len=9)
    state = engine.start(sample([source([1]), source([7, 2])])["net_input"])
    reader = engine.reader(state, (0, engine.depth), constraints)
    fine, broken = reader.draft([[2], [2]], [0, 1], math.inf, 0.0)
    assert len(fine) == 10 and fine[-1].token == symbols().eos()
    assert len(broken) == 1 and math.isnan(broken[0].lprob)


# ---- Threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def encode(request):
    """Encodes a batch by kernels that are loaded at the first call. Also says which threads were started for it."""
    before, encoders, family = torch.get_num_threads(), [], getattr(request, "param", "Transformer")

    @torch.no_grad()
    def run(threads):
        if not encoders:
            encoders.append(NativeEncoder(model(3, **FAMILIES[family]).encoder))
        torch.set_num_threads(threads)  # which may start some
        net_input, others = sample([source(range(6)), source([2]), source(range(11))])["net_input"], running()
        return encoders[0](net_input)[0], running() - others

    yield run
    torch.set_num_threads(before)


def running():
    """The threads of this process, by the system's number."""
    return set(map(int, os.listdir("/proc/self/task"))) if sys.platform == "linux" else set()


def in_another_thread(function):
    """What a function returns in a thread that ends with it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="threads have no numbers here")


@needs_kernels
@pytest.mark.parametrize("encode", FAMILIES, indirect=True)
def test_more_threads_than_cores(encode):
    """What comes out is what one thread computes, to the last bit."""
    wanted, _ = encode(1)
    for _ in range(20):
        assert torch.equal(encode(2 * (os.cpu_count() or 1) + 1)[0], wanted)


@needs_kernels
@needs_linux
def test_helpers_that_are_put_aside(encode):
    """They get a core only when the caller leaves it to them, and lose it in the middle of any piece."""
    wanted, _ = encode(1)

    def with_idle_helpers():
        _, helpers = encode(3)
        for thread in (0, *helpers):
            os.sched_setaffinity(thread, [min(os.sched_getaffinity(0))])
        for thread in helpers:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        return helpers, [encode(3)[0] for _ in range(50)]

    helpers, found = in_another_thread(with_idle_helpers)
    assert len(helpers) == 2
    assert all(torch.equal(one, wanted) for one in found)
    end = time.monotonic() + 30
    while helpers & running():  # the thread is over for Python a little earlier than for the system
        assert time.monotonic() < end
        time.sleep(0.01)


@needs_kernels
@needs_linux
def test_helpers_that_never_come(fresh, tmp_path, monkeypatch, encode):
    """The caller does all of the work where the system starts no threads."""
    (tmp_path / "refuse.h").write_text("#include <pthread.h>\n#define pthread_create(...) 11\n")
    monkeypatch.setenv("CC", compiler(tmp_path, f'{BUILD_QUICKLY} -include "{tmp_path}/refuse.h"'))
    wanted, _ = encode(1)
    found, helpers = encode(3)
    assert not helpers
    assert torch.equal(found, wanted)


@needs_kernels
@needs_linux
def test_a_forked_process_has_helpers_of_its_own(encode):
    wanted, _ = encode(1)

    def fork():
        encode(3)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            found, helpers = encode(3)
            os._exit(not (torch.equal(found, wanted) and len(helpers) == 2))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert in_another_thread(fork) == 0


def decoded(large, small, sources, max_len):
    """What BiLD makes of a batch, to the last bit; an exit drafts where there is no small model."""
    constraints = Constraints(symbols().pad(), symbols().unk(), symbols().eos(), max_len, min_len=max_len // 2)
    net_input = sample(sources)["net_input"]
    if small is None:
        state = large.start(net_input)
        drafting = large.reader(state, (0, 1), constraints, keep=True)
        verifying = large.reader(state, (1, large.depth), constraints, below=drafting)
    else:
        verifying, drafting = (one.reader(one.start(net_input), (0, one.depth), constraints) for one in (large, small))
    made = decode(verifying, drafting, symbols().eos(), [[]] * len(sources), Policy(0.3, 2.0), symbols().eos())
    return [(sentence.tokens, sentence.scores) for sentence in made]


@needs_kernels
@torch.no_grad()
@each_family
@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_share_engines(precision, family):
    """Eight threads with batches of all sizes, which outgrow what was reserved, equal one after another."""
    rng = random.Random(3)
    large = model(1, **FAMILIES[family])
    engines = NativeEngine(large, precision), NativeEngine(related(large, 0.1, 2), precision)
    cases = [
        (
            *(engines if number % 3 else (early_exit_engine(family, precision), None)),
            # 15 and 31 words and the end symbol fill the kernels' blocks.
            [source(rng.choices(range(20), k=rng.choice([0, 3, 8, 15, 31]))) for _ in range(rng.randint(1, 6))],
            [5, 30, 100][number // 3] if number % 3 else 40,  # the sources reserve 34 to 96 positions
        )
        for number in range(9)
    ]
    wanted = [decoded(*case) for case in cases]

    def in_thread(case):
        with torch.no_grad():
            return decoded(*case)

    engines = NativeEngine(large, precision), NativeEngine(related(large, 0.1, 2), precision)  # with nothing reserved
    cases = [(*engines, *case[2:]) if case[1] is not None else case for case in cases]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(in_thread, cases)) == wanted


@needs_kernels
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler whose sanitizers are known here")
def test_sanitizers_find_nothing(tmp_path):
    """Every kind of decoding, precision and instruction set again, with addresses and undefined behaviour checked."""
    libraries = [Path(gcc_file(f"lib{name}.so")) for name in ("asan", "ubsan")]
    if not all(path.is_absolute() for path in libraries):
        pytest.skip("the compiler's sanitizers are not installed")
    sanitize = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
    environment = {
        **os.environ,
        "CC": compiler(tmp_path, f'exec gcc "$@" {sanitize}'),
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": " ".join(map(str, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    wanted = "share_engines or general_reader or above_an_exit or more_threads or put_aside or of_its_own"
    # Precisions differ in the products alone, which T5 shares with the Transformer.
    wanted = f"({wanted}) and not (T5 and float16)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", wanted]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout


def gcc_file(name):
    """Where the compiler's own library is; the bare name if it is nowhere."""
    return subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
