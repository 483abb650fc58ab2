"""Every encoder-decoder architecture and every option of the Transformer and T5: stock fairseq's text, or a refusal.

Both lists come from the code itself, so that what is new in a later fairseq is met here first: an architecture is tried
without a word, an option fails a test until somebody has said what to build with it.
"""

import argparse
import dataclasses
import functools
import inspect
import math
import re
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import quantization_utils, utils
from fairseq.dataclass.configs import GenerationConfig
from fairseq.models import (
    ARCH_MODEL_REGISTRY,
    MODEL_REGISTRY,
    FairseqEncoderDecoderModel,
    FairseqMultiModel,
    build_model,
)
from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules import transformer_layer
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask
from fairseq.tasks.multilingual_translation import MultilingualTranslationTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from reference import SMALL, Rules
from support import PRE_NORM, SIZE, assert_same_hypothesis, generator, model, randomize, sample, source, symbols, task
from torch import nn

from bild_fairseq.errors import BildError
from bild_fairseq.models.t5_config import FEED_FORWARD, T5Config

RULES = Rules(max_len=12)
# The small model writes all, and nothing verifies it.
VERBATIM = Rules(max_len=12, fallback_threshold=0.0, rollback_threshold=math.inf, start=SMALL, max_draft=10**6)
SENTENCES = [source(words) for words in ([3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], [8, 9, 7, 9])]


@functools.cache
def plain() -> nn.Module:
    """A large model beside which the others draft."""
    return model(100)


def refusal(made: nn.Module) -> str | None:
    """Why a generator refuses a model, in one line; None if it takes it. As large and as small model alike."""
    reasons = {}
    for role, large, small, more in (("large", made, [], {"alone": True}), ("small", plain(), [made], {})):
        try:
            generator([large], small, RULES, **more)
        except BildError as error:
            assert role in str(error)
            assert "\n" not in str(error)
            reasons[role] = str(error).replace(role, "")
    assert len(set(reasons.values())) == (1 if len(reasons) == 2 else 0)
    return reasons.get("large")


def assert_like_stock(made: nn.Module) -> None:
    """Text and scores of the model alone, and of its drafts that nothing verifies, are stock fairseq's greedy ones."""
    stock = SequenceGenerator([made], symbols(), beam_size=1, max_len_b=RULES.max_len)
    wanted = [one for (one, *_) in stock.generate([made], sample(SENTENCES))]
    for ours in (generator([made], [], RULES, alone=True), generator([plain()], [made], VERBATIM)):
        for (found,), one in zip(ours.generate([], sample(SENTENCES)), wanted, strict=True):
            assert_same_hypothesis(found, one)


# ---- architectures


def is_encoder_decoder(kind: type) -> bool:
    return issubclass(kind, (FairseqEncoderDecoderModel, FairseqMultiModel)) or hasattr(kind, "build_decoder")


# Every named architecture, and the models that have none.
KINDS = {
    name: kind
    for name, kind in {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY}.items()
    if is_encoder_decoder(kind) and (name in ARCH_MODEL_REGISTRY or kind not in ARCH_MODEL_REGISTRY.values())
}
# What has to decode, so that a check that refuses too much is seen.
FAMILIES = ("TransformerModel", "BARTModel", "TransformerAlignModel", "MultilingualTransformerModel")
FAMILIES += ("T5Model", "EarlyExitTransformerModel", "EarlyExitBARTModel", "EarlyExitT5Model")

