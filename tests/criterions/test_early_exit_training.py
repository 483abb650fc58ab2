"""Training early-exit models: the loss by hand, and fairseq-train from end to end."""

import gc
import json
import math
import random
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import support
import torch
import torch.nn.functional as F
from cli_support import USER_DIR
from fairseq import checkpoint_utils
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary
from fairseq.distributed import ModuleProxyWrapper
from fairseq.logging import metrics
from fairseq.sequence_generator import SequenceGenerator
from torch.distributions import Categorical, kl_divergence

from bild_fairseq.criterions import EarlyExitLabelSmoothedCrossEntropyCriterion
from bild_fairseq.models import exit_model

SMOOTHING = 0.1


def model_of(arch="early_exit_transformer", **chosen):
    """A pre-norm model with exits at layers 1 and 2 of 3, at random, without dropout."""
    norm = {"encoder_normalize_before": True, "decoder_normalize_before": True}
    exits = {"decoder_layers": 3, "exit_layers": "1,2", "task": "translation", "dropout": 0.0}
    return support.model(11, arch, **{**norm, **exits, **chosen}).train()


def sample_of(rows=slice(None)):
    """Some rows of a batch of four sentences whose targets have 7, 5, 4 and 2 tokens."""
    lengths = (7, 5, 4, 2)
    symbols = support.symbols()
    dice = torch.Generator().manual_seed(2)
    words = torch.randint(symbols.nspecial, len(symbols), (4, 6), generator=dice)
    target = torch.full((4, 7), symbols.pad())
    previous = target.clone()
    for row, length in enumerate(lengths):
        target[row, :length] = torch.tensor([*words[row, : length - 1], symbols.eos()])
        previous[row, :length] = torch.tensor([symbols.eos(), *words[row, : length - 1]])
    inputs = support.sample([support.source([3, 1, 4, i]) for i in range(4)])["net_input"]
    return {
        "net_input": {**{name: tensor[rows] for name, tensor in inputs.items()}, "prev_output_tokens": previous[rows]},
        "target": target[rows],
        "ntokens": sum(lengths[rows]),
    }


def criterion_of(**chosen):
    options = {"sentence_avg": False, "label_smoothing": SMOOTHING, **chosen}
    return EarlyExitLabelSmoothedCrossEntropyCriterion(support.task(), **options)


def heads_of(model):
    """Name in the log -> the model whose full forward pass ends in that head."""
    return {"exit1": exit_model(model, 1), "exit2": exit_model(model, 2), "final": model}


def scores_and_targets(model, sample):
    """(tokens, vocab) and (tokens,) of a head's model, without padding."""
    target = sample["target"]
    kept = target != support.symbols().pad()
    return model(**sample["net_input"])[0][kept], target[kept]


def smoothed_loss(scores, target):
    """Cross-entropy with the smoothed target distribution written out, summed over tokens."""
    vocabulary = scores.size(1)
    wanted = torch.full_like(scores, SMOOTHING / (vocabulary - 1))
    wanted[torch.arange(len(target)), target] = 1 - SMOOTHING
    return F.cross_entropy(scores, wanted, reduction="sum")


def close(got, wanted):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("written", "weights"), [("", (1, 1, 1)), ("1,2,5", (1, 2, 5)), ("0,0.5,0", (0, 0.5, 0))])
def test_loss_is_the_weighted_mean_over_the_heads(written, weights):
    model, sample = model_of(), sample_of()
    loss, sample_size, log = criterion_of(exit_loss_weights=written)(model, sample)
    wanted = {}
    for name, head in heads_of(model).items():
        scores, target = scores_and_targets(head, sample)
        wanted[name] = smoothed_loss(scores, target)
        nll_loss = F.cross_entropy(scores, target, reduction="sum")
        correct = (scores.argmax(1) == target).sum()
        prefix = "" if name == "final" else f"{name}_"
        close(log[f"{name}_loss"], wanted[name].detach())
        close(log[f"{prefix}nll_loss"], nll_loss.detach())
        close(log[f"{prefix}n_correct"], correct)
    mean = sum(w * x for w, x in zip(weights, wanted.values(), strict=True)) / sum(weights)
    close(loss, mean)
    close(log["loss"], mean.detach())
    assert sample_size == log["ntokens"] == log["total"] == 18
    assert "exit1_kl" not in log


