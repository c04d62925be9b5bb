"""What the tests share: how long hypothesis may look, a seeded generator, and a model too small to be slow."""

import os

import numpy as np
import pytest
from hypothesis import Phase, settings

from minimoe.core.config import ModelConfig

# The learner's run repeats itself; a longer look for new cases: pytest --hypothesis-profile=thorough
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=500, deadline=None)
# What CI runs over tests/test_fuzz.py: new cases each time, with the words to repeat one that fails
settings.register_profile("fuzz", max_examples=400, deadline=None, print_blob=True)
# For tests/mutations: that a test fails is enough to know, the simplest example is not.
settings.register_profile(
    "no-shrinking", settings.get_profile("quick"), phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
settings.load_profile("quick")

# The workers of `coverage run -m pytest -n auto` are measured; the processes that tests start are not, since what some
# of them are watched for is their imports, their memory, what they may write and what they say.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    """Every size is another number, so that no two axes can be mixed up unnoticed."""
    return ModelConfig(
        vocab_size=13, width=6, layers=2, heads=4, kv_heads=2, head_width=8, context=7, experts=5, expert_width=3
    )
