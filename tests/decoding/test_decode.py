"""The generator against a naive reference decoder and against fairseq's own generator."""

import copy
import dataclasses
import itertools
import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fairseq.models.transformer import TransformerEncoder
from fairseq.sequence_generator import SequenceGenerator
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import LARGE, SMALL, Rules, bild
from support import (
    ANY_PAIR,
    LIMITS,
    MAX_POSITIONS,
    NGRAMS,
    PADDING,
    PAIRS,
    POLICY,
    PRE_NORM,
    SOURCES,
    WORD,
    any_rules,
    assert_like_reference,
    assert_same_hypothesis,
    count_positions,
    generator,
    long_case,
    model,
    pair,
    prefix_batch,
    related,
    sample,
    source,
    symbols,
    task,
)
from torch import Tensor, nn

from bild_fairseq.decoding.constraints import Constraints
from bild_fairseq.decoding.decode import decode
from bild_fairseq.decoding.policies import Policy
from bild_fairseq.engines.readers import LogitsReader
from bild_fairseq.errors import BildError
from bild_fairseq.plugin.generator import BildGenerator

EOS = symbols().eos()
UNK = symbols().unk()
VERBATIM = Rules(fallback_threshold=0.0, rollback_threshold=math.inf, start=SMALL, max_draft=10**6)
LOSSLESS = {"rollback_threshold": st.just(0.0), "verify_end": st.just(True)}


def hypotheses(made: Any, batch: dict, **more: Any) -> list[dict[str, Any]]:
    """The one hypothesis of each sentence, from any generator."""
    return [one for (one,) in made.generate([], batch, **more)]


def stock(models: Sequence[nn.Module], rules: Rules) -> SequenceGenerator:
    """fairseq's own generator, made greedy."""
    return SequenceGenerator(
        models,
        symbols(),
        beam_size=1,
        max_len_b=rules.max_len,
        min_len=rules.min_len,
        normalize_scores=rules.normalize_scores,
        len_penalty=rules.len_penalty,
        unk_penalty=rules.unk_penalty,
        temperature=rules.temperature,
    )


def assert_all_like_reference(
    large: Sequence[nn.Module],
    small: Sequence[nn.Module],
    rules: Rules,
    sources: Sequence[list[int]],
    padding: int = 0,
) -> None:
    made = generator(large, small, rules)
    for one, hypothesis in zip(sources, hypotheses(made, sample(sources, padding)), strict=True):
        assert_like_reference(hypothesis, bild(large, small, one, symbols(), rules))


@settings(max_examples=50)
@given(ANY_PAIR, any_rules(**POLICY, **LIMITS, **NGRAMS), SOURCES, PADDING)
def test_equals_the_reference(models, rules, sources, padding):
    """Tokens, counters and scores, for any thresholds, windows, rules, constraints, batches and padding.

    This is also what n-gram blocking is held to: fairseq's own, in Python, compares with the end of its padded
    token buffer and so blocks next to nothing.
    """
    large, small = models
    assert_all_like_reference([large], [small], rules, sources, padding)


@pytest.mark.parametrize("seed", range(6))
def test_long_sentences_equal_the_reference(seed):
    """Rows that drift far apart, and caches that outgrow what the sources' length reserved."""
    rules, sources = long_case(seed)
    large, small = pair(PAIRS[seed % 3], seed % 4)
    assert_all_like_reference([large], [small], rules, sources)


PREFIX = st.lists(st.integers(symbols().nspecial, len(symbols()) - 1) | st.just(UNK), max_size=6)
# A forced prefix may itself end the sentence.
ENDING = PREFIX | PREFIX.map(lambda tokens: [*tokens, EOS])


@settings(max_examples=40)
@given(ANY_PAIR, any_rules(**POLICY, **LIMITS, **NGRAMS), st.lists(st.tuples(SOURCES, ENDING), min_size=1, max_size=4))
def test_forced_prefixes_equal_the_reference(models, rules, drawn):
    """Prefixes of different lengths in one batch: verified from the start, and scored by who reads them."""
    large, small = models
    sources, prefixes = [sources[0] for sources, _ in drawn], [prefix for _, prefix in drawn]
    made = generator([large], [small], rules)
    found = hypotheses(made, sample(sources), prefix_tokens=prefix_batch(prefixes))
    for one, prefix, hypothesis in zip(sources, prefixes, found, strict=True):
        alone = dataclasses.replace(rules, prefix=tuple(prefix))
        assert_like_reference(hypothesis, bild([large], [small], one, symbols(), alone))


