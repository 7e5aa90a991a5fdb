"""Imports go one way: launch -> trainers -> model and launch -> data, and stay light where they must."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("model", "trainers", "data", "launch")

# Packages each one may import of the project's own, and what it must not import from outside.
OWN = {
    "model": {"model"},
    "trainers": {"trainers", "model"},
    "data": {"data"},
    "launch": {"launch", "trainers", "model", "data"},
}
# The modules that need TensorFlow are slow to import and are kept out of the training process.
TENSORFLOW = {"tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio"}
FORBIDDEN = {
    "model": {"gin", "absl", "orbax", *TENSORFLOW},
    "trainers": {"gin", *TENSORFLOW},
    "data": set(),
    "launch": set(),
}
# Modules that define SeqIO classes; they are slow to import themselves.
SEQIO_CLASSES = {"character_vocabulary", "hf_vocabulary"}
PEERS = {"torch", "transformers"}  # reference implementations, never imported
# Run by a benchmark as a script of their own environment.
PEER_SCRIPTS = {
    *(ROOT / "launch" / "benchmarks" / "torch").glob("*_torch.py"),
    ROOT / "launch" / "benchmarks" / "jax" / "lm_eval_side.py",
}


def files(package: str) -> list[pathlib.Path]:
    return sorted(set((ROOT / package).rglob("*.py")) - PEER_SCRIPTS)


def imports(path: pathlib.Path):
    """(line, module, names, relative level, at module level) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, [], 0, top
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            yield node.lineno, node.module or "", names, node.level, top


def problems(path: pathlib.Path, package: str) -> list[str]:
    found = []
    for line, module, names, level, top in imports(path):
        where = f"{path.name}:{line}"
        root = module.partition(".")[0]
        if level:
            found.append(f"{where} relative import")
            continue
        if "*" in names:
            found.append(f"{where} star import of {module}")
        if root in PACKAGES and root not in OWN[package]:
            found.append(f"{where} {package} imports {module}")
        if module in PACKAGES and not names:
            found.append(f"{where} bare import of {module}: import its modules")
        if root in FORBIDDEN[package] | PEERS:
            found.append(f"{where} {package} imports {module}")
        slow = root in TENSORFLOW or (
            root == "data" and SEQIO_CLASSES & {*names, *module.split(".")}
        )
        if package in ("data", "launch") and top and slow and path.stem not in SEQIO_CLASSES:
            found.append(f"{where} {module} is slow: import it inside the function that needs it")
        if root == "tests":
            found.append(f"{where} imports tests")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_direction(package):
    found = [problem for path in files(package) for problem in problems(path, package)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("model", "from trainers import step"),
        ("model", "def f():\n    import gin"),
        ("model", "import orbax.checkpoint"),
        ("trainers", "import data.stream.stream"),
        ("trainers", "def f():\n    import tensorflow as tf"),
        ("launch", "from data.tokenizers import hf_vocabulary"),
        ("data", "from model.config import TransformerConfig"),
        ("data", "from trainers import batches"),
        ("data", "import seqio"),
        ("launch", "from . import cli"),
        ("launch", "from model.config import *"),
        ("launch", "import model"),
        ("trainers", "import torch"),
    ],
)
def test_the_check_sees_each_kind_of_fault(tmp_path, package, source):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert len(problems(path, package)) == 1


def test_what_is_allowed_passes(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import jax\nfrom data.stream import stream\n\ndef f():\n    import seqio\n")
    assert problems(path, "data") == []


@pytest.mark.parametrize("package", [*PACKAGES, "t5x_configs", "tests"])
def test_package_markers(package):
    markers = list((ROOT / package).rglob("__init__.py"))
    if package in PACKAGES:
        folders = {path.parent for path in files(package)}
        missing = [str(f) for f in folders if not (f / "__init__.py").exists()]
        assert not missing, f"folders without __init__.py: {missing}"
        assert not [str(m) for m in markers if m.read_text().strip()], "they stay empty"
    else:
        # They would be installed as top-level packages.
        assert markers == []


@pytest.mark.parametrize("packages", [["model"], ["model", "trainers"]])
def test_what_trains_loads_no_tensorflow(packages):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in packages
        for path in files(package)
        if path.name != "__init__.py"
    ]
    forbidden = TENSORFLOW | PEERS | {"gin"} | ({"orbax"} if packages == ["model"] else set())
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(sorted({forbidden!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
