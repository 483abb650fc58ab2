"""Flags of fairseq-train that build a model again, and what a training will do with its data."""

from argparse import Namespace
from pathlib import Path

import pytest
import support
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY

from bild_fairseq.errors import BildError
from bild_fairseq.experiments import train_flags
from bild_fairseq.experiments.calibration_set import data_file, languages, write_tokens
from bild_fairseq.experiments.data import make_task


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


def write_corpus(folder: Path, sizes: dict[str, list[int]]) -> None:
    """Sentences of some sizes, end symbol included, in languages that a file name does not tell apart."""
    task = Namespace(cfg=Namespace(source_lang="zh-CN", target_lang="en"))
    for language in languages(task):
        support.symbols().save(str(folder / f"dict.{language}.txt"))
        for subset, lengths in sizes.items():
            rows = [torch.tensor([*[5] * (length - 1), support.symbols().eos()]) for length in lengths]
            write_tokens(data_file(folder, task, subset, language), rows)


def test_updates_are_those_of_the_sentences_that_fit(tmp_path):
    write_corpus(tmp_path, {"train": [3, 3, 3, 9, 20, 4, 5], "valid": [30, 2]})
    task = make_task(tmp_path, "zh-CN", "en")

    def plan(*flags: object) -> train_flags.Plan:
        words = [str(tmp_path), "--arch", "transformer", "--required-batch-size-multiple", "1", *map(str, flags)]
        return train_flags.plan(task, train_flags.parse(words))

    # Batches of 10 tokens: 3 + 3 + 3, 4 + 5 (padded to 5), 9; of 4 tokens: 3, 3, 3, 4.
    assert plan("--max-tokens", 10, "--max-epoch", 2) == train_flags.Plan(updates=6, left_out=1, longest_valid=30)
    assert plan("--max-tokens", 10, "--max-epoch", 2, "--update-freq", 2).updates == 4
    assert plan("--max-tokens", 4, "--max-epoch", 3) == train_flags.Plan(updates=12, left_out=3, longest_valid=30)
    assert plan("--max-tokens", 4, "--max-epoch", 3, "--max-update", 5).updates == 5
    assert plan("--batch-size", 2, "--max-epoch", 1) == train_flags.Plan(updates=4, left_out=0, longest_valid=30)
    assert plan("--batch-size", 2, "--max-epoch", 1, "--distributed-world-size", 2).updates == 2
    with pytest.raises(BildError, match="--max-tokens 2: all sentences of the calibration set are longer; raise it"):
        plan("--max-tokens", 2, "--max-epoch", 1)


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