@pytest.mark.parametrize("sentence_avg", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_every_head_has_the_stock_criterion_s_loss(sentence_avg, prefix):
    """Ignored prefixes, padding and sample sizes are fairseq's."""
    model, sample = model_of(), sample_of()
    with torch.no_grad():  # padding is the most probable token where it is the target
        features = model(**sample["net_input"], features_only=True)[0]  # (batch, time, dim)
        model.decoder.output_projection.weight[support.symbols().pad()] = 9 * features[-1, -1]
    ours = criterion_of(sentence_avg=sentence_avg, ignore_prefix_size=prefix)
    stock = LabelSmoothedCrossEntropyCriterion(support.task(), sentence_avg, SMOOTHING, prefix, True)
    _, sample_size, log = ours(model, sample)
    for name, head in heads_of(model).items():
        wanted, wanted_size, stock_log = stock(head, sample)
        own = "" if name == "final" else f"{name}_"
        close(log[f"{name}_loss"], wanted.detach())
        close(log[f"{own}nll_loss"], stock_log["nll_loss"])
        assert log[f"{own}n_correct"] == stock_log["n_correct"]
        assert (sample_size, log["total"]) == (wanted_size, stock_log["total"])


@pytest.mark.parametrize("distill", [0.25, 1.0])
def test_distillation_pulls_the_exits_towards_the_last_layer(distill):
    model, sample = model_of(), sample_of()
    loss, _, log = criterion_of(exit_distill=distill)(model, sample)
    teacher, target = scores_and_targets(model, sample)
    total = smoothed_loss(teacher, target)
    for name in ("exit1", "exit2"):
        scores, _ = scores_and_targets(heads_of(model)[name], sample)
        kl = kl_divergence(Categorical(logits=teacher), Categorical(logits=scores)).sum()
        wanted = (1 - distill) * smoothed_loss(scores, target) + distill * kl
        close(log[f"{name}_kl"], kl.detach())
        close(log[f"{name}_loss"], wanted.detach())
        total = total + wanted
    close(loss, total / 3)


def test_distillation_leaves_the_teacher_alone():
    """With the last layer's own loss off, nothing above the highest exit gets a gradient."""
    model = model_of()
    criterion = criterion_of(exit_loss_weights="1,1,0", exit_distill=0.5)
    criterion(model, sample_of())[0].backward()
    above = [*model.decoder.layers[2].parameters(), *model.decoder.layer_norm.parameters()]
    assert all(p.grad is None or not p.grad.any() for p in above)
    assert all(p.grad.any() for p in model.decoder.exit_parameters())


def test_unreduced_loss_adds_up():
    model, sample = model_of(), sample_of()
    criterion = criterion_of(exit_distill=0.3, exit_loss_weights="1,2,3")
    each = criterion(model, sample, reduce=False)[0]
    assert each.shape == (28, 1)  # (batch * time, 1)
    assert not each[sample["target"].flatten() == support.symbols().pad()].any()
    close(each.sum(), criterion(model, sample)[0])


def test_metrics_do_not_depend_on_how_sentences_are_batched():
    """Outputs of two workers, added up or side by side, log what one batch of all logs."""
    model, criterion = model_of(), criterion_of(exit_distill=0.5, sentence_avg=True)
    assert criterion.logging_outputs_can_be_summed()
    whole = criterion(model, sample_of())[2]
    halves = [criterion(model, sample_of(rows))[2] for rows in (slice(0, 2), slice(2, 4))]
    summed = {key: halves[0][key] + halves[1][key] for key in whole}
    logged = []
    for outputs in ([whole], halves, [summed]):
        with metrics.aggregate(new_root=True) as aggregator:
            criterion.reduce_metrics(outputs)
        logged.append(aggregator.get_smoothed_values())
    assert logged[0] == pytest.approx(logged[1], abs=2e-3)
    assert logged[0] == pytest.approx(logged[2], abs=2e-3)

    a_token, a_sentence = 18 * math.log(2), 4 * math.log(2)
    log = {key: float(value) for key, value in whole.items()}
    wanted = {"loss": log["loss"] / a_sentence}
    for name, own in (("exit1", "exit1_"), ("exit2", "exit2_"), ("final", "")):
        wanted[f"{name}_loss"] = log[f"{name}_loss"] / a_sentence
        wanted[f"{own}nll_loss"] = log[f"{own}nll_loss"] / a_token
        wanted[f"{own}accuracy"] = 100 * log[f"{own}n_correct"] / 18
        assert logged[0].pop(f"{own}ppl") == pytest.approx(2 ** wanted[f"{own}nll_loss"], rel=1e-2)
    for name in ("exit1_kl", "exit2_kl"):
        wanted[name] = log[name] / a_token
    assert logged[0] == pytest.approx(wanted, abs=1e-3)


def test_training_through_bart():
    model = model_of("early_exit_bart_base")
    loss = criterion_of()(model, sample_of())[0]
    wanted = [smoothed_loss(*scores_and_targets(h, sample_of())) for h in heads_of(model).values()]
    close(loss, sum(wanted) / 3)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"exit_loss_weights": "1,1"}, r"gives 2 weights, the model needs 3: .*exit \(1, 2\)"),
        ({"exit_loss_weights": "1,one,1"}, r"--exit-loss-weights 1,one,1: give numbers"),
        ({"exit_loss_weights": "1,-1,1"}, r"--exit-loss-weights 1,-1,1: give numbers"),
        ({"exit_loss_weights": "1,inf,1"}, r"--exit-loss-weights 1,inf,1: give numbers"),
        ({"exit_loss_weights": "0,0,0"}, r"not all 0"),
        ({"exit_distill": 1.5}, r"--exit-distill 1.5: give a weight from 0 to 1"),
        ({"exit_distill": -0.1}, r"--exit-distill -0.1"),
    ],
)
def test_bad_options_are_refused_in_one_line(chosen, message):
    with pytest.raises(ValueError, match=message) as caught:
        criterion_of(**chosen)(model_of(), sample_of())
    assert "\n" not in str(caught.value)