SPEECH = {"input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 8, "n_frames_per_step": 1, "fp16": False}
SPEECH |= {"output_frame_dim": 8, "prenet_dim": 8, "postnet_conv_dim": 8, "target_speaker_embed": False}
CONVOLUTIONS = {"encoder_layers": "[(16, 3)]", "decoder_layers": "[(16, 3)]", "decoder_attention": "True"}
KERNELS = {"encoder_kernel_size_list": [3, 3], "decoder_kernel_size_list": [3, 3]}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
# Options that a kind of model needs beyond the sizes, by the name of its class.
OPTIONS = {
    "LightConvModel": KERNELS,
    "FConvModel": {**CONVOLUTIONS, "decoder_out_embed_dim": 16},
    "FConvModelSelfAtt": {**CONVOLUTIONS, "decoder_out_embed_dim": 16, "encoder_attention": "False"},
    "LSTMModel": {"criterion": "cross_entropy"},
    "RobertaEncDecModel": {"max_positions": 50},
    "BerardModel": {"lstm_size": 8, "num_blstm_layers": 1, "decoder_hidden_dim": 8, "decoder_num_layers": 1},
    "Tacotron2Model": {"decoder_lstm_dim": 8},
    "T5Model": T5,
    "EarlyExitT5Model": T5,
}

PRETRAINED = "reads the checkpoint of a pretrained model"
CANNOT_BE_BUILT = {
    "Wav2Vec2Seq2SeqModel": PRETRAINED,
    "HubertSeq2SeqModel": PRETRAINED,
    "TransformerFromPretrainedXLMModel": PRETRAINED,
    "XMTransformerModel": PRETRAINED,
    "XMTransformerModelUnitY": PRETRAINED,
    "PipelineParallelTransformerModel": "needs fairscale, and a device for each part",
    "ModelParallelTransformerModel": "needs the megatron submodule, and has no architecture",
}


class AnyTask(TranslationTask):
    """Translation, with what models of speech ask their tasks for: a further decoder, which writes text."""

    multitask_tasks = {
        "text": Namespace(
            args=Namespace(input_from="encoder", decoder_type="transformer", decoder_args=Namespace(**SIZE)),
            is_first_pass_decoder=True,
            target_dictionary=symbols(),
        )
    }

    def get_speaker_embeddings(self, args: Namespace) -> None:
        return None


def task_for(kind: type) -> FairseqTask:
    if issubclass(kind, FairseqMultiModel):
        return MultilingualTranslationTask(
            Namespace(lang_pairs=["de-en"]), dict.fromkeys(["de", "en"], symbols()), True
        )
    made = AnyTask(TranslationConfig(source_lang="de", target_lang="en"), symbols(), symbols())
    made.args = Namespace(target_is_code="Spec" not in kind.__name__)  # units of speech, or a spectrogram
    return made


def build(name: str, folder: Path) -> nn.Module:
    """An architecture at test size; what it does not know of the options, it ignores.

    Args:
        folder: for the description of the data that some models of speech read.
    """
    (folder / "config.yaml").write_text("{}")
    kind = KINDS[name]
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    kind.add_args(parser)
    defaults = {option: value for option, value in vars(parser.parse_args([])).items() if value is not None}
    options = {**defaults, **SPEECH, **SIZE, "encoder_layers": 2, **OPTIONS.get(kind.__name__, {})}
    options |= {"data": str(folder), "config_yaml": "config.yaml"}
    with suppress(Exception), torch.device("meta"):  # without memory, where the model's constructor can do that
        size = sum(
            weight.numel() for weight in build_model(Namespace(arch=name, **options), task_for(kind)).parameters()
        )
        if size > 1_000_000:
            pytest.fail(f"say in OPTIONS what makes {name} small: it has {size} weights")
    torch.manual_seed(0)
    return build_model(Namespace(arch=name, **options), task_for(kind)).eval()


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.__name__ not in CANNOT_BE_BUILT])
def test_every_architecture(name, tmp_path):
    made = build(name, tmp_path)
    if KINDS[name].__name__ in FAMILIES or refusal(made) is None:
        assert_like_stock(randomize(made))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.__name__ in CANNOT_BE_BUILT])
def test_what_cannot_be_built_cannot(name, tmp_path):
    """Otherwise it belongs to the test above."""
    with pytest.raises((AssertionError, AttributeError, ImportError, OSError, ValueError)):
        build(name, tmp_path)


def test_a_language_model_is_refused():
    with pytest.raises(BildError, match="the large model .* no encoder"):
        generator([model(0, "transformer_lm", tokens_per_sample=50)], [], RULES, alone=True)


# ---- options

