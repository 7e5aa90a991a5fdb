"""Pages are written with few exchanges of arms; tests/launch/papers/shared/ has tests of their number and result."""

import functools

import matplotlib.figure
import pytest

from espalier.launch.papers.shared import claim


@pytest.fixture(autouse=True)
def few_exchanges(monkeypatch):
    monkeypatch.setattr(claim, "exchanges", functools.partial(claim.exchanges, draws=2))


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are drawn and not written, which takes longer than all else."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *_, **__: None)
