"""Every number that an option takes, at its extremes: a generation runs, or one line says what is wrong."""

import dataclasses
import math

import pytest
import support
from fairseq.tasks import FairseqTask

from bild_fairseq.errors import BildError
from bild_fairseq.plugin.flags import BildGenerationConfig

NUMBERS = [
    option.name
    for option in dataclasses.fields(BildGenerationConfig)
    if type(option.default) in (int, float) or option.name == "bild_exit_layer"
]
HONOURED = ("max_len_a", "max_len_b", "min_len", "lenpen", "unkpen", "temperature", "no_repeat_ngram_size")
FLOATS = [0.0, -1.0, 1e-300, 1e-5, 1000.0, -1000.0, 1e308, -1e308, math.inf, -math.inf, math.nan]
INTEGERS = [0, -1, 1, 2**31, 2**63, -(2**63), 10**30]


def generated(**chosen) -> list:
    large, _ = support.pair("agreeing", 0)
    args = BildGenerationConfig(generator="greedy", **{"max_len_b": 12, **chosen})
    generator = support.task().build_generator([large], args)
    return generator.generate([], support.sample([support.source([1, 2]), support.source([3])]))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_at_its_extremes(name):
    default = BildGenerationConfig.__dataclass_fields__[name].default
    ran = 0
    for value in FLOATS if isinstance(default, float) or name in ("max_len_a", "lenpen", "unkpen") else INTEGERS:
        try:
            hypotheses = generated(**{name: value})
        except BildError as error:
            assert "\n" not in str(error)
            continue
        ran += 1
        for (hypothesis,) in hypotheses:
            assert hypothesis["tokens"][-1] == support.symbols().eos()
            assert not hypothesis["score"].isnan()
    assert ran or name not in HONOURED


@pytest.mark.parametrize("penalty", [-1000.0, -1e30])
def test_the_small_model_may_be_surer_than_certain(penalty):
    """A negative penalty makes the log-probability of the unknown word positive; nobody is asked then."""
    large, small = support.pair("agreeing", 0)
    args = BildGenerationConfig(generator="greedy", max_len_b=12, unkpen=penalty)
    wanted = support.task().build_generator([large], args)
    rules = support.Rules(unk_penalty=penalty, max_len=12, rollback_threshold=0.0, verify_end=True)
    made = support.generator([large], [small], rules)
    batch = support.sample([support.source([1, 2]), support.source([3])])
    for found, one in zip(made.generate([], batch), wanted.generate([], batch), strict=True):
        assert found[0]["tokens"].tolist() == one[0]["tokens"].tolist()


def test_a_search_that_args_ask_for_is_refused():
    """fairseq reads ``prefix_allowed_tokens_fn`` from the arguments where no function is given."""
    large, _ = support.pair("agreeing", 0)
    args = BildGenerationConfig(generator="greedy")
    args.prefix_allowed_tokens_fn = lambda batch, tokens: [5]
    with pytest.raises(BildError, match="asks for a search"):
        FairseqTask.build_generator(support.task(), [large], args)
