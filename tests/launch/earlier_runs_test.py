"""Runs that an earlier commit began go on, bit for bit, from their own config.gin and checkpoints."""

import json
import pathlib
import runpy

import pytest

GOLDENS = pathlib.Path(__file__).parent / "goldens"
GOLDEN = runpy.run_path(str(GOLDENS / "make_earlier_runs.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of all runs: some begin with others."""
    folder = tmp_path_factory.mktemp("runs")
    GOLDEN["place"](folder)
    return folder


@pytest.mark.parametrize("name", GOLDEN["RUNS"])
def test_an_earlier_run_goes_on(train, folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    result = train(*GOLDEN["continuation"](name))
    assert result.status == 0, result.err
    expected = json.loads((GOLDENS / "earlier_runs" / "expected.json").read_text())
    want, found = expected["runs"][name], GOLDEN["numbers"](folder / name)
    assert len(found["metrics"]) == len(want["metrics"]) == 2
    for row, golden in zip(found["metrics"], want["metrics"], strict=True):
        assert row == pytest.approx(golden, rel=1e-5)  # as on any processor
    assert found["arrays"].keys() == want["arrays"].keys()
    if GOLDEN["processor"]() == expected["processor"]:
        assert found == want
