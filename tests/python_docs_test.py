"""The notebooks and docs/use/python.md run as shown, and the notebooks store what they show.

One process of its own executes them all (tests/notebooks.py, which also stores the outputs again): they share runs and compiled
programs, and one device is several times faster than the eight of this process.
"""

import json
import subprocess
import sys

import pytest

from tests import notebooks

BYTES = 150_000  # of a notebook
README = notebooks.ROOT / "docs" / "README.md"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What is wrong with each notebook, and with the page."""
    file = tmp_path_factory.mktemp("notebooks") / "results.json"
    ended = subprocess.run(
        [sys.executable, "-m", "tests.notebooks", f"--json={file}"],
        cwd=notebooks.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert file.exists(), ended.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", [*notebooks.ORDER, notebooks.PAGE])
def test_it_runs_and_shows_what_it_stores_and_says(results, name):
    assert results[name] == [], "\n".join([*results[name], notebooks.REMEDY])


@pytest.mark.parametrize(
    "path", sorted(notebooks.NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem
)
def test_outputs_are_stored_without_traces_of_a_machine(path):
    assert path.stem in notebooks.ORDER
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any(cell["outputs"] for cell in code)
    for cell in code:
        for shown in notebooks.texts(cell):
            assert not notebooks.OF_A_MACHINE.search(shown), shown
    assert len(text.encode()) < BYTES
    assert f"(notebooks/{path.name})" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("stored", "shown", "same"),
    [
        ("loss 0.50", "loss 0.51", True),
        ("loss 0.50", "loss 0.65", False),
        ("1,000 tokens", "1,010 tokens", True),
        ("the owl", "the cat", False),
        ("a -0.5", "a 0.5", False),
        ("code   0.1", "code 0.1", True),
    ],
)
def test_words_are_compared_exactly_and_numbers_with_a_tolerance(stored, shown, same):
    assert notebooks.alike(stored, shown) is same


def test_a_cell_shows_what_jupyter_would_show():
    namespace = {}
    outputs = notebooks.execute("print('a')\n1 + 1", "cell", namespace)
    assert [output["output_type"] for output in outputs] == ["stream", "execute_result"]
    assert notebooks.texts({"outputs": outputs}) == ["a\n", "2"]
    assert notebooks.execute("x = 3\nx;", "cell", namespace) == [] and namespace["x"] == 3