@given(ANY_PAIR, any_rules(**POLICY, **LIMITS), SOURCES, st.integers(0, 2))
def test_matching_the_source_length_equals_the_reference(models, rules, sources, shorter):
    """Each sentence's own length is exact, for both models, and the others' lengths are not mixed in."""
    large, small = models
    lengths = [max(0, len(one) - shorter) for one in sources]
    longest = max(lengths)
    if rules.min_len > longest:
        rules = dataclasses.replace(rules, min_len=longest)
    made = generator([large], [small], rules, source_lengths=lambda net_input: torch.tensor(lengths))
    for one, length, hypothesis in zip(sources, lengths, hypotheses(made, sample(sources)), strict=True):
        alone = dataclasses.replace(rules, max_len=longest, source_length=length)
        assert_like_reference(hypothesis, bild([large], [small], one, symbols(), alone))


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True),
    st.lists(ANY_PAIR, min_size=1, max_size=2),
    any_rules(**POLICY, **LIMITS),
    SOURCES,
)
def test_ensembles_equal_the_reference(seeds, pairs, rules, sources):
    """One or two large models with one or two small ones, of different shapes."""
    large = [pair("agreeing", seed)[0] for seed in seeds]
    small = [small for _, small in pairs]
    assert_all_like_reference(large, small, rules, sources)


@given(ANY_PAIR, any_rules(**POLICY), SOURCES, WORD)
def test_another_start_symbol_equals_the_reference(models, rules, sources, word):
    """Both models start from it, and the end symbol stays what ends a sentence."""
    large, small = models
    start = symbols().nspecial + word
    found = hypotheses(generator([large], [small], rules), sample(sources), bos_token=start)
    for one, hypothesis in zip(sources, found, strict=True):
        alone = dataclasses.replace(rules, start_symbol=start)
        assert_like_reference(hypothesis, bild([large], [small], one, symbols(), alone))


@settings(max_examples=40)
@given(ANY_PAIR, any_rules(**{**POLICY, **LOSSLESS}, **LIMITS), SOURCES, PADDING)
def test_rollback_threshold_0_with_verified_end_is_the_large_models_greedy_output(models, rules, sources, padding):
    large, small = models
    batch = sample(sources, padding)
    wanted = hypotheses(stock([large], rules), batch)
    for hypothesis, greedy in zip(hypotheses(generator([large], [small], rules), batch), wanted, strict=True):
        assert_same_hypothesis(hypothesis, greedy)


@given(ANY_PAIR, any_rules(**LIMITS), SOURCES)
def test_no_thresholds_is_the_small_models_greedy_output_without_large_calls(models, limits, sources):
    """Fallback 0, rollback inf, small start, any number of drafts, no verified end."""
    large, small = models
    rules = dataclasses.replace(
        limits, fallback_threshold=0.0, rollback_threshold=math.inf, start=SMALL, max_draft=10**6
    )
    batch = sample(sources)
    wanted = hypotheses(stock([small], rules), batch)
    for hypothesis, greedy in zip(hypotheses(generator([large], [small], rules), batch), wanted, strict=True):
        assert_same_hypothesis(hypothesis, greedy)
        counters = hypothesis["counters"]
        assert (counters.large_calls, counters.fallbacks, counters.rollbacks) == (0, 0, 0)
        assert counters.tokens == counters.drafted == counters.unverified == counters.small_calls


@given(st.integers(0, 3), any_rules(**POLICY, **LIMITS), SOURCES)
def test_a_model_never_rolls_back_its_own_drafts(seed, rules, sources):
    """Small = large: no rollback, and the output is greedy, whatever the rules."""
    large, small = pair("same", seed)
    batch = sample(sources)
    wanted = hypotheses(stock([large], rules), batch)
    for hypothesis, greedy in zip(hypotheses(generator([large], [small], rules), batch), wanted, strict=True):
        assert_same_hypothesis(hypothesis, greedy)
        assert hypothesis["counters"].rollbacks == hypothesis["counters"].discarded == 0


