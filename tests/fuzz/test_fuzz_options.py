"""Random generation options, ordinary ones and extremes, compared with stock fairseq and with the naive reference.

Ordinary options must be honoured. Any other value is honoured as stock fairseq does, or refused in one line.
"""

import math
import random
from typing import Any

import pytest
from cli_support import Corpus
from fairseq import checkpoint_utils
from fuzzing import Fuzzer, assert_same_text, configured, refused
from reference import Rules, bild

from bild_fairseq import BildGenerationConfig
from bild_fairseq.decoding import decode

# By fairseq's option; what is left out has fairseq's default. Stock n-gram blocking has no effect on a CPU.
ORDINARY = {
    "max_len_a": [0, 0.5, 1, 1.3],
    "max_len_b": [2, 5, 12, 30],
    "min_len": [0, 1, 2],
    "lenpen": [0, 0.5, 1, 2, -1],
    "unkpen": [0, 1, -3, 0.5],
    "temperature": [0.5, 1.0, 1.6],
    "unnormalized": [True, False],
    "match_source_len": [True, False],
    "prefix_size": [0, 1, 2],
}
OF_BILD = {
    "bild_fallback_threshold": [0.0, 0.3, 0.6, 0.9, 1.0],
    "bild_rollback_threshold": [0.0, 1.0, 2.0, math.inf],
    "bild_max_draft": [1, 2, 3, 10],
    "bild_start": ["large", "small"],
    "bild_verify_end": [True, False],
}
LOSSLESS = {"bild_rollback_threshold": 0.0, "bild_verify_end": True}
INTEGERS = [0, -1, 1, 38, 39, 40, 41, 10**9, 2**31, 2**63 - 1, 2**63, -(2**63)]
FLOATS = [0.0, -0.0, 1e-300, -1e-9, 0.999, 1.001, 1e4, 1e300, -1.0, -1000.0, -1e300, math.inf, -math.inf, math.nan]
EXTREMES = {"max_len_b": INTEGERS, "min_len": INTEGERS, "bild_max_draft": INTEGERS}
EXTREMES |= dict.fromkeys(["max_len_a", "lenpen", "unkpen", "temperature"], FLOATS)
EXTREMES |= dict.fromkeys(["bild_fallback_threshold", "bild_rollback_threshold"], FLOATS)
# What greedy decoding cannot honour.
FOREIGN = {
    "nbest": 2,
    "sampling": True,
    "sampling_topk": 3,
    "constraints": "ordered",
    "diverse_beam_groups": 2,
    "lm_path": "lm.pt",
    "print_alignment": "hard",
    "replace_unk": "",
    "iter_decode_max_iter": 3,
    "retain_dropout": True,
}


def drawn(dice: random.Random, options: dict[str, list]) -> dict[str, Any]:
    """A value for some of the options."""
    return {name: dice.choice(values) for name, values in options.items() if dice.random() < 0.4}


