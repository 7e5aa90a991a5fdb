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
def wrong(tmp_path_factory):
    """Returns what is wrong with a notebook, or with the page, as soon as it has been executed."""
    errors = tmp_path_factory.mktemp("notebooks") / "errors"
    results = {}
    with (
        errors.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "tests.notebooks", "--json"],
            cwd=notebooks.ROOT,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        ) as process,
    ):

        def result(name):
            while name not in results:
                line = process.stdout.readline()
                assert line, errors.read_text()
                results.update([json.loads(line)])
            return results[name]

        yield result
        process.kill()


@pytest.mark.parametrize("name", [*notebooks.ORDER, notebooks.PAGE])
def test_it_runs_and_shows_what_it_stores_and_says(wrong, name):
    messages = wrong(name)
    assert not messages, "\n".join([*messages, notebooks.REMEDY])


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
        ("share 0.00", "share 0.01", True),
        ("share 0.00", "share 0.03", False),
        ("logit: 7e-06", "logit: 2e-05", True),
        ("logit: 7e-06", "logit: 0.01", False),
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