def test_plain_model_is_refused():
    with pytest.raises(ValueError, match=r"choose --arch early_exit_transformer or"):
        criterion_of()(model_of("transformer"), sample_of())


def on_two_workers(programs, work, *arguments):
    """Runs `work`, a line of Python, in two processes at once; `rank` is 0 in one and 1 in the other."""
    program = f"""
import os, sys
child = os.fork()
rank = 0 if child else 1
{work}
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    programs("python", program, *arguments)


def ddp_worker(rank, rendezvous, results):
    """Two steps of one of two workers, each on half of the batch; worker 0 saves its gradients."""
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for frozen in (False, True):
        model = model_of(exit_freeze_model=frozen, exit_share_output_projection=False)
        # fairseq 0.12.2's encoder layers hold parameters that training does not use.
        idle = any(name.endswith(".in_proj_weight") for name, _ in model.named_parameters())
        wrapped = ModuleProxyWrapper(torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=idle))
        for _ in range(2):  # the second step fails if the first left a parameter out
            wrapped.zero_grad()
            rows = slice(2 * rank, 2 * rank + 2)
            criterion_of(exit_distill=0.5)(wrapped, sample_of(rows))[0].backward()
        if rank == 0:
            torch.save(gradients(model), f"{results}/{frozen}.pt")
    # A wrapper that is collected after the group has ended waits for the other worker forever.
    del model, wrapped
    gc.collect()
    torch.distributed.destroy_process_group()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_two_workers_have_the_gradient_of_the_whole_batch(programs, tmp_path):
    """PyTorch's DDP over gloo averages workers; fairseq undoes that with the sample size."""
    folder = str(Path(__file__).parent)  # the server of parallel workers does not know it
    work = f"sys.path.append({folder!r}); import {__name__} as t; t.ddp_worker(rank, *sys.argv)"
    on_two_workers(programs, work, f"file://{tmp_path}/rendezvous", tmp_path)
    for frozen in (False, True):
        model = model_of(exit_freeze_model=frozen, exit_share_output_projection=False)
        criterion_of(exit_distill=0.5)(model, sample_of())[0].backward()
        wanted, got = gradients(model), torch.load(tmp_path / f"{frozen}.pt")
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(2 * got[name], gradient, rtol=1e-4, atol=1e-4)


