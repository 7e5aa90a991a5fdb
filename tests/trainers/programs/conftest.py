"""What tests of stored programs share."""

import pytest

from espalier.trainers.programs import program


@pytest.fixture
def traces(monkeypatch):
    """The names of the functions that were traced."""
    names = []
    lower = program._lower

    def recording(jitted, *rest):
        names.append(jitted.__wrapped__.__name__)
        return lower(jitted, *rest)

    monkeypatch.setattr(program, "_lower", recording)
    return names
