"""Source code: Python of the standard library and packages, C and C++ of packages."""

import pathlib
from collections.abc import Iterator

from data.text.sources import document, environment

# Permissively licensed packages that an installation of this project brings, or often has beside it.
# The list is explicit so that a corpus does not depend on what else happens to be installed.
PYTHON_PACKAGES = (
    "python",
    "absl-py",
    "babel",
    "clu",
    "django",
    "docutils",
    "etils",
    "flax",
    "fonttools",
    "fsspec",
    "gin-config",
    "jax",
    "jinja2",
    "keras",
    "matplotlib",
    "ml_collections",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "pillow",
    "pyarrow",
    "pygments",
    "requests",
    "rich",
    "scipy",
    "seqio",
    "simplejson",
    "sphinx",
    "tensorboardX",
    "tensorflow",
    "tensorflow-datasets",
    "tensorflow-metadata",
    "tensorflow-text",
    "tqdm",
    "treescope",
    "urllib3",
)
# Tables of numbers and message formats that pass the other rules.
SKIPPED_PYTHON = ("python/encodings/", "python/pydoc_data/", "django/conf/locale/", "/_vendor/")

CPP_PACKAGES = ("python", "numpy", "pyarrow", "scipy", "sentencepiece", "tensorflow")
CPP_SUFFIXES = (".h", ".hpp", ".c", ".cc", ".cpp")
# Headers of proprietary toolkits, and copies of the headers of Python.
SKIPPED_CPP = (
    "/third_party/gpus/",
    "/external/cuda_",
    "/external/nvshmem/",
    "/external/local_config_",
    "/external/python_3_",
)
# Written by the protocol-buffer and MLIR compilers.
GENERATED_CPP = (".pb.h", ".pb.cc", ".pb.c", ".upb.h", ".upbdefs.h", ".h.inc", "_pywrap.cc")


def python_candidates(env: environment.Environment) -> Iterator[document.Candidate]:
    """Python modules, whole."""
    for name, path in python_files(env):
        yield candidate(f"python/{name}", name, path)


def cpp_candidates(env: environment.Environment) -> Iterator[document.Candidate]:
    """C and C++ headers and sources, whole; generated ones left out."""
    for package in CPP_PACKAGES:
        for name, path in env.files(package, CPP_SUFFIXES):
            if not name.endswith(GENERATED_CPP) and not any(part in name for part in SKIPPED_CPP):
                yield candidate(f"cpp/{name}", name, path)
    if env.include is not None:
        for name, path in environment.walk(env.include, CPP_SUFFIXES, prefix="python/include"):
            yield candidate(f"cpp/{name}", name, path)


def python_files(env: environment.Environment) -> Iterator[tuple[str, pathlib.Path]]:
    """(name, path) of the Python modules worth reading."""
    for package in PYTHON_PACKAGES:
        for name, path in env.files(package, (".py",)):
            if not any(part in name for part in SKIPPED_PYTHON):
                yield name, path


def candidate(id: str, split_key: str, path: pathlib.Path) -> document.Candidate:
    """A file read as UTF-8 when asked for."""
    return document.Candidate(
        id=id, read=lambda: path.read_bytes().decode("utf-8"), split_key=split_key
    )