def write_copy_task(folder):
    """Text whose translation is itself: 2 to 5 letters of 8, in 480 and 48 lines."""
    dice = random.Random(4)
    for split, count in (("train", 480), ("valid", 48)):
        lines = [" ".join(dice.choices("abcdefgh", k=2 + i % 4)) for i in range(count)]
        for language in ("x", "y"):
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def data(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy_task")
    write_copy_task(folder)
    prefixes = ["--trainpref", folder / "train", "--validpref", folder / "valid"]
    languages = ["-s", "x", "-t", "y", "--joined-dictionary"]
    programs("preprocess", *languages, *prefixes, "--destdir", folder / "bin")
    return folder / "bin"


EARLY_EXIT = ["--criterion", "early_exit_label_smoothed_cross_entropy", "--exit-layers", "1"]
PRE_NORM = ["--encoder-normalize-before", "--decoder-normalize-before"]


def arguments_of(data, save_dir, arch, *chosen):
    size = ["--encoder-layers", 1, "--decoder-layers", 2, "--share-all-embeddings"]
    for side in ("encoder", "decoder"):
        size += [f"--{side}-embed-dim", 32, f"--{side}-ffn-embed-dim", 64]
        size += [f"--{side}-attention-heads", 2]
    common = "--cpu --user-dir {} -s x -t y --label-smoothing 0.1 --batch-size 32 --dropout 0"
    quiet = "--log-format json --no-epoch-checkpoints --required-batch-size-multiple 1"
    quiet += " --num-workers 0"
    where = [data, "--save-dir", save_dir, "--arch", arch]
    return [*where, *size, *common.format(USER_DIR).split(), *quiet.split(), *chosen]


def train(programs, *arguments):
    """Runs fairseq-train; returns the statistics that it logs, by "train" and "valid"."""
    run = programs("train", *arguments_of(*arguments))
    logged = {"train": [], "valid": []}
    for name, statistics in re.findall(r'\b(train|valid)\W+(\{".*\})$', run.out + run.err, re.MULTILINE):
        logged[name].append(json.loads(statistics))
    return logged


def load(path):
    """The model of a checkpoint as fairseq-generate loads it, in evaluation mode."""
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return models[0].eval()


@pytest.mark.parametrize(("exits", "message"), [("2", "with --decoder-layers 2 the"), ("a", "give decoder layers")])
def test_fairseq_train_refuses_bad_exits_in_one_line(programs, data, tmp_path, exits, message):
    arguments = arguments_of(data, tmp_path, "early_exit_bart_base", *EARLY_EXIT, "--exit-layers", exits)
    run = programs("train", *arguments, status=None)
    assert run.error().startswith(f"bild_fairseq: --exit-layers {exits}: {message}")


@pytest.fixture(scope="module")
def trained(programs, data, tmp_path_factory):
    """An early-exit model trained until its exit copies, and what was logged on the way."""
    folder = tmp_path_factory.mktemp("trained")
    best = ["--best-checkpoint-metric", "exit1_accuracy", "--maximize-best-checkpoint-metric"]
    steps = ["--optimizer", "adam", "--lr", 0.005, "--max-epoch", 24]
    steps += ["--lr-scheduler", "polynomial_decay", "--total-num-update", 360]
    steps += ["--save-interval", 2, "--validate-interval", 2]  # epochs; saving takes as long as training
    logged = train(programs, data, folder, "early_exit_transformer_tiny", *EARLY_EXIT, *best, *steps)
    return folder, logged


def test_fairseq_train_teaches_the_exit(trained):
    folder, logged = trained
    accuracies = [float(stats["valid_exit1_accuracy"]) for stats in logged["valid"]]
    assert accuracies[0] < 50 < 95 < max(accuracies)
    assert float(logged["train"][-1]["train_exit1_ppl"]) < 1.3
    best = checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint_best.pt"))
    assert best["extra_state"]["best"] == pytest.approx(max(accuracies), abs=1e-2)


def test_exit_decodes_alone(data, trained):
    small = exit_model(load(trained[0] / "checkpoint_best.pt"), 1)
    symbols = Dictionary.load(str(data / "dict.x.txt"))
    text = "a b c\nh g\nd d e f\nb a b a\n"
    source = torch.stack(
        [
            F.pad(ids, (5 - len(ids), 0), value=symbols.pad())
            for ids in (symbols.encode_line(line).long() for line in text.splitlines())
        ]
    )
    lengths = source.ne(symbols.pad()).sum(1)
    generator = SequenceGenerator([small], symbols, beam_size=1, max_len_b=10)
    found = generator.generate([small], {"net_input": {"src_tokens": source, "src_lengths": lengths}})
    copies = [symbols.string(hypotheses[0]["tokens"]) for hypotheses in found]
    right = sum(got == wanted for got, wanted in zip(copies, text.splitlines(), strict=True))
    assert right >= 3, copies


def test_stock_generation_uses_the_full_depth(programs, data, trained):
    options = "--gen-subset valid --beam 2 --cpu --batch-size 16 --required-batch-size-multiple 1"
    where = [data, "--user-dir", USER_DIR, "--path", trained[0] / "checkpoint_best.pt"]
    run = programs("generate", *where, *options.split(), "--num-workers", 0)
    wanted = {number: text for number, (text,) in run.fields("T").items()}
    got = run.texts()
    assert len(wanted) == 48
    assert sum(got[number] == text for number, text in wanted.items()) >= 43


@pytest.fixture(scope="module")
def plain(programs, data, tmp_path_factory):
    """Checkpoints of stock models, by stock architecture."""
    made = {}
    for arch, chosen in (("transformer_tiny", PRE_NORM), ("bart_base", [])):
        folder = tmp_path_factory.mktemp(arch)
        steps = ["--optimizer", "adam", "--lr", 0.005, "--max-update", 4]
        train(programs, data, folder, arch, "--criterion", "label_smoothed_cross_entropy", *steps, *chosen)
        made[arch] = folder / "checkpoint_last.pt"
    return made


def assert_same_trunk(ours, stock):
    got, wanted = dict(ours.named_parameters()), dict(stock.named_parameters())
    assert wanted.keys() == {name for name in got if not name.startswith("decoder.exit_")}
    for name, weight in wanted.items():
        assert torch.equal(got[name], weight), name


RESTORE = "--reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler --restore-file"


@pytest.mark.parametrize(("arch", "start"), [("transformer_tiny", RESTORE), ("bart_base", "--finetune-from-model")])
def test_plain_checkpoint_starts_an_early_exit_model(programs, data, plain, tmp_path, arch, start):
    """A training that changes nothing saves the plain model with copies of its head as exits."""
    norm = PRE_NORM if arch == "transformer_tiny" else []
    still = ["--optimizer", "sgd", "--lr", 0, "--max-epoch", 1, "--no-exit-share-output-projection"]
    chosen = [*EARLY_EXIT, *norm, *still, *start.split(), plain[arch]]
    train(programs, data, tmp_path, f"early_exit_{arch}", *chosen)
    stock, ours = load(plain[arch]), load(tmp_path / "checkpoint_last.pt")
    assert_same_trunk(ours, stock)
    got, wanted = ours.state_dict(), stock.state_dict()
    projection = got["decoder.exit_output_projections.1.weight"]
    assert torch.equal(projection, wanted["decoder.output_projection.weight"])
    if norm:
        for name in ("weight", "bias"):
            exit_norm = got[f"decoder.exit_layer_norms.1.{name}"]
            assert torch.equal(exit_norm, wanted[f"decoder.layer_norm.{name}"])


def test_frozen_training_changes_the_exits_alone(programs, data, plain, tmp_path):
    origin = plain["transformer_tiny"]
    steps = ["--optimizer", "adam", "--lr", 0.01, "--weight-decay", 0.1, "--max-epoch", 2]
    frozen = [*EARLY_EXIT, *PRE_NORM, *steps, "--dropout", 0.3, "--exit-freeze-model"]
    logged = train(programs, data, tmp_path, "early_exit_transformer_tiny", *frozen, "--finetune-from-model", origin)
    stock, ours = load(origin), load(tmp_path / "checkpoint_last.pt")
    assert_same_trunk(ours, stock)
    norm = ours.state_dict()["decoder.exit_layer_norms.1.weight"]
    assert not torch.equal(norm, stock.state_dict()["decoder.layer_norm.weight"])

    source = torch.tensor([[1, 6, 7, 2], [8, 9, 10, 2]])  # 1 pads, 2 ends
    inputs = {"src_tokens": source, "src_lengths": torch.tensor([3, 4])}
    previous = torch.tensor([[2, 6, 7], [2, 8, 9]])
    for model in (stock, ours):
        model.prepare_for_inference_(SimpleNamespace(generation=SimpleNamespace()))
    with torch.no_grad():
        wanted = stock(**inputs, prev_output_tokens=previous)[0]
        assert torch.equal(ours(**inputs, prev_output_tokens=previous)[0], wanted)
    first, last = (logged["valid"][i] for i in (0, -1))
    assert first["valid_nll_loss"] == last["valid_nll_loss"]
    assert first["valid_exit1_nll_loss"] != last["valid_exit1_nll_loss"]


def test_half_precision_training(programs, data, tmp_path):
    """On a CPU fairseq trains in half precision with separate gradients only."""
    steps = ["--optimizer", "adam", "--adam-eps", 1e-6, "--lr", 0.005, "--max-update", 8]
    half = ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4, "--exit-distill", 0.5]
    logged = train(programs, data, tmp_path, "early_exit_transformer_tiny", *EARLY_EXIT, *steps, *half)
    assert 1 < float(logged["valid"][-1]["valid_exit1_nll_loss"]) < 4
    model = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))["model"]
    weight = model["decoder.embed_tokens.weight"]  # saved in float32
    assert torch.equal(weight, weight.half().float())


