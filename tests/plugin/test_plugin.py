"""The seam to fairseq: what hooks.py relies on, that it changes nothing else, and how the package is found."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from cli_support import SENTENCES, STOCK, USER_DIR
from fairseq import checkpoint_utils, options, tasks
from fairseq.data import data_utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from hydra.core.config_store import ConfigStore

from bild_fairseq.plugin.flags import BildGenerationConfig
from bild_fairseq.plugin.hooks import install
from bild_fairseq.plugin.search import SearchOptions

# Run in a fairseq that has not seen the plugin.
GENERATION_FLAGS = """
from dataclasses import dataclass, field
from fairseq import options
from fairseq.dataclass import configs

default = configs.FairseqConfig.__dataclass_fields__["generation"].default
assert default is configs.GenerationConfig or type(default) is configs.GenerationConfig
assert options.GenerationConfig is configs.GenerationConfig

@dataclass
class More(configs.GenerationConfig):
    one_flag_more: int = field(default=3, metadata={"help": "one more"})

options.GenerationConfig = More
for parser in (options.get_generation_parser(), options.get_interactive_generation_parser()):
    assert parser.get_default("one_flag_more") == 3
"""
PARSING = """
import sys
from fairseq import options
import fairseq_cli.generate, fairseq_cli.interactive

class Called(Exception):
    pass

def parse(*args, **kwargs):
    raise Called

options.parse_args_and_arch = parse
for program in (fairseq_cli.generate, fairseq_cli.interactive):
    sys.argv = ["program"]
    try:
        program.cli_main()
    except Called:
        continue
    raise AssertionError(f"{program.__name__} does not call options.parse_args_and_arch by attribute")
"""
LOADING = """
import sys
from fairseq import checkpoint_utils

class Called(Exception):
    pass

def load(path, *args, **kwargs):
    raise Called(path)

checkpoint_utils.load_checkpoint_to_cpu = load
for read in (checkpoint_utils.load_model_ensemble, checkpoint_utils.load_model_ensemble_and_task):
    try:
        read([sys.argv[0]])
    except Called:
        continue
    raise AssertionError("a checkpoint is read by another function")
"""
MAKING = """
import inspect, sys
from fairseq import checkpoint_utils

class Called(Exception):
    pass

def load(*args, **kwargs):
    raise Called

def raises(function):
    try:
        function([sys.argv[0]])
    except Called:
        return True

parameters = list(inspect.signature(checkpoint_utils.load_model_ensemble_and_task).parameters)
assert parameters == ["filenames", "arg_overrides", "task", "strict", "suffix", "num_shards", "state"], parameters
checkpoint_utils._upgrade_state_dict = load
assert raises(lambda paths: checkpoint_utils.load_checkpoint_to_cpu(*paths)), "another function upgrades checkpoints"
checkpoint_utils.load_model_ensemble_and_task = load
assert raises(checkpoint_utils.load_model_ensemble), "models are made by another function"
"""
FAST_PATH = """
import inspect
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase as Layer

if "can_use_fastpath" in Layer.__init__.__code__.co_names:
    assert "self.can_use_fastpath" in inspect.getsource(Layer.forward)
else:
    assert "fastpath" not in inspect.getsource(Layer), "the fast path is chosen in another way"
"""
BUILDING = """
import inspect
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask
from fairseq.tasks.translation import TranslationTask

parameters = list(inspect.signature(FairseqTask.build_generator).parameters)
assert parameters == [
    "self", "models", "args", "seq_gen_cls", "extra_gen_cls_kwargs", "prefix_allowed_tokens_fn"
], parameters
assert "build_generator" not in vars(TranslationTask)
"""
BATCHES = """
import inspect
from fairseq.data import FairseqDataset, data_utils

parameters = list(inspect.signature(data_utils.batch_by_size).parameters)
assert parameters == [
    "indices", "num_tokens_fn", "num_tokens_vec", "max_tokens", "max_sentences", "required_batch_size_multiple",
    "fixed_shapes",
], parameters
assert "data_utils.batch_by_size(" in inspect.getsource(FairseqDataset.batch_by_size)
"""
TRAINING = """
import inspect
from fairseq.distributed import utils
from fairseq.trainer import Trainer

