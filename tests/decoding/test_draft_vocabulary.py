"""A small model that drafts among some types only, against the naive reference, whose other logits are -inf."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SMALL, Rules, bild
from support import (
    LIMITS,
    PADDING,
    POLICY,
    PRE_NORM,
    SOURCES,
    any_rules,
    assert_like_reference,
    generator,
    long_case,
    model,
    pair,
    prefix_batch,
    sample,
    source,
    symbols,
)
from torch import nn

from bild_fairseq.engines.choose import engine_for, remember
from bild_fairseq.engines.native.build import library
from bild_fairseq.engines.torch.engine import TorchEngine
from bild_fairseq.errors import BildError
from bild_fairseq.models import exit_model
from bild_fairseq.plugin.draft_vocabulary import DraftVocabulary
from bild_fairseq.plugin.pair import Pair

EOS, PAD, UNK, SPECIAL = symbols().eos(), symbols().pad(), symbols().unk(), symbols().nspecial


def types_of(words: set[int]) -> tuple[int, ...]:
    return DraftVocabulary.of([SPECIAL + word for word in words], symbols()).types


SOME = types_of(set(range(0, 20, 3)))
# Few of them: a head is proved when it is first cut.
VOCABULARY = st.sampled_from([SOME, types_of({4}), types_of(set(range(12)))])
DRAFTING = {**POLICY, "draft_types": VOCABULARY}
PAIRS = [pair("agreeing", 0), pair("quarrelling", 1), pair("agreeing, post-norm", 2), pair("unrelated", 3)]
MODELS = st.sampled_from(PAIRS)


@functools.cache
def with_engine(kind: str, made: nn.Module) -> nn.Module:
    """A copy of a model that an engine of some kind runs; graphs are not captured on a CPU."""
    made = copy.deepcopy(made)
    if kind != "native":
        remember(made, "float32", TorchEngine(made, graphs=kind == "graphs"))
    return made


KINDS = ["torch", "graphs", *(["native"] if library() else [])]
kinds = pytest.mark.parametrize("kind", KINDS)


def assert_all_like_reference(large, small, rules, sources, padding=0, prefixes=(), **more):
    """Every sentence of a batch; ``more`` goes to the generator, whose exits are ``small`` where it has some."""
    made = generator(large, [] if "exit_layer" in more else small, rules, **more)
    prefixes = prefixes or [()] * len(sources)
    found = made.generate([], sample(sources, padding), prefix_tokens=prefix_batch(prefixes))
    for one, prefix, (hypothesis,) in zip(sources, prefixes, found, strict=True):
        alone = dataclasses.replace(rules, prefix=tuple(prefix))
        assert_like_reference(hypothesis, bild(large, small, one, symbols(), alone))


@kinds
@settings(max_examples=15)
@given(MODELS, any_rules(**DRAFTING, **LIMITS), SOURCES, PADDING)
def test_equals_the_reference(kind, models, rules, sources, padding):
    """Tokens, counters and scores, for any types, thresholds, rules, constraints, batches and padding."""
    large, small = (with_engine(kind, one) for one in models)
    assert_all_like_reference([large], [small], rules, sources, padding)


@kinds
def test_long_sentences_equal_the_reference(kind):
    """Rows that drift far apart."""
    rules, sources = long_case(KINDS.index(kind))
    large, small = (with_engine(kind, one) for one in PAIRS[0])
    assert_all_like_reference([large], [small], dataclasses.replace(rules, draft_types=SOME), sources[:2])


ENDING = st.lists(st.integers(SPECIAL, len(symbols()) - 1) | st.just(UNK), max_size=5).flatmap(
    lambda tokens: st.sampled_from([tokens, [*tokens, EOS]])
)


@kinds
@settings(max_examples=15)
@given(MODELS, any_rules(**DRAFTING, **LIMITS), st.lists(st.tuples(SOURCES, ENDING), min_size=1, max_size=3))
def test_forced_prefixes_are_scored_over_all_types(kind, models, rules, drawn):
    """Their tokens need not be in the draft vocabulary; whoever reads them first scores them."""
    large, small = (with_engine(kind, one) for one in models)
    sources, prefixes = [sources[0] for sources, _ in drawn], [prefix for _, prefix in drawn]
    assert_all_like_reference([large], [small], rules, sources, prefixes=prefixes)


@kinds
@settings(max_examples=15)
@given(MODELS, any_rules(**POLICY, max_len=st.integers(1, 9), no_repeat_ngram_size=st.integers(1, 3)), SOURCES)
def test_n_gram_blocking_equals_the_reference(kind, models, rules, sources):
    large, small = (with_engine(kind, one) for one in models)
    rules = dataclasses.replace(rules, draft_types=types_of(set(range(2, 14))))
    assert_all_like_reference([large], [small], rules, sources)


def test_types_that_n_gram_blocking_could_use_up_are_refused():
    """The fewest that are enough: one for each position, and the end symbol, which blocking forbids as well."""
    large, small = pair("agreeing", 0)
    rules = Rules(draft_types=SOME, max_len=len(SOME) - 1, no_repeat_ngram_size=1, start=SMALL, min_len=0)
    rules = dataclasses.replace(rules, fallback_threshold=0.0, rollback_threshold=math.inf, max_draft=100)
    assert_all_like_reference([large], [small], rules, [source([1, 2])])
    made = generator([large], [small], dataclasses.replace(rules, max_len=len(SOME)))
    with pytest.raises(BildError, match=f"could forbid all {len(SOME)} types of --bild-draft-vocab"):
        made.generate([], sample([source([1, 2])]))


@settings(max_examples=15)
@given(any_rules(**DRAFTING, min_len=st.just(0)), SOURCES)
def test_match_source_len_equals_the_reference(rules, sources):
    large, small = pair("agreeing", 1)

    def lengths(net_input):
        return net_input["src_tokens"].ne(PAD).sum(dim=1) - 1

    found = generator([large], [small], rules, source_lengths=lengths).generate([], sample(sources))
    longest = max(len(one) - 1 for one in sources)
    for one, (hypothesis,) in zip(sources, found, strict=True):
        alone = dataclasses.replace(rules, source_length=len(one) - 1, max_len=longest)
        assert_like_reference(hypothesis, bild([large], [small], one, symbols(), alone))


@kinds
@settings(max_examples=15)
@given(any_rules(**DRAFTING, **LIMITS), SOURCES)
def test_ensembles_equal_the_reference(kind, rules, sources):
    large, small = (with_engine(kind, one) for one in pair("quarrelling", 0))
    other = with_engine(kind, pair("unrelated", 1)[1])
    assert_all_like_reference([large, other], [small, other], rules, sources)


def early_exit(seed: int, **options) -> nn.Module:
    made = model(seed, "early_exit_transformer", exit_layers="1,2", decoder_layers=3, **options)
    with torch.no_grad():
        for layer in made.decoder.layers[1:]:
            for projection in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
                projection.weight *= 0.15
    return made


EARLY = [early_exit(0, **PRE_NORM), early_exit(1, exit_share_output_projection=False)]
EARLY += [early_exit(2, decoder_output_dim=10, **PRE_NORM)]  # with PyTorch's operators only
EARLY += [early_exit(3, exit_own_layers=1)]


@settings(max_examples=20)
@given(st.sampled_from(EARLY), st.integers(1, 2), any_rules(**DRAFTING, **LIMITS), SOURCES, PADDING)
def test_an_exit_equals_the_reference(full, exit_layer, rules, sources, padding):
    """Its head is cut; that of the last layer, which may be the same matrix, is not."""
    small = exit_model(full, exit_layer)
    assert_all_like_reference([full], [small], rules, sources, padding, exit_layer=exit_layer)


@settings(max_examples=20)
@given(MODELS, any_rules(**DRAFTING | {"rollback_threshold": st.just(0.0), "verify_end": st.just(True)}), SOURCES)
def test_lossless_is_greedy(models, rules, sources):
    """Also with a small model of which nothing is in the draft vocabulary that the large one writes."""
    large, small = models
    batch = sample(sources)
    greedy = generator([large], [], Rules(max_len=rules.max_len), alone=True).generate([], batch)
    found = generator([large], [small], rules).generate([], batch)
    assert [one["tokens"].tolist() for (one,) in found] == [one["tokens"].tolist() for (one,) in greedy]


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_rounded_weights(kind, precision):
    """The rows that are kept are rounded as they are in the whole matrix: probabilities differ by a factor only."""
    made = copy.deepcopy(pair("agreeing", 0)[1])
    if kind != "native":
        remember(made, precision, TorchEngine(made, precision, graphs=kind == "graphs"))
    sources = [source([1, 5, 3]), source([7])]
    verbatim = Rules(fallback_threshold=0.0, rollback_threshold=math.inf, start=SMALL, max_draft=100)
    rules = dataclasses.replace(verbatim, draft_types=DraftVocabulary.of(range(len(symbols())), symbols()).types)
    large = model(0)
    found, wanted = (
        generator([large], [made], one, small_precision=precision).generate([], sample(sources))
        for one in (rules, verbatim)
    )
    for (one,), (other,) in zip(found, wanted, strict=True):
        assert one["tokens"].tolist() == other["tokens"].tolist()
        difference = one["positional_scores"] - other["positional_scores"]
        assert (difference > 0).all()  # nothing is lost to types that are out


def test_every_draft_is_in_the_vocabulary():
    """And with it the fallback threshold sees other probabilities."""
    large, small = pair("unrelated", 2)
    rules = Rules(fallback_threshold=0.0, rollback_threshold=math.inf, start=SMALL, max_draft=100, draft_types=SOME)
    found = generator([large], [small], rules).generate([], sample([source([3, 4]), source([9, 1, 1])]))
    drafted = {token for (one,) in found for token in one["tokens"].tolist()}
    assert drafted <= set(SOME)
    assert PAD not in SOME and {EOS, UNK} <= set(SOME)


def test_the_large_model_alone_has_none():
    large, small = pair("agreeing", 0)
    whole = Pair([large], [small], draft_vocabulary=DraftVocabulary(SOME))
    assert whole.greedy().draft_vocabulary is None and whole.small_alone().draft_vocabulary is None
    with pytest.raises(BildError, match="draft vocabulary"):
        Pair([large], alone=True, draft_vocabulary=DraftVocabulary(SOME))


def test_a_changed_weight_is_seen():
    """The cut head is made anew with the engine."""
    large, small = pair("agreeing", 0)
    small = copy.deepcopy(small)
    rules = Rules(draft_types=SOME, start=SMALL)
    made = generator([large], [small], rules)
    before = made.generate([], sample([source([1, 2, 3])]))
    with torch.no_grad():
        small.decoder.output_projection.weight.mul_(0.2)
    after = made.generate([], sample([source([1, 2, 3])]))[0][0]
    assert_like_reference(after, bild([large], [small], source([1, 2, 3]), symbols(), rules))
    assert after["counters"] != before[0][0]["counters"]


def test_another_end_symbol_must_be_in_it():
    large, small = pair("agreeing", 0)
    end = SPECIAL + 1
    with pytest.raises(BildError, match="--bild-draft-vocab lacks the end symbol of this task, w1"):
        generator([large], [small], Rules(draft_types=SOME), eos=end)
    generator([large], [small], Rules(draft_types=types_of({1})), eos=end)


@kinds
@pytest.mark.parametrize("large_model", [False, True])
def test_a_head_that_is_cut_elsewhere_is_refused(kind, large_model, monkeypatch):
    """The proof of an engine covers its cut heads."""
    made = copy.deepcopy(EARLY[0] if large_model else pair("agreeing", 0)[1])
    if kind != "native":
        remember(made, "float32", TorchEngine(made, graphs=kind == "graphs"))
    engine = engine_for(made, "float32", "small")
    cut = engine.cut_head
    other = [token + 1 if token == SOME[3] else token for token in SOME]
    monkeypatch.setattr(engine, "cut_head", lambda depth, types: cut(depth, other))
    rules = Rules(draft_types=SOME)
    for _ in range(2):  # it is not remembered as proved
        with pytest.raises(BildError, match="cannot be decoded exactly.*with its draft vocabulary"):
            generator([made], [], rules, exit_layer=1) if large_model else generator([model(0)], [made], rules)
