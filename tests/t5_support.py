"""Tiny random T5 models of every variant, in `transformers` and in fairseq, and a SentencePiece vocabulary."""

import functools
import io
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import Tensor, nn

from bild_fairseq.experiments.convert_t5 import convert

# fairseq's requirements bring a torchaudio, which may not fit the torch that is installed. transformers imports it if
# it finds it.
_hidden = sys.modules.pop("torchaudio", None)
sys.modules["torchaudio"] = None
try:
    import transformers
    from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration
finally:
    del sys.modules["torchaudio"]
    if _hidden is not None:
        sys.modules["torchaudio"] = _hidden

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SENTINELS = 5
PIECES = 90
ENDING = 3.0  # added to the end symbol's score, on average
# Heads x size differs from the model's width, and the encoder's depth from the decoder's. Where the decoder is deeper,
# the cache of `transformers` has too few layers.
SIZE = {"d_model": 24, "d_kv": 5, "d_ff": 32, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2}
TIED = "T5 1.0, tied"
VARIANTS = {
    TIED: (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "relu"}),
    "T5 1.1, untied and gated": (
        T5ForConditionalGeneration,
        T5Config,
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mT5": (MT5ForConditionalGeneration, MT5Config, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}


@functools.cache
def text() -> tuple[str, ...]:
    """Sentences of made-up words."""
    dice = random.Random(3)
    words = ["".join(dice.choices("abcdefghiklmnoprstuvwz", k=dice.randint(2, 7))) for _ in range(150)]
    return tuple(" ".join(dice.choices(words, k=dice.randint(1, 9))) for _ in range(600))


@functools.cache
def spiece(with_sentinels: bool = False) -> bytes:
    """A SentencePiece model trained on `text`, with T5's special symbols; mT5's has the sentinels among its pieces."""
    written = io.BytesIO()
    sentinels = [f"<extra_id_{n}>" for n in reversed(range(SENTINELS))] if with_sentinels else []
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text()),
        model_writer=written,
        vocab_size=PIECES + len(sentinels),
        user_defined_symbols=sentinels,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def hf_model(variant: str, seed: int = 7, **changes: object) -> nn.Module:
    """A model of `transformers` in evaluation mode.

    Every parameter is random, and larger than at T5's initialisation: what follows depends on the source, on each
    earlier token and on positions, and sentences end at many different lengths.
    """
    torch.manual_seed(seed + list(VARIANTS).index(variant))
    model_class, config_class, options = VARIANTS[variant]
    # Three rows without a piece, as the published models have some.
    size = {"vocab_size": PIECES + SENTINELS + 3, "decoder_start_token_id": 0, "relative_attention_max_distance": 20}
    model = model_class(config_class(**(SIZE | size | options | changes)))
    with torch.no_grad():
        if variant != TIED:
            model.lm_head.weight = nn.Parameter(0.7 * torch.randn_like(model.shared.weight))
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
            elif "relative_attention_bias" in name:
                parameter.normal_(std=3.0)
            elif "EncDecAttention" in name or "SelfAttention" in name:
                parameter.mul_(2.0)
    scale = model.config.d_model**0.5 if variant == TIED else 1.0
    return _ending(model.eval(), scale)


@torch.no_grad()
def _ending(model: nn.Module, scale: float) -> nn.Module:
    """Makes the end symbol more likely everywhere, so that sentences end by themselves, sooner or later."""
    ids = padded(sources(20), 0, left=False)
    mask = (ids != 0).long()
    states = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids, output_hidden_states=True)
    mean = states.decoder_hidden_states[-1].flatten(0, 1).mean(0)
    model.lm_head.weight[model.config.eos_token_id] += ENDING * scale * mean / mean.square().sum()
    return model


def save_folder(folder: Path, model: nn.Module, **options: object) -> Path:
    """What `save_pretrained` writes, with a SentencePiece model and the tokenizer's number of sentinels.

    Args:
        options: of `save_pretrained`.
    """
    model.save_pretrained(folder, **options)
    mt5 = model.config.model_type == "mt5"
    (folder / "spiece.model").write_bytes(spiece(with_sentinels=mt5))
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0 if mt5 else SENTINELS}))
    return folder


def converted(folder: Path, variant: str, seed: int = 7, **changes: object) -> tuple[nn.Module, nn.Module, Dictionary]:
    """A model of `transformers`, the same as fairseq loads it after conversion, and its dictionary."""
    wanted = hf_model(variant, seed, **changes)
    return wanted, *in_fairseq(folder, wanted)


def in_fairseq(folder: Path, wanted: nn.Module) -> tuple[nn.Module, Dictionary]:
    """A model of `transformers` as fairseq loads it after conversion, and its dictionary."""
    convert(save_folder(folder / "hf", wanted), folder / "fairseq")
    task = task_of(folder / "fairseq")
    return load(folder / "fairseq" / "model.pt", task), task.target_dictionary


def task_of(folder: Path) -> TranslationTask:
    """A translation task with a converted folder's dictionary on both sides."""
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    return TranslationTask(TranslationConfig(source_lang="x", target_lang="y"), dictionary, dictionary)


def load(path: Path, task: tasks.FairseqTask) -> nn.Module:
    """The model of a checkpoint, in evaluation mode."""
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task)
    return model.eval()


def sources(count: int, seed: int = 5) -> list[list[int]]:
    """T5's ids of random sources: 1 to 24 pieces, some of them farther apart than biases reach, and the end symbol."""
    dice = random.Random(seed)
    return [[*(dice.randrange(2, PIECES) for _ in range(dice.randint(1, 24))), 1] for _ in range(count)]


def source_batch(rows: Sequence[Sequence[int]]) -> dict[str, dict[str, Tensor]]:
    """fairseq's batch of T5's ids, padded on the left as for translation."""
    tokens = padded([to_fairseq(row) for row in rows], 1, left=True)
    return {"net_input": {"src_tokens": tokens, "src_lengths": torch.tensor([len(row) for row in rows])}}


def batches(rows: Sequence[Sequence[int]], size: int) -> list[Sequence[Sequence[int]]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def padded(rows: Sequence[Sequence[int]], padding: int, left: bool) -> Tensor:
    """(batch, longest)"""
    width = max(map(len, rows))
    columns = [[padding] * (width - len(row)) for row in rows]
    return torch.tensor(
        [fill + list(row) if left else list(row) + fill for fill, row in zip(columns, rows, strict=True)]
    )


def to_fairseq(row: Sequence[int]) -> list[int]:
    """T5's ids as fairseq's: padding 0 -> 0, and all others one higher."""
    return [number + 1 if number else 0 for number in row]
