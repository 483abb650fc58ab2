"""T5 folders become fairseq checkpoints and come back: the same tensors, types, configuration and text."""

import argparse
import json
from pathlib import Path

import pytest
import sentencepiece
import t5_support
import torch
from cli_support import USER_DIR
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from safetensors.torch import load_file, save_file
from t5_support import TIED, VARIANTS, hf_model, padded, save_folder, source_batch, sources, to_fairseq

from bild_fairseq.errors import BildError
from bild_fairseq.experiments.convert_t5 import convert, restore
from bild_fairseq.experiments.hf_folder import read_tensors

UNTIED = "T5 1.1, untied and gated"
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_t5.py"
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def assert_same_tensors(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_again(tmp_path, variant, dtype):
    folder = save_folder(tmp_path / "hf", hf_model(variant).to(dtype))
    convert(folder, tmp_path / "converted")
    restore(tmp_path / "converted", tmp_path / "back")
    wanted = load_file(folder / "model.safetensors")
    assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), wanted)
    assert {tensor.dtype for tensor in wanted.values()} == {dtype}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "spiece.model"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


@each_variant
def test_transformers_loads_what_comes_back(tmp_path, variant):
    model = hf_model(variant)
    convert(save_folder(tmp_path / "hf", model), tmp_path / "converted")
    restore(tmp_path / "converted", tmp_path / "back")
    back = VARIANTS[variant][0].from_pretrained(tmp_path / "back").eval()
    inputs = {"input_ids": torch.tensor(sources(1)), "decoder_input_ids": torch.tensor([[0, 9, 8]])}
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("saved", ["shards", "pickle", "pickled shards", "old pickle"])
def test_every_way_of_saving_gives_the_same_checkpoint(tmp_path, saved):
    """Old folders hold the embedding several times, and a table that is not used."""
    model = hf_model(TIED)
    folder = save_folder(tmp_path / "hf", model, max_shard_size="30KB" if saved == "shards" else "5GB")
    tensors = read_tensors(folder)
    if saved == "shards":
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        (folder / "model.safetensors").unlink()
    if saved == "old pickle":
        copies = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
        tensors |= {f"{name}.weight": tensors["shared.weight"].clone() for name in copies}
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(32, 4)
    if saved == "pickled shards":
        names = sorted(tensors)
        parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for part, held in parts.items():
            torch.save({name: tensors[name] for name in held}, folder / part)
        index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif "pickle" in saved:
        torch.save(tensors, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "converted")
    convert(save_folder(tmp_path / "plain", model), tmp_path / "wanted")
    got, wanted = (torch.load(tmp_path / name / "model.pt") for name in ("converted", "wanted"))
    assert_same_tensors(got["model"], wanted["model"])
    assert got["cfg"] == wanted["cfg"]


