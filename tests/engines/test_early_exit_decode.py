"""Early exit: one decoder drafts from its shallow layers and verifies with the rest."""

import dataclasses
import functools
import math
from argparse import Namespace
from typing import Any

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SMALL, Rules, bild
from support import (
    LIMITS,
    NGRAMS,
    PADDING,
    POLICY,
    PRE_NORM,
    SOURCES,
    any_rules,
    assert_like_reference,
    assert_same_hypothesis,
    count_positions,
    generator,
    long_case,
    model,
    prefix_batch,
    sample,
    source,
    symbols,
    task,
)
from torch import nn

from bild_fairseq.decoding.policies import Policy
from bild_fairseq.errors import BildError
from bild_fairseq.models import exit_model
from bild_fairseq.plugin.draft_vocabulary import DraftVocabulary
from bild_fairseq.plugin.generator import BildGenerator
from bild_fairseq.plugin.pair import Pair

OWN = {"exit_share_output_projection": False}
VARIANTS = {
    "pre-norm": PRE_NORM,
    "post-norm, own projections": {"decoder_learned_pos": True, **OWN},
    "pre-norm, own projections": {"decoder_learned_pos": True, **PRE_NORM, **OWN},
    "output dimension": {"decoder_output_dim": 10, **PRE_NORM},
    "BART": {"arch": "early_exit_bart_base"},
    "own layers": {"exit_own_layers": 1},
    "pre-norm, own layers": {"exit_own_layers": 2, **PRE_NORM, **OWN},
}
DEPTH = 3


@functools.cache
def early_exit(variant: str, seed: int) -> nn.Module:
    """A model with exits at layers 1 and 2 of 3 that often agree with the last layer."""
    options = {"arch": "early_exit_transformer", **VARIANTS[variant]}
    made = model(seed, exit_layers="1,2", decoder_layers=DEPTH, **options)
    decoder = made.decoder
    with torch.no_grad():
        for layer in decoder.layers[1:]:
            for projection in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
                projection.weight *= 0.15
        # The exits' own heads are near the final one, as after training.
        for name, parameter in [*decoder.exit_layer_norms.named_parameters()]:
            parameter.copy_(decoder.layer_norm.get_parameter(name.partition(".")[2]))
        for parameter in decoder.exit_output_projections.parameters():
            parameter.mul_(0.1).add_(decoder.output_projection.weight)
    return made


ANY_MODEL = st.builds(early_exit, st.sampled_from(list(VARIANTS)), st.integers(0, 2))
EXIT = st.integers(1, DEPTH - 1)


def hypotheses(made: Any, batch: dict, **more: Any) -> list[dict[str, Any]]:
    return [one for (one,) in made.generate([], batch, **more)]


def stock(made: nn.Module, rules: Rules) -> SequenceGenerator:
    return SequenceGenerator([made], symbols(), beam_size=1, max_len_b=rules.max_len, min_len=rules.min_len)


@settings(max_examples=40)
@given(ANY_MODEL, EXIT, any_rules(**POLICY, **LIMITS, **NGRAMS), SOURCES, PADDING)
def test_equals_two_models_and_the_reference(full, exit_layer, rules, sources, padding):
    """Sharing encoder, cache and hidden states changes nothing: the exit as a model of its own decodes the same."""
    small = exit_model(full, exit_layer)
    batch = sample(sources, padding)
    found = hypotheses(generator([full], [], rules, exit_layer=exit_layer), batch)
    wanted = hypotheses(generator([full], [small], rules), batch)
    for one, hypothesis, two_models in zip(sources, found, wanted, strict=True):
        assert_same_hypothesis(hypothesis, two_models)
        assert_like_reference(hypothesis, bild([full], [small], one, symbols(), rules))


@settings(max_examples=20)
@given(ANY_MODEL, EXIT, any_rules(**POLICY, **LIMITS), SOURCES, st.sampled_from(["float16", "int8"]), st.booleans())
def test_an_exit_with_another_precision_equals_two_models(full, exit_layer, rules, sources, precision, few):
    """It reads its layers anew in that precision; the large model's pass begins at the bottom, as without exits."""
    types = DraftVocabulary.of(range(7, len(symbols())), symbols()).types if few else None
    rules = dataclasses.replace(rules, draft_types=types)
    batch = sample(sources)
    found = hypotheses(generator([full], [], rules, exit_layer=exit_layer, small_precision=precision), batch)
    wanted = hypotheses(generator([full], [exit_model(full, exit_layer)], rules, small_precision=precision), batch)
    for hypothesis, two_models in zip(found, wanted, strict=True):
        assert_same_hypothesis(hypothesis, two_models)


@pytest.mark.parametrize("seed", range(12))
def test_long_sentences_equal_two_models(seed):
    """Rows that drift far apart, and a cache that outgrows what the sources' length reserved."""
    rules, sources = long_case(seed)
    full, exit_layer = early_exit(list(VARIANTS)[seed % len(VARIANTS)], seed % 3), 1 + seed % 2
    batch = sample(sources)
    found = hypotheses(generator([full], [], rules, exit_layer=exit_layer), batch)
    wanted = hypotheses(generator([full], [exit_model(full, exit_layer)], rules), batch)
    for hypothesis, two_models in zip(found, wanted, strict=True):
        assert_same_hypothesis(hypothesis, two_models)


