"""Early-exit architectures from Hydra's configurations, as fairseq-hydra-train reads them."""

import json
from argparse import Namespace

import pytest
import support
import torch
from cli_support import USER_DIR
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY, build_criterion
from fairseq.models import ARCH_MODEL_REGISTRY, build_model
from omegaconf import OmegaConf

import bild_fairseq

FLAT = {**support.SIZE, "decoder_layers": 3, "dropout": 0.0}
GROUPS = {
    side: {name.removeprefix(f"{side}_"): value for name, value in FLAT.items() if name.startswith(f"{side}_")}
    for side in ("encoder", "decoder")
}
NESTED = {name: value for name, value in FLAT.items() if not name.startswith(("encoder_", "decoder_"))} | GROUPS


@pytest.mark.parametrize("exits", ["1,2", [1, 2]])
@pytest.mark.parametrize("arch", ["early_exit_transformer", "early_exit_transformer_tiny", "early_exit_bart_base"])
@pytest.mark.parametrize("kind", ["flat", "nested"])
def test_a_configuration_is_the_model_of_the_same_options(kind, arch, exits):
    config = OmegaConf.create({"_name": arch, "exit_layers": exits, **(FLAT if kind == "flat" else NESTED)})
    OmegaConf.set_struct(config, True)
    torch.manual_seed(1)
    made = build_model(config, support.task()).eval()
    wanted = support.model(1, arch, decoder_layers=3, exit_layers="1,2", dropout=0.0)
    assert made.decoder.exit_layers == [1, 2]
    found = {name: weight.shape for name, weight in made.state_dict().items()}
    assert found == {name: weight.shape for name, weight in wanted.state_dict().items()}


# fairseq's own presets have other models behind them.
OURS = sorted(
    arch for arch, model in ARCH_MODEL_REGISTRY.items() if model.__module__.startswith(bild_fairseq.__name__ + ".")
)
TINY_T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 3}


def test_the_presets_are_all_there():
    for arch in ("early_exit_transformer_vaswani_wmt_en_de_big", "early_exit_bart_large", "t5_small", "flan_t5_xl"):
        assert arch in OURS
    assert {"early_exit_mt5_small", "early_exit_transformer", "mt5_base"} < set(OURS)


@pytest.mark.parametrize("arch", OURS)
def test_every_preset_is_built_from_configurations(arch):
    """Flat and nested, they are the model of the same options on the command line; its sizes are given, to be quick."""
    t5 = "t5" in arch
    flat = {**(TINY_T5 if t5 else FLAT), **({"exit_layers": "1"} if arch.startswith("early_exit") else {})}
    kinds = {"flat": flat, "nested": flat if t5 else {**NESTED, "exit_layers": "1"}}
    wanted = build_model(Namespace(arch=arch, **flat), support.task()).state_dict()
    for kind, options in kinds.items():
        config = OmegaConf.create({"_name": arch, **options})
        OmegaConf.set_struct(config, True)
        made = build_model(config, support.task()).state_dict()
        found, expected = ({name: one.shape for name, one in weights.items()} for weights in (made, wanted))
        assert found == expected, kind


@pytest.mark.parametrize("defaults", [True, False], ids=["of the dataclass", "of what is given"])
@pytest.mark.parametrize("name", ["early_exit_label_smoothed_cross_entropy", "word_distillation_cross_entropy"])
def test_every_criterion_is_built_from_a_configuration(corpus, name, defaults):
    given = {"_name": name, "sentence_avg": False}
    given |= {"teacher_path": str(corpus.large)} if name.startswith("word") else {"label_smoothing": 0.1}
    config = OmegaConf.create(given)
    if defaults:
        config = OmegaConf.merge(OmegaConf.structured(CRITERION_DATACLASS_REGISTRY[name]), config)
    OmegaConf.set_struct(config, True)
    made = build_criterion(config, corpus.task())
    assert type(made) is CRITERION_REGISTRY[name]


HYDRA = "from fairseq_cli.hydra_train import cli_main; cli_main()"


def test_fairseq_hydra_train(corpus, tmp_path):
    """It trains, and an error is one line."""
    config = {
        "common": {"cpu": True, "user_dir": USER_DIR},
        "task": {"_name": "translation", "data": str(corpus.data), "source_lang": "x", "target_lang": "y"},
        "criterion": {"_name": "early_exit_label_smoothed_cross_entropy"},
        "dataset": {"batch_size": 16, "num_workers": 0, "disable_validation": True},
        "optimization": {"max_update": 1, "lr": [0.001]},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "fixed"},
        "checkpoint": {"no_save": True},
        "distributed_training": {"distributed_world_size": 1},
        "model": {"_name": "early_exit_transformer", "exit_layers": "1", **NESTED, "encoder_normalize_before": True},
    }
    del config["model"]["task"]
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    arguments = ["--config-dir", tmp_path, "--config-name", "tiny", f"hydra.run.dir={tmp_path}"]
    run = corpus.programs("python", HYDRA, "fairseq-hydra-train", *arguments)
    assert "exit1_loss" in run.out + run.err
    run = corpus.programs("python", HYDRA, "fairseq-hydra-train", *arguments, "model.exit_layers=7", status=None)
    assert run.error() == "bild_fairseq: --exit-layers 7: with --decoder-layers 3 the highest exit is 2"
