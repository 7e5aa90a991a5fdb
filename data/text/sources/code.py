"""Python of the standard library and packages, its docstrings as prose, and C and C++ of packages."""

import ast
import functools
import pathlib
import warnings
from collections.abc import Iterator

from espalier.data.text.sources import environment

# Permissively licensed packages that this project installs, or that are often installed beside it.
# The list is explicit, so that a corpus does not depend on other installed packages.
PYTHON_PACKAGES = (
    *("python", "absl-py", "babel", "clu", "django", "docutils", "etils", "flax", "fonttools"),
    *("fsspec", "gin-config", "jax", "jinja2", "keras", "matplotlib", "ml_collections", "numpy"),
    *("optax", "orbax-checkpoint", "pillow", "pyarrow", "pygments", "requests", "rich", "scipy"),
    *("seqio", "simplejson", "sphinx", "tensorboardX", "tensorflow", "tensorflow-datasets"),
    *("tensorflow-metadata", "tensorflow-text", "tqdm", "treescope", "urllib3"),
)
# Tables of numbers and message formats that pass the other rules.
SKIPPED_PYTHON = ("python/encodings/", "python/pydoc_data/", "django/conf/locale/", "/_vendor/")

CPP_PACKAGES = ("python", "numpy", "pyarrow", "scipy", "sentencepiece", "tensorflow")
CPP_SUFFIXES = (".h", ".hpp", ".c", ".cc", ".cpp")
# Headers of proprietary toolkits, and copies of the headers of Python.
SKIPPED_CPP = (
    *("/third_party/gpus/", "/external/cuda_", "/external/nvshmem/", "/external/local_config_"),
    "/external/python_3_",
)
# Written by the protocol-buffer and MLIR compilers.
GENERATED_CPP = (".pb.h", ".pb.cc", ".pb.c", ".upb.h", ".upbdefs.h", ".h.inc", "_pywrap.cc")
MIN_DOCSTRING = 40  # characters; shorter docstrings only repeat a name


def python_candidates(env: environment.Environment) -> Iterator[environment.Candidate]:
    """Yields Python modules, each as a whole document."""
    for name, path in python_files(env):
        yield candidate(f"python/{name}", name, path)


def cpp_candidates(env: environment.Environment) -> Iterator[environment.Candidate]:
    """Yields C and C++ headers and sources that are not generated, each as a whole document."""
    for package in CPP_PACKAGES:
        for name, path in env.files(package, CPP_SUFFIXES):
            if not name.endswith(GENERATED_CPP) and not any(part in name for part in SKIPPED_CPP):
                yield candidate(f"cpp/{name}", name, path)
    if env.include is not None:
        for name, path in environment.walk(env.include, CPP_SUFFIXES, prefix="python/include"):
            yield candidate(f"cpp/{name}", name, path)


def python_files(env: environment.Environment) -> Iterator[tuple[str, pathlib.Path]]:
    """Yields (name, path) of the Python modules that are not in `SKIPPED_PYTHON`."""
    for package in PYTHON_PACKAGES:
        for name, path in env.files(package, (".py",)):
            if not any(part in name for part in SKIPPED_PYTHON):
                yield name, path


def candidate(id: str, split_key: str, path: pathlib.Path) -> environment.Candidate:
    """Returns a candidate whose text is a UTF-8 file, read on demand."""
    return environment.Candidate(
        id=id, read=lambda: path.read_bytes().decode("utf-8"), split_key=split_key
    )


def docstring_candidates(env: environment.Environment) -> Iterator[environment.Candidate]:
    """Yields one document per module; its text is empty if the module has no docstrings."""
    for name, path in python_files(env):
        read = functools.partial(_docstrings, name, path)
        yield environment.Candidate(id=f"docstrings/{name}", read=read, split_key=name)


def _docstrings(name: str, path: pathlib.Path) -> str:
    text = path.read_bytes().decode("utf-8")
    if '"""' not in text and "'''" not in text:  # parsing is slow
        return ""
    module = name.removeprefix("python/").removesuffix(".py").removesuffix("/__init__")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in packages
            tree = ast.parse(text)
    except SyntaxError:  # written for another version of Python
        return ""
    return "\n\n".join(_sections(tree, module.replace("/", ".")))


def _sections(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    """Yields the docstrings of a definition and its nested definitions, each under its full name."""
    docstring = ast.get_docstring(node)
    if docstring and len(docstring) >= MIN_DOCSTRING:
        yield f"{name}\n\n{docstring}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _sections(child, f"{name}.{child.name}")