@given(ANY_PAIR, any_rules(**POLICY, **LIMITS, **NGRAMS), SOURCES, PADDING, st.randoms(use_true_random=False))
def test_a_sentence_does_not_depend_on_its_batch_or_on_padding(models, rules, sources, padding, random):
    """Alone, or in any order among others and with any padding: the same tokens, counters and scores."""
    large, small = models
    made = generator([large], [small], rules)
    order = random.sample(range(len(sources)), len(sources))
    together = hypotheses(made, sample([sources[row] for row in order], padding))
    for row, hypothesis in zip(order, together, strict=True):
        (alone,) = hypotheses(made, sample([sources[row]]))
        assert_same_hypothesis(hypothesis, alone)


@given(ANY_PAIR, any_rules(**{**POLICY, "fallback_threshold": st.just(0.0)}, **LIMITS), SOURCES)
def test_fallback_threshold_0_never_falls_back(models, rules, sources):
    large, small = models
    for hypothesis in hypotheses(generator([large], [small], rules), sample(sources)):
        assert hypothesis["counters"].fallbacks == 0


@given(ANY_PAIR, any_rules(**{**POLICY, "fallback_threshold": st.just(1.0)}, **LIMITS), SOURCES)
def test_fallback_threshold_1_is_greedy_decoding_by_the_large_model(models, rules, sources):
    """Nothing these models predict is certain, so nothing is drafted."""
    large, small = models
    rules = dataclasses.replace(rules, unk_penalty=abs(rules.unk_penalty))  # a bonus could make it so
    batch = sample(sources)
    wanted = hypotheses(stock([large], rules), batch)
    for hypothesis, greedy in zip(hypotheses(generator([large], [small], rules), batch), wanted, strict=True):
        assert_same_hypothesis(hypothesis, greedy)
        counters = hypothesis["counters"]
        assert counters.drafted == 0
        assert counters.large_calls == counters.tokens
        assert counters.fallbacks == counters.small_calls


@given(ANY_PAIR, any_rules(**{**POLICY, "rollback_threshold": st.just(math.inf)}, **LIMITS), SOURCES)
def test_rollback_threshold_inf_never_rolls_back(models, rules, sources):
    large, small = models
    for hypothesis in hypotheses(generator([large], [small], rules), sample(sources)):
        assert hypothesis["counters"].rollbacks == hypothesis["counters"].discarded == 0


def test_a_token_exactly_at_the_fallback_threshold_stays():
    """The comparison is strict: the small model hands over below the threshold, not at it."""
    large, small = pair("agreeing", 1)
    batch = sample([source([3, 1, 4])])
    (draft,) = hypotheses(generator([large], [small], VERBATIM), batch)
    least = math.exp(draft["positional_scores"].min())
    for threshold, falls_back in ((least, False), (least * 1.001, True)):
        rules = dataclasses.replace(VERBATIM, fallback_threshold=threshold)
        (found,) = hypotheses(generator([large], [small], rules), batch)
        assert (found["counters"].fallbacks > 0) == falls_back


def test_a_token_exactly_at_the_rollback_threshold_stays():
    """The comparison is strict: the large model goes back above the threshold, not at it."""
    large, small = pair("quarrelling", 1)
    batch = sample([source([3, 1, 4])])
    verified = dataclasses.replace(VERBATIM, verify_end=True)
    (accepted,) = hypotheses(generator([large], [small], verified), batch)
    assert accepted["counters"].accepted == accepted["counters"].tokens
    worst = -accepted["positional_scores"].min().item()
    for threshold, rolls_back in ((worst, False), (worst * 0.999, True)):
        rules = dataclasses.replace(verified, rollback_threshold=threshold)
        (found,) = hypotheses(generator([large], [small], rules), batch)
        assert (found["counters"].rollbacks > 0) == rolls_back


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("verify_end", [False, True])
def test_what_the_random_models_exercise(kind, verify_end):
    """Guards the other tests: fallbacks, rollbacks, accepted and unverified drafts do occur with these models."""
    seen = dict.fromkeys(("fallbacks", "rollbacks", "accepted", "discarded", "unverified"), 0)
    rules = Rules(fallback_threshold=0.4, rollback_threshold=1.5, max_draft=4, verify_end=verify_end, max_len=14)
    for seed in range(4):
        large, small = pair(kind, seed)
        sources = [source(range(start, start + length)) for start, length in ((0, 3), (5, 6), (9, 1))]
        found = hypotheses(generator([large], [small], rules), sample(sources))
        for name in seen:
            seen[name] += sum(getattr(hypothesis["counters"], name) for hypothesis in found)
    impossible = set()
    if verify_end:
        impossible.add("unverified")
    if kind == "same":
        impossible |= {"rollbacks", "discarded"}
    if kind == "unrelated":
        impossible |= {"accepted", "unverified"}  # possible, but rare
    assert {name for name, count in seen.items() if not count} <= impossible