PREFIXES = st.lists(st.lists(st.integers(symbols().eos(), len(symbols()) - 1), max_size=5), min_size=4, max_size=4)


@given(ANY_MODEL, EXIT, any_rules(**POLICY), SOURCES, PREFIXES)
def test_forced_prefixes_equal_the_reference(full, exit_layer, rules, sources, prefixes):
    """Prefixes of different lengths, which may end in the end symbol, scored by who reads them first and last."""
    eos = symbols().eos()
    prefixes = [one[: one.index(eos) + 1] if eos in one else one for one in prefixes[: len(sources)]]
    small = exit_model(full, exit_layer)
    made = generator([full], [], rules, exit_layer=exit_layer)
    found = hypotheses(made, sample(sources), prefix_tokens=prefix_batch(prefixes))
    for one, prefix, hypothesis in zip(sources, prefixes, found, strict=True):
        alone = Rules(**{**vars(rules), "prefix": tuple(prefix)})
        assert_like_reference(hypothesis, bild([full], [small], one, symbols(), alone))


@settings(max_examples=15)
@given(any_rules(**POLICY), SOURCES)
def test_ensembles_equal_the_reference(rules, sources):
    """Two early-exit models: the exits are one ensemble, the full depths the other."""
    full = [early_exit("pre-norm", 0), early_exit("BART", 1)]
    small = [exit_model(one, 2) for one in full]
    found = hypotheses(generator(full, [], rules, exit_layer=2), sample(sources))
    for one, hypothesis in zip(sources, found, strict=True):
        assert_like_reference(hypothesis, bild(full, small, one, symbols(), rules))


@given(ANY_MODEL, EXIT, any_rules(**POLICY), SOURCES, st.randoms(use_true_random=False))
def test_a_sentence_does_not_depend_on_its_batch(full, exit_layer, rules, sources, random):
    made = generator([full], [], rules, exit_layer=exit_layer)
    order = random.sample(range(len(sources)), len(sources))
    together = hypotheses(made, sample([sources[row] for row in order], extra_padding=1))
    for row, hypothesis in zip(order, together, strict=True):
        (alone,) = hypotheses(made, sample([sources[row]]))
        assert_same_hypothesis(hypothesis, alone)


@given(ANY_MODEL, EXIT, SOURCES)
def test_an_exit_alone_is_its_model_decoding_greedily(full, exit_layer, sources):
    """``--generator greedy`` with an exit: fairseq's greedy output of the truncated model, in large calls."""
    rules = Rules()
    batch = sample(sources)
    wanted = hypotheses(stock(exit_model(full, exit_layer), rules), batch)
    found = hypotheses(generator([full], [], rules, exit_layer=exit_layer, alone=True), batch)
    for hypothesis, greedy in zip(found, wanted, strict=True):
        assert_same_hypothesis(hypothesis, greedy)
        assert hypothesis["counters"].large_calls == hypothesis["counters"].tokens
        assert hypothesis["counters"].small_calls == 0


