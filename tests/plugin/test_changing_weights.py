"""A generator that was built before a training decodes with the weights of now, as fairseq's own does."""

import copy
import re
import shutil

import pytest
import support
import torch
from cli_support import USER_DIR
from fairseq import checkpoint_utils
from fairseq.optim.adam import Adam
from reference import Rules
from torch import nn

from bild_fairseq.plugin.flags import BildGenerationConfig

SAMPLE = support.sample([support.source([3, 1, 4, i]) for i in range(6)])
EXITS = {"decoder_layers": 3, "exit_layers": "1"}


def optimizer_of_fairseq(model: nn.Module, other: nn.Module) -> None:
    """Writes through ``.data``, which torch's counts of changes miss."""
    model.train()
    optimizer = Adam(model.parameters(), lr=0.3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    model.eval()


def loading(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict(other.state_dict())


def writing(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(-1)


def another_parameter(model: nn.Module, other: nn.Module) -> None:
    model.decoder.output_projection.weight = nn.Parameter(-model.decoder.output_projection.weight.detach())


def other_data(model: nn.Module, other: nn.Module) -> None:
    model.decoder.output_projection.weight.data = -model.decoder.output_projection.weight.data


def another_order(model: nn.Module, other: nn.Module) -> None:
    """The same numbers in other places."""
    with torch.no_grad():
        model.decoder.output_projection.weight.copy_(model.decoder.output_projection.weight.flip(0))


CHANGES = [optimizer_of_fairseq, loading, writing, another_parameter, other_data, another_order]


def generator_of(kind: str, model: nn.Module):
    rules = Rules(max_len=12)
    if kind == "greedy":
        return support.generator([model], [], rules, alone=True)
    if kind == "exit":
        return support.generator([model], [], rules, exit_layer=1)
    return support.generator([support.model(5)], [model], rules)


def texts(generator) -> list[list[int]]:
    return [hypotheses[0]["tokens"].tolist() for hypotheses in generator.generate([], SAMPLE)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["greedy", "exit", "small"])
def test_text_is_that_of_a_new_generator(kind, change):
    options = {"arch": "early_exit_transformer", **EXITS, **support.PRE_NORM}
    model, other = support.model(1, **options), support.model(2, **options)
    generator = generator_of(kind, model)
    before = [hypotheses[0]["positional_scores"] for hypotheses in generator.generate([], SAMPLE)]
    change(model, other)
    copied = copy.deepcopy(model).eval()
    fresh = generator_of(kind, copied)
    for found, wanted in zip(generator.generate([], SAMPLE), fresh.generate([], SAMPLE), strict=True):
        support.assert_same_hypothesis(found[0], wanted[0])
    if kind != "small":  # its text is mostly the large model's
        after = [hypotheses[0]["positional_scores"] for hypotheses in generator.generate([], SAMPLE)]
        assert any(len(a) != len(b) or not torch.allclose(a, b) for a, b in zip(before, after, strict=True))


def writing_through_data(model: nn.Module) -> None:
    """Torch counts no change of this kind, and no optimizer has made a step."""
    model.decoder.output_projection.weight.data.neg_()


def swapping_through_data(model: nn.Module) -> None:
    weight = model.decoder.output_projection.weight.data
    weight.copy_(weight.flip(0))


def scaling_the_position_table(model: nn.Module) -> None:
    """A table that is no parameter and is not saved."""
    model.decoder.embed_positions.weights = model.decoder.embed_positions.weights * 2


def hooking_an_encoder_layer(model: nn.Module) -> None:
    model.encoder.layers[0].register_forward_hook(lambda layer, given, out: out * 1.5)


def hooking_what_an_encoder_layer_is_given(model: nn.Module) -> None:
    model.encoder.layers[0].fc1.register_forward_pre_hook(lambda layer, given: (given[0] * 1.5,))


AT_REST = [writing_through_data, swapping_through_data, scaling_the_position_table]
AT_REST += [hooking_an_encoder_layer, hooking_what_an_encoder_layer_is_given]


@pytest.mark.parametrize("change", AT_REST)
def test_a_new_generator_has_the_model_of_now(change):
    """However it was changed: what a generator before has left to be used again is not used."""
    model = support.model(1)
    before = generator_of("greedy", model).generate([], SAMPLE)
    change(model)
    copied = copy.deepcopy(model).eval()
    found, wanted = (generator_of("greedy", one).generate([], SAMPLE) for one in (model, copied))
    for ours, theirs in zip(found, wanted, strict=True):
        support.assert_same_hypothesis(ours[0], theirs[0])
    scores = [[hypotheses[0]["score"].item() for hypotheses in batch] for batch in (before, wanted)]
    assert scores[0] != scores[1]


def test_weights_that_stay_are_laid_out_once(monkeypatch):
    """However many batches and generators there are; the engines are made of their weights once."""
    model = support.model(1)
    generator = generator_of("greedy", model)
    engines = generator.pair.engines
    for _ in range(3):
        texts(generator)
    assert generator.pair.engines == engines == generator_of("greedy", model).pair.engines
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(1)  # written to, with the same numbers
    texts(generator)
    assert generator.pair.engines == engines


def test_a_small_model_is_loaded_anew_only_if_its_file_has_changed(corpus, tmp_path):
    """fairseq's hub interface builds a generator for every call."""
    task, file = corpus.task(), tmp_path / "small.pt"
    models, _ = checkpoint_utils.load_model_ensemble([str(corpus.large)], task=task)

    def small_model() -> nn.Module:
        args = BildGenerationConfig(generator="bild", bild_small_path=str(file))
        return task.build_generator(models, args).pair.small[0]

    shutil.copy(corpus.small, file)
    first = small_model()
    assert small_model() is first
    shutil.copy(corpus.small_halfway, file)
    assert small_model() is not first


def test_bleu_during_training_is_that_of_beam_search_with_one_beam(corpus, tmp_path):
    """--eval-bleu builds its generator once, before the first step."""
    size = "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 --decoder-embed-dim 32 --max-epoch 6 --no-save"
    size += " --encoder-attention-heads 2 --decoder-attention-heads 2 --encoder-normalize-before --cpu -s x -t y"
    options = [
        "--arch",
        "transformer_tiny",
        "--optimizer",
        "adam",
        "--lr",
        0.01,
        "--batch-size",
        20,
        "--num-workers",
        0,
    ]
    options += ["--user-dir", USER_DIR, "--log-format", "simple", "--save-dir", tmp_path, "--dropout", 0]
    scores = {}
    for name in ("greedy", "beam"):
        chosen = f'{{"generator": "{name}", "beam": 1, "max_len_b": 12}}'
        bleu = ["--eval-bleu", "--eval-bleu-args", chosen]
        run = corpus.programs("train", corpus.data, *size.split(), *options, *bleu)
        lines = [line for line in (run.out + run.err).splitlines() if "valid on 'valid' subset" in line]
        scores[name] = [re.search(r"\| bleu ([\d.]+)", line)[1] for line in lines]
    assert scores["greedy"] == scores["beam"]
    assert len(set(scores["beam"])) > 1 and float(scores["beam"][-1]) > 20, "nothing was learned, so nothing is proved"