@settings(max_examples=40)
@given(ANY_PAIR, any_rules(**POLICY, **LIMITS, **NGRAMS), st.lists(st.tuples(SOURCES, ENDING), min_size=1, max_size=3))
def test_counters_add_up(models, rules, drawn):
    """What the counters mean to each other, whatever happens."""
    large, small = models
    sources, prefixes = [sources[0] for sources, _ in drawn], [prefix for _, prefix in drawn]
    made = generator([large], [small], rules)
    found = hypotheses(made, sample(sources), prefix_tokens=prefix_batch(prefixes))
    for prefix, hypothesis in zip(prefixes, found, strict=True):
        c, tokens = hypothesis["counters"], hypothesis["tokens"].tolist()
        forced = min(len(prefix), rules.max_len)
        whole = bool(forced) and prefix[forced - 1] == EOS
        assert c.tokens == len(tokens) == len(hypothesis["positional_scores"]) <= rules.max_len + 1
        assert tokens[:forced] == prefix[:forced]
        assert tokens[-1] == EOS and EOS not in tokens[:-1]
        assert c.drafted == c.accepted + c.discarded + c.unverified
        assert c.small_calls == c.drafted + c.fallbacks + (whole and rules.start == SMALL)
        assert c.rollbacks <= min(c.discarded, c.large_calls)
        # A call of the large model puts one token, unless all was drafted up to the end symbol.
        put = c.tokens - forced - c.accepted - c.unverified
        assert c.large_calls - 1 <= put <= c.large_calls or put == c.large_calls == 0
        if put < c.large_calls:
            assert rules.verify_end or whole
        if rules.verify_end:
            assert c.unverified == 0
        assert c.drafted <= rules.max_draft * (c.large_calls + 1)


def test_generator_sums_its_sentences():
    """``counters()`` is the sum over every batch, ``stats()`` names each sentence by its id."""
    large, small = pair("agreeing", 0)
    made = generator([large], [small], Rules(), stats_path="never written")
    batches = [sample([source([1, 2]), source([5])], ids=[7, 3]), sample([source([9, 9, 1])], ids=[5])]
    each = [hypothesis["counters"] for batch in batches for hypothesis in hypotheses(made, batch)]
    for field in dataclasses.fields(each[0]):
        assert getattr(made.counters(), field.name) == sum(getattr(one, field.name) for one in each)
    assert [record["id"] for record in made.stats()["sentences"]] == [7, 3, 5]
    assert made.stats()["summary"]["tokens"] == sum(one.tokens for one in each)


OPTIONS = {
    "defaults": {},
    "lenpen": {"lenpen": 0.3},
    "unnormalized": {"unnormalized": True},
    "unkpen": {"unkpen": -4.0},
    "temperature": {"temperature": 1.7},
    "min_len": {"min_len": 12, "max_len_b": 20},
    "max_len_a": {"max_len_a": 0.6, "max_len_b": 2},
    "match_source_len": {"match_source_len": True},
    "several": {"max_len_a": 1.2, "max_len_b": 3, "min_len": 3, "lenpen": 1.5, "unkpen": 2.0, "temperature": 0.8},
}
BATCH = [source(words) for words in ([4, 8, 15], [16], [], [2, 3, 4, 2, 3, 19, 0, 7, 7, 1], [5, 6, 5, 6, 5])]


