"""The two policies as the paper and the definition of the algorithm have them."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from bild_fairseq.policies import falls_back, rolls_back

LPROBS = st.lists(st.floats(-50, 0, width=32) | st.just(-math.inf), min_size=1, max_size=6)


@given(LPROBS)
def test_fallback_threshold_0_never_falls_back(lprobs):
    """Not even where the best probability itself is 0."""
    assert not falls_back(torch.tensor(lprobs), 0.0).any()


def test_fallback_threshold_1_keeps_only_what_is_certain():
    assert falls_back(torch.tensor([0.0, -1e-3, -5.0, -math.inf]), 1.0).tolist() == [False, True, True, True]


@given(LPROBS)
def test_fallback_is_strictly_below_the_threshold(lprobs):
    """A token exactly as probable as the threshold is kept."""
    lprobs = torch.tensor(lprobs)
    for at in lprobs.exp().tolist():
        wanted = [p < at for p in lprobs.exp().tolist()]
        assert falls_back(lprobs, at).tolist() == wanted


@given(LPROBS)
def test_rollback_threshold_inf_never_rolls_back(lprobs):
    """Not even a token that the large model holds impossible."""
    lprobs = torch.tensor(lprobs)
    assert not rolls_back(lprobs, torch.zeros_like(lprobs, dtype=torch.bool), math.inf).any()


def test_rollback_threshold_0_keeps_only_the_large_models_choice():
    lprobs = torch.tensor([-0.1, -0.1, -9.0, -math.inf])
    best = torch.tensor([True, False, False, False])
    assert rolls_back(lprobs, best, 0.0).tolist() == [False, True, True, True]


@given(LPROBS)
def test_rollback_is_strictly_above_the_threshold(lprobs):
    """A token exactly as unlikely as the threshold is kept."""
    lprobs = torch.tensor(lprobs)
    nobody = torch.zeros_like(lprobs, dtype=torch.bool)
    for at in (-lprobs).tolist():
        assert rolls_back(lprobs, nobody, at).tolist() == [-lprob > at for lprob in lprobs.tolist()]


@given(LPROBS, st.floats(0, 60))
def test_the_large_models_own_choice_never_rolls_back(lprobs, threshold):
    """However unlikely it is: going back would only put the same token again."""
    lprobs = torch.tensor(lprobs)
    assert not rolls_back(lprobs, torch.ones_like(lprobs, dtype=torch.bool), threshold).any()


def test_any_shape():
    lprobs = torch.tensor([[-1.0, -3.0], [-0.5, -2.5]])
    assert falls_back(lprobs, 0.2).tolist() == [[False, True], [False, True]]
    best = torch.tensor([[False, False], [False, True]])
    assert rolls_back(lprobs, best, 2.0).tolist() == [[False, True], [False, False]]
