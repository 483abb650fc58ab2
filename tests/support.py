"""Tiny seeded fairseq models and batches for the tests."""

import copy
import dataclasses
import functools
import math
import random
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import torch
from fairseq.data import Dictionary
from fairseq.models import build_model
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from reference import LARGE, SMALL, Result, Rules
from torch import Tensor, nn

from bild_fairseq.decoding.policies import Policy
from bild_fairseq.engines.base import Pass
from bild_fairseq.engines.choose import engine_for, remember
from bild_fairseq.plugin.draft_vocabulary import DraftVocabulary
from bild_fairseq.plugin.generator import BildGenerator
from bild_fairseq.plugin.pair import Pair
from bild_fairseq.plugin.search import SearchOptions

WORDS = 20
MAX_POSITIONS = 100

SIZE = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 24,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "max_source_positions": MAX_POSITIONS,
    "max_target_positions": MAX_POSITIONS,
    # Layers that drop something in evaluation mode, or a decoder left in training mode, would show.
    "dropout": 0.3,
    "task": "translation",
}


@functools.cache
def symbols() -> Dictionary:
    """A dictionary that source and target share."""
    made = Dictionary()
    for i in range(WORDS):
        made.add_symbol(f"w{i}")
    return made


@functools.cache
def task() -> TranslationTask:
    return TranslationTask(TranslationConfig(source_lang="de", target_lang="en"), symbols(), symbols())


def model(seed: int, arch: str = "transformer", **options: Any) -> nn.Module:
    """A model at test size in eval mode.

    Every parameter is random, and larger than at fairseq's initialisation: the distributions are peaked, they
    depend on the source and on each earlier token, and sentences end at many different lengths.
    """
    torch.manual_seed(seed)
    return randomize(build_model(Namespace(arch=arch, **{**SIZE, **options}), task()))


def randomize(made: nn.Module) -> nn.Module:
    """Gives every parameter of a model a random value, in place; see :func:`model`."""
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "embed_tokens" in name:
                parameter.normal_(std=0.5)
            elif "embed_positions" in name:
                parameter.normal_()
            elif "output_projection" in name:
                parameter.normal_()
                parameter[symbols().eos()] *= 1.4  # so that more sentences end by themselves
            else:
                attention = "attn" in name
                parameter.normal_(std=(0.7 if attention else 1.5) / parameter.size(1) ** 0.5)
    # fairseq 0.12.2 keeps copies of encoder parameters that it brings up to date on loading.
    made.load_state_dict(made.state_dict())
    return made.eval()


def related(large: nn.Module, noise: float, seed: int) -> nn.Module:
    """A small model that often agrees with ``large``: its weights plus noise."""
    made = copy.deepcopy(large)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    made.load_state_dict(made.state_dict())
    return made.eval()


PRE_NORM = {"encoder_normalize_before": True, "decoder_normalize_before": True}
# Heads x size differs from the width, nothing fills a vector, and biases end within a short text.
T5 = {"arch": "t5", "d_model": 18, "d_kv": 5, "d_ff": 26, "num_heads": 3, "num_layers": 2, "num_decoder_layers": 2}
T5 |= {"relative_attention_max_distance": 20}
T5_GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "scale_decoder_outputs": False}
PAIRS = ("agreeing", "agreeing, post-norm", "quarrelling", "unrelated", "same")