ADAPTIVE = {"adaptive_softmax_cutoff": "8,16"}
PRODUCT_NOISE = {"quant_noise_pq": 0.1, "quant_noise_pq_block_size": 4}
NOT_BUILT = {
    "encoder_embed_path": "where embeddings start from in training",
    "decoder_embed_path": "where embeddings start from in training",
    "encoder_xformers_att_config": "needs xformers",
    "decoder_xformers_att_config": "needs xformers",
    "base_layers": "needs an extension of fairseq's own, and several processes",
}
# What to build to see that an option changes the forward pass, or that it does not.
CASES: dict[str, list[dict[str, Any]]] = {
    "activation_fn": [{"activation_fn": name} for name in (*utils.get_available_activation_fns(), "relu_squared")],
    "dropout": [{"dropout": 0.9}],
    "attention_dropout": [{"attention_dropout": 0.9}],
    "activation_dropout": [{"activation_dropout": 0.9}],
    "relu_dropout": [{"relu_dropout": 0.9}],
    "adaptive_input": [{"adaptive_input": True}, {"adaptive_input": True, **PRODUCT_NOISE}],
    "encoder_embed_dim": [{"encoder_embed_dim": 24}],
    "encoder_ffn_embed_dim": [{"encoder_ffn_embed_dim": 40}],
    "encoder_layers": [{"encoder_layers": 3}],
    "encoder_attention_heads": [{"encoder_attention_heads": 4}],
    "encoder_normalize_before": [{"encoder_normalize_before": True}],
    "encoder_learned_pos": [{"encoder_learned_pos": True}],
    "encoder_layerdrop": [{"encoder_layerdrop": 0.9, "encoder_layers": 3}],
    "encoder_layers_to_keep": [{"encoder_layers_to_keep": "0", "encoder_layers": 3}],
    "max_source_positions": [{"max_source_positions": 9}, {"max_source_positions": 9, "encoder_learned_pos": True}],
    "decoder_embed_dim": [{"decoder_embed_dim": 24}],
    "decoder_ffn_embed_dim": [{"decoder_ffn_embed_dim": 40}],
    "decoder_layers": [{"decoder_layers": 3}],
    "decoder_attention_heads": [{"decoder_attention_heads": 4}],
    "decoder_normalize_before": [{"decoder_normalize_before": True}],
    "decoder_learned_pos": [{"decoder_learned_pos": True}],
    "decoder_layerdrop": [{"decoder_layerdrop": 0.9, "decoder_layers": 3}],
    "decoder_layers_to_keep": [{"decoder_layers_to_keep": "0", "decoder_layers": 3}],
    "decoder_input_dim": [{"decoder_input_dim": 8}],
    "decoder_output_dim": [{"decoder_output_dim": 8}],
    "max_target_positions": [{"max_target_positions": 6}, {"max_target_positions": 6, "decoder_learned_pos": True}],
    "share_decoder_input_output_embed": [{"share_decoder_input_output_embed": True}],
    "share_all_embeddings": [{"share_all_embeddings": True}],
    "merge_src_tgt_embed": [{"merge_src_tgt_embed": True}],
    "no_token_positional_embeddings": [{"no_token_positional_embeddings": True}],
    "adaptive_softmax_cutoff": [ADAPTIVE],
    "adaptive_softmax_dropout": [{"adaptive_softmax_dropout": 0.9}, {"adaptive_softmax_dropout": 0.9, **ADAPTIVE}],
    "adaptive_softmax_factor": [{"adaptive_softmax_factor": 2}, {"adaptive_softmax_factor": 2, **ADAPTIVE}],
    "layernorm_embedding": [{"layernorm_embedding": True}],
    "tie_adaptive_weights": [{"tie_adaptive_weights": True}],
    "tie_adaptive_proj": [{"tie_adaptive_proj": True}, {"tie_adaptive_proj": True, **ADAPTIVE}],
    "no_scale_embedding": [{"no_scale_embedding": True}],
    "checkpoint_activations": [{"checkpoint_activations": True}],
    "offload_activations": [{"checkpoint_activations": True, "offload_activations": True}],
    "no_cross_attention": [{"no_cross_attention": True}],
    "cross_self_attention": [
        {"cross_self_attention": True},
        {"cross_self_attention": True, "no_cross_attention": True},
    ],
    "quant_noise_pq": [PRODUCT_NOISE],
    "quant_noise_pq_block_size": [{"quant_noise_pq_block_size": 4}],
    "quant_noise_scalar": [{"quant_noise_scalar": 0.5}],
    "min_params_to_wrap": [{"min_params_to_wrap": 1}],
    "char_inputs": [{"char_inputs": True}],
    "base_sublayers": [{"base_sublayers": 2}],
    "base_shuffle": [{"base_shuffle": 0}],
    "export": [{"export": True}],
    "no_decoder_final_norm": [{"no_decoder_final_norm": True, **PRE_NORM}],
    # Options that the layers look for and the configuration does not declare.
    "scale_attn": [{"scale_attn": True}],
    "scale_fc": [{"scale_fc": True}],
    "scale_heads": [{"scale_heads": True}],
    "scale_resids": [{"scale_resids": True}],
}
# Any of these is refused; everything else has to run.
REFUSED = ("adaptive_softmax_cutoff", "cross_self_attention", "quant_noise_pq", "quant_noise_scalar")