def test_the_safe_unpickler_reads_the_checkpoint_and_tied_weights_are_written_once(tmp_path):
    sizes = {}
    for variant in (TIED, UNTIED):
        folder = tmp_path / variant
        convert(save_folder(folder / "hf", hf_model(variant, feed_forward_proj="relu")), folder / "converted")
        state = torch.load(folder / "converted" / "model.pt", weights_only=True)["model"]
        sizes[variant] = len(
            {tensor.data_ptr() for name, tensor in state.items() if "embed" in name or "output" in name}
        )
    assert sizes == {TIED: 1, UNTIED: 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Variant -> its folder and what it was converted to."""
    made = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp("t5")
        convert(save_folder(folder / "hf", hf_model(variant)), folder / "converted")
        made[variant] = (folder / "hf", folder / "converted")
    return made


@each_variant
def test_sentencepiece_text_gets_the_rows_of_its_ids(folders, variant):
    """Text with characters that the vocabulary lacks as well."""
    _, converted = folders[variant]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(converted / "spiece.model"))
    dictionary = Dictionary.load(str(converted / "dict.txt"))
    for line in [*t5_support.text()[:100], "Ünknown #1 words", "x"]:
        tokens = dictionary.encode_line(" ".join(pieces.encode(line, out_type=str)), add_if_not_exist=False)
        ids = [*pieces.encode(line), 1]
        assert tokens.tolist() == to_fairseq(ids)
        if pieces.unk_id() not in ids:
            assert dictionary.string(tokens, bpe_symbol="sentencepiece") == pieces.decode(ids[:-1]) == line


def test_sentinels_and_rows_without_a_piece_keep_their_place(folders):
    """T5's tokenizer numbers sentinels from the end; mT5's SentencePiece model has its own."""
    for variant, (_, converted) in folders.items():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(converted / "spiece.model"))
        dictionary = Dictionary.load(str(converted / "dict.txt"))
        for number in range(t5_support.SENTINELS):
            name = f"<extra_id_{number}>"
            number_of_rows = t5_support.PIECES + t5_support.SENTINELS
            wanted = pieces.piece_to_id(name) if variant == "mT5" else number_of_rows - 1 - number
            assert dictionary.index(name) == wanted + 1
        assert dictionary.symbols[-3:] == ["<unused_95>", "<unused_96>", "<unused_97>"]
        assert len(dictionary) == 99


def test_a_pair_with_different_numbers_of_rows_has_one_dictionary(folders, tmp_path):
    """The rows that the small model lacks have probability 0, and do not come back."""
    rows = hf_model(TIED).config.vocab_size
    folder = save_folder(tmp_path / "hf", hf_model(UNTIED, vocab_size=rows - 3))
    convert(folder, tmp_path / "small", rows=rows)
    assert (tmp_path / "small" / "dict.txt").read_text() == (folders[TIED][1] / "dict.txt").read_text()
    task = t5_support.task_of(tmp_path / "small")
    model = t5_support.load(tmp_path / "small" / "model.pt", task)
    net_output = model(**source_batch(sources(1))["net_input"], prev_output_tokens=torch.tensor([[2, 7]]))
    probs = model.get_normalized_probs(net_output, log_probs=False)
    assert not probs[..., -3:].any() and probs[..., 1:-3].all()
    restore(tmp_path / "small", tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(folder))
    with pytest.raises(BildError, match=r"--rows 9: the model has 95 rows"):
        convert(folder, tmp_path / "small", rows=9)


@pytest.mark.parametrize(
    ("options", "scaled"),
    [
        ({"model_type": "t5"}, True),
        ({"model_type": "t5", "tie_word_embeddings": False}, False),
        ({"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"model_type": "mt5"}, False),
        ({"model_type": "mt5", "tie_word_embeddings": True, "transformers_version": "4.57.6"}, True),
        ({"model_type": "mt5", "tie_word_embeddings": True, "transformers_version": "5.0.0"}, False),
    ],
)
def test_output_scaling_is_read_as_each_version_of_transformers_writes_it(tmp_path, options, scaled):
    folder = save_folder(tmp_path / "hf", hf_model(TIED))
    config = {name: value for name, value in config_of(folder).items() if not name.startswith(("tie_", "scale_"))}
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.57.6", **options}))
    convert(folder, tmp_path / "converted")
    args = torch.load(tmp_path / "converted" / "model.pt")["cfg"]["model"]
    assert (args.scale_decoder_outputs, args.tie_word_embeddings) == (scaled, True)


def test_options_are_whole_or_completed_on_loading(tmp_path, monkeypatch):
    """A converted file is loaded as it is; one with the model's options alone, as they were once written, as well."""
    folder, made = tmp_path / "converted", []
    complete = checkpoint_utils.convert_namespace_to_omegaconf
    monkeypatch.setattr(
        checkpoint_utils, "convert_namespace_to_omegaconf", lambda args: made.append(args) or complete(args)
    )
    convert(save_folder(tmp_path / "hf", hf_model(UNTIED)), folder)
    task = t5_support.task_of(folder)
    new = t5_support.load(folder / "model.pt", task)
    assert made == []

    state = torch.load(folder / "model.pt")
    options = {name: value for name, value in vars(state["cfg"]["model"]).items() if name != "_name"}
    torch.save({**state, "args": argparse.Namespace(**options), "cfg": None}, tmp_path / "old.pt")
    old = t5_support.load(tmp_path / "old.pt", task)
    assert made
    batch = source_batch(sources(3))["net_input"]
    with torch.no_grad():
        got, wanted = (model(**batch, prev_output_tokens=torch.tensor([[2, 6]] * 3))[0] for model in (old, new))
    assert torch.equal(got, wanted)
    restore(folder, tmp_path / "back", tmp_path / "old.pt")
    assert_same_tensors(
        load_file(tmp_path / "back" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    )


def run_script(programs, *arguments, status=0):
    return programs("script", SCRIPT, *arguments, status=status)


@pytest.fixture(scope="module")
def data(folders, programs, tmp_path_factory):
    """Binarized text in the SentencePiece model's pieces, with T5's dictionary."""
    folder = tmp_path_factory.mktemp("data")
    converted = folders[UNTIED][1]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(converted / "spiece.model"))
    for split, lines in (("train", t5_support.text()[:64]), ("valid", t5_support.text()[64:80])):
        encoded = "".join(" ".join(pieces.encode(line, out_type=str)) + "\n" for line in lines)
        for language in ("x", "y"):
            (folder / f"{split}.{language}").write_text(encoded)
    splits = [f"--{split}pref={folder / split}" for split in ("train", "valid")]
    dictionary = ["--srcdict", converted / "dict.txt", "--joined-dictionary"]
    programs("preprocess", "-s", "x", "-t", "y", *dictionary, *splits, "--destdir", folder / "bin")
    return folder / "bin"


def test_script_and_stock_generation_give_the_text_of_transformers(folders, programs, data, tmp_path):
    """`convert_t5.py` and `fairseq-generate` with beam 4, wherever the best text ends before the maximum length."""
    out = tmp_path / "converted"
    said = run_script(programs, folders[UNTIED][0], out).out
    assert said.startswith(f"{out / 'model.pt'}: 0.0 million weights in float32, 99 symbols")
    options = "--gen-subset valid --beam 4 --max-len-b 20 --min-len 0 --cpu --batch-size 8 --num-workers 0"
    options += " --required-batch-size-multiple 1 --remove-bpe sentencepiece -s x -t y"
    run = programs("generate", data, "--user-dir", USER_DIR, "--path", out / "model.pt", *options.split())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "spiece.model"))
    model = hf_model(UNTIED)
    compared = 0
    for number, text in enumerate(t5_support.text()[64:80]):
        search = {"num_beams": 4, "early_stopping": True, "max_new_tokens": 20, "suppress_tokens": [0]}
        (ids,) = model.generate(torch.tensor([[*pieces.encode(text), 1]]), do_sample=False, **search).tolist()
        if ids[-1] == 1 and max(ids) < t5_support.PIECES and len(ids) < 20 and pieces.unk_id() not in ids:
            assert run.texts()[number] == pieces.decode(ids[1:-1])
            compared += 1
    assert compared >= 3


