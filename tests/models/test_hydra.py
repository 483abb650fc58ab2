"""Early-exit architectures from Hydra's configurations, as fairseq-hydra-train reads them."""

import pytest
import support
import torch
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