assert list(inspect.signature(Trainer.__init__).parameters)[:5] == ["self", "cfg", "task", "model", "criterion"]
parameters = list(inspect.signature(utils._broadcast_object_slow).parameters)
assert parameters == ["obj", "src_rank", "group", "dist_device"], parameters
assert "_broadcast_object_slow(obj, src_rank, group, dist_device)" in inspect.getsource(utils.broadcast_object)
"""
NO_PLUGIN = """
import sys
assert "bild_fairseq" not in sys.modules
"""


@pytest.mark.parametrize(
    "code",
    [GENERATION_FLAGS, PARSING, LOADING, MAKING, FAST_PATH, BUILDING, BATCHES, TRAINING],
    ids=[
        "the flags' dataclass",
        "the parser",
        "reading",
        "making models",
        "the encoder's fast path",
        "build_generator",
        "batches",
        "training",
    ],
)
def test_fairseq_is_as_the_plugin_expects(corpus, code):
    corpus.programs("python", code + NO_PLUGIN, corpus.large, environment=STOCK)


def replaced():
    generation = FairseqConfig.__dataclass_fields__["generation"]
    return [
        options.GenerationConfig,
        options.parse_args_and_arch,
        checkpoint_utils.load_checkpoint_to_cpu,
        checkpoint_utils._upgrade_state_dict,
        checkpoint_utils.load_model_ensemble_and_task,
        data_utils.batch_by_size,
        Trainer.__init__,
        distributed_utils._broadcast_object_slow,
        FairseqTask.build_generator,
        *(task.build_generator for task in tasks.TASK_REGISTRY.values()),
        generation.default,
        generation.type,
        FairseqConfig.generation,
    ]


def test_installing_twice_changes_nothing():
    before = replaced()
    assert BildGenerationConfig in before
    install()
    assert all(new is old for new, old in zip(replaced(), before, strict=True))


REACHES = re.compile(
    r"^\s*(?:fairseq|checkpoint_utils|data_utils|distributed_utils|options|tasks|task|utils|FairseqTask|Trainer|FairseqConfig"
    r"|Transformer\w+)(?:\.\w+)+ = ",
    re.MULTILINE,
)


def test_only_the_hooks_reach_into_fairseq():
    """No other module of the package puts something of its own in place of fairseq's."""
    reaching = [path.name for path in Path(USER_DIR).rglob("*.py") if REACHES.search(path.read_text())]
    assert reaching == ["hooks.py"]