def test_a_model_trained_on_goes_back(folders, programs, data, tmp_path):
    """`fairseq-train` from a converted model in bfloat16; transformers then computes what fairseq does."""
    folder = save_folder(tmp_path / "hf", hf_model(UNTIED).bfloat16())
    run_script(programs, folder, tmp_path / "converted")
    model_flags = ["--arch", "mt5_small"]
    for name, value in t5_support.SIZE.items():
        model_flags += ["--" + name.replace("_", "-"), value]
    model_flags += ["--relative-attention-max-distance", 20]
    training = "--optimizer adam --lr 0.001 --max-update 4 --batch-size 16 --cpu --num-workers 0 -s x -t y"
    training += " --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --log-format none"
    where = [data, "--user-dir", USER_DIR, "--save-dir", tmp_path / "trained"]
    start = ["--finetune-from-model", tmp_path / "converted" / "model.pt"]
    programs("train", *where, *model_flags, *training.split(), *start)
    checkpoint = tmp_path / "trained" / "checkpoint_last.pt"
    run_script(programs, "--to-hf", tmp_path / "converted", tmp_path / "back", "--checkpoint", checkpoint)

    assert config_of(folder).get("dtype", config_of(folder).get("torch_dtype")) == "bfloat16"
    changed = config_of(folder).items() ^ config_of(tmp_path / "back").items()
    assert {value for _, value in changed} == {"bfloat16", "float32"}
    theirs = VARIANTS[UNTIED][0].from_pretrained(tmp_path / "back").eval()
    assert not torch.equal(theirs.shared.weight, hf_model(UNTIED).shared.weight)
    ours = t5_support.load(checkpoint, t5_support.task_of(tmp_path / "converted"))
    rows = sources(4)
    ids = padded(rows, 0, left=False)
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=(ids != 0).long(), decoder_input_ids=torch.tensor([[0, 5]] * 4)).logits
        got = ours(**source_batch(rows)["net_input"], prev_output_tokens=torch.tensor([[2, 6]] * 4))[0]
    torch.testing.assert_close(got[..., 1:], wanted, rtol=0, atol=1e-4)


