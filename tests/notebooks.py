"""Executes the notebooks of docs/notebooks, and compares what they show with what they store.

  python -m tests.notebooks                        all of them, in the order of ORDER, as tests/python_docs_test.py does
  python -m tests.notebooks --write                stores what they show now
  python -m tests.notebooks --write --folder=DIR merge_with_search
                                                   only this one, with the runs that earlier calls left in DIR

The cells run in this process, without Jupyter: they are plain Python without magics. Like Jupyter, a cell shows what it prints, its
figures, and the value of its last expression, unless that ends with a semicolon. Programs are compiled as in all tests
(tests/conftest.py), but for one device.

Texts are compared word for word and numbers with a tolerance, since sums in another order move the results of a training. What a
notebook says of its results is checked by its function in `tests/notebook_claims.py`.
"""

import argparse
import ast
import base64
import contextlib
import importlib
import io
import json
import os
import pathlib
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "docs" / "notebooks"
# A notebook may read the runs of those before it.
ORDER = (
    "start_to_finish",
    "import_and_lora",
    "dpo_and_indicators",
    "low_rank",
    "influence",
    "bam",
    "nexus",
    "merge_with_search",
    "arbitrage",
    "snapkv",
)
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
# Paths and times, which differ from one machine to the next.
OF_A_MACHINE = re.compile(r"/(?:tmp|home|root|usr|work|var)/|\b20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d")
DPI = 70
PAGE = "docs/use/python.md"
RUN_OF_PAGE = "/tmp/espalier_tiny"
REMEDY = "python -m tests.notebooks --write stores what notebooks show now; look at it, and at what the text says of it."


def path_of(name: str) -> pathlib.Path:
    return NOTEBOOKS / f"{name}.ipynb"


def read(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path_of(name).read_text(encoding="utf-8"))
    return notebook


def write(name: str, notebook: dict[str, Any]) -> None:
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path_of(name).write_text(text + "\n", encoding="utf-8")


