"""Early-exit architectures from Hydra's configurations, as fairseq-hydra-train reads them."""

import json

import pytest
import support
import torch
from cli_support import USER_DIR
from fairseq.models import build_model
from omegaconf import OmegaConf

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