def test_early_exit_training_starts_from_a_converted_model(folders, programs, data, tmp_path):
    converted = folders[UNTIED][1]
    flags = ["--arch", "early_exit_mt5_small", "--exit-layers", 1, "--relative-attention-max-distance", 20]
    for name, value in t5_support.SIZE.items():
        flags += ["--" + name.replace("_", "-"), value]
    training = "--optimizer adam --lr 0.01 --max-update 4 --batch-size 16 --cpu --num-workers 0 -s x -t y"
    training += " --criterion early_exit_label_smoothed_cross_entropy --exit-freeze-model --log-format none"
    where = [data, "--user-dir", USER_DIR, "--save-dir", tmp_path, "--finetune-from-model", converted / "model.pt"]
    programs("train", *where, *flags, *training.split())
    before = torch.load(converted / "model.pt")["model"]
    after = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    norm = "decoder.exit_layer_norms.1.weight"
    assert_same_tensors({name: after[name] for name in before}, before)
    assert not torch.equal(after[norm], before["decoder.layer_norm.weight"])
    with pytest.raises(BildError, match=rf"{norm} has no counterpart in Hugging Face's T5; convert a plain t5"):
        restore(converted, tmp_path / "back", tmp_path / "checkpoint_last.pt")


def without(name):
    return lambda folder: (folder / name).unlink()