# The same for this package's T5; all of it has to run.
T5_CASES: dict[str, list[dict[str, Any]]] = {
    "d_model": [{"d_model": 24}],
    "d_kv": [{"d_kv": 6}],
    "d_ff": [{"d_ff": 40}],
    "num_heads": [{"num_heads": 3}],
    "num_layers": [{"num_layers": 1}],
    "num_decoder_layers": [{"num_decoder_layers": 3}],
    "relative_attention_num_buckets": [{"relative_attention_num_buckets": 6}],
    "relative_attention_max_distance": [
        {"relative_attention_max_distance": 5, "relative_attention_num_buckets": 6},
    ],
    "feed_forward_proj": [{"feed_forward_proj": name} for name in FEED_FORWARD],
    "layer_norm_epsilon": [{"layer_norm_epsilon": 0.1}],
    "tie_word_embeddings": [{"tie_word_embeddings": False}, {"tie_word_embeddings": True}],
    "scale_decoder_outputs": [{"scale_decoder_outputs": False}, {"scale_decoder_outputs": True}],
    "dropout": [{"dropout": 0.9}],
    "missing_rows": [{"missing_rows": 3}],
}


def option_names() -> set[str]:
    """Fields of the Transformer's configuration as the command line calls them, and what its modules look up beside."""
    names = set()
    for field in dataclasses.fields(TransformerConfig):
        if dataclasses.is_dataclass(field.type):
            names |= {f"{field.name}_{inner.name}" for inner in dataclasses.fields(field.type) if inner.name != "_name"}
        elif field.name != "_name":  # of the configuration itself
            names.add(field.name)
    for module in (transformer_layer, *map(inspect.getmodule, (TransformerDecoderBase, TransformerEncoderBase))):
        names |= set(re.findall(r"getattr\(\s*cfg,\s*\"(\w+)\"", inspect.getsource(module)))
    return names


@pytest.mark.parametrize("name", sorted(option_names()))
def test_every_option_is_known(name):
    assert name in CASES or name in NOT_BUILT, f"say in CASES whether {name} changes the forward pass"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(T5Config)])
def test_every_option_of_t5_is_known(name):
    assert name in T5_CASES, f"say in T5_CASES whether {name} changes the forward pass"


def with_options(arch: str = "transformer", **options: Any) -> nn.Module:
    """As fairseq's tasks build a model, and with random weights."""
    args = Namespace(arch=arch, **{**SIZE, **options})
    torch.manual_seed(2)
    return randomize(quantization_utils.quantize_model_scalar(build_model(args, task()), args))


@pytest.mark.parametrize(
    "options",
    [case for name in CASES if name in option_names() for case in CASES[name]],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_option(options):
    made = with_options(**options)
    if any(options.get(name) for name in REFUSED):
        assert refusal(made) is not None
    else:
        assert_like_stock(made)


@pytest.mark.parametrize(
    "options",
    [case for cases in T5_CASES.values() for case in cases],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_option_of_t5(options):
    assert_like_stock(with_options("t5", **{**T5, **options}))


def drops() -> nn.Module:
    return with_options(dropout=0.3, attention_dropout=0.3, activation_dropout=0.3)


DROPPING = sorted({part.module_name for part in drops().modules() if isinstance(part, FairseqDropout)})


@pytest.mark.parametrize("kinds", [None, *([name] for name in DROPPING)], ids=str)
def test_retained_dropout_is_refused(kinds):
    """In any kind of module, encoders included, as fairseq's programs switch it on: text would be another each time."""
    made = drops()
    generation = GenerationConfig(retain_dropout=True, retain_dropout_modules=kinds)
    made.prepare_for_inference_(Namespace(generation=generation))
    assert "--retain-dropout" in refusal(made)


@pytest.mark.parametrize(("dropout", "kinds"), [(0.3, ["LSTMDecoder"]), (0.0, None)])
def test_retained_dropout_that_drops_nothing(dropout, kinds):
    made = with_options(dropout=dropout, attention_dropout=dropout)
    generation = GenerationConfig(retain_dropout=True, retain_dropout_modules=kinds)
    made.prepare_for_inference_(Namespace(generation=generation))
    assert_like_stock(made)
