"""Flags of fairseq-train that build a model again."""

from argparse import Namespace

import pytest
from fairseq.models import ARCH_CONFIG_REGISTRY

from bild_fairseq.errors import BildError
from bild_fairseq.experiments import train_flags


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("transformer", {}),
        ("transformer", {"encoder_layers": 2, "decoder_embed_dim": 64, "decoder_output_dim": 64}),
        ("transformer_iwslt_de_en", {"share_all_embeddings": True, "encoder_normalize_before": True}),
        (
            "transformer_wmt_en_de_big",
            {"activation_fn": "gelu", "decoder_learned_pos": True, "no_scale_embedding": True},
        ),
        ("bart_base", {"decoder_layers": 1, "max_target_positions": 512}),
    ],
)
def test_a_model_is_built_again_from_flags(arch, changes):
    """What fairseq-train makes of the flags has every option of the model."""
    config = Namespace(arch=arch, dropout=0.3, max_source_positions=1024, max_target_positions=1024)
    vars(config).update(changes)
    ARCH_CONFIG_REGISTRY[arch](config)
    flags = ["data", "--task", "translation", *train_flags.model_flags(config), "--dropout", "0"]
    parsed = train_flags.parse(flags)
    train_flags.check_model(parsed, config)
    for name, value in {**vars(config), "dropout": 0.0}.items():
        assert getattr(parsed, name) == value, name


def test_a_model_that_flags_cannot_build_is_refused():
    config = Namespace(arch="bart_base", share_all_embeddings=False)
    ARCH_CONFIG_REGISTRY["bart_base"](config)
    parsed = train_flags.parse(["data", "--task", "translation", *train_flags.model_flags(config)])
    with pytest.raises(BildError, match="--share-all-embeddings False, which fairseq-train cannot be told"):
        train_flags.check_model(parsed, config)
    with pytest.raises(BildError, match="its architecture is lstm"):
        train_flags.model_flags(Namespace(arch="lstm"))
    with pytest.raises(BildError, match="fairseq-train: .*--no-such-flag.*; see the flags after --"):
        train_flags.parse(["data", "--arch", "transformer", "--no-such-flag"])