@pytest.mark.parametrize(
    ("arch", "chosen", "message"),
    [
        ("transformer_tiny", EARLY_EXIT[:2], "choose --arch early_exit_transformer or"),
        ("early_exit_transformer_tiny", [*EARLY_EXIT, "--exit-loss-weights", "1,2,3"], "gives 3 weights"),
        (
            "early_exit_transformer_tiny",
            [*EARLY_EXIT, *PRE_NORM, "--exit-freeze-model", "--exit-loss-weights", "0,1"],
            "leaves nothing to train",
        ),
        (
            "early_exit_transformer_tiny",
            ["--exit-freeze-model", "--criterion", "label_smoothed_cross_entropy", *PRE_NORM],
            "choose --criterion early_exit_label_smoothed_cross_entropy",
        ),
    ],
)
def test_errors_are_told_before_the_first_step(programs, data, tmp_path, arch, chosen, message):
    """Later, while other threads read the data, they would end in "Aborted"."""
    arguments = arguments_of(data, tmp_path, arch, *chosen, "--optimizer", "adam", "--max-update", 1)
    run = programs("train", *arguments, "--num-workers", 2, status=1)
    assert message in run.error()
    assert "begin training" not in run.out + run.err


def test_exits_that_learn_nothing_are_warned_of_once(programs, data, tmp_path):
    stock = ["--criterion", "label_smoothed_cross_entropy", "--report-accuracy"]
    steps = ["--optimizer", "adam", "--max-update", 2, "--no-save", "--disable-validation"]
    for chosen, warnings in ((stock, 1), ([*EARLY_EXIT, "--report-accuracy"], 0)):
        run = programs("train", *arguments_of(data, tmp_path, "early_exit_transformer_tiny", *chosen, *steps))
        assert (run.out + run.err).count("the exits (1) learn nothing of their own") == warnings


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def on_two_gloo_workers(programs, *arguments):
    """`fairseq-train` itself, in two processes."""
    gloo = "--distributed-world-size 2 --distributed-no-spawn --distributed-backend gloo"
    gloo += f" --distributed-init-method tcp://localhost:{free_port()} --ddp-backend legacy_ddp"
    work = "sys.argv = ['fairseq-train', *sys.argv, str(rank)]; import fairseq_cli.train as t; t.cli_main()"
    on_two_workers(programs, work, *arguments, *gloo.split(), "--distributed-rank")


