"""The two policies as the paper and the definition of the algorithm have them."""

import math

from hypothesis import given
from hypothesis import strategies as st

from bild_fairseq.decoding.policies import falls_back, rolls_back

LPROBS = st.floats(-50, 0) | st.just(-math.inf)


@given(LPROBS)
def test_fallback_threshold_0_never_falls_back(lprob):
    """Not even where the best probability itself is 0."""
    assert not falls_back(lprob, 0.0)


def test_fallback_threshold_1_keeps_only_what_is_certain():
    assert [falls_back(lprob, 1.0) for lprob in (0.0, -1e-3, -5.0, -math.inf)] == [False, True, True, True]


@given(LPROBS, LPROBS)
def test_fallback_is_strictly_below_the_threshold(lprob, at):
    """A token exactly as probable as the threshold is kept."""
    assert not falls_back(at, math.exp(at))
    assert falls_back(lprob, math.exp(at)) == (math.exp(lprob) < math.exp(at))


def test_a_token_that_a_penalty_makes_likelier_than_certain_is_kept():
    assert not any(falls_back(lprob, 1.0) for lprob in (1e-3, 1000.0, math.inf))


@given(LPROBS)
def test_rollback_threshold_inf_never_rolls_back(lprob):
    """Not even a token that the large model holds impossible."""
    assert not rolls_back(lprob, False, math.inf)


def test_rollback_threshold_0_keeps_only_the_large_models_choice():
    assert not rolls_back(-0.1, True, 0.0)
    assert all(rolls_back(lprob, False, 0.0) for lprob in (-0.1, -9.0, -math.inf))


@given(LPROBS, LPROBS)
def test_rollback_is_strictly_above_the_threshold(lprob, at):
    """A token exactly as unlikely as the threshold is kept."""
    assert not rolls_back(at, False, -at)
    assert rolls_back(lprob, False, -at) == (-lprob > -at)


@given(LPROBS, st.floats(0, 60))
def test_the_large_models_own_choice_never_rolls_back(lprob, threshold):
    """However unlikely it is: going back would only put the same token again."""
    assert not rolls_back(lprob, True, threshold)