def text_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def execute(source: str, name: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the outputs of a cell, in the format of notebooks."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, out = None, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(tree, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if out.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(out.getvalue())})
    for number in pyplot.get_fignums():
        image = _png(pyplot.figure(number))
        outputs.append({"data": image, "metadata": {}, "output_type": "display_data"})
    pyplot.close("all")
    if value is not None and not source.rstrip().endswith(";"):
        data: dict[str, Any] = {"text/plain": _lines(repr(value))}
        if isinstance(value, Figure):
            data = _png(value)
        elif hasattr(value, "_repr_html_"):
            data["text/html"] = _lines(value._repr_html_())
        outputs.append({"data": data, "metadata": {}, "output_type": "execute_result"})
    return outputs


def _png(figure: Any) -> dict[str, Any]:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    image = base64.b64encode(png.getvalue()).decode("ascii")
    return {"image/png": image, "text/plain": ["<Figure>"]}


def run(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """Executes the cells, replaces their outputs, and returns the names that they define."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell["outputs"] = execute(text_of(cell), f"{name}, code {number}", namespace)
        cell["execution_count"] = number
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
    return namespace


def run_page() -> dict[str, Any]:
    """Executes the blocks of docs/use/python.md with a run of the notebooks; returns the names that they define."""
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```") // 2
    # The run's texts are relative to it.
    os.chdir(pathlib.Path(tempfile.gettempdir(), "espalier_notebooks"))
    pathlib.Path("my_data").mkdir()
    lines = [json.dumps({"text": f"def f_{i}(x):\n    return x + {i}\n"}) for i in range(200)]
    pathlib.Path("my_data/code.jsonl").write_text("\n".join(lines), encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks, 1):
        code = block.replace(RUN_OF_PAGE, "runs/base")
        exec(compile(code, f"{PAGE}, block {number}", "exec"), names)
    return names


def texts(cell: dict[str, Any]) -> list[str]:
    """Returns what a cell shows: its texts, and '<Figure>' for each image."""
    return [
        "".join(output["text"] if "text" in output else output["data"]["text/plain"])
        for output in cell["outputs"]
    ]


def differences(stored: dict[str, Any], shown: dict[str, Any]) -> list[str]:
    """Returns a message for each cell that shows something else than it stores."""
    messages = []
    for number, (before, now) in enumerate(zip(stored["cells"], shown["cells"], strict=True), 1):
        if before["cell_type"] == "code":
            one, other = "\0".join(texts(before)), "\0".join(texts(now))
            if not alike(one, other):
                messages.append(f"cell {number} stores\n{one}\nand shows\n{other}")
    return messages


def alike(stored: str, shown: str) -> bool:
    """Returns whether two texts have the same words and spaces between lines, and numbers that are near each other.

    Numbers are near if they differ by at most 0.05 plus 10 %; by 0.02 if the stored one is smaller than 0.01, such as a share of
    0.00; and by ten times the stored one if it is written with an exponent, such as a rounding error of 7e-06.
    """
    words = [re.sub(r"[ -]+", " ", NUMBER.sub("#", text)) for text in (stored, shown)]
    numbers = [NUMBER.findall(text) for text in (stored, shown)]
    return words[0] == words[1] and all(
        abs(_value(a) - _value(b)) <= _tolerance(a) for a, b in zip(*numbers, strict=True)
    )


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))


def _tolerance(stored: str) -> float:
    size = abs(_value(stored))
    if "e" in stored:
        return 10 * size
    return 0.02 if size < 0.01 else 0.05 + 0.1 * size


@contextlib.contextmanager
def _place(folder: pathlib.Path) -> Iterator[None]:
    """Context manager: the temporary folder is `folder`, and the working directory afterwards as before."""
    before = os.getcwd()
    tempfile.tempdir = str(folder)
    os.environ["ESPALIER_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        tempfile.tempdir = None
        os.chdir(before)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="names of notebooks; all by default")
    parser.add_argument("--write", action="store_true", help="stores what the notebooks show")
    parser.add_argument("--folder", type=pathlib.Path, help="of their files, which stay")
    parser.add_argument("--json", action="store_true", help="prints results as JSON lines")
    flags = parser.parse_args(argv)
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    importlib.import_module("tests.conftest")  # sets the variables and options of JAX
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for name, messages in _results(flags, (flags.folder or pathlib.Path(temporary)).resolve()):
            failed |= bool(messages)
            shown = "\n".join([f"{name}: {'failed' if messages else 'good'}", *messages])
            print(json.dumps([name, messages]) if flags.json else shown, flush=True)
    return int(failed)


def _results(flags: argparse.Namespace, folder: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the name of each notebook, and of the page if all notebooks are executed, with what is wrong with it."""
    import matplotlib

    matplotlib.use("Agg")
    with _place(folder):
        for name in [name for name in ORDER if name in (flags.names or ORDER)]:
            began = time.process_time()
            yield name, _failures(lambda name=name: _check(name, stored=not flags.write))
            seconds = time.process_time() - began
            print(f"{name}: {seconds:.0f} s of processor time", file=sys.stderr, flush=True)
        if not flags.names:
            yield PAGE, _failures(_check_page)


def _failures(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except Exception:
        return [traceback.format_exc()]


def _check(name: str, *, stored: bool) -> list[str]:
    """Executes a notebook and checks its claims; compares its outputs, or stores them. Returns the differences."""
    from tests import notebook_claims

    notebook = read(name)
    names = run(notebook, name)
    messages = differences(read(name), notebook) if stored else []
    if not stored:
        write(name, notebook)
    getattr(notebook_claims, name)(names)
    return messages


def _check_page() -> list[str]:
    from tests import notebook_claims

    with contextlib.redirect_stdout(io.StringIO()):
        notebook_claims.page(run_page())
    return []


if __name__ == "__main__":
    sys.exit(main())
