"""Word-level distillation: the loss by hand, and that the teacher stays out of the training."""

import copy
import math

import pytest
import support
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from torch.distributions import Categorical, kl_divergence

from bild_fairseq.criterions import WordDistillationCrossEntropyCriterion
from bild_fairseq.errors import BildError


class Setting:
    """The corpus's small model as the student of its large one, and a batch of validation sentences."""

    def __init__(self, corpus):
        flags = options.parse_args_and_arch(options.get_generation_parser(), [str(corpus.data), "--path", "-"])
        self.task = tasks.setup_task(convert_namespace_to_omegaconf(flags).task)
        self.task.load_dataset("valid")
        self.path = str(corpus.large)
        self.student, self.teacher = (
            checkpoint_utils.load_model_ensemble([str(path)], task=self.task)[0][0]
            for path in (corpus.small, corpus.large)
        )
        self.teacher.eval()

    def sample(self, rows=range(6)):
        dataset = self.task.dataset("valid")
        return dataset.collater([dataset[i] for i in rows])

    def criterion(self, weight=0.5, sentence_avg=False, top=0, choice=False):
        return WordDistillationCrossEntropyCriterion(self.task, sentence_avg, self.path, weight, top, choice)


@pytest.fixture(scope="module")
def loaded(corpus):
    return Setting(corpus)


@pytest.fixture
def setting(loaded):
    """Models of its own, which a test may train."""
    made = copy.copy(loaded)
    made.student, made.teacher = copy.deepcopy((loaded.student, loaded.teacher))
    return made


def close(got, wanted):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted), rtol=1e-4, atol=1e-4)


def by_hand(setting, sample, weight):
    """Loss, cross-entropy and divergence, summed over the tokens that are no padding."""
    kept = sample["target"] != setting.task.target_dictionary.pad()
    student, teacher = (model(**sample["net_input"])[0][kept] for model in (setting.student, setting.teacher))
    nll_loss = F.cross_entropy(student, sample["target"][kept], reduction="sum")
    kl = kl_divergence(Categorical(logits=teacher.detach()), Categorical(logits=student)).sum()
    return (1 - weight) * nll_loss + weight * kl, nll_loss, kl


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_and_gradient_mix_the_text_and_the_teacher(setting, weight):
    sample = setting.sample()
    loss, sample_size, log = setting.criterion(weight)(setting.student, sample)
    wanted, nll_loss, kl = by_hand(setting, sample, weight)
    assert nll_loss > 1 and kl > 1
    close(loss, wanted)
    close([log["loss"], log["nll_loss"], log["teacher_kl"]], [wanted.item(), nll_loss.item(), kl.item()])
    assert sample_size == log["ntokens"] == int((sample["target"] != setting.task.target_dictionary.pad()).sum())
    ours, theirs = gradients(setting.student, loss), gradients(setting.student, wanted)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        close(gradient, theirs[name])


def test_all_words_remembered_are_the_whole_distribution(setting):
    """Up to the half precision that they are kept in; sentences are found again in other batches."""
    sample = setting.sample()
    criterion = setting.criterion(0.7, top=10**6)
    criterion(setting.student, setting.sample([5, 1, 3]))
    loss, _, log = criterion(setting.student, sample)
    wanted, _, kl = by_hand(setting, sample, 0.7)
    assert log["teacher_kl"] == pytest.approx(kl.item(), rel=2e-3)
    ours, theirs = gradients(setting.student, loss), gradients(setting.student, wanted)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-2, atol=1e-2)


def test_the_most_probable_words_by_hand(setting):
    sample = setting.sample()
    kept = sample["target"] != setting.task.target_dictionary.pad()
    student, teacher = (model(**sample["net_input"])[0][kept] for model in (setting.student, setting.teacher))
    top, words = teacher.topk(3)
    probs = top.softmax(-1)
    wanted = (probs * (probs.log() - student.log_softmax(-1).gather(1, words))).sum()
    log = setting.criterion(top=3)(setting.student, sample)[2]
    assert log["teacher_kl"] == pytest.approx(wanted.item(), rel=2e-3)


@pytest.mark.parametrize("top", [0, 3])
def test_the_teachers_choice_replaces_the_text(setting, top):
    """On a text that is not the teacher's: words of the text itself have no part in the loss."""
    sample = setting.sample()
    sample["target"] = sample["target"].flip(0)
    sample["net_input"]["prev_output_tokens"] = sample["net_input"]["prev_output_tokens"].flip(0)
    kept = sample["target"] != setting.task.target_dictionary.pad()
    student, teacher = (model(**sample["net_input"])[0][kept] for model in (setting.student, setting.teacher))
    assert teacher.argmax(-1).ne(sample["target"][kept]).any()
    wanted = F.cross_entropy(student, teacher.argmax(-1), reduction="sum")
    loss, _, log = setting.criterion(0.0, top=top, choice=True)(setting.student, sample)
    close([loss, log["nll_loss"]], [wanted, wanted])
    assert log["n_correct"] == student.argmax(-1).eq(teacher.argmax(-1)).sum()


