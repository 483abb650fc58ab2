"""What all tests share: the package on the path, one thread, repeatable randomness."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bild_fairseq  # noqa: E402, F401

torch.set_num_threads(1)

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