def built(models: Sequence[nn.Module], **args: Any) -> Any:
    return task().build_generator(models, Namespace(**{"beam": 1, **args}))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_generator_is_fairseqs_with_beam_1(options, seed):
    """``--generator greedy`` honours each option as fairseq does, tokens and all scores alike."""
    large = model(seed, decoder_learned_pos=True, **PRE_NORM)
    made, wanted = built([large], generator="greedy", **options), built([large], **options)
    assert isinstance(made, BildGenerator) and isinstance(wanted, SequenceGenerator)
    batch = sample(BATCH, extra_padding=1)
    for hypothesis, greedy in zip(hypotheses(made, batch), hypotheses(wanted, batch), strict=True):
        assert_same_hypothesis(hypothesis, greedy)
        counters = hypothesis["counters"]
        assert counters.large_calls == counters.tokens
        assert counters.small_calls == counters.drafted == 0


@pytest.mark.parametrize("given_beam", [{"beam": 5}, {}], ids=["5", "absent"])
def test_greedy_generator_takes_fairseqs_default_beam(given_beam):
    """fairseq's default of 5 needs no word from the user, nor does a namespace without the option."""
    large = model(0, **PRE_NORM)
    made = task().build_generator([large], Namespace(generator="greedy", **given_beam))
    wanted = hypotheses(built([large]), sample(BATCH))
    for hypothesis, greedy in zip(hypotheses(made, sample(BATCH)), wanted, strict=True):
        assert_same_hypothesis(hypothesis, greedy)


@settings(max_examples=40)
@given(
    st.integers(0, 3),
    any_rules(**LIMITS).filter(lambda rules: rules.max_len > 0),
    st.lists(st.tuples(SOURCES, ENDING), min_size=1, max_size=4),
)
def test_greedy_generator_forces_prefixes_as_fairseq_does(seed, rules, drawn):
    """Ragged prefixes, some of them whole sentences: tokens and scores.

    fairseq lifts the minimum length for the whole batch while any of its sentences still has a prefix; here a
    sentence does not depend on the others, so with a minimum length the prefixes are equally long.
    """
    large, _ = pair("agreeing", seed)
    batch = sample([sources[0] for sources, _ in drawn])
    prefixes = [prefix for _, prefix in drawn]
    if len(set(map(len, prefixes))) > 1:
        rules = dataclasses.replace(rules, min_len=0)
    forced = prefix_batch(prefixes)
    wanted = hypotheses(stock([large], rules), batch, prefix_tokens=forced)
    found = hypotheses(generator([large], [], rules, alone=True), batch, prefix_tokens=forced)
    for hypothesis, greedy in zip(found, wanted, strict=True):
        assert_same_hypothesis(hypothesis, greedy)


