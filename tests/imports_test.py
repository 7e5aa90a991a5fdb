"""Imports go one way: launch -> trainers -> model -> common and launch -> data -> common, and stay light where they must.

Here `model.config` stands for the module espalier.model.config.
"""

import ast
import collections
import functools
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("espalier", "model", "trainers", "data", "launch")

# How large the house may be. A number that falls is lowered here; one that has to rise needs a reason in its commit.
# Files and lines of the project that an import of the module reads, itself included.
CLOSURES = {
    "trainers.step": (7, 796),
    "trainers.recipe": (41, 5_765),
    "model.transformer": (27, 4_476),
    "launch.train": (92, 17_744),
}
# Files, without __init__.py, and lines of each package.
SIZES = {
    "espalier": (16, 2_140),
    "model": (103, 17_657),
    "trainers": (115, 20_081),
    "data": (132, 26_099),
    "launch": (312, 69_304),
}
# Files of a folder, without __init__.py: of any, and of these.
FOLDER = 15
FOLDERS = {
    "trainers": 17,
    "trainers/influence": 16,
    "launch/merge": 16,
    "launch/influence": 17,
}
# Folders that import those of papers (SLUGS) outside of launch/papers, and which: every entry is to go.
INTO_SLUGS: dict[str, set[str]] = {
    "launch.aya_expanse": {
        "distillation"
    },  # what a pool's teachers predict is stored as one teacher's is
    "launch.evaluate": {"nexus"},
    "launch.nexus": {"bam"},
    "launch.precompile": {"influence"},
    "launch.upcycle": {"bam", "nexus"},
    "launch.weights": {"low_rank"},
}

# Packages each one may import of the project's own, and what it must not import from outside.
OWN = {
    "espalier": {"espalier"},
    "model": {"espalier", "model"},
    "trainers": {"espalier", "trainers", "model"},
    "data": {"espalier", "data"},
    "launch": {"espalier", "launch", "trainers", "model", "data"},
}
# The modules that need TensorFlow are slow to import and are kept out of the training process.
TENSORFLOW = {"tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio"}
FORBIDDEN = {
    "espalier": {"gin", "absl", "orbax", *TENSORFLOW},
    "model": {"gin", "absl", "orbax", *TENSORFLOW},
    "trainers": {"gin", *TENSORFLOW},
    "data": set(),
    "launch": set(),
}
PEERS = {"torch", "transformers"}  # reference implementations, never imported


def files(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


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
    return [(line, _short(module), *rest) for line, module, *rest in found]


def _short(module: str) -> str:
    """Returns `model.config` for espalier.model.config; an import of `model.config` itself is marked by a question mark."""
    short = module.removeprefix("espalier.")
    if short.partition(".")[0] not in PACKAGES[1:]:
        return module
    return short if short != module else f"?{module}"


def problems(path: pathlib.Path, package: str) -> list[str]:
    if (
        path == ROOT / "espalier" / "__init__.py"
    ):  # it names what users need, of all packages, and imports it when it is used
        return []
    found = []
    for line, module, names, level, top in imports(path):
        where = f"{path.name}:{line}"
        root = module.partition(".")[0]
        if level:
            found.append(f"{where} relative import")
            continue
        if module.startswith("?"):
            found.append(f"{where} import espalier.{module[1:]} in place of {module[1:]}")
        if "*" in names:
            found.append(f"{where} star import of {module}")
        if root in PACKAGES and root not in OWN[package]:
            found.append(f"{where} {package} imports {module}")
        if module in PACKAGES and not names:
            found.append(f"{where} bare import of {module}: import its modules")
        if root in FORBIDDEN[package] | PEERS:
            found.append(f"{where} {package} imports {module}")
        if root == "apache_beam" and path != ROOT / "espalier" / "common" / "pipelines.py":
            found.append(f"{where} imports {module}: espalier.common.pipelines does")
        if package in ("data", "launch") and top and root in TENSORFLOW:
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
        ("espalier", "from espalier.model import axes"),
        ("model", "from espalier.trainers import step"),
        ("model", "def f():\n    import gin"),
        ("model", "import orbax.checkpoint"),
        ("trainers", "import espalier.data.stream.stream"),
        ("trainers", "def f():\n    import tensorflow as tf"),
        ("launch", "import tensorflow_datasets as tfds"),
        ("data", "from espalier.model.config import TransformerConfig"),
        ("data", "from espalier.trainers import batches"),
        ("data", "import seqio"),
        ("data", "def f():\n    import apache_beam"),
        ("launch", "from . import cli"),
        ("launch", "from espalier.model.config import *"),
        ("launch", "import espalier.model"),
        ("trainers", "from model.config import TransformerConfig"),
        ("trainers", "import torch"),
        *((package, "def f():\n    from tests.faults import program") for package in PACKAGES),
    ],
)
def test_the_check_sees_each_kind_of_fault(tmp_path, package, source):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert len(problems(path, package)) == 1


def test_what_is_allowed_passes(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import jax\nfrom espalier.data.stream import stream\n\ndef f():\n    import seqio\n"
    )
    assert problems(path, "data") == []


