"""The notebooks and docs/use/python.md run as shown.

They run in this process, cell after cell: a Jupyter kernel for each would start Python, JAX and TensorFlow anew, and Jupyter is
not a dependency. The cells are plain Python, without magics.
"""

import json
import pathlib
import re
import tempfile

import matplotlib
import numpy as np
import pytest

from espalier.launch.run.metric_rows import read_rows

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = ROOT / "docs" / "notebooks"
RUN = "/tmp/espalier_tiny"  # the run in docs/use/python.md


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run(name, sources):
    """The names that are defined after running pieces of code in order."""
    namespace = {"__name__": name}
    for number, source in enumerate(sources, 1):
        exec(compile(source, f"{name}, code {number}", "exec"), namespace)
    matplotlib.pyplot.close("all")
    return namespace


def run_notebook(name):
    code = [c for c in cells(NOTEBOOKS / f"{name}.ipynb") if c["cell_type"] == "code"]
    return run(name, ["".join(cell["source"]) for cell in code])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory, with a folder of data; temporary files and caches are in it too."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "my_data").mkdir()
    lines = [json.dumps({"text": f"def f_{i}(x):\n    return x + {i}\n"}) for i in range(200)]
    (folder / "my_data" / "code.jsonl").write_text("\n".join(lines))
    matplotlib.use("Agg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("ESPALIER_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def trained(folder):
    """What the notebook that trains defines; it leaves a run behind."""
    return run_notebook("train_a_model")


def test_the_notebook_that_trains(trained):
    losses = [row["loss"] for row in read_rows(trained["FOLDER"]) if "loss" in row]
    assert len(losses) == trained["STEPS"] and losses[-1] < losses[0] - 0.5
    assert 0 < trained["scores"]["loss"] < losses[0]


def test_the_notebook_that_uses_a_run(trained):
    used = run_notebook("use_a_run")
    assert used["RUN"] == trained["FOLDER"]
    assert len(used["samples"]) == 4
    np.testing.assert_allclose(
        trained["run"].logits([used["tokens"]])[0], used["logits_TV"], atol=1e-5
    )


def test_the_page(trained, folder):
    page = (ROOT / "docs" / "use" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```") // 2
    names = run("docs/use/python.md", [b.replace(RUN, str(trained["FOLDER"])) for b in blocks])
    assert len(names["answers"]) == 2 and names["metrics"]["loss"] > 0
    assert (folder / "runs" / "mine" / "checkpoints" / "3").is_dir()


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (
            cell["outputs"] == [] and cell["execution_count"] is None
        )
    page = (ROOT / "docs" / "use" / "python.md").read_text(encoding="utf-8")
    assert f"notebooks/{path.name}" in page
