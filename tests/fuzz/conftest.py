"""The fuzzers' settings."""

import pytest
from fuzzing import Fuzzer


@pytest.fixture
def fuzzer(request: pytest.FixtureRequest) -> Fuzzer:
    """Runs a fuzzer's cases for --fuzz-seconds, from --fuzz-seed on."""
    return Fuzzer(request.config.getoption("--fuzz-seconds"), request.config.getoption("--fuzz-seed"))