ARCHITECTURES = {
    "post-norm": {},
    "pre-norm": PRE_NORM,
    "embedding norm": {"layernorm_embedding": True},
    "learned source positions": {"encoder_learned_pos": True, **PRE_NORM},
    "no source positions": {"no_token_positional_embeddings": True},
    "no embedding scale, gelu": {"no_scale_embedding": True, "activation_fn": "gelu"},
    "three encoder layers": {"encoder_layers": 3, "encoder_attention_heads": 4, **PRE_NORM},
    "wider encoder": {"encoder_embed_dim": 24},
    "shared embeddings": {"share_all_embeddings": True},
    "layer drop": {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5, "encoder_layers": 2},
    "NormFormer": {"scale_attn": True, "scale_fc": True, "scale_heads": True, "scale_resids": True, **PRE_NORM},
    "BART": {"arch": "bart_base"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_greedy_generator_is_fairseqs_for_every_architecture(architecture):
    """Encoder and decoder together, with sources padded on the left and on the right."""
    large = model(5, **architecture)
    rules = Rules(max_len=25, min_len=3)
    left = sample(BATCH, extra_padding=2)
    right = sample(BATCH)
    width = right["net_input"]["src_tokens"].size(1)
    for row, one in enumerate(BATCH):
        right["net_input"]["src_tokens"][row] = torch.tensor(one + [symbols().pad()] * (width - len(one)))
    for batch in (left, right):
        wanted = hypotheses(stock([large], rules), batch)
        found = hypotheses(generator([large], [], rules, alone=True), batch)
        for hypothesis, greedy in zip(found, wanted, strict=True):
            assert_same_hypothesis(hypothesis, greedy)


def test_an_encoder_with_a_forward_pass_of_its_own_runs_as_it_is():
    """Only stock encoders are recomputed; the output is fairseq's for any other."""

    class Negated(TransformerEncoder):
        def forward_embedding(self, src_tokens, token_embedding=None):
            x, embedding = super().forward_embedding(src_tokens, token_embedding)
            return -x, embedding

    large = model(5, **PRE_NORM)
    rules = Rules()
    before = hypotheses(generator([large], [], rules, alone=True), sample(BATCH))
    large.encoder.__class__ = Negated
    found = hypotheses(generator([large], [], rules, alone=True), sample(BATCH))
    for hypothesis, greedy in zip(found, hypotheses(stock([large], rules), sample(BATCH)), strict=True):
        assert_same_hypothesis(hypothesis, greedy)
    assert any(one["tokens"].tolist() != other["tokens"].tolist() for one, other in zip(before, found, strict=True))


def test_greedy_ensemble_is_fairseqs():
    """Three models of different shapes, at a temperature."""
    models = [pair("agreeing", 0)[0], model(8), model(9, encoder_embed_dim=24, decoder_layers=1, **PRE_NORM)]
    rules = Rules(temperature=1.4, max_len=30)
    batch = sample(BATCH)
    wanted = hypotheses(stock(models, rules), batch)
    for hypothesis, greedy in zip(hypotheses(generator(models, [], rules, alone=True), batch), wanted, strict=True):
        assert_same_hypothesis(hypothesis, greedy)


@settings(max_examples=40)
@given(ANY_PAIR, any_rules(**POLICY), st.integers(1, 3), SOURCES)
def test_no_ngram_repeats(models, rules, size, sources):
    """The start symbol takes part in n-grams; the end symbol at the length limit is exempt."""
    large, small = models
    rules = dataclasses.replace(rules, max_len=15, no_repeat_ngram_size=size)
    for hypothesis in hypotheses(generator([large], [small], rules), sample(sources)):
        tokens = [EOS, *hypothesis["tokens"].tolist()]
        if len(tokens) == rules.max_len + 2:
            tokens.pop()
        ngrams = list(itertools.zip_longest(*(tokens[offset:] for offset in range(size))))
        ngrams = ngrams[: len(tokens) - size + 1]
        assert len(set(ngrams)) == len(ngrams)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("start", [LARGE, SMALL])
def test_sentences_end_at_the_position_limit(learned, start):
    """The decoders' position limit caps the length, the end symbol included, also where a whole draft is verified."""
    limit = 12
    options = {"max_target_positions": limit, "decoder_learned_pos": learned, **PRE_NORM}
    large = model(3, **options)
    small = related(large, 0.1, 3)
    rules = Rules(rollback_threshold=1.0, fallback_threshold=0.2, min_len=9, start=start, verify_end=True, max_len=200)
    sources = [source(range(length)) for length in (2, 7, 0, 4)]
    found = hypotheses(generator([large], [small], rules), sample(sources))
    assert max(len(hypothesis["tokens"]) for hypothesis in found) == limit
    capped = dataclasses.replace(rules, max_len=limit - 1)
    for one, hypothesis in zip(sources, found, strict=True):
        assert_like_reference(hypothesis, bild([large], [small], one, symbols(), capped))


def test_the_smaller_position_limit_of_both_models_holds():
    """A small model with fewer positions limits the sentence; nobody reads beyond its own positions."""
    large = model(3, decoder_learned_pos=True, **PRE_NORM)
    small = model(3, decoder_learned_pos=True, max_target_positions=9, **PRE_NORM)
    rules = Rules(rollback_threshold=math.inf, fallback_threshold=0.0, min_len=7, max_len=50)
    for hypothesis in hypotheses(generator([large], [small], rules), sample(BATCH)):
        assert len(hypothesis["tokens"]) <= 9


def test_a_source_that_is_longer_than_what_the_models_can_write_is_no_length_to_match():
    """Beyond its learned positions a decoder has nothing to read; the longest source that fits is translated."""
    large = model(3, decoder_learned_pos=True, **PRE_NORM)
    small = model(3, decoder_learned_pos=True, max_target_positions=9, **PRE_NORM)
    made = generator([large], [small], Rules(), source_lengths=lambda net_input: net_input["src_lengths"])
    (hypothesis,) = hypotheses(made, sample([source(range(7))]))
    assert len(hypothesis["tokens"]) == 9
    with pytest.raises(BildError, match="--match-source-len: a source has 9 tokens, the models write at most 8; "):
        made.generate([], sample([source(range(8)), source([1])]))


@pytest.mark.parametrize("start", [LARGE, SMALL])
def test_sources_of_any_length_share_a_batch(start):
    """A source of only the end symbol, one of one token and one at the position limit, together and alone."""
    large, small = pair("agreeing", 0)
    sources = [source([]), source([4]), source([word % 20 for word in range(MAX_POSITIONS - 1)]), source([1, 2])]
    rules = Rules(fallback_threshold=0.5, start=start)
    assert_all_like_reference([large], [small], rules, sources)


def test_minimum_above_the_maximum_length_is_refused():
    large, small = pair("agreeing", 0)
    made = generator([large], [small], Rules(min_len=5, max_len=4))
    with pytest.raises(BildError, match="5 is above the maximum length, 4"):
        made.generate([], sample([source([1])]))


def test_lexical_constraints_are_refused():
    large, small = pair("agreeing", 0)
    with pytest.raises(BildError, match="constraints"):
        generator([large], [small], Rules()).generate([], sample([source([1])]), constraints=torch.zeros(1, 1))


POISON = 13


def poisoned(healthy: nn.Module, seed: int) -> nn.Module:
    """The same model, but the source word ``POISON`` makes all that depends on it NaN."""
    sick = related(healthy, 0.0, seed)
    with torch.no_grad():
        sick.encoder.embed_tokens.weight[symbols().nspecial + POISON] = math.nan
    return sick


@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("start", [LARGE, SMALL])
@pytest.mark.parametrize("sick", [{LARGE}, {SMALL}, {LARGE, SMALL}], ids=["large", "small", "both"])
def test_nan_names_the_sentence_and_leaves_the_others_alone(caplog, sick, start, threshold):
    """Whichever model it comes from, in the middle of a sentence or over a draft that is complete."""
    large, small = pair("agreeing", 2)
    rules = Rules(threshold, rollback_threshold=1.5, max_draft=10**6, start=start, verify_end=True)
    sources = [source([1, 2, 3]), source([4, POISON]), source([6]), source([7, 8, 9, 10, 11])]
    wanted = hypotheses(generator([large], [small], rules), sample(sources))
    made = generator(
        [poisoned(large, 0) if LARGE in sick else large], [poisoned(small, 0) if SMALL in sick else small], rules
    )
    found = hypotheses(made, sample(sources, ids=[40, 41, 42, 43]))
    for row in (0, 2, 3):
        assert_same_hypothesis(found[row], wanted[row])
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "41" in warnings[0]
    blamed = start if start in sick else next(iter(sick))
    assert f"the {blamed} model" in warnings[0]
    assert found[1]["tokens"][-1] == EOS
    assert found[1]["score"] == -math.inf
    counters = found[1]["counters"]
    assert counters.tokens == len(found[1]["tokens"])
    assert counters.drafted == counters.accepted + counters.discarded + counters.unverified


def test_nan_over_a_forced_prefix_names_the_sentence(caplog):
    """Also where the prefix is a whole sentence, which no model goes on with."""
    large, small = pair("agreeing", 2)
    made = generator([large], [poisoned(small, 0)], Rules(start=SMALL))
    batch = sample([source([4, POISON]), source([6])], ids=[8, 9])
    word = symbols().nspecial
    (sick,), (healthy,) = made.generate([], batch, prefix_tokens=torch.tensor([[word, EOS], [word, EOS]]))
    assert (sick["tokens"].tolist(), healthy["tokens"].tolist()) == ([word, EOS], [word, EOS])
    assert sick["score"] == -math.inf and healthy["score"].isfinite()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "sentence 8: the small model's logits are not numbers" in warning


def test_nan_in_greedy_decoding_names_the_sentence(caplog):
    large, _ = pair("agreeing", 2)
    sources = [source([4, POISON]), source([6])]
    made = generator([poisoned(large, 0)], [], Rules(), alone=True)
    sick, healthy = hypotheses(made, sample(sources, ids=[8, 9]))
    (wanted,) = hypotheses(generator([large], [], Rules(), alone=True), sample(sources[1:]))
    assert_same_hypothesis(healthy, wanted)
    assert sick["score"] == -math.inf
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "sentence 8" in warning


@settings(max_examples=30)
@given(ANY_PAIR, any_rules(**POLICY), SOURCES)
def test_no_token_is_read_twice(models, rules, sources):
    """Both caches are kept up to the rollback position: every token ever written is read at most once."""
    large, small = models[0], copy.deepcopy(models[1])
    by_large, by_small = count_positions(large), count_positions(small)
    made = generator([large], [small], rules)
    (hypothesis,) = hypotheses(made, sample(sources[:1]))
    c = hypothesis["counters"]
    written = 1 + c.tokens + c.discarded  # the start symbol included
    # The large model has read all but the tail it does not verify and the token that it wrote last; to read an
    # accepted end symbol is needless and harmless.
    needed = written - 1 - c.unverified if c.large_calls else 0
    assert set(by_large) <= {needed, needed + rules.verify_end}
    assert len(set(by_large)) == 1
    # The small model has not read the last token of a draft that the large one verified, unless it drafted on.
    assert len(set(by_small)) == 1
    assert by_small[0] <= written
    assert by_small[0] >= c.small_calls


class Table(LogitsReader):
    """A reader that predicts ``rows[position]``, whatever the tokens are."""

    def __init__(self, constraints: Constraints, rows: list[list[float]]):
        super().__init__(constraints)
        self.consumed = [0]
        self._rows = rows

    def logits(
        self, tokens: Sequence[Sequence[int]], rows: Sequence[int], last_only: bool, drafting: bool
    ) -> tuple[Tensor, Tensor]:
        end = len(tokens[0])
        first = end - 1 if last_only else self.consumed[0]
        self.consumed[0] = end
        logits = torch.tensor(self._rows[first:end]).log()
        return logits, torch.zeros(len(logits))

    def rollback(self, row: int, length: int) -> None:
        self.consumed[0] = min(self.consumed[0], length)


def test_thresholds_on_a_table_of_probabilities():
    """The loop takes any two readers; here both thresholds are met exactly, which keeps a token.

    The last drafted word is far beyond the rollback threshold, and stays because it is the large model's choice.
    """
    pad, unk, eos, a, b = range(5)
    limits = Constraints(pad=pad, unk=unk, eos=eos, max_len=6)
    sure = {token: [float(token == other) for other in range(8)] for token in (eos, a, b)}
    even = [0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0]  # a, by the order of words
    barely = [0.0, 0.0, 0.0, 0.19, 0.24, 0.19, 0.19, 0.19]  # b
    half = -torch.tensor(0.5).log().item()
    for threshold, tokens, rollbacks in ((half, [a, b, b, eos], 0), (half * 0.99, [a, a, b, eos], 1)):
        small = Table(limits, [sure[a], sure[b], sure[b], sure[eos]])
        large = Table(limits, [sure[a], even, barely, sure[eos], sure[eos]])
        policy = Policy(fallback_threshold=1.0, rollback_threshold=threshold, start_small=True, verify_end=True)
        (sentence,) = decode(large, small, eos, [[]], policy, eos)
        assert sentence.tokens[1:] == tokens
        assert (sentence.counters.rollbacks, sentence.counters.fallbacks) == (rollbacks, 0)


class Eager(Table):
    """Drafts up to the limit, however unsure it is."""

    def draft(self, tokens: Any, rows: Any, limit: float, threshold: float) -> Any:
        return super().draft(tokens, rows, limit, 0.0)


def test_the_policy_alone_decides_where_a_draft_falls_back():
    """An engine that drafts past the first unsure token gives the same text and counters as one that stops there."""
    pad, unk, eos, a, b = range(5)
    limits = Constraints(pad=pad, unk=unk, eos=eos, max_len=8)
    sure = {token: [float(token == other) for other in range(8)] for token in (eos, a, b)}
    even = [0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0]  # a, by the order of words
    policy = Policy(fallback_threshold=0.9, rollback_threshold=math.inf, start_small=True)
    written = []
    for kind in (Table, Eager):
        small = kind(limits, [sure[a], even, sure[b], even, sure[a], sure[eos]])
        large = Table(limits, [sure[a], sure[b], sure[b], sure[b], sure[a], sure[eos]])
        (sentence,) = decode(large, small, eos, [[]], policy, eos)
        written.append((sentence.tokens, sentence.counters, sentence.rounds))
    assert written[0] == written[1]
    assert written[0][0][1:] == [a, b, b, b, a, eos]
    assert written[0][1].fallbacks == 2