def configured(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


def rewritten(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def overwritten(name, text):
    return lambda folder: (folder / name).write_text(text)


def quantized(name, dtype):
    return rewritten(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


ENCODER_NORM = "encoder.final_layer_norm.weight"
SHARED, HEAD = "shared.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("config.json"), r"has no config.json; give a folder of T5"),
        (without("spiece.model"), r"has no spiece.model; put the one of the published model"),
        (without("model.safetensors"), r"has neither model.safetensors nor pytorch_model.bin"),
        (overwritten("config.json", "{"), r"config.json: is no JSON"),
        (overwritten("config.json", "[]"), r"config.json: holds no JSON object"),
        (overwritten("spiece.model", "x"), r"spiece.model: is no SentencePiece model"),
        (overwritten("model.safetensors", "x"), r"model.safetensors: cannot be read"),
        (configured(model_type="bart"), r"is of a bart model; only t5 and mt5"),
        (configured(model_type="umt5"), r"is of a umt5 model"),
        (configured(quantization_config={}), r"the model is quantized"),
        (configured(eos_token_id=[1, 2]), r"eos_token_id is \[1, 2\]; one number is needed"),
        (configured(decoder_start_token_id=5), r"texts start with symbol 5, not with padding"),
        (configured(pad_token_id=3, decoder_start_token_id=3), r"has pad_token_id 0, config.json 3"),
        (configured(feed_forward_proj="gated-silu"), r"--feed-forward-proj gated-silu is not supported"),
        (configured(vocab_size=99), r"the embedding has 98 rows, config.json 99"),
        (configured(vocab_size=80), r"has 90 pieces, the model 80 rows"),
        (rewritten(lambda tensors: tensors.pop(ENCODER_NORM)), rf"{ENCODER_NORM} is missing; a whole T5"),
        (rewritten(lambda tensors: tensors.pop("shared.weight")), r"do not share one embedding"),
        (rewritten(lambda tensors: tensors.update(adapter=torch.ones(1))), r"adapter is no part of a T5"),
        (configured(d_model="24"), r"config.json: d_model is '24'; it must be of type int"),
        (configured(num_decoder_layers="2"), r"config.json: num_decoder_layers is '2'; it must be of type int"),
        (configured(layer_norm_epsilon=None), r"config.json: layer_norm_epsilon is None; it must be of type float"),
        (configured(feed_forward_proj=["relu"]), r"config.json: feed_forward_proj is \['relu'\]"),
        (configured(dense_act_fn="gelu"), r"dense_act_fn is 'gelu', which does not go with feed_forward_proj relu"),
        (configured(d_kv=7), r"SelfAttention.q.weight is 20 x 24, by options and dictionary 28 x 24"),
        (
            configured(num_heads=5, d_kv=4),
            r"relative_attention_bias.weight is 32 x 4, by options and dictionary 32 x 5",
        ),
        (configured(d_model=25), r"shared.weight is 99 x 24, by options and dictionary 99 x 25"),
        (rewritten(lambda tensors: tensors.update({ENCODER_NORM: torch.ones(5)})), rf"{ENCODER_NORM} is 5, by"),
        (rewritten(lambda tensors: tensors.update({SHARED: torch.ones(98)})), r"the embedding is no matrix"),
        (rewritten(lambda tensors: tensors.update({HEAD: torch.ones(97, 24)})), r"output projection has 97 rows"),
        (quantized("shared.weight", torch.int8), r"shared.weight holds int8 numbers"),
        (quantized(ENCODER_NORM, torch.float8_e4m3fn), rf"{ENCODER_NORM} holds float8_e4m3fn numbers"),
        (overwritten("config.json", "[" * 100_000), r"config.json: is no JSON"),
        (overwritten("tokenizer_config.json", '{"extra_ids": null}'), r"extra_ids is None; a number of sentinels"),
        (overwritten("generation_config.json", '{"decoder_start_token_id": 5}'), r"texts start with symbol 5"),
    ],
)
def test_a_folder_that_is_something_else_is_refused_in_one_line(tmp_path, spoil, message):
    folder = save_folder(tmp_path / "hf", hf_model(TIED))
    spoil(folder)
    with pytest.raises(BildError, match=message) as caught:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


class Payload:
    def __reduce__(self):
        return print, ("code ran",)


def test_code_in_a_pickle_is_not_run(tmp_path, capsys):
    folder = save_folder(tmp_path / "hf", hf_model(TIED))
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(BildError, match=r"pytorch_model.bin: is damaged, or holds more than tensors"):
        convert(folder, tmp_path / "out")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "held", [None, [1], {SHARED: [1.0]}, {"state_dict": {}}, {SHARED: torch.ones(98, 24).to_sparse()}]
)
def test_a_pickle_of_something_else_is_refused(tmp_path, held):
    folder = save_folder(tmp_path / "hf", hf_model(TIED))
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(BildError, match=r"pytorch_model.bin: holds something else than tensors by name"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_of_something_else_is_refused(tmp_path, index):
    folder = save_folder(tmp_path / "hf", hf_model(TIED))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BildError, match=r"index.json: has no weight_map that says in which file"):
        convert(folder, tmp_path / "out")


def test_no_more_sentinels_are_made_than_there_are_rows(tmp_path):
    folder = save_folder(tmp_path / "hf", hf_model(TIED))
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 1000000000000}')  # more than memory holds
    convert(folder, tmp_path / "out")
    assert len(Dictionary.load(str(tmp_path / "out" / "dict.txt"))) == 99


