"""The C kernels: when they are built, and what happens without them; the encoder. The decoder: test_cached_decoder."""

import logging
import os
import stat
import subprocess
import sys

import pytest
import torch
from reference import Rules
from support import PRE_NORM, assert_close, generator, model, sample, source, symbols

from bild_fairseq.decoding.constraints import Constraints
from bild_fairseq.engines.native import NativeDecoder, NativeEncoder, build, missing_option
from bild_fairseq.engines.precision import PRECISIONS, quantize, rounded, rounded_copy
from bild_fairseq.engines.readers import ModelReader
from bild_fairseq.engines.torch.decoder import CachedDecoder
from bild_fairseq.engines.torch.lean_encoder import LeanEncoder
from bild_fairseq.errors import BildError

needs_kernels = pytest.mark.skipif(build.library() is None, reason="no C compiler here")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and nothing loaded yet; kernels that were loaded before stay what they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BILD_NATIVE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    build.library.cache_clear()
    yield tmp_path / "bild_fairseq"
    build.library.cache_clear()


def compiler(folder, text):
    """A program in the place of the C compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@needs_kernels
def test_kernels_are_built_once(fresh, tmp_path, monkeypatch):
    """A second process finds the first one's file, in a folder that nobody else can write to."""
    assert build.library() is not None
    (built,) = fresh.iterdir()
    assert stat.S_IMODE(fresh.stat().st_mode) & 0o022 == 0
    time = built.stat().st_mtime_ns
    build.library.cache_clear()
    assert build.library() is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [time]
    # Another compiler's file would not be this one.
    build.library.cache_clear()
    monkeypatch.setenv("CC", compiler(tmp_path, 'exec cc "$@"'))
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
    assert missing_option(model(0).decoder) == "no C kernels"
    assert not list(fresh.iterdir())


def test_kernels_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("BILD_NATIVE", "0")
    assert build.library() is None


@needs_kernels
@pytest.mark.parametrize("options", [{}, PRE_NORM], ids=["post-norm", "pre-norm"])
def test_with_and_without_kernels_the_text_is_the_same(options, fresh, monkeypatch):
    large, small = model(1, **options), model(2, **options)
    batch = sample([source([1, 2, 3]), source([4]), source(range(9))])
    rules = Rules(fallback_threshold=0.2, rollback_threshold=1.5)
    native = generator([large], [small], rules)
    assert isinstance(native._large[0].decoder, NativeDecoder)
    monkeypatch.setenv("BILD_NATIVE", "0")
    build.library.cache_clear()
    other = generator([large], [small], rules)
    assert isinstance(other._large[0].decoder, CachedDecoder)
    for (got,), (wanted,) in zip(native.generate([], batch), other.generate([], batch), strict=True):
        assert got["tokens"].tolist() == wanted["tokens"].tolist()
        assert got["counters"] == wanted["counters"]
        assert_close(got["positional_scores"], wanted["positional_scores"])


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, PRE_NORM, {"encoder_learned_pos": True, "layernorm_embedding": True}, {"arch": "bart_base"}],
    ids=["post-norm", "pre-norm", "learned positions", "BART"],
)
def test_encoder(options):
    """Equals the stock encoder; a sentence's result is the same, to the last bit, alone and in a padded batch."""
    made = model(3, **options)
    encoder = NativeEncoder(made.encoder)
    sources = [source(range(6)), source([2]), source(range(11))]
    together = sample(sources)["net_input"]["src_tokens"]
    found, padding = encoder(together)
    stock, stock_padding = LeanEncoder(made.encoder)(together)
    for row, one in enumerate(sources):
        alone, _ = encoder(torch.tensor([one]))
        assert torch.equal(found[~padding[row], row], alone[:, 0])
        assert_close(alone[:, 0], stock[~stock_padding[row], row])
        wanted = made.encoder(torch.tensor([one]), torch.tensor([len(one)]))["encoder_out"][0]
        assert_close(alone, wanted)


@needs_kernels
def test_fewer_threads_than_wanted():
    """OpenMP may give fewer, as with a limit of 1 here; nothing is left out then."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "more_threads_than_cores"]
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@needs_kernels
@torch.no_grad()
def test_more_threads_than_cores():
    """Some of them sleep at barriers; what comes out is what one thread computes, to the last bit."""
    encoder = NativeEncoder(model(3, **PRE_NORM).encoder)
    tokens = sample([source(range(6)), source([2]), source(range(11))])["net_input"]["src_tokens"]
    wanted, _ = encoder(tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(2 * (os.cpu_count() or 1) + 1)
    try:
        for _ in range(20):
            assert torch.equal(encoder(tokens)[0], wanted)
    finally:
        torch.set_num_threads(before)


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


def test_weights_beyond_half_precision_are_refused():
    with pytest.raises(BildError, match="--bild-precision float16.*bfloat16"):
        quantize(torch.tensor([[1e5]]), "float16")


@needs_kernels
def test_half_precision_loses_nothing_of_a_half_checkpoint():
    """Its weights are halves, tiny ones included, so that the logits are those of float32 to the last bit."""
    made = model(1)
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight[0, ::2] *= 1e-6  # below the smallest normal half
                part.weight.copy_(part.weight.half().float())
    read = [source(range(6))[:-1]], [0], [0], (0, len(made.decoder.layers)), "all"
    encoder_out = torch.randn(5, 1, made.encoder.layers[0].embed_dim)
    logits = []
    for precision in ("float32", "float16", "bfloat16"):
        decoder = NativeDecoder(made.decoder, precision)
        state = decoder.start(encoder_out, None, 1)
        logits.append(decoder.read(state, *read)[0].clone())
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@needs_kernels
@pytest.mark.parametrize("unk_penalty", [0.0, 2.5])
def test_judgements_are_what_the_logits_say(unk_penalty):
    """Best tokens and log-probabilities, with what a position forbids; ragged rows."""
    made = model(3)
    decoder = NativeDecoder(made.decoder)
    words = symbols()
    constraints = Constraints(words.pad(), words.unk(), words.eos(), max_len=20, min_len=2, unk_penalty=unk_penalty)
    tokens = [[words.eos(), *source(range(count))[:-1]] for count in (4, 0, 9)]
    encoder_out = torch.randn(5, 3, made.encoder.layers[0].embed_dim)

    def reader():
        return ModelReader(decoder, decoder.start(encoder_out, None, 3))

    logits, normalizers = (part.clone() for part in reader().read(tokens, range(3), last_only=False))
    places = [(row, position) for row, text in enumerate(tokens) for position in range(len(text))]
    constraints.apply(logits.numpy(), normalizers.numpy(), places, tokens, [0] * 3)
    lprobs = logits - normalizers[:, None]
    judged = [judgement for row in reader().judge(tokens, range(3), constraints) for judgement in row]
    assert [best for best, _, _ in judged] == lprobs.argmax(1).tolist()
    assert_close(torch.tensor([lprob for _, lprob, _ in judged]), lprobs.amax(1))
    for (row, position), lprob, (_, _, standing) in zip(places, lprobs, judged, strict=True):
        if position + 1 < len(tokens[row]):
            assert standing == pytest.approx(lprob[tokens[row][position + 1]].item(), abs=1e-6)


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
