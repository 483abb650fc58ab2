"""What the fuzzers share: a loop over seeds, refusals in one line, and equality with stock fairseq's text."""

import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cli_support import Corpus
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import FairseqTask

from bild_fairseq.errors import BildError

LONGEST = 40  # seconds that a case may take, on a machine that is busy with other work


class TookTooLong(BaseException):
    """No Exception, so that what explains all of those does not explain this one."""


@dataclass
class Fuzzer:
    """Runs cases, each from a seed of its own, until the time is up."""

    seconds: float
    first_seed: int
    outcomes: Counter[str] = field(default_factory=Counter)

    def __call__(self, case: Callable[[random.Random], str]) -> Counter[str]:
        """Runs cases.

        Args:
            case: makes and checks one case; returns a word for what came of it.

        Returns:
            how often each outcome came.

        Raises:
            AssertionError: a case failed; the message begins with its seed.
        """
        ends, seed = time.monotonic() + self.seconds, self.first_seed
        while time.monotonic() < ends:
            try:
                with time_limit(LONGEST):
                    self.outcomes[case(random.Random(seed))] += 1
            except (Exception, TookTooLong) as error:
                again = f"again with --fuzz-seed {seed}, after {seed - self.first_seed} good ones"
                raise AssertionError(f"seed {seed} ({again}): {type(error).__name__}: {error}") from error
            seed += 1
        return self.outcomes


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TookTooLong in a block that takes longer."""

    def stop(*_: Any) -> None:
        raise TookTooLong(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def configured(corpus: Corpus, *more: object) -> tuple[Any, FairseqTask]:
    """A configuration as fairseq's programs make it from arguments, and its task with the test data."""
    parser = options.get_generation_parser(interactive=True)
    arguments = [str(argument) for argument in (corpus.data, "--path", corpus.large, "-s", "x", "-t", "y", *more)]
    config = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))
    task = tasks.setup_task(config.task)
    task.load_dataset("test")
    return config, task


def refused(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call returns, and the one line that it is refused with; nothing but a BildError is a refusal."""
    try:
        return work(), None
    except BildError as error:
        line = str(error)
        assert line.strip() and len(line.splitlines()) == 1, f"not one line: {line!r}"
        assert len(line) < 500, f"too long: {line}"
        return None, line


def assert_same_text(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    """Two hypotheses of the same sentence: the same tokens and scores, up to the first tie between two tokens."""
    tokens = list(zip(ours["tokens"].tolist(), stock["tokens"].tolist(), strict=False))
    scores = list(zip(ours["positional_scores"].tolist(), stock["positional_scores"].tolist(), strict=False))
    sums = sum(abs(score) for score in stock["positional_scores"].tolist() if math.isfinite(score))
    rounding = 2e-4 + 1e-6 * sums  # stock scores are differences of float32 sums
    for (token, wanted), (score, stock_score) in zip(tokens, scores, strict=True):
        close = score == stock_score or math.isclose(score, stock_score, rel_tol=2e-4, abs_tol=rounding)
        assert close, f"{ours['tokens'].tolist()} instead of {stock['tokens'].tolist()}: {score}, {stock_score}"
        if token != wanted:
            return
    assert len(ours["tokens"]) == len(stock["tokens"])
    score, stock_score = float(ours["score"]), float(stock["score"])
    both_nan = math.isnan(score) and math.isnan(stock_score)
    assert both_nan or score == stock_score or math.isclose(score, stock_score, rel_tol=1e-3, abs_tol=1e-3)
