"""Which source files and installed packages a program may depend on."""

import functools
import hashlib
import os
import pathlib
import sys
import sysconfig
from collections.abc import Iterator

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# TensorFlow writes its form of the functions of a data pipeline under random names; no program of jax calls them.
_OF_TENSORFLOW = "__autograph_generated_file"
OWN = ("espalier", "model", "trainers", "data", "launch")


@functools.cache
def own_digest(root: pathlib.Path = _ROOT) -> str:
    """Returns the digest of all Python files of this project, read once per process."""
    digest = hashlib.sha256()
    for package in OWN:
        for path in sorted((root / package).rglob("*.py")):
            _add(digest, path.relative_to(root).as_posix(), path.read_bytes())
    return digest.hexdigest()


def other_digest() -> str:
    """Returns the digest of the loaded source files that are neither this project's, nor Python's, nor installed."""
    digest = hashlib.sha256()
    for name, path in sorted(_other_files()):
        try:
            _add(digest, name, pathlib.Path(path).read_bytes())
        except OSError:
            _add(digest, name, b"missing")
    return digest.hexdigest()


@functools.cache
def installed() -> tuple[str, ...]:
    """Returns names with versions of all installed distributions, as pip's folders have them."""
    names: set[str] = set()
    for folder in map(pathlib.Path, sys.path):
        if folder.is_dir():
            names |= {n for n in os.listdir(folder) if n.endswith((".dist-info", ".egg-info"))}
    return tuple(sorted(names))


def has_file(module: str) -> bool:
    """Returns whether a loaded module was read from a file, which one of the digests covers."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and os.path.isfile(file)


def is_python(module: str) -> bool:
    """Returns whether a loaded module was read from a file of Python source."""
    return has_file(module) and str(sys.modules[module].__file__).endswith(".py")


def is_own(module: str) -> bool:
    """Returns whether a module belongs to this project."""
    return module.partition(".")[0] in OWN and has_file(module)


def is_installed(module: str) -> bool:
    """Returns whether a loaded module is Python's or of an installed distribution, which its version determines."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module.partition(".")[0] in sys.stdlib_module_names and module != "__main__"
    return os.path.abspath(file).startswith(_installed_folders())


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    chosen = {sysconfig.get_paths()[name] for name in names}
    chosen |= {path for path in sys.path if path.endswith("-packages")}
    return tuple(os.path.join(os.path.abspath(path), "") for path in sorted(chosen))


def _other_files() -> Iterator[tuple[str, str]]:
    own = tuple(os.path.join(str(_ROOT / package), "") for package in OWN)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.startswith(_OF_TENSORFLOW):
            continue
        if isinstance(file, str) and not os.path.abspath(file).startswith(
            (*own, *_installed_folders())
        ):
            yield name, file


def _add(digest: "hashlib._Hash", name: str, data: bytes) -> None:
    digest.update(f"{name}\0{len(data)}\0".encode())
    digest.update(data)