def test_two_processes_load_what_one_has_saved(programs, data, tmp_path):
    """To go on with a training, and to begin one from a model; the second process is sent what the first has read."""
    chosen = ["early_exit_transformer_tiny", *EARLY_EXIT, "--optimizer", "adam", "--lr", 0.001]
    train(programs, data, tmp_path / "one", *chosen, "--max-update", 2)
    first = tmp_path / "one/checkpoint_last.pt"
    for flag in ("--restore-file", "--finetune-from-model"):
        folder = tmp_path / flag
        last = 3 if flag == "--restore-file" else 1
        on_two_gloo_workers(programs, *arguments_of(data, folder, *chosen, "--max-update", last, flag, first))
        state = checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint_last.pt"))
        assert state["optimizer_history"][-1]["num_updates"] == last


def test_two_processes_train_as_one_that_takes_two_batches_a_step(programs, data, tmp_path):
    """`fairseq-train` itself over gloo, and --update-freq, with the same batches in each step."""
    steps = ["--optimizer", "sgd", "--lr", 0.1, "--max-update", 3]
    chosen = ["early_exit_transformer_tiny", *EARLY_EXIT, "--exit-loss-weights", "2,1", *steps]
    on_two_gloo_workers(programs, *arguments_of(data, tmp_path / "two", *chosen))
    train(programs, data, tmp_path / "one", *chosen, "--update-freq", 2)
    one, two = (
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / name / "checkpoint_last.pt")) for name in ("one", "two")
    )
    for name, weight in one["model"].items():
        if not name.endswith("_float_tensor"):  # fairseq 0.12.2 leaves this one uninitialised
            torch.testing.assert_close(two["model"][name], weight, rtol=1e-4, atol=1e-5)
    score = one["extra_state"]["val_loss"]
    assert two["extra_state"]["val_loss"] == pytest.approx(score, abs=2e-3)
