"""The seam to fairseq: what plugin.py relies on, and that it changes nothing else."""

import json

import pytest
import torch
from cli_support import SENTENCES, STOCK, USER_DIR
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.configs import FairseqConfig
from fairseq.tasks import FairseqTask
from hydra.core.config_store import ConfigStore

from bild_fairseq.plugin.flags import BildGenerationConfig
from bild_fairseq.plugin.hooks import install

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
NO_PLUGIN = """
import sys
assert "bild_fairseq" not in sys.modules
"""


@pytest.mark.parametrize(
    "code",
    [GENERATION_FLAGS, PARSING, LOADING, BUILDING],
    ids=["the flags' dataclass", "the parser", "the loading function", "build_generator"],
)
def test_fairseq_is_as_the_plugin_expects(corpus, code):
    corpus.programs("python", code + NO_PLUGIN, corpus.large)


def replaced():
    generation = FairseqConfig.__dataclass_fields__["generation"]
    return [
        options.GenerationConfig,
        options.parse_args_and_arch,
        checkpoint_utils.load_checkpoint_to_cpu,
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
        arguments = [parser, "program", "data", "--user-dir", USER_DIR, "--path", corpus.large, *flags]
        return json.loads(corpus.programs("python", FLAGS, *arguments).out)

    given = {
        "generator": "bild",
        "bild_small_path": str(corpus.small),
        "bild_fallback_threshold": 0.25,
        "bild_rollback_threshold": 0.0,
        "bild_max_draft": 3,
        "bild_start": "small",
        "bild_verify_end": True,
        "bild_stats": "stats.json",
        "bild_precision": "bfloat16",
        "bild_small_precision": "int8",
    }
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags.remove(True)  # a switch has no value
    for parser in ("get_generation_parser", "get_interactive_generation_parser"):
        assert parsed(parser, *flags) == {**given, "bild_exit_layer": None}
    assert parsed("get_generation_parser") == {
        "generator": "beam",
        "bild_small_path": None,
        "bild_exit_layer": None,
        "bild_fallback_threshold": 0.6,
        "bild_rollback_threshold": 2.0,
        "bild_max_draft": 10,
        "bild_start": "large",
        "bild_verify_end": False,
        "bild_stats": None,
        "bild_precision": "float32",
        "bild_small_precision": "same",
    }


IMPORTED_FIRST = """
import sys
import bild_fairseq
import fairseq_cli.generate
fairseq_cli.generate.cli_main()
"""


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
        assert torch.equal(models["plugin"][name], weight), name