# Folders and files from the lowest to the highest; a module may import its own level and those below. A longer name is a
# place of its own. A folder that no level names is a method's, with the METHODS; a file that none names is a command, above all.
LEVELS = {
    "espalier": (("common",),),
    "model": (
        ("axes", "kernels", "layer_groups", "like"),
        ("config", "embed", "flops", "kv_cache", "linear", "norm", "protocol", "rope", "rows"),
        ("attention", "layers", "mlp", "transformer"),
        ("heads", "low_rank", "moe", "t5", "transforms", "vision"),
        ("adapters", "bam", "nexus"),
        ("hf", "mov"),
    ),
    "trainers": (
        (
            *("extensions", "host_memory", "inputs", "partitioning", "telemetry", "train_state"),
            "trainable",
        ),
        ("anomaly", "batches", "checkpoints", "initialise", "moving_reference", "optim", "signals"),
        ("decoding", "objectives", "rewards", "scoring"),
        ("recipe", "reports", "step"),
        ("evaluate", "hooks", "loop"),
        ("distillation", "influence", "low_rank", "online", "preference", "snapkv"),
    ),
    "data": (
        (
            *(
                "cache",
                "cpu_tensorflow",
                "limited_process",
                "sandbox",
                "pieces",
                "seqio_tasks",
                "task",
            ),
            "tokenizers",
        ),
        (
            "by_beam",
            "counting",
            "data_source",
            "languages",
            "stream",
            "tasks",
            "text",
            "tokenizers.vocabularies",
        ),
        ("rows", "text.user_data", "vision"),
        (
            *("aya23", "aya_expanse", "chats", "code_mix", "distillation", "instructions"),
            *("nexus", "preference", "prompts", "t5"),
        ),
    ),
    "launch": (
        ("cli", "config", "environment", "input_errors", "processes"),
        ("run",),
        ("inference", "load", "plots", "precompile", "predictions", "serve", "submit"),
        ("influence",),
        # Commands that a suite, a sweep or a reproduction runs in its own process.
        (
            *("aya_expanse", "code_mix", "convert", "evaluate", "lm_eval", "low_rank", "merge"),
            *("nexus", "preference", "prepare", "sweep", "upcycle", "weights"),
        ),
        ("report",),
        ("papers",),
    ),
}
# A folder of the level of folders that no level names.
METHODS = {"model": "mov", "trainers": "preference", "data": "preference", "launch": "evaluate"}
# Folders of the papers, and of a method that is none: no file of the core imports or names one. The core are
# the files at the top of each package, and all folders of model and trainers that are not such a folder.
SLUGS = tuple(
    sorted(
        {
            path.name
            for folder in ("launch/papers", "t5x_configs/methods")
            for path in (ROOT / folder).iterdir()
            if path.is_dir()
        }
        - {"__pycache__", "adapters", "averaging", "moe", "shared"}
    )
)
MOST_FROM_OUTSIDE = 9  # imports of modules in these folders by others, those of papers excepted
# `reproduce` and `report` serve any paper by what the papers share.
SHARED = ("claim", "criteria", "page", "results", "scorecard", "sweeps")
CORE_MAY_IMPORT = {f"launch.papers.shared.{name}" for name in SHARED}
# Files of the core that still name a paper, to be mended: what they import or name.
NAMES_A_PAPER = {
    # The error of a run without a method names a folder to choose from.
    "trainers.online.rollouts": {"methods/preference"},
    # A part of TR-DPO that config.gin of earlier runs imports from here.
    "trainers.moving_reference": {"methods/preference"},
    # Examples of commands, which stay.
    "launch.quickstart": {"experiments/code_mix"},
    "launch.sweep.__main__": {"launch/papers/code_mix"},
}


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def path_of(module: str) -> pathlib.Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


