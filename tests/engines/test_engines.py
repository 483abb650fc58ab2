"""Every engine (PyTorch, fixed shapes, C) against the full forward pass of the stock model."""

import functools
import random
from collections.abc import Sequence

import pytest
import torch
from fairseq.models.lstm import LSTMDecoder
from fairseq.models.transformer import Embedding, TransformerDecoder, TransformerDecoderBase
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Rules
from support import PRE_NORM, SIZE, T5, T5_GATED, assert_close, generator, model, sample, source, symbols
from torch import Tensor, nn

from bild_fairseq.engines.base import Engine, Pass, State
from bild_fairseq.engines.native import NativeEngine, missing_option
from bild_fairseq.engines.native.build import library
from bild_fairseq.engines.precision import PRECISIONS, rounded_copy
from bild_fairseq.engines.torch.engine import TorchEngine
from bild_fairseq.engines.torch.linear import norm, projection
from bild_fairseq.errors import BildError

NORMFORMER = {"scale_attn": True, "scale_fc": True, "scale_heads": True, "scale_resids": True}
ARCHITECTURES = {
    "post-norm": {},
    "pre-norm": PRE_NORM,
    "pre-norm without final norm": {**PRE_NORM, "no_decoder_final_norm": True},
    "embedding norm": {"layernorm_embedding": True},
    "learned positions": {"decoder_learned_pos": True, **PRE_NORM},
    "no positions": {"no_token_positional_embeddings": True},
    "no embedding scale": {"no_scale_embedding": True},
    "shared output projection": {"share_decoder_input_output_embed": True},
    "all embeddings shared": {"share_all_embeddings": True},
    "output dimension": {"decoder_output_dim": 10},
    "shared output projection of a narrower output": {
        "decoder_output_dim": 10,
        "share_decoder_input_output_embed": True,
        "input_width": 10,
    },
    "input dimension": {"input_width": 10, "layernorm_embedding": True},
    "gelu": {"activation_fn": "gelu"},
    "gelu_accurate": {"activation_fn": "gelu_accurate"},
    "tanh": {"activation_fn": "tanh"},
    "linear": {"activation_fn": "linear"},
    "scale_attn": {"scale_attn": True},
    "scale_fc": {"scale_fc": True, **PRE_NORM},
    "scale_heads": {"scale_heads": True},
    "scale_resids": {"scale_resids": True, **PRE_NORM},
    "NormFormer, pre-norm": {**NORMFORMER, **PRE_NORM},
    "NormFormer, post-norm": NORMFORMER,
    "no cross-attention": {"no_cross_attention": True},
    "wider encoder": {"encoder_embed_dim": 24, "encoder_attention_heads": 3},
    "narrower encoder": {"encoder_embed_dim": 8, **PRE_NORM},
    "one layer, four heads": {"decoder_layers": 1, "decoder_attention_heads": 4},
    "three layers, one head": {"decoder_layers": 3, "decoder_attention_heads": 1},
    "layer drop": {"decoder_layerdrop": 0.5, "decoder_layers": 3},
    "alignment": {"arch": "transformer_align", "decoder_layers": 5},
    "BART": {"arch": "bart_base"},
    "mBART": {"arch": "mbart_base"},
    "T5": T5,
    "T5, gated and untied": T5_GATED,
}


def graphed(made: nn.Module) -> TorchEngine:
    """The passes that become CUDA graphs, operator by operator."""
    return TorchEngine(made, graphs=True)


T5S = ("T5", "T5, gated and untied")
ANY_BATCH = ("pre-norm", "post-norm", "learned positions", "gelu", *T5S)
# What the kernels leave to PyTorch's operators.
NOT_NATIVE = {
    *("output dimension", "shared output projection of a narrower output", "input dimension"),
    *("tanh", "linear", "no cross-attention"),
    *("scale_attn", "scale_fc", "scale_heads", "scale_resids", "NormFormer, pre-norm", "NormFormer, post-norm"),
}
KINDS = {"torch": TorchEngine, "graphed": graphed} | ({"native": NativeEngine} if library() else {})
LACKS = {"torch": set(), "graphed": {"no cross-attention"}, "native": NOT_NATIVE}
CASES = [(kind, name) for kind in KINDS for name in ARCHITECTURES if name not in LACKS[kind]]
needs_kernels = pytest.mark.skipif(library() is None, reason="no C compiler here")
# Few source positions, or many: the decoder attends to them in two different ways.
SOURCES = {"short": (3, 1, 2), "long": (9, 2, 6)}


