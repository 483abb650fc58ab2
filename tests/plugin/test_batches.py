"""No program loses a sentence: batches of a data set hold all of it, whatever fairseq does with the last one."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from cli_support import SENTENCES, USER_DIR
from fairseq.data import data_utils

EVERY = set(range(SENTENCES))


@pytest.mark.parametrize("given", ["function", "sizes", "iterator"])
@pytest.mark.parametrize("multiple", [1, 2, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 37, 100])
def test_every_index_is_in_one_batch(count, multiple, given):
    """Within the limits; all batches but the last are of a size below the multiple, or a multiple of it."""
    sizes = np.sort(np.random.default_rng(count).integers(1, 20, count))
    indices = iter(range(count)) if given == "iterator" else np.arange(count)
    batches = data_utils.batch_by_size(
        indices,
        lambda index: sizes[index],
        num_tokens_vec=sizes if given == "sizes" else None,
        max_tokens=200,
        max_sentences=20,
        required_batch_size_multiple=multiple,
    )
    assert [index for batch in batches for index in batch] == list(range(count))
    for batch in batches:
        assert len(batch) <= 20 and len(batch) * max(sizes[batch]) <= 200
    assert all(len(batch) < multiple or len(batch) % multiple == 0 for batch in batches[:-1])


def test_only_data_sets_of_the_task_are_remembered(corpus):
    """fairseq-interactive makes a data set of each lines that it reads."""
    task = corpus.task(dataset_impl="mmap", required_seq_len_multiple=1)
    task.load_dataset("test")

    def batches(dataset):
        return task.get_batch_iterator(dataset=dataset, max_sentences=8)

    assert batches(task.dataset("test")) is batches(task.dataset("test"))
    lines = [torch.tensor([4, 5, 2]), torch.tensor([6, 2])]
    dataset = task.build_dataset_for_inference(lines, [len(line) for line in lines])
    sample = next(batches(dataset).next_epoch_itr(shuffle=False))
    assert sample["id"].tolist() == [0, 1]
    seen = weakref.ref(dataset)
    del dataset
    gc.collect()
    assert seen() is None


def test_fixed_shapes_are_fairseq_s_own_affair():
    shapes = [(2, 5), (4, 3)]
    batches = data_utils.batch_by_size(np.arange(10), lambda index: 3, fixed_shapes=shapes)
    assert sorted(index for batch in batches for index in batch) == list(range(10))


@pytest.mark.parametrize("generator", ["beam", "greedy"])
def test_every_sentence_is_translated(corpus, generator):
    """With fairseq's own --required-batch-size-multiple; the set is no multiple of it."""
    run = corpus.generate("--generator", generator, "--beam", 1, "--batch-size", 16)
    assert run.fields("H").keys() == EVERY
    assert (run.out + run.err).count("the last batch is kept") <= 1


def test_fewer_sentences_than_a_batch_must_have(corpus):
    run = corpus.interactive("--beam", 1, "--buffer-size", 9, text="a b\nc\n")
    assert run.fields("H").keys() == {0, 1}


def test_training_and_validation_read_every_sentence(corpus, tmp_path):
    """fairseq logs the sentences of every update (bsz), and their average over the batches of a validation."""
    size = "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 8 --decoder-embed-dim 8 --max-epoch 1 --no-save"
    size += " --encoder-attention-heads 2 --decoder-attention-heads 2 --encoder-normalize-before --cpu -s x -t y"
    options = ["--train-subset", "test", "--batch-size", 16, "--required-batch-size-multiple", 8, "--num-workers", 0]
    options += ["--arch", "transformer_tiny", "--optimizer", "adam", "--lr", 0.01, "--save-dir", tmp_path]
    options += ["--user-dir", USER_DIR, "--log-format", "json", "--log-interval", 1]
    run = corpus.programs("train", corpus.data, *size.split(), *options)
    log = [json.loads(line[line.index('{"') :]) for line in run.out.splitlines() + run.err.splitlines() if '{"' in line]
    assert sum(float(update["bsz"]) for update in log if "bsz" in update) == SENTENCES
    (validation,) = [entry for entry in log if "valid_bsz" in entry]
    assert float(validation["valid_bsz"]) == (16 + 4) / 2
    assert (run.out + run.err).count("the last batch is kept") <= 1
