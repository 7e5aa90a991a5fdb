"""Imports go one way: launch -> trainers -> model and launch -> data, and stay light where they must."""

import ast
import functools
import os
import pathlib
import re
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
# Names of types, files and addresses, and signs of life, which all packages use; the modules import no other package.
LEAVES = {
    "model.ranges",
    "trainers.telemetry.bars",
    "trainers.telemetry.stages",
    "model.storage",
    *(f"model.storage.{name}" for name in ("lock", "mirror", "output_files", "paths")),
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


@functools.cache  # a file is read by several tests
def imports(path: pathlib.Path) -> list:
    """(line, module, names, relative level, at module level) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found: list = []
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, [], 0, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            found.append((node.lineno, node.module or "", names, node.level, top))
    return found


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
        if root in PACKAGES and root not in OWN[package] and module not in LEAVES:
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


# Folders and files from the lowest to the highest; a module may import its own level and those below. A longer name is a
# place of its own. A folder that no level names is a method's, with the METHODS; a file that none names is a command, above all.
LEVELS = {
    "model": (
        ("axes", "kernels", "like", "ranges", "storage"),
        ("config", "embed", "flops", "kv_cache", "linear", "norm", "protocol", "rope"),
        ("attention", "layers", "mlp", "transformer"),
        ("heads", "low_rank", "moe", "t5", "transforms", "vision"),
        ("adapters", "bam", "nexus"),
        ("hf", "mov"),
    ),
    "trainers": (
        ("inputs", "partitioning", "programs", "telemetry", "train_state", "trainable"),
        ("anomaly", "batches", "checkpoints", "initialise", "moving_reference", "optim", "signals"),
        ("decoding", "objectives", "rewards", "scoring"),
        ("recipe", "reports", "step"),
        ("evaluate", "hooks", "loop"),
        ("distillation", "influence", "low_rank", "online", "preference", "snapkv"),
    ),
    "data": (
        ("cache", "choices", "cpu_tensorflow", "sandbox", "tokenizers"),
        ("data_source", "languages", "stream", "text", "tokenizers.vocabularies"),
        ("tasks", "text.user_data", "vision"),
        (
            *("aya23", "aya_expanse", "chats", "code_mix", "distillation", "influence"),
            *("instructions", "mov", "nexus", "preference", "prompts", "snapkv", "t5"),
        ),
    ),
    "launch": (
        ("cli", "config", "environment", "input_errors", "processes"),
        ("run",),
        ("aot", "cluster", "inference", "plots", "run.load", "serving"),
        ("attribution",),
        # Commands that a suite, a sweep or a reproduction runs in its own process.
        (
            *("aya_expanse", "code_mix", "convert", "evaluation", "lm_eval", "low_rank"),
            *("merge", "merging", "nexus", "preference"),
            *("preparation", "sweep", "sweeping", "weights"),
        ),
        ("reporting",),
        ("benchmarks", "papers", "reliability"),
    ),
}
# A folder of the level of folders that no level names.
METHODS = {"model": "mov", "trainers": "preference", "data": "preference", "launch": "evaluation"}
# Folders of the papers, and of a method that is none: no file at the top of a package imports or names one.
SLUGS = tuple(
    sorted(
        {
            path.name
            for folder in ("launch/papers", "t5x_configs/methods")
            for path in (ROOT / folder).iterdir()
            if path.is_dir()
        }
        - {"__pycache__", "adapters", "averaging", "shared"}
    )
)
MOST_FROM_OUTSIDE = 54  # imports of modules in these folders by others, those of papers excepted
# `reproduce` and `report` serve any paper by what the papers share.
SHARED = ("claim", "criteria", "page", "scorecard", "sweeps")
CORE_MAY_IMPORT = {f"launch.papers.shared.{name}" for name in SHARED}


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def graph() -> dict[str, set[str]]:
    """The project's modules, and the modules that each imports, inside functions too."""
    paths = {module_of(path): path for package in PACKAGES for path in files(package)}
    return {
        module: {
            target
            for _, owner, names, _, _ in imports(path)
            for target in ({f"{owner}.{name}" for name in names} & set(paths) or {owner})
            if target in paths and target != module
        }
        for module, path in paths.items()
    }


def level(module: str) -> int | None:
    """The place of a module in LEVELS; None for a command."""
    package, _, name = module.partition(".")
    matches = [
        (len(entry), i)
        for i, entries in enumerate(LEVELS[package])
        for entry in entries
        if f"{name}.".startswith(f"{entry}.")
    ]
    if not matches and "." in name and name.split(".")[0] != METHODS[package]:
        return level(f"{package}.{METHODS[package]}")  # a method's folder
    return max(matches)[1] if matches else None


def upward(modules: dict[str, set[str]]) -> list[str]:
    """Imports of a higher level of the same package."""
    return [
        f"{module} imports {target}"
        for module, targets in modules.items()
        for target in targets
        if module.partition(".")[0] == target.partition(".")[0]
        and (place := level(module)) is not None
        and ((above := level(target)) is None or above > place)
    ]


def circles(modules: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves through others."""
    open_, done, found = [], set(), []

    def visit(module: str) -> None:
        if module in open_:
            found.append(" -> ".join([*open_[open_.index(module) :], module]))
        elif module not in done:
            open_.append(module)
            for target in sorted(modules[module]):
                visit(target)
            open_.pop()
            done.add(module)

    for module in modules:
        visit(module)
    return found


def core() -> list[str]:
    """The files at the top of each package: the core, and the commands."""
    return [module for module in graph() if module.count(".") == 1 and "__init__" not in module]


def papers_named(module: str) -> list[str]:
    """Modules of papers that a core module imports, or names in a string."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    strings = " ".join(
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    owners = "|".join(PACKAGES)
    named = re.findall(rf"\b(?:{owners})(?:\.\w+)*\.(?:{'|'.join(SLUGS)})\b", strings)
    named = [name for name in named if name != module]  # a command's help shows itself
    imported = [
        target
        for target in graph()[module] - CORE_MAY_IMPORT
        if {*SLUGS, "papers"} & set(target.split("."))
    ]
    return named + imported


def test_imports_run_down_only():
    assert upward(graph()) == []


def test_every_module_below_the_commands_has_a_level():
    lost = [m for m in graph() if level(m) is None and "__init__" not in m]
    assert [m for m in lost if m.count(".") > 1 or not m.startswith("launch.")] == []


def test_no_module_imports_itself_through_others():
    assert circles(graph()) == []


def test_the_core_names_no_paper():
    assert {m: names for m in core() if (names := papers_named(m))} == {}


def test_few_modules_outside_of_a_papers_folders_import_them():
    """The rooms that all share serve methods by seams. The number falls as they learn to; it never rises."""
    inside = {*SLUGS, "papers"}
    outside = [m for m in graph() if not inside & set(m.split(".")[1:-1])]
    found = {
        f"{module} imports {target}"
        for module in outside
        for target in graph()[module]
        if set(SLUGS) & set(target.split(".")[1:-1]) and ".papers." not in target
    }
    attribution = {line for line in found if line.startswith("launch.attribution.")}  # influence
    assert len(found - attribution) <= MOST_FROM_OUTSIDE, sorted(found - attribution)


def test_the_checks_of_structure_can_fail():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a -> b -> c -> a"]
    assert upward({"model.linear": {"model.moe.moe"}}) == ["model.linear imports model.moe.moe"]
    assert upward({"launch.run.run_dir": {"launch.train"}}) != []
    assert upward({"model.moe.moe": {"model.linear"}, "launch.train": {"launch.run.phase"}}) == []


def test_the_top_of_each_package_stays_short():
    """A newcomer finds a paper by its folder, not among files."""
    # One of launch is __main__, which nobody opens.
    tops = {p: sum(m.startswith(f"{p}.") for m in core()) for p in PACKAGES}
    assert tops["launch"] <= 23 and tops["trainers"] <= 16
    assert tops["model"] <= 14 and tops["data"] <= 8


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
