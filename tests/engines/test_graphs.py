"""Decoding with passes of fixed shapes, which become CUDA graphs on a GPU; test_cached_decoder has single passes."""

import contextlib
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

from bild_fairseq.engines.choose import engine_for, remember
from bild_fairseq.engines.torch.engine import TorchEngine
from bild_fairseq.engines.torch.graphs import GraphedDecoder

RULES = Rules(fallback_threshold=0.3, rollback_threshold=1.0, max_draft=4, verify_end=True, max_len=70)
BATCHES = [
    [source([1, 2, 3]), source([4])],
    [source([5, 6]), source(range(9))],
    [source([7])],
    [source([i % 20 for i in range(40)]), source([8, 9])],
    [source([2]), source([3, 1])],
]


def with_graphs(models, small, capture=False, **more):
    """A generator whose decoders read in passes of fixed shapes, and those decoders."""
    decoders = []
    for one in (*models, *small):
        engine = TorchEngine(one, graphs=True)
        engine.decoder.capture = capture
        remember(one, "float32", engine)
        decoders.append(engine.decoder)
    return made_from(models, small, **more), decoders


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
    wanted = outputs(made_from(**models))
    made, decoders = with_graphs(**models)
    for got, one in zip(outputs(made), wanted, strict=True):
        assert_same_hypothesis(got, one)
    assert {batch for batch, _ in decoders[0].states} == {1, 2}


def test_few_passes_serve_many_sentences():
    made, decoders = with_graphs(**two_models())
    outputs(made, [[source([i % 7, i % 5, i])] for i in range(20)])
    for decoder in decoders:
        (state,) = decoder.states.values()
        assert len(state.passes) <= 6


def test_a_sentence_that_is_not_a_number_leaves_nothing_behind():
    """Its keys and values lie where the next batch's sentences will not look, and 0 times NaN would still be NaN."""
    models = two_models()
    wanted = outputs(made_from(**models), BATCHES[1:2])
    made, decoders = with_graphs(**models)
    outputs(made, BATCHES[:1])
    for decoder in decoders:
        (state,) = decoder.states.values()
        for kv in state.state.self_kv:
            kv.fill_(torch.nan)
    for got, one in zip(outputs(made, BATCHES[1:2]), wanted, strict=True):
        assert_same_hypothesis(got, one)


def test_without_graphs_it_goes_on(caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch.cuda, "Stream", fail)
    models = two_models()
    wanted = outputs(made_from(**models))
    with caplog.at_level(logging.WARNING):
        found = outputs(with_graphs(**models, capture=True)[0])
    assert sum("no CUDA graphs" in record.getMessage() for record in caplog.records) == 2  # once a model
    for got, one in zip(found, wanted, strict=True):
        assert_same_hypothesis(got, one)


class Stream:
    """Stands in for CUDA's where there is no GPU."""

    def wait_stream(self, other):
        pass


class Graph:
    """A graph whose replay spoils what the pass computed, as a wrong capture would."""

    spoiled = None

    def replay(self):
        Graph.spoiled[0].add_(1.0)

    def pool(self):
        return None


def test_a_graph_whose_first_replay_is_wrong_is_not_used(caplog, monkeypatch):
    """Whatever a capture leaves out, the first replay is compared with the same pass without a graph."""
    models = two_models()
    wanted = outputs(made_from(**models))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    made, decoders = with_graphs(**models, capture=True)
    for decoder in decoders:
        predict = decoder.decoder.predict

        def remembering(*args, predict=predict):
            Graph.spoiled = predict(*args)
            return Graph.spoiled

        decoder.decoder.predict = remembering
    with caplog.at_level(logging.WARNING):
        found = outputs(made)
    assert sum("first replay gave other logits" in record.getMessage() for record in caplog.records) == 2
    assert not any(decoder.capture for decoder in decoders)
    for got, one in zip(found, wanted, strict=True):
        assert_same_hypothesis(got, one)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("build", [two_models, one_model])
def test_graphs_equal_single_operators_on_a_gpu(build):
    models = build()
    wanted = outputs(made_from(**models))
    for each in (*models["models"], *models["small"]):
        each.cuda()
    made = made_from(**models)
    decoders = [engine_for(one, "float32", "large").decoder for one in (*models["models"], *models["small"])]
    assert all(isinstance(decoder, GraphedDecoder) for decoder in decoders)
    for batch, start in zip(BATCHES, (0, 2, 4, 5, 7), strict=True):
        inputs = sample(batch)
        inputs["net_input"] = {name: value.cuda() for name, value in inputs["net_input"].items()}
        for (got,), one in zip(made.generate([], inputs), wanted[start:], strict=False):
            assert_same_hypothesis(got, one)
    assert all(decoder.capture for decoder in decoders)