@pytest.mark.parametrize("small_precision", [None, "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lossless_is_fairseqs_greedy_output_of_the_full_depth(variant, small_precision):
    """Rollback threshold 0 with a verified end, whatever the exit drafts, and in whatever precision."""
    full = early_exit(variant, 0)
    rules = Rules(fallback_threshold=0.2, rollback_threshold=0.0, verify_end=True, start=SMALL)
    batch = sample([source(range(start, 2 * start + 1)) for start in range(5)])
    wanted = hypotheses(stock(full, rules), batch)
    for exit_layer in (1, 2):
        made = generator([full], [], rules, exit_layer=exit_layer, small_precision=small_precision)
        for hypothesis, greedy in zip(hypotheses(made, batch), wanted, strict=True):
            assert_same_hypothesis(hypothesis, greedy)


def test_an_exit_with_another_precision_alone():
    """Its pair drafts with it in that precision; alone it decodes in it, and that is what the flags say."""
    full, batch = early_exit("pre-norm", 0), sample([source([1, 2, 3, 4]), source([5])])
    made = Pair([full], exit_layer=2, small_precision="int8", large_path="large.pt")
    assert made.flags() == "--path large.pt --generator bild --bild-exit-layer 2 --bild-small-precision int8"
    alone = made.small_alone()
    assert alone.flags() == "--path large.pt --generator greedy --bild-exit-layer 2 --bild-precision int8"
    found = hypotheses(BildGenerator(alone, symbols(), Policy()), batch)
    wanted = hypotheses(
        BildGenerator(Pair([exit_model(full, 2)], alone=True, precision="int8"), symbols(), Policy()), batch
    )
    for hypothesis, greedy in zip(found, wanted, strict=True):
        assert_same_hypothesis(hypothesis, greedy)
    with pytest.raises(BildError, match="nothing drafts"):
        Pair([full], alone=True, small_precision="int8")


def test_an_exit_keeps_its_engine_until_its_weights_change():
    full = early_exit("pre-norm", 1)
    first, second = (Pair([full], exit_layer=1, small_precision="int8") for _ in range(2))
    assert first.small_engines == second.small_engines
    with torch.no_grad():
        full.decoder.exit_layer_norms["1"].weight.mul_(2)
    assert Pair([full], exit_layer=1, small_precision="int8").small_engines != first.small_engines


def test_the_random_exits_draft_tokens_of_every_fate():
    """Guards the other tests: with these models drafts are accepted, discarded and left unverified."""
    seen = dict.fromkeys(("fallbacks", "rollbacks", "accepted", "discarded", "unverified"), 0)
    rules = Rules(fallback_threshold=0.4, rollback_threshold=1.0, max_draft=4)
    batch = sample([source(range(start, 2 * start + 1)) for start in range(6)])
    for variant in VARIANTS:
        for hypothesis in hypotheses(generator([early_exit(variant, 0)], [], rules, exit_layer=1), batch):
            for name in seen:
                seen[name] += getattr(hypothesis["counters"], name)
    assert all(seen.values()), seen


@settings(max_examples=40)
@given(ANY_MODEL, EXIT, any_rules(**POLICY), SOURCES)
def test_no_layer_runs_twice_over_a_token(full, exit_layer, rules, sources):
    """Shallow layers run once over each token ever written, drafts included; deep ones once over what they verify.

    The token written last is not read; an end symbol that the large model accepts may be, to no harm.
    """
    positions = count_positions(full)
    made = generator([full], [], rules, exit_layer=exit_layer)
    (hypothesis,) = hypotheses(made, sample(sources[:1]))
    c = hypothesis["counters"]
    written = 1 + c.tokens + c.discarded  # the start symbol included
    read_by_exit = written - 1
    read_by_all = written - 1 - c.unverified if c.large_calls else 0
    end = int(rules.verify_end)
    assert set(positions[:exit_layer]) <= {read_by_exit, read_by_exit + end}
    assert set(positions[exit_layer:]) <= {read_by_all, read_by_all + end}
    assert len(set(positions[:exit_layer])) == len(set(positions[exit_layer:])) == 1


def test_an_exit_alone_runs_no_deeper_layer():
    full = early_exit("pre-norm", 1)
    positions = count_positions(full)
    made = generator([full], [], Rules(), exit_layer=1, alone=True)
    (hypothesis,) = hypotheses(made, sample([source([1, 2])]))
    assert positions == [len(hypothesis["tokens"]), 0, 0]


def built(full: nn.Module, **args: Any) -> Any:
    return task().build_generator([full], Namespace(beam=1, **args))


def test_the_command_line_chooses_the_exit():
    """The lowest exit drafts unless ``--bild-exit-layer`` names another; ``greedy`` uses full depth unless it does."""
    full = early_exit("pre-norm", 2)
    batch = sample([source(range(4)), source([7])])
    rules = Rules(fallback_threshold=0.6, rollback_threshold=2.0, max_len=99)
    for args, exit_layer, alone in (
        ({"generator": "bild"}, 1, False),
        ({"generator": "bild", "bild_exit_layer": 2}, 2, False),
        ({"generator": "greedy"}, None, True),
        ({"generator": "greedy", "bild_exit_layer": 2}, 2, True),
    ):
        wanted = hypotheses(generator([full], [], rules, exit_layer=exit_layer, alone=alone), batch)
        for hypothesis, one in zip(hypotheses(built(full, **args), batch), wanted, strict=True):
            assert_same_hypothesis(hypothesis, one)


@pytest.mark.parametrize("name", ["bild", "greedy"])
def test_an_exit_that_is_not_there_is_refused(name):
    with pytest.raises(BildError, match="no exit at layer 3; its exits: 1, 2"):
        built(early_exit("pre-norm", 0), generator=name, bild_exit_layer=3)
    with pytest.raises(BildError, match="has no exits"):
        built(model(0), generator=name, bild_exit_layer=1)


def test_nan_names_the_sentence_and_leaves_the_others_alone(caplog):
    """Shallow and deep layers share hidden states by row; one row's NaN stays in it."""
    poison = 13
    full = model(1, "early_exit_transformer", exit_layers="1,2", decoder_layers=DEPTH, **PRE_NORM)
    sources = [source([1, 2, 3]), source([4, poison]), source([6])]
    rules = Rules(fallback_threshold=0.3, rollback_threshold=1.5)
    wanted = hypotheses(generator([full], [], rules, exit_layer=1), sample(sources))
    with torch.no_grad():
        full.encoder.embed_tokens.weight[symbols().nspecial + poison] = math.nan
    found = hypotheses(generator([full], [], rules, exit_layer=1), sample(sources, ids=[40, 41, 42]))
    for row in (0, 2):
        assert_same_hypothesis(found[row], wanted[row])
    assert found[1]["score"] == -math.inf
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "41" in warning