@functools.cache
def graph(at_import: bool = False) -> dict[str, set[str]]:
    """The project's modules, and the modules that each imports, inside functions too unless `at_import`."""
    paths = {module_of(path): path for package in PACKAGES for path in files(package)}
    return {
        module: {
            target
            for _, owner, names, _, top in imports(path)
            if top or not at_import
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
        and not module.endswith(".__main__")  # a command, above all
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


def closure(module: str) -> set[str]:
    """The modules of the project that an import of `module` reads, itself included."""
    open_, read = [module], set()
    while open_:
        if (one := open_.pop()) not in read:
            read.add(one)
            open_ += graph(at_import=True)[one]
    return read


def lines(module: str) -> int:
    return len(path_of(module).read_text(encoding="utf-8").splitlines())


def exceeds(size: tuple[int, int], most: tuple[int, int]) -> bool:
    """Whether there are more files or more lines than `most`."""
    return any(one > limit for one, limit in zip(size, most, strict=True))


def beyond(found: dict[str, set[str]], allowed: dict[str, set[str]]) -> dict[str, set[str]]:
    """What was found and is not allowed, by name."""
    more = {name: values - allowed.get(name, set()) for name, values in found.items()}
    return {name: values for name, values in more.items() if values}


def slug_of(module: str) -> str | None:
    """The paper in whose folder a module is."""
    return next((part for part in module.split(".")[:-1] if part in SLUGS), None)


def core() -> list[str]:
    """The files of the core, and the commands."""
    return [
        module
        for module in graph()
        if "__init__" not in module
        and (module.count(".") == 1 or module.split(".")[0] in ("model", "trainers"))
        and slug_of(module) is None
    ]


def papers_named(module: str) -> set[str]:
    """Modules of papers that a core module imports, and their modules and folders that it names in a string."""
    strings = " ".join(
        node.value
        for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    owners, slugs = "|".join((*PACKAGES, "methods", "experiments")), "|".join(SLUGS)
    named = re.findall(rf"\b(?:{owners})(?:[./]\w+)*[./](?:{slugs})\b(?!\.py)", strings)
    named = [name for name in named if name != module]  # a command's help shows itself
    imported = [
        target
        for target in graph()[module] - CORE_MAY_IMPORT
        if slug_of(target) is not None or "papers" in target.split(".")
    ]
    return {*named, *imported}


def test_imports_run_down_only():
    assert upward(graph()) == []


def test_every_module_below_the_commands_has_a_level():
    lost = [m for m in graph() if level(m) is None and "__init__" not in m]
    assert [m for m in lost if m.count(".") > 1 or not m.startswith("launch.")] == []


def test_no_module_imports_itself_through_others():
    assert circles(graph()) == []


def test_the_core_names_no_paper():
    assert beyond({module: papers_named(module) for module in core()}, NAMES_A_PAPER) == {}


def test_what_a_reader_of_a_module_has_to_read_does_not_grow():
    now = {module: closure(module) for module in CLOSURES}
    sizes = {module: (len(read), sum(map(lines, read))) for module, read in now.items()}
    assert {m: size for m, size in sizes.items() if exceeds(size, CLOSURES[m])} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_grows(package):
    paths = [path for path in files(package) if path.name != "__init__.py"]
    size = len(paths), sum(lines(module_of(path)) for path in paths)
    assert not exceeds(size, SIZES[package]), size


def test_papers_are_imported_from_within():
    imported: dict[str, set[str]] = {}
    for module, targets in graph().items():
        slugs = {
            slug for target in targets if (slug := slug_of(target)) not in (None, slug_of(module))
        }
        if slugs and "papers" not in module.split("."):
            imported.setdefault(module.rpartition(".")[0], set()).update(slugs)
    assert beyond(imported, INTO_SLUGS) == {}


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
    attribution = {line for line in found if line.startswith("launch.influence.")}  # influence
    assert len(found - attribution) <= MOST_FROM_OUTSIDE, sorted(found - attribution)


def test_the_checks_of_structure_can_fail():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a -> b -> c -> a"]
    assert upward({"model.linear": {"model.moe.moe"}}) == ["model.linear imports model.moe.moe"]
    assert upward({"launch.run.run_dir": {"launch.train"}}) != []
    assert upward({"model.moe.moe": {"model.linear"}, "launch.train": {"launch.run.phase"}}) == []
    assert exceeds((3, 10), (2, 20)) and exceeds((2, 21), (2, 20)) and not exceeds((2, 20), (2, 20))
    assert beyond({"a": {"x", "y"}, "b": {"x"}}, {"a": {"x"}, "b": {"x", "z"}}) == {"a": {"y"}}
    assert {"trainers.step", "trainers.train_state"} <= closure("trainers.step")


def test_folders_stay_short():
    """A newcomer finds a paper by its folder, not among files."""
    sizes = collections.Counter(
        path.parent.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in files(package)
        if path.name != "__init__.py"
    )
    assert {f: n for f, n in sizes.items() if n > FOLDERS.get(f, FOLDER)} == {}


@pytest.mark.parametrize("package", [*PACKAGES, "t5x_configs", "tests"])
def test_package_markers(package):
    markers = list((ROOT / package).rglob("__init__.py"))
    if package in PACKAGES:
        folders = {path.parent for path in files(package)}
        missing = [str(f) for f in folders if not (f / "__init__.py").exists()]
        assert not missing, f"folders without __init__.py: {missing}"
        written = [str(m.relative_to(ROOT)) for m in markers if m.read_text().strip()]
        assert written == [f"{package}/__init__.py"], "the others stay empty"
    else:
        # They would be installed as top-level packages.
        assert markers == []


@pytest.mark.parametrize("packages", [["model"], ["model", "trainers"]])
def test_what_trains_loads_no_tensorflow(packages):
    modules = [
        ".".join(("espalier", *path.relative_to(ROOT).with_suffix("").parts))
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


def test_training_loads_neither_the_sandbox_nor_what_builds_a_corpus():
    assert "data.sandbox.sandbox_zygote" in closure("data.sandbox.limited_child")
    unwanted = ("data.sandbox.", "data.text.corpus_build", "data.text.dedup")
    assert [m for m in sorted(closure("launch.train")) if m.startswith(unwanted)] == []
