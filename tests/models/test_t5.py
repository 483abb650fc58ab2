"""T5 in fairseq computes what `transformers` computes, trains, and has exits.

Models are random ones of every variant, saved by `transformers` and converted.
"""

import math
from argparse import Namespace

import pytest
import t5_support
import torch
import torch.nn.functional as F
from fairseq import options
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY, build_model
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from t5_support import SIZE, VARIANTS, batches, padded, source_batch, sources, to_fairseq
from transformers import T5Config as HFConfig
from transformers.models.t5.modeling_t5 import T5Attention as HFAttention

import bild_fairseq
from bild_fairseq.criterions import EarlyExitLabelSmoothedCrossEntropyCriterion
from bild_fairseq.models import exit_model
from bild_fairseq.models.t5_config import T5Config
from bild_fairseq.models.t5_layers import RelativeAttentionBias

PAD, EOS, START = 1, 2, 0  # fairseq's; START is the row of <s>
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Variant -> the model of `transformers`, the same in fairseq, and its dictionary."""
    return {variant: t5_support.converted(tmp_path_factory.mktemp("t5"), variant) for variant in VARIANTS}


def hf_inputs(rows):
    ids = padded(rows, 0, left=False)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@each_variant
def test_encoder_and_decoder_equal_those_of_transformers(models, variant):
    """Sources are padded on the left here and on the right there; positions are relative."""
    theirs, ours, _ = models[variant]
    rows = sources(12)
    targets = [[0, *row[:-1]] for row in sources(12, seed=6)]
    with torch.no_grad():
        wanted = theirs(**hf_inputs(rows), decoder_input_ids=padded(targets, 0, left=False))
        encoder_out = ours.encoder(**source_batch(rows)["net_input"])
        # fairseq puts </s> first.
        previous = padded([[EOS, *to_fairseq(row[1:])] for row in targets], PAD, left=False)
        logits = ours.decoder(previous, encoder_out)[0]  # (batch, time, vocab)
    hidden = encoder_out["encoder_out"][0].transpose(0, 1)  # (batch, source, d_model)
    for row, source in enumerate(rows):
        close(hidden[row, -len(source) :], wanted.encoder_last_hidden_state[row, : len(source)])
    for row, target in enumerate(targets):
        # T5's padding stands at <pad>, its other types follow in T5's order.
        close(logits[row, : len(target), PAD:], wanted.logits[row, : len(target)])


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@each_variant
def test_probabilities_are_those_of_transformers(models, variant):
    """<s>, which T5 does not have, takes nothing from the others, in either form."""
    theirs, ours, _ = models[variant]
    rows = sources(3)
    with torch.no_grad():
        wanted = theirs(**hf_inputs(rows), decoder_input_ids=torch.zeros(3, 1, dtype=torch.long)).logits
        net_output = ours(**source_batch(rows)["net_input"], prev_output_tokens=torch.full((3, 1), EOS))
    probs = ours.get_normalized_probs(net_output, log_probs=False)
    lprobs = ours.get_normalized_probs(net_output, log_probs=True)
    assert not probs[..., START].any() and not lprobs[..., START].exp().any()
    assert lprobs.isfinite().all()
    close(probs[..., PAD:], wanted.softmax(-1))
    close(lprobs[..., PAD:], wanted.log_softmax(-1))


def hf_generate(model, rows, **search):
    """T5's ids without the start symbol, up to the end symbol, for each sentence; padding is not allowed.

    Returns:
        the texts; and with a beam their scores.
    """
    search |= {"do_sample": False, "suppress_tokens": [0], "output_scores": True, "return_dict_in_generate": True}
    found = model.generate(**hf_inputs(rows), **search)
    texts = [row[1 : row.index(1, 1) + 1] if 1 in row else row[1:] for row in found.sequences.tolist()]
    return texts, getattr(found, "sequences_scores", None)


@each_variant
def test_greedy_text_equals_that_of_transformers(models, variant):
    """200 sources of 2 to 25 tokens, in batches; the end that fairseq forces at the maximum length is left out."""
    theirs, ours, dictionary = models[variant]
    limit = 24
    generator = SequenceGenerator([ours], dictionary, beam_size=1, max_len_b=limit, min_len=0)
    ended = 0
    for rows in batches(sources(200), 20):
        wanted, _ = hf_generate(theirs, rows, max_new_tokens=limit, num_beams=1)
        found = generator.generate([ours], source_batch(rows))
        got = [hypotheses[0]["tokens"].tolist()[:limit] for hypotheses in found]
        assert got == [to_fairseq(row) for row in wanted]
        ended += sum(row[-1] == EOS for row in got)
    assert 80 < ended < 200


@each_variant
def test_beam_search_equals_that_of_transformers(models, variant):
    """Stock beam 4: the best text and its score, wherever all four texts end before the maximum length."""
    theirs, ours, dictionary = models[variant]
    limit, beam = 24, 4
    generator = SequenceGenerator([ours], dictionary, beam_size=beam, max_len_b=limit, min_len=0)
    search = {"num_beams": beam, "early_stopping": True, "length_penalty": 1.0, "max_new_tokens": limit}
    compared = 0
    for rows in batches(sources(100), 20):
        wanted, scores = hf_generate(theirs, rows, **search)
        for number, hypotheses in enumerate(generator.generate([ours], source_batch(rows))):
            if all(len(hypothesis["tokens"]) < limit for hypothesis in hypotheses):
                assert hypotheses[0]["tokens"].tolist() == to_fairseq(wanted[number])
                close(hypotheses[0]["score"], scores[number])
                compared += 1
    assert compared > 40


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (4, 3), (12, 100)])
def test_biases_equal_those_of_transformers_at_every_distance(decoder, buckets, distance):
    """Distances on the border of two buckets are rounded to the same side."""
    options = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance}
    ours = RelativeAttentionBias(T5Config(**options, num_heads=1), bidirectional=not decoder)
    config = HFConfig(**options, num_heads=1, is_decoder=decoder)
    theirs = HFAttention(config, has_relative_attention_bias=True, layer_idx=0)
    theirs.relative_attention_bias.weight = ours.weight
    positions = torch.arange(400)
    assert torch.equal(ours(positions, positions), theirs.compute_bias(400, 400)[0])


@each_variant
def test_position_bias_is_the_same_at_any_offset_and_in_any_row(models, variant):
    """What a cached decoder needs: rows that are at different positions, and several new tokens each."""
    decoder = models[variant][1].decoder
    everywhere = decoder.position_bias(torch.arange(40), torch.arange(40))  # (heads, 40, 40)
    starts = torch.tensor([3, 30])
    rows = decoder.position_bias(starts[:, None] + torch.arange(4), torch.arange(40).expand(2, -1))
    for row, start in enumerate(starts.tolist()):
        assert torch.equal(rows[row], everywhere[:, start : start + 4])


@each_variant
def test_steps_with_a_state_equal_one_pass(models, variant):
    """Also when the batch is put into another order on the way, as beam search does."""
    model = models[variant][1]
    rows = sources(4)
    targets = torch.tensor([[EOS, *to_fairseq(row[:12])] for row in sources(40, seed=8) if len(row) > 12][:4])
    order = torch.tensor([2, 0, 0, 3])
    with torch.no_grad():
        encoder_out = model.encoder(**source_batch(rows)["net_input"])
        state = {}
        for step in range(1, 8):
            model.decoder(targets[:, :step], encoder_out, state)
        model.decoder.reorder_incremental_state_scripting(state, order)
        reordered, targets = model.encoder.reorder_encoder_out(encoder_out, order), targets[order]
        for step in range(8, targets.size(1) + 1):
            got = model.decoder(targets[:, :step], reordered, state)[0]
            close(got[:, 0], model.decoder(targets[:, :step], reordered)[0][:, -1])


# Models that fairseq builds itself, on a dictionary that nobody converted.


def task():
    dictionary = Dictionary()
    for number in range(20):
        dictionary.add_symbol(f"w{number}")
    return TranslationTask(TranslationConfig(source_lang="x", target_lang="y"), dictionary, dictionary)


def new_model(arch="t5", **changes):
    torch.manual_seed(2)
    return build_model(Namespace(arch=arch, **{**SIZE, "dropout": 0.0, **changes}), task())


def sample():
    """Three sentence pairs whose targets have 5, 3 and 2 tokens."""
    target = padded([[6, 7, 8, 9, EOS], [10, 11, EOS], [12, EOS]], PAD, left=False)
    previous = padded([[EOS, 6, 7, 8, 9], [EOS, 10, 11], [EOS, 12]], PAD, left=False)
    net_input = source_batch([[4, 5, 6, 1], [7, 8, 1], [9, 1]])["net_input"]
    return {"net_input": {**net_input, "prev_output_tokens": previous}, "target": target, "ntokens": 10}


def test_every_size_has_its_early_exit_version():
    sizes = {
        *(f"t5_{size}" for size in ("small", "base", "large", "3b", "11b")),
        *(
            f"{name}_{size}"
            for name in ("t5_v1_1", "mt5", "flan_t5")
            for size in ("small", "base", "large", "xl", "xxl")
        ),
    }
    for arch in sizes | {"t5"}:
        assert {arch, f"early_exit_{arch}"} <= ARCH_MODEL_REGISTRY.keys()


def test_command_line_options(monkeypatch):
    """An architecture gives the sizes, a flag wins, and the decoder is as deep as the encoder unless told otherwise."""
    # fairseq looks for --user-dir in sys.argv, which here belongs to the test runner.
    monkeypatch.setattr("sys.argv", ["fairseq-train"])
    parser = options.get_training_parser()
    common = ["data", "--user-dir", bild_fairseq.__path__[0], "--arch"]
    mt5 = options.parse_args_and_arch(parser, [*common, "early_exit_mt5_small", "--tie-word-embeddings"])
    assert (mt5.d_model, mt5.num_heads * mt5.d_kv, mt5.num_decoder_layers) == (512, 384, 8)
    assert (mt5.tie_word_embeddings, mt5.scale_decoder_outputs, mt5.exit_layers) == (True, False, [1])
    small = options.parse_args_and_arch(options.get_training_parser(), [*common, "t5", "--num-layers", "3"])
    assert (small.num_layers, small.num_decoder_layers, small.feed_forward_proj) == (3, 3, "relu")


@pytest.mark.parametrize("arch", ["t5", "mt5_small"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_stock_criterion_trains_it(arch, smoothing):
    """The loss is finite, falls, and is that of the rows that the model has but for a constant."""
    model = new_model(arch, missing_rows=2).train()
    criterion = LabelSmoothedCrossEntropyCriterion(task(), False, smoothing)
    net_output = model(**sample()["net_input"])
    kept = sample()["target"] != PAD
    logits = net_output[0][kept][:, 1:-2]  # without <s> and the two missing rows
    target = sample()["target"][kept]
    share = smoothing / (net_output[0].size(-1) - 1)
    nll = F.cross_entropy(logits, target - 1, reduction="none")
    expected = (1 - smoothing - share) * nll - share * logits.log_softmax(-1).sum(-1)
    loss, _, _ = criterion(model, sample())
    constant = 3 * share * 105.0 * kept.sum()
    assert loss.item() == pytest.approx(expected.sum().item() + constant.item(), rel=1e-5)
    train(model, criterion)
    assert criterion(model, sample())[2]["nll_loss"] / 10 < 0.5 < nll.mean()


def train(model, criterion, updates=40):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(updates):
        optimizer.zero_grad()
        criterion(model, sample())[0].backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_no_parameter_is_left_out_of_training():
    """A distributed wrapper waits for the gradient of every parameter."""
    for arch in ("t5", "mt5_small"):
        model = new_model(arch).train()
        LabelSmoothedCrossEntropyCriterion(task(), False, 0.1)(model, sample())[0].backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("arch", ["t5", "mt5_small"])
def test_an_exit_learns_and_is_a_t5_with_fewer_layers(arch, own):
    """Distillation included; both ways to an exit's scores agree, and the missing row stays out."""
    exits = {"exit_layers": "1,2", "exit_share_output_projection": not own, "num_decoder_layers": 3}
    model = new_model(f"early_exit_{arch}", **exits).train()
    criterion = EarlyExitLabelSmoothedCrossEntropyCriterion(task(), False, 0.1, exit_distill=0.3)
    before = criterion(model, sample())[2]["exit1_nll_loss"].item()
    train(model, criterion)
    log = criterion(model, sample())[2]
    assert log["exit1_nll_loss"].item() / 10 < 0.5 < before / 10
    assert log["exit1_n_correct"] == 10 and math.isfinite(log["exit1_kl"])
    model.eval()
    with torch.no_grad():
        heads = model(**sample()["net_input"], return_exit_logits=True)[1]["exit_logits"]
        for layer in (1, 2):
            small = exit_model(model, layer)
            assert len(small.decoder.layers) == small.cfg.num_decoder_layers == layer
            logits = small(**sample()["net_input"])[0]
            torch.testing.assert_close(heads[layer], logits, rtol=0, atol=1e-5)
            assert not logits.softmax(-1)[..., START].any()