@pytest.mark.parametrize("arguments", [["-m", "bild_fairseq"], ["-mbild_fairseq", "ignored"]])
def test_the_folder_is_printed_without_fairseq(tmp_path, arguments):
    (tmp_path / "fairseq.py").write_text("raise AssertionError('imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(USER_DIR).parent)])}
    command = [sys.executable, *arguments]
    assert subprocess.check_output(command, cwd=tmp_path, env=environment, text=True) == f"{USER_DIR}\n"


def test_another_module_started_with_m_loads_the_package(tmp_path):
    """Which begins with fairseq or torch; here both only say that they are imported."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("import bild_fairseq")
    (tmp_path / "mine/__main__.py").touch()
    for name in ("fairseq", "torch"):
        (tmp_path / f"{name}.py").write_text("import sys; sys.exit('imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(USER_DIR).parent)])}
    command = [sys.executable, "-m", "mine", "bild_fairseq"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert run.stderr == "imported\n"


def test_a_wheel_holds_the_whole_package(tmp_path):
    """Built from a copy, as pip builds one; the files in C are compiled where it is installed."""
    root = Path(USER_DIR).parent
    shutil.copytree(USER_DIR, tmp_path / "bild_fairseq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if not name.split("/")[0].endswith(".dist-info")}
        (metadata,) = [file.read(name).decode() for name in file.namelist() if name.endswith("/METADATA")]
    assert found == {str(path.relative_to(tmp_path)) for path in tmp_path.glob("bild_fairseq/**/*") if path.is_file()}
    assert any(name.endswith(".c") for name in found)
    for line in (root / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or f"Requires-Dist: {line}" in metadata
    for extra in ("t5", "plot", "rouge"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_hydra_knows_the_flags():
    """For fairseq-hydra-train, whose configuration files may name any option of fairseq."""
    for name, node in (("config", lambda stored: stored.generation), ("generation", lambda stored: stored)):
        assert node(ConfigStore.instance().load(f"{name}.yaml").node).bild_max_draft == 10


FLAGS = """
import json, sys
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
parser = getattr(options, sys.argv.pop(0))()
config = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser)).generation
print(json.dumps({name: config[name] for name in config if name.startswith("bild_") or name == "generator"}))
"""


def test_flags_reach_the_generation_config(corpus):
    def parsed(parser, *flags):
        arguments = [parser, "program", corpus.data, "--user-dir", USER_DIR, "--path", corpus.large, *flags]
        return json.loads(corpus.programs("python", FLAGS, *arguments).out)

    given = {
        "generator": "bild",
        "bild_small_path": str(corpus.small),
        "bild_small_overrides": "{'dropout': 0.0}",
        "bild_small_suffix": "",
        "bild_small_shard_count": 1,
        "bild_fallback_threshold": 0.25,
        "bild_rollback_threshold": 0.0,
        "bild_max_draft": 3,
        "bild_start": "small",
        "bild_verify_end": True,
        "bild_stats": "stats.json",
        "bild_max_batch": 4,
        "bild_precision": "bfloat16",
        "bild_small_precision": "int8",
        "bild_draft_vocab": str(corpus.data / "dict.y.txt"),
    }
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags = [word for word in flags if word is not True]  # a switch has no value
    for parser in ("get_generation_parser", "get_interactive_generation_parser"):
        assert parsed(parser, *flags) == {**given, "bild_exit_layer": None}
    assert parsed("get_generation_parser") == {
        "generator": "beam",
        "bild_small_path": None,
        "bild_small_overrides": "{}",
        "bild_small_suffix": None,
        "bild_small_shard_count": None,
        "bild_exit_layer": None,
        "bild_fallback_threshold": 0.6,
        "bild_rollback_threshold": 2.0,
        "bild_max_draft": 10,
        "bild_start": "large",
        "bild_verify_end": False,
        "bild_stats": None,
        "bild_max_batch": None,
        "bild_precision": "float32",
        "bild_small_precision": "same",
        "bild_draft_vocab": None,
    }


IMPORTED_FIRST = """
import sys
import bild_fairseq
import fairseq_cli.generate
fairseq_cli.generate.cli_main()
"""


def test_search_options_have_the_defaults_and_the_values_of_fairseq():
    """Also where a namespace or a hub interface gives a few of them only, or None."""
    fairseq = BildGenerationConfig()
    assert SearchOptions.from_args(fairseq) == SearchOptions.from_args(Namespace(lenpen=None)) == SearchOptions()
    given = {"max_len_a": 1.5, "max_len_b": 7, "min_len": 2, "match_source_len": True, "temperature": 0.5}
    given |= {"no_repeat_ngram_size": 3, "lenpen": 0.8, "unkpen": 2.0, "unnormalized": True}
    wanted = {**given, "len_penalty": given["lenpen"], "unk_penalty": given["unkpen"], "normalize_scores": False}
    made = dataclasses.asdict(SearchOptions.from_args(Namespace(**given)))
    assert made == {name: wanted[name] for name in made}


def test_user_dir_after_an_import_in_python(corpus):
    """Imported once, under one name, and everything works as if it had been the --user-dir alone."""
    arguments = [*corpus.arguments(*corpus.bild()), "--user-dir", USER_DIR]
    run = corpus.programs("python", IMPORTED_FIRST, "program", *arguments)
    assert run.fields("H") == corpus.generate(*corpus.bild()).fields("H")
    assert run.err.count(f"{SENTENCES} sentences, ") == 1


TWICE = """
import sys
import fairseq_cli.generate
for _ in range(2):
    fairseq_cli.generate.cli_main()
"""


def test_two_generations_in_one_process_are_reported_once_each(corpus):
    arguments = [*corpus.arguments(*corpus.bild("--max-len-b", 1)), "--user-dir", USER_DIR]
    run = corpus.programs("python", TWICE, "program", *arguments)
    assert run.err.count(f"{SENTENCES} sentences, ") == 2


def test_training_is_untouched(corpus, tmp_path):
    """The same weights with and without the plugin, also with the beam search that --eval-bleu builds."""
    size = "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 8 --decoder-embed-dim 8 --max-update 3"
    size += " --encoder-attention-heads 2 --decoder-attention-heads 2 --encoder-normalize-before"
    common = "--arch transformer_tiny --optimizer adam --lr 0.01 --batch-size 64 --cpu --num-workers 0 -s x -t y"
    bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 5}', "--required-batch-size-multiple", 1]
    models = {}
    for name, chosen in (("stock", []), ("plugin", ["--user-dir", USER_DIR])):
        arguments = [*size.split(), *common.split(), *bleu, *chosen, "--save-dir", tmp_path / name]
        run = corpus.programs("train", corpus.data, *arguments, environment=STOCK if name == "stock" else {})
        assert "bleu" in run.out + run.err
        models[name] = torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False)["model"]
    assert models["stock"].keys() == models["plugin"].keys()
    for name, weight in models["stock"].items():
        # fairseq 0.12.2 stores one that it has never written to.
        assert "_float_tensor" in name or torch.equal(models["plugin"][name], weight), name