@functools.cache
def pair(kind: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """A large model and a small one that agrees with it more or less often."""
    if kind == "agreeing, post-norm":
        large = model(seed, decoder_learned_pos=True)
    else:
        large = model(seed, decoder_learned_pos=seed % 2 == 1, **PRE_NORM)
    if kind == "same":
        return large, large
    if kind == "unrelated":
        narrow = {"decoder_embed_dim": 12, "decoder_layers": 1, "decoder_attention_heads": 1}
        return large, model(100 + seed, encoder_embed_dim=12, **narrow)
    return large, related(large, 0.15 if kind == "quarrelling" else 0.07, seed)


def source(words: Sequence[int]) -> list[int]:
    """Source tokens, end symbol included, of words numbered from 0."""
    return [symbols().nspecial + word for word in words] + [symbols().eos()]


def sample(sources: Sequence[Sequence[int]], extra_padding: int = 0, ids: Sequence[int] | None = None) -> dict:
    """A batch as fairseq's LanguagePairDataset collates it for translation: sources padded on the left.

    Args:
        sources: tokens of each sentence, end symbol included.
        extra_padding: columns of padding beyond what the longest sentence needs.
        ids: names of the sentences.
    """
    width = max(map(len, sources)) + extra_padding
    tokens = torch.full((len(sources), width), symbols().pad())
    for row, one in enumerate(sources):
        tokens[row, width - len(one) :] = torch.tensor(one)
    return {
        "id": torch.tensor(range(len(sources)) if ids is None else ids),
        "nsentences": len(sources),
        "net_input": {"src_tokens": tokens, "src_lengths": torch.tensor([len(one) for one in sources])},
    }


def prefix_batch(prefixes: Sequence[Sequence[int]]) -> Tensor | None:
    """Forced prefixes as fairseq passes them: (batch, longest), padded on the right; None if all are empty."""
    width = max(map(len, prefixes))
    if width == 0:
        return None
    tokens = torch.full((len(prefixes), width), symbols().pad())
    for row, one in enumerate(prefixes):
        tokens[row, : len(one)] = torch.tensor(one)
    return tokens


OF_PAIR = ("exit_layer", "alone", "precision", "small_precision")


def generator(large: Sequence[nn.Module], small: Sequence[nn.Module], rules: Rules, **more: Any) -> BildGenerator:
    """The package's generator for the reference's rules; what they say of one sentence is left out.

    Args:
        more: further arguments of ``Pair`` and ``BildGenerator``, and the models' ``dictionary`` if it is another one.
    """
    dictionary = more.pop("dictionary", None) or symbols()
    of_pair = {name: more.pop(name) for name in OF_PAIR if name in more}
    policy = Policy(
        fallback_threshold=rules.fallback_threshold,
        rollback_threshold=rules.rollback_threshold,
        max_draft=rules.max_draft,
        start_small=rules.start == SMALL,
        verify_end=rules.verify_end,
    )
    options = SearchOptions(
        max_len_b=rules.max_len,
        min_len=rules.min_len,
        match_source_len="source_lengths" in more,
        normalize_scores=rules.normalize_scores,
        len_penalty=rules.len_penalty,
        unk_penalty=rules.unk_penalty,
        temperature=rules.temperature,
        no_repeat_ngram_size=rules.no_repeat_ngram_size,
    )
    if rules.draft_types is not None:
        of_pair["draft_vocabulary"] = DraftVocabulary(rules.draft_types)
    return BildGenerator(Pair(large, small, **of_pair), dictionary, policy, options, **more)


def assert_like_reference(hypothesis: dict[str, Any], wanted: Result) -> None:
    """Tokens and counters are equal, scores up to rounding."""
    assert hypothesis["tokens"].tolist() == wanted.tokens
    assert dataclasses.asdict(hypothesis["counters"]) == wanted.counters
    assert hypothesis["steps"] == wanted.counters["large_calls"]
    assert_close(hypothesis["positional_scores"], torch.tensor(wanted.positional_scores))
    assert_close(hypothesis["score"], torch.tensor(wanted.score))


def assert_same_hypothesis(hypothesis: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Two generators agree: on tokens and scores, and on the counters where both have them."""
    assert hypothesis["tokens"].tolist() == wanted["tokens"].tolist()
    assert_close(hypothesis["positional_scores"], wanted["positional_scores"])
    assert_close(hypothesis["score"], wanted["score"])
    if "counters" in wanted:
        assert hypothesis["counters"] == wanted["counters"]


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


WORD = st.integers(0, WORDS - 1)
SOURCES = st.lists(st.lists(WORD, max_size=7).map(source), min_size=1, max_size=4)
ANY_PAIR = st.builds(pair, st.sampled_from(PAIRS), st.integers(0, 3))
PADDING = st.integers(0, 3)
POLICY = {
    "fallback_threshold": st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]) | st.floats(0, 1, width=16),
    "rollback_threshold": st.sampled_from([0.0, 1.0, 2.0, math.inf]) | st.floats(0, 8, width=16),
    "max_draft": st.sampled_from([1, 2, 3, 10, 10**6]),
    "start": st.sampled_from([LARGE, SMALL]),
    "verify_end": st.booleans(),
}
# What bounds and scores a sentence. No n-gram blocking: stock fairseq's differs.
LIMITS = {
    "max_len": st.sampled_from([9, 14, 5, 1, 0, 11, 17]),
    "min_len": st.sampled_from([0, 1, 4]),
    "unk_penalty": st.sampled_from([0.0, 2.0, -3.0]),
    "temperature": st.sampled_from([1.0, 1.6]),
    "normalize_scores": st.booleans(),
    "len_penalty": st.sampled_from([0.0, 0.6, 1.0]),
}
NGRAMS = {"no_repeat_ngram_size": st.sampled_from([0, 1, 2, 3])}


def long_case(seed: int) -> tuple[Rules, list[list[int]]]:
    """Rules and short sources for which sentences grow long, at a different pace in each row.

    Drafts differ in length from row to row, so rows drift apart, and the caches outgrow what the sources reserved.
    """
    rng = random.Random(seed)
    rules = Rules(
        fallback_threshold=rng.choice([0.3, 0.5, 0.7]),
        rollback_threshold=rng.choice([1.0, 2.0, 4.0]),
        max_draft=rng.choice([5, 10, 30]),
        start=rng.choice([LARGE, SMALL]),
        verify_end=rng.random() < 0.5,
        max_len=62,
        min_len=57,
    )
    return rules, [source(rng.choices(range(WORDS), k=rng.randint(1, 3))) for _ in range(rng.randint(2, 4))]


def any_rules(**strategies: Any) -> st.SearchStrategy[Rules]:
    """Rules with some fields drawn and the others at their defaults."""
    return st.builds(Rules, **strategies).filter(lambda rules: rules.min_len <= rules.max_len)


def count_positions(made: nn.Module) -> list[int]:
    """From now on, how many tokens each decoder layer of a model reads; grows in place."""
    engine = type(engine_for(made, "float32", "large"))(made)  # a new one, which nothing else counts
    remember(made, "float32", engine)
    counts = [0] * engine.depth
    make, run = engine.reader, engine.run

    def count(layers: tuple[int, int], tokens: int) -> None:
        for layer in range(*layers):
            counts[layer] += tokens

    def counted_run(state: Any, step: Pass) -> Any:
        count(step.layers, sum(map(len, step.tokens)))
        return run(state, step)

    def counted_reader(state: Any, layers: tuple[int, int], *args: Any, **kwargs: Any) -> Any:
        """Counts what the reader reads by itself, beyond the passes that it asks the engine for."""
        reader = make(state, layers, *args, **kwargs)

        def counting(method: Callable[..., Any]) -> Callable[..., Any]:
            def counted(tokens: Sequence, rows: Sequence[int], *more: Any) -> Any:
                before, known = counts[layers[0]], [reader.consumed[row] for row in rows]
                result = method(tokens, rows, *more)
                read = sum(reader.consumed[row] - start for row, start in zip(rows, known, strict=True))
                count(layers, read - (counts[layers[0]] - before))
                return result

            return counted

        reader.draft, reader.verify = counting(reader.draft), counting(reader.verify)
        return reader

    engine.reader, engine.run = counted_reader, counted_run
    return counts
