"""Exchanges of arms are as many here as on the pages."""

import pytest


@pytest.fixture(autouse=True)
def few_exchanges():
    """Replaces the fixture of all papers."""