def test_missing_shards_are_named(tmp_path):
    folder = save_folder(tmp_path / "hf", hf_model(TIED), max_shard_size="30KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BildError, match=rf"{shard.name} is missing; model.safetensors.index.json names it"):
        convert(folder, tmp_path / "out")


def test_the_way_back_needs_a_converted_folder_and_its_own_model(folders, tmp_path):
    with pytest.raises(BildError, match=r"has no hf/ and spiece.model; give a folder that was converted"):
        restore(tmp_path, tmp_path / "out")
    other = folders[TIED][1] / "model.pt"
    with pytest.raises(BildError, match=r"feed_forward_proj is relu, in hf/config.json gated-gelu"):
        restore(folders[UNTIED][1], tmp_path / "out", other)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("model"), r"holds no model"),
        (lambda state: state.update(model=[1]), r"holds no model"),
        (lambda state: state.pop("cfg"), r"holds no options of its model"),
        (
            lambda state: state["model"].update({"encoder.layer_norm.weight": torch.ones(5)}),
            r"encoder.layer_norm.weight is 5, by options and dictionary 24",
        ),
        (
            lambda state: state["model"].update({"encoder.embed_tokens.weight": torch.ones(50, 24)}),
            r"encoder.embed_tokens.weight is 50 x 24, by options and dictionary 99 x 24",
        ),
    ],
)
def test_a_damaged_checkpoint_does_not_go_back(folders, tmp_path, spoil, message):
    state = torch.load(folders[UNTIED][1] / "model.pt")
    spoil(state)
    torch.save(state, tmp_path / "damaged.pt")
    with pytest.raises(BildError, match=message) as caught:
        restore(folders[UNTIED][1], tmp_path / "out", tmp_path / "damaged.pt")
    assert "damaged.pt" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_conversion_left_does_not_go_back(folders, tmp_path):
    """Settings of another model in the same folder would become those of the new one."""
    theirs = save_folder(tmp_path / "hf", hf_model(UNTIED))
    convert(theirs, tmp_path / "ours")
    (theirs / "generation_config.json").unlink()
    convert(theirs, tmp_path / "ours")
    restore(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back" / "generation_config.json").exists()


def test_a_place_that_cannot_be_written_is_said_in_one_line(folders, tmp_path):
    theirs, ours = folders[TIED]
    (tmp_path / "file").touch()
    for write in (lambda out: convert(theirs, out), lambda out: restore(ours, out)):
        for out in (tmp_path / "file", tmp_path / "file" / "out"):
            with pytest.raises(BildError, match=rf"cannot write there: {tmp_path / 'file'} is a file"):
                write(out)
    (tmp_path / "out" / "spiece.model").mkdir(parents=True)
    for write in (lambda out: convert(theirs, out), lambda out: restore(ours, out)):
        with pytest.raises(BildError, match="it cannot be written: Is a directory"):
            write(tmp_path / "out")


def test_a_link_to_the_same_vocabulary_stays(folders, tmp_path):
    theirs = folders[TIED][0]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "spiece.model").symlink_to(theirs / "spiece.model")
    convert(theirs, tmp_path / "out")
    assert (theirs / "spiece.model").read_bytes() == t5_support.spiece()


def test_a_folder_is_not_written_over_itself(folders, tmp_path):
    """Nor over the copy that it holds of what it was converted from."""
    theirs, ours = folders[TIED]
    (tmp_path / "hf").symlink_to(theirs)
    for written in (theirs, tmp_path):
        with pytest.raises(BildError, match="is read, and would be written over; name another one"):
            convert(theirs, written)
    for written in (ours, ours / "hf"):
        with pytest.raises(BildError, match="is read, and would be written over; name another one"):
            restore(ours, written)


def test_script_ends_with_one_line(programs):
    run = run_script(programs, "missing", "out", status=1)
    assert run.err.splitlines()[-1].startswith("convert_t5: missing: has no config.json; give a folder of T5, mT5 or")
    assert "Traceback" not in run.err