def test_plain_checkpoint_gives_the_exits_its_own_head():
    plain = new_model("mt5_small", num_decoder_layers=3)
    model = new_model("early_exit_mt5_small", num_decoder_layers=3, exit_share_output_projection=False)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(model.decoder.exit_layer_norm(1).weight, plain.decoder.layer_norm.weight)
    assert torch.equal(model.decoder.exit_output_projection(1).weight, plain.decoder.output_projection.weight)
    assert torch.equal(model(**sample()["net_input"])[0], plain(**sample()["net_input"])[0])


def test_half_precision_computes_nearly_the_same():
    """bfloat16, which T5 is trained in: no norm or softmax loses its range."""
    model = new_model("mt5_small").eval()
    wanted = model(**sample()["net_input"])[0].softmax(-1)
    got = model.bfloat16()(**sample()["net_input"])[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float().softmax(-1), wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, r"--feed-forward-proj gated-silu is not supported; it must be relu or"),
        ({"num_heads": 0}, r"--num-heads 0: give a number above 0"),
        ({"missing_rows": -1}, r"--missing-rows -1"),
        ({"relative_attention_num_buckets": 2}, r"--relative-attention-num-buckets 2: give at least 4"),
        ({"relative_attention_max_distance": 16}, r"--relative-attention-max-distance 16: .* more than 16"),
        ({"arch": "early_exit_t5", "exit_layers": "2"}, r"with --num-decoder-layers 2 the highest exit is 1"),
        ({"arch": "early_exit_t5", "num_decoder_layers": 1}, r"--num-decoder-layers 1 leaves no layer"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(chosen, message):
    with pytest.raises(ValueError, match=message) as caught:
        new_model(**{"arch": "t5", **chosen})
    assert "\n" not in str(caught.value)


def test_data_that_t5_cannot_have_is_refused():
    other = Dictionary()
    config = TranslationConfig(source_lang="x", target_lang="y")
    with pytest.raises(ValueError, match="T5 has one dictionary for both sides"):
        build_model(Namespace(arch="t5", **SIZE), TranslationTask(config, other, task().target_dictionary))
    left = TranslationTask(TranslationConfig(left_pad_target=True), other, other)
    with pytest.raises(ValueError, match="leave --left-pad-target out"):
        build_model(Namespace(arch="t5", **SIZE), left)