class Options:
    """Decodes some sentences under options from a seed, with each generator."""

    def __init__(self, corpus: Corpus):
        _, self.task = configured(corpus)
        self.small_path = str(corpus.small)
        (self.large,), (self.small,) = (
            checkpoint_utils.load_model_ensemble_and_task([str(path)], task=self.task)[0]
            for path in (corpus.large, corpus.small)
        )
        self.large.eval()
        self.small.eval()

    def __call__(self, dice: random.Random) -> str:
        options = drawn(dice, ORDINARY)
        extreme = dice.random() < 0.5
        if extreme:
            values = {name: [value] for name, value in FOREIGN.items()} if dice.random() < 0.2 else EXTREMES
            name = dice.choice(list(values))
            options[name] = dice.choice(values[name])
        if options.get("match_source_len") and options.get("unkpen", 0) < 0:
            # An unknown word can be likelier than the end that is made certain, and stock fairseq goes on beyond it.
            del options["unkpen"]
        dataset = self.task.dataset("test")
        rows = dice.sample(range(len(dataset)), dice.randint(1, 5))
        sample = dataset.collater([dataset[row] for row in rows])
        if not extreme and dice.random() < 0.3:
            return self.like_reference(sample, {**drawn(dice, OF_BILD), **options})
        generator = dice.choice(["greedy", "bild"])
        if generator == "bild":
            options = {**drawn(dice, OF_BILD), **LOSSLESS, **options, "bild_small_path": self.small_path}
        return self.like_stock(sample, generator, options, extreme)

    def decoded(self, sample: dict, options: dict[str, Any]) -> list[dict[str, Any]]:
        generator = self.task.build_generator([self.large], BildGenerationConfig(**options))
        size = options.get("prefix_size", 0)
        prefixes = sample["target"][:, :size] if size else None
        found = self.task.inference_step(generator, [self.large], sample, prefix_tokens=prefixes)
        return [hypotheses[0] for hypotheses in found]

    def like_stock(self, sample: dict, generator: str, options: dict[str, Any], extreme: bool) -> str:
        """Honoured as stock fairseq does, or refused in one line, which ordinary options never are."""
        found, line = refused(lambda: self.decoded(sample, {**options, "generator": generator}))
        assert line is None or extreme, line
        if line is not None:
            return "refused"
        assert not FOREIGN.keys() & options.keys(), f"ignored: {options}"
        if any(name in options and options[name] != LOSSLESS[name] for name in LOSSLESS):
            return "not lossless"
        stock = {name: value for name, value in options.items() if not name.startswith("bild_")}
        try:
            wanted = self.decoded(sample, {**stock, "generator": "beam", "beam": 1})
        except Exception:
            return "stock fails"
        for ours, theirs in zip(found, wanted, strict=True):
            if ours["steps"]:
                assert_same_text(ours, theirs)
            else:  # a forced prefix is all of it, and the small model gives its scores
                assert ours["tokens"].tolist() == theirs["tokens"].tolist()
        return "like stock"

    def like_reference(self, sample: dict, options: dict[str, Any]) -> str:
        """Both thresholds at any ordinary value: tokens and counters are the naive reference's."""
        options.pop("match_source_len", None)  # its length differs between versions of fairseq
        found = self.decoded(sample, {**options, "generator": "bild", "bild_small_path": self.small_path})
        width = sample["net_input"]["src_tokens"].size(1)
        for row, ours in enumerate(found):
            source = sample["net_input"]["src_tokens"][row].tolist()
            source = [token for token in source if token != self.task.source_dictionary.pad()]
            rules = self.rules(options, width, sample["target"][row].tolist())
            wanted = bild([self.large], [self.small], source, self.task.target_dictionary, rules)
            assert ours["tokens"].tolist() == wanted.tokens
            assert vars(ours["counters"]) == wanted.counters
            assert float(ours["score"]) == pytest.approx(wanted.score, abs=1e-3)
        return "like reference"

    def rules(self, options: dict[str, Any], width: int, target: list[int]) -> Rules:
        longest = int(options.get("max_len_a", 0) * width + options.get("max_len_b", 200))
        prefix = [token for token in target[: options.get("prefix_size", 0)] if token != 1]
        return Rules(
            fallback_threshold=options.get("bild_fallback_threshold", 0.6),
            rollback_threshold=options.get("bild_rollback_threshold", 2.0),
            max_draft=options.get("bild_max_draft", 10),
            start=options.get("bild_start", "large"),
            verify_end=options.get("bild_verify_end", False),
            max_len=min(longest, self.large.max_decoder_positions() - 1),
            min_len=options.get("min_len", 1),
            unk_penalty=options.get("unkpen", 0.0),
            temperature=options.get("temperature", 1.0),
            prefix=tuple(prefix),
            normalize_scores=not options.get("unnormalized", False),
            len_penalty=options.get("lenpen", 1.0),
        )


@pytest.fixture(scope="module")
def options(corpus: Corpus) -> Options:
    return Options(corpus)


def test_options(options: Options, fuzzer: Fuzzer):
    outcomes = fuzzer(options)
    for outcome in ("refused", "like stock", "like reference"):
        assert outcomes[outcome] > 0.05 * outcomes.total(), outcomes


@pytest.mark.parametrize(("name", "fault"), [("rolls_back", False), ("falls_back", True)])
def test_a_fault_of_a_policy_is_found(options: Options, fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch, name, fault):
    """Planted: no draft is rolled back, or every draft falls back."""
    monkeypatch.setattr(decode, name, lambda *_: fault)
    with pytest.raises(AssertionError, match=r"^seed \d+ "):
        fuzzer(options)
