"""What several tests of influence share."""

import jax
import pytest


@pytest.fixture(scope="module")
def float64():
    """Arrays of a test file have 64 bits."""
    with jax.enable_x64(True):
        yield