@pytest.fixture
def teachers(monkeypatch):
    """The models that criterions load from now on."""
    loaded = []
    load = checkpoint_utils.load_model_ensemble

    def recorded(*args, **kwargs):
        models, config = load(*args, **kwargs)
        loaded.extend(models)
        return models, config

    monkeypatch.setattr(checkpoint_utils, "load_model_ensemble", recorded)
    return loaded


def test_the_teacher_reads_a_sentence_once(setting, teachers):
    criterion = setting.criterion(top=3)
    (teacher,) = teachers
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    first = criterion(setting.student, setting.sample())[0]
    again = criterion(setting.student, setting.sample(range(5, -1, -1)))[0]
    assert len(calls) == 1
    close(again, first)


def test_a_model_has_nothing_to_learn_from_itself(setting):
    log = setting.criterion()(setting.teacher, setting.sample())[2]
    assert abs(log["teacher_kl"]) < 1e-3 < log["nll_loss"]


def test_the_teacher_is_no_part_of_the_training(setting, teachers):
    """Nothing of it is trained, saved or switched to training mode with the criterion."""
    criterion = setting.criterion(1.0).train()
    assert not list(criterion.parameters()) and not criterion.state_dict()
    (teacher,) = teachers
    assert not any(module.training for module in teacher.modules())
    before = [parameter.clone() for parameter in teacher.parameters()]
    criterion(setting.student.train(), setting.sample())[0].backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(map(torch.equal, before, teacher.parameters()))


def test_the_teacher_follows_the_student_in_precision(setting):
    _, nll_loss, kl = by_hand(setting, setting.sample(), 0.5)
    log = setting.criterion()(setting.student.to(torch.bfloat16), setting.sample())[2]
    assert log["teacher_kl"] == pytest.approx(kl.item(), rel=0.2)
    assert log["nll_loss"] == pytest.approx(nll_loss.item(), rel=0.2)


def test_unreduced_loss_adds_up(setting):
    sample = setting.sample()
    each = setting.criterion()(setting.student, sample, reduce=False)[0]
    assert each.shape == (sample["target"].numel(),)
    assert not each[sample["target"].flatten() == setting.task.target_dictionary.pad()].any()
    close(each.sum(), setting.criterion()(setting.student, sample)[0])


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_metrics_do_not_depend_on_how_sentences_are_batched(setting, sentence_avg):
    """Outputs of two workers, added up or side by side, log what one batch of all logs."""
    criterion = setting.criterion(0.5, sentence_avg)
    assert criterion.logging_outputs_can_be_summed()
    whole = criterion(setting.student, setting.sample())[2]
    halves = [criterion(setting.student, setting.sample(rows))[2] for rows in (range(2), range(2, 6))]
    summed = {key: halves[0][key] + halves[1][key] for key in whole}
    logged = []
    for outputs in ([whole], halves, [summed]):
        with metrics.aggregate(new_root=True) as aggregator:
            criterion.reduce_metrics(outputs)
        logged.append(aggregator.get_smoothed_values())
    assert logged[0] == pytest.approx(logged[1], abs=2e-3)
    assert logged[0] == pytest.approx(logged[2], abs=2e-3)

    wanted, nll_loss, kl = (value.item() / math.log(2) for value in by_hand(setting, setting.sample(), 0.5))
    tokens = whole["ntokens"]
    assert logged[0]["loss"] == pytest.approx(wanted / (6 if sentence_avg else tokens), abs=1e-3)
    assert logged[0]["nll_loss"] == pytest.approx(nll_loss / tokens, abs=1e-3)
    assert logged[0]["teacher_kl"] == pytest.approx(kl / tokens, abs=1e-3)
    assert logged[0]["ppl"] == pytest.approx(2 ** (nll_loss / tokens), abs=1e-2)
    assert logged[0]["accuracy"] == pytest.approx(100 * int(whole["n_correct"]) / tokens, abs=1e-3)


def test_what_cannot_be_used_is_refused(setting, corpus, tmp_path):
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(BildError, match="--teacher-weight"):
            setting.criterion(weight)
    with pytest.raises(BildError, match="--teacher-top -1"):
        setting.criterion(top=-1)
    criterion = setting.criterion()
    setting.student.decoder.adaptive_softmax = torch.nn.Identity()
    with pytest.raises(BildError, match="--adaptive-softmax-cutoff"):
        criterion(setting.student, setting.sample())
    setting.path = str(tmp_path / "missing.pt")
    with pytest.raises(BildError, match="--teacher-path .*no such file"):
        setting.criterion()
    setting.path = str(tmp_path / "text.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(BildError, match="damaged, or no checkpoint"):
        setting.criterion()
    setting.path = str(corpus.large)
    setting.task = support.task()
    with pytest.raises(BildError, match="another source dictionary"):
        setting.criterion()