def build(options: dict) -> nn.Module:
    options = dict(options)
    width = options.pop("input_width", None)
    if width is None:
        return model(2, **options)
    # No command line makes the input embedding narrower than the decoder, but its constructor takes one.
    shared = options.pop("share_decoder_input_output_embed", False)
    made = model(2, **options)
    cfg = made.cfg
    cfg.share_decoder_input_output_embed = shared
    torch.manual_seed(3)
    made.decoder = TransformerDecoderBase(cfg, symbols(), Embedding(len(symbols()), width, symbols().pad()))
    for parameter in made.decoder.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.eval()


@functools.cache
def architecture_model(architecture: str) -> nn.Module:
    """For tests that only read it."""
    return build(ARCHITECTURES[architecture])


def net_input(lengths: Sequence[int]) -> dict:
    return sample([source(range(length - 1)) for length in lengths])["net_input"]


def full(made: nn.Module, lengths: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits after every token, by one full forward pass of the stock model."""
    encoded = made.encoder(**net_input(lengths))
    previous = torch.full((len(tokens), max(map(len, tokens))), symbols().pad())
    for row, one in enumerate(tokens):
        previous[row, : len(one)] = torch.tensor(one)
    logits = made.decoder(previous, encoder_out=encoded)[0]
    return [row[: len(one)] for row, one in zip(logits, tokens, strict=True)]


def read(engine: Engine, state: State, rows: list[int], starts: list[int], chunks: list[list[int]]) -> list[Tensor]:
    """Logits after each token of the chunks, which may differ in length, read from each row's own offset."""
    logits, normalizers = engine.run(state, Pass(rows, starts, chunks, (0, engine.depth), "all"))
    assert_close(normalizers, logits.logsumexp(dim=1))
    return list(logits.clone().split([len(chunk) for chunk in chunks]))


def sentences(lengths: Sequence[int], rng: random.Random) -> list[list[int]]:
    """Decoder inputs of random words; the unknown word and the end symbol may come anywhere."""
    kinds = [symbols().unk(), symbols().eos(), *range(symbols().nspecial, len(symbols()))]
    return [[symbols().eos()] + rng.choices(kinds, k=length - 1) for length in lengths]


def read_at_random(engine: Engine, state: State, wanted: list[list[int]], rng: random.Random) -> list[Tensor]:
    """Reads sentences in chunks of random size, any subset of rows at a time, with drafts that go wrong.

    A wrong draft is read into the cache and then rolled back: the row is read on from before it.
    """
    consumed = [0] * len(wanted)
    found = [[None] * len(one) for one in wanted]
    while unfinished := [row for row, one in enumerate(wanted) if consumed[row] < len(one)]:
        rows = sorted(rng.sample(unfinished, rng.randint(1, len(unfinished))))
        chunks, right = [], []
        for row in rows:
            chunk = wanted[row][consumed[row] :][: rng.randint(1, 7)]
            right.append(len(chunk) if rng.random() < 0.6 else rng.randrange(len(chunk)))
            chunks.append(chunk[: right[-1]] + [symbols().unk()] * (len(chunk) - right[-1]))
        logits = read(engine, state, rows, [consumed[row] for row in rows], chunks)
        for row, some, count in zip(rows, logits, right, strict=True):
            found[row][consumed[row] : consumed[row] + count] = some[:count]
            consumed[row] += count
    return [torch.stack(row) for row in found]


@torch.no_grad()
@pytest.mark.parametrize("lengths", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(("kind", "architecture"), CASES)
def test_equals_the_stock_decoder(kind, architecture, lengths):
    """In ragged batches, over subsets of rows, after rollbacks and beyond the reserved cache."""
    rng = random.Random(7)
    made = architecture_model(architecture)
    engine = KINDS[kind](made)
    tokens = sentences((13, 95, 41), rng)
    state = engine.start(net_input(lengths))
    reserved = state.length
    found = read_at_random(engine, state, tokens, rng)
    assert state.length > reserved
    for got, wanted in zip(found, full(made, lengths, tokens), strict=True):
        assert_close(got, wanted)


@torch.no_grad()
@pytest.mark.parametrize("lengths", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(("kind", "architecture"), CASES)
def test_equals_the_stock_decoder_in_step(kind, architecture, lengths):
    """All rows at the same offset, which has a way of its own, with rollbacks of all of them together."""
    rng = random.Random(8)
    made = architecture_model(architecture)
    engine = KINDS[kind](made)
    tokens = sentences((20, 20, 20), rng)
    state = engine.start(net_input(lengths))
    wanted = full(made, lengths, tokens)
    position = 0
    while position < 20:
        new = min(rng.randint(1, 5), 20 - position)
        chunks = [one[position : position + new] for one in tokens]
        for got, row in zip(read(engine, state, [0, 1, 2], [position] * 3, chunks), wanted, strict=True):
            assert_close(got, row[position : position + new])
        position += rng.randint(1, new)


@torch.no_grad()
@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.sampled_from([case for case in CASES if case[1] in ANY_BATCH]),
    st.randoms(use_true_random=False),
)
def test_equals_the_stock_decoder_for_any_batch(lengths, case, rng):
    """Any number of rows, sources and sentences of any length."""
    kind, architecture = case
    made = architecture_model(architecture)
    engine = KINDS[kind](made)
    tokens = sentences([rng.randint(1, 25) for _ in lengths], rng)
    found = read_at_random(engine, engine.start(net_input(lengths)), tokens, rng)
    for got, wanted in zip(found, full(made, lengths, tokens), strict=True):
        assert_close(got, wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("options", [PRE_NORM, {"decoder_learned_pos": True}], ids=["sinusoidal", "learned"])
def test_reads_up_to_the_last_position(options, kind):
    """The last position that the stock decoder has, and padding of a shorter row beyond it."""
    made = model(2, max_target_positions=12, **options)
    engine = kind(made)
    tokens = sentences((12, 9), random.Random(1))
    state = engine.start(net_input((3, 4)))
    wanted = full(made, (3, 4), tokens)
    read(engine, state, [0, 1], [0, 0], [tokens[0][:11], tokens[1][:2]])
    first, second = read(engine, state, [0, 1], [11, 2], [tokens[0][11:], tokens[1][2:]])
    assert_close(first, wanted[0][11:])
    assert_close(second, wanted[1][2:])


@torch.no_grad()
@pytest.mark.parametrize("lengths", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.5), (torch.float16, 0.06)], ids=str
)
def test_other_precisions(dtype, tolerance, lengths):
    """Computes in the decoder's own precision; the logits come in float32."""
    made = model(2, **PRE_NORM)
    tokens = sentences((8, 11, 5), random.Random(1))
    wanted = full(made, lengths, tokens)
    engine = TorchEngine(made.to(dtype))
    found = read_at_random(engine, engine.start(net_input(lengths)), tokens, random.Random(2))
    for got, one in zip(found, wanted, strict=True):
        assert got.dtype is torch.float32
        assert (got - one).abs().max() < tolerance


@needs_kernels
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_which_architectures_are_native(architecture):
    """The kernels run what they are tested for, and say what they lack of the rest."""
    assert (missing_option(architecture_model(architecture).decoder) is None) == (architecture not in NOT_NATIVE)


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ["pre-norm", "post-norm", "all embeddings shared", "BART", *T5S])
def test_rounded_weights(architecture, precision):
    """The kernels' rounded weights are those of a stock decoder with rounded matrices."""
    made = build(ARCHITECTURES[architecture])
    tokens = sentences((8, 11, 5), random.Random(1))
    engine = NativeEngine(made, precision)
    found = read_at_random(engine, engine.start(net_input(SOURCES["long"])), tokens, random.Random(2))
    for got, one in zip(found, full(rounded_copy(made, precision), SOURCES["long"], tokens), strict=True):
        assert_close(got, one)


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("lengths", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("options", [PRE_NORM, T5, T5_GATED], ids=["Transformer", "T5", "T5, gated"])
def test_native_results_depend_on_nothing_else_in_the_call(options, lengths, precision):
    """To the last bit: token by token, and many tokens of many sentences at once."""
    made = build(options)
    engine = NativeEngine(made, precision)
    tokens = sentences((21, 14, 17), random.Random(3))
    state = engine.start(net_input(lengths))
    together = read(engine, state, [0, 1, 2], [0, 0, 0], tokens)
    for row, one in enumerate(tokens):
        for position, token in enumerate(one):
            (alone,) = read(engine, state, [row], [position], [[token]])
            assert torch.equal(alone[0], together[row][position])


def custom(base: type, method: str) -> type:
    """A subclass whose ``method`` is its own."""
    return type("Custom", (base,), {method: lambda self, *args, **kwargs: getattr(base, method)(self, *args, **kwargs)})


def with_decoder_class(method: str) -> nn.Module:
    made = model(0)
    made.decoder.__class__ = custom(TransformerDecoder, method)
    return made


def with_layer_class() -> nn.Module:
    made = model(0)
    made.decoder.layers[1].__class__ = custom(TransformerDecoderLayerBase, "forward")
    return made


def with_foreign_layer() -> nn.Module:
    made = model(0)
    made.decoder.layers.append(nn.Identity())
    return made


def with_attention(**options: bool) -> nn.Module:
    made = model(0)
    width, heads = SIZE["decoder_embed_dim"], SIZE["decoder_attention_heads"]
    made.decoder.layers[1].self_attn = MultiheadAttention(width, heads, self_attention=True, **options)
    return made


def with_xformers() -> nn.Module:
    made = model(0)
    made.decoder.layers[0].self_attn.use_xformers = True
    return made


def with_lstm() -> nn.Module:
    made = model(0)
    made.decoder = LSTMDecoder(symbols())
    return made


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: model(0, adaptive_softmax_cutoff="8,16"), "--adaptive-softmax-cutoff"),
        (lambda: model(0, cross_self_attention=True), "--cross-self-attention"),
        (lambda: model(0, quant_noise_pq=0.1, quant_noise_pq_block_size=4), "--quant-noise-pq"),
        (with_xformers, "--decoder-xformers-att-config"),
        (lambda: with_attention(add_bias_kv=True), "add_bias_kv"),
        (lambda: with_attention(add_zero_attn=True), "add_zero_attn"),
        (lambda: with_decoder_class("extract_features"), "Custom computes extract_features"),
        (lambda: with_decoder_class("extract_features_scriptable"), "Custom computes extract_features_scriptable"),
        (lambda: with_decoder_class("output_layer"), "Custom computes output_layer"),
        (with_layer_class, "Custom computes forward"),
        (with_foreign_layer, "layer of type Identity"),
        (with_lstm, "LSTMDecoder"),
    ],
)
def test_what_it_cannot_run_is_refused_by_name(make, named):
    """By the decoder itself, and in one line that says which model by the generator."""
    made, fine = make(), model(1)
    with pytest.raises(BildError, match=named):
        TorchEngine(made)
    for large, small, role in ((made, fine, "large"), (fine, made, "small")):
        with pytest.raises(BildError, match=named) as caught:
            generator([large], [small], Rules())
        assert role in str(caught.value)
        assert "\n" not in str(caught.value)


def test_projections_go_side_by_side():
    torch.manual_seed(4)
    parts = [nn.Linear(6, width) for width in (3, 5, 2)]
    x = torch.randn(4, 6)
    with torch.no_grad():
        assert_close(projection(*parts)(x), torch.cat([part(x) for part in parts], dim=1))


def test_norm_is_the_layer_norm():
    torch.manual_seed(4)
    module = nn.LayerNorm(6, eps=1e-3)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    x = torch.randn(4, 6)
    with torch.no_grad():
        assert_close(norm(module)(x), module(x))
    assert norm(None) is None
