"""Decoding with passes of fixed shapes, which become CUDA graphs on a GPU; test_cached_decoder has single passes."""

import logging

import pytest
import torch
from reference import Rules
from support import (
    PRE_NORM,
    assert_same_hypothesis,
    generator,
    model,
    related,
    sample,
    source,
)
from test_early_exit_decode import early_exit

from bild_fairseq.engines.torch.decoder import CachedDecoder
from bild_fairseq.engines.torch.graphs import GraphedDecoder

RULES = Rules(fallback_threshold=0.3, rollback_threshold=1.0, max_draft=4, verify_end=True, max_len=70)
BATCHES = [
    [source([1, 2, 3]), source([4])],
    [source([5, 6]), source(range(9))],
    [source([7])],
    [source(range(40)), source([8, 9])],
    [source([2]), source([3, 1])],
]


def with_graphs(made, capture=False, device="cpu"):
    """A generator whose decoders read in passes of fixed shapes."""
    for member in (*made._large, *made._small):
        decoder = CachedDecoder(member.model.to(device).decoder)
        member.decoder = GraphedDecoder(decoder, capture)
    return made


def outputs(made, batches=BATCHES):
    return [one for batch in batches for (one,) in made.generate([], sample(batch))]


def two_models():
    large = model(2, **PRE_NORM)
    return {"models": [large], "small": [related(large, 0.2, 1)]}


def one_model():
    return {"models": [early_exit("pre-norm", 1)], "small": [], "exit_layer": 1}


def made_from(models, small, **more):
    return generator(models, small, RULES, **more)


@pytest.mark.parametrize("build", [two_models, one_model])
def test_batch_after_batch_in_the_same_states(build):
    """Also back in a state that another batch has used, and in one that had to grow."""
    models = build()
    plain, fixed = made_from(**models), with_graphs(made_from(**models))
    for got, wanted in zip(outputs(fixed), outputs(plain), strict=True):
        assert_same_hypothesis(got, wanted)
    assert {key[0] for member in fixed._large for key in member.decoder._states} == {1, 2}


def test_few_passes_serve_many_sentences():
    made = with_graphs(made_from(**two_models()))
    outputs(made, [[source([i % 7, i % 5, i])] for i in range(20)])
    for member in (*made._large, *made._small):
        (state,) = member.decoder._states.values()
        assert len(state.passes) <= 6


def test_a_sentence_that_is_not_a_number_leaves_nothing_behind():
    """Its keys and values lie where the next batch's sentences will not look, and 0 times NaN would still be NaN."""
    models = two_models()
    plain, fixed = made_from(**models), with_graphs(made_from(**models))
    outputs(fixed, BATCHES[:1])
    for member in fixed._large:
        (state,) = member.decoder._states.values()
        for kv in state.state.self_kv:
            kv.fill_(torch.nan)
    for got, wanted in zip(outputs(fixed, BATCHES[1:2]), outputs(plain, BATCHES[1:2]), strict=True):
        assert_same_hypothesis(got, wanted)


def test_without_graphs_it_goes_on(caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch.cuda, "Stream", fail)
    models = two_models()
    with caplog.at_level(logging.WARNING):
        found = outputs(with_graphs(made_from(**models), capture=True))
    assert sum("no CUDA graphs" in record.getMessage() for record in caplog.records) == 2  # once a model
    for got, wanted in zip(found, outputs(made_from(**models)), strict=True):
        assert_same_hypothesis(got, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("build", [two_models, one_model])
def test_graphs_equal_single_operators_on_a_gpu(build):
    models = build()
    wanted = outputs(made_from(**models))
    for each in (*models["models"], *models["small"]):
        each.cuda()
    made = made_from(**models)
    assert all(isinstance(member.decoder, GraphedDecoder) for member in (*made._large, *made._small))
    for batch, start in zip(BATCHES, (0, 2, 4, 5, 7), strict=True):
        inputs = sample(batch)
        inputs["net_input"] = {name: value.cuda() for name, value in inputs["net_input"].items()}
        for (got,), one in zip(made.generate([], inputs), wanted[start:], strict=False):
            assert_same_hypothesis(got, one)
    assert all(member.decoder._pool is not None for member in made._large)
