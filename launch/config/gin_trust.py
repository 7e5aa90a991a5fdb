"""The names that a gin file beside a checkpoint may use: an import runs code, and `@f()` calls it.

Such a file may come from anyone, and users only mean to use the model that it describes. It may use this project's
packages, the libraries of its models, and modules that the user's own gin files import.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from gin import config_parser

from launch.config import gin_source

PACKAGES = ("model", "trainers", "data", "launch", "jax", "optax", "seqio")
# Parts of these packages that start processes, unpickle, send, or import by name.
REFUSED = (
    "data.text.user_data.import_mixtures",
    "jax.experimental",
    "jax.tools",
    "launch.bench",
    "launch.benchmarks",
    "launch.cli",
    "launch.environment",
    "launch.config.gin_config",
    "launch.config.gin_reader",
    "launch.cluster",
    "launch.evaluation.harness",
    "launch.evaluation.judges",
    "launch.evaluation.suites",
    "launch.report",
    "launch.run.load_run.config_of",
    "launch.run.run_vocabulary.export_files",
    "launch.run.run_vocabulary.save",
    "launch.run.run_vocabulary.save_files",
    "launch.sweep",
    "launch.sweeping",
    "launch.evaluation.win_rate",
    "seqio.beam_utils",
    "seqio.scripts",
)


@dataclasses.dataclass(frozen=True)
class Trust:
    """The names that an untrusted `file` and its includes may use.

    `modules` are allowed, too: the user's own files import them.
    """

    file: str
    modules: frozenset[str]

    def module_error(self, module: str) -> tuple[str, str] | None:
        """Returns (problem, remedy) of an import before it is executed, or None if it is allowed."""
        return None if self._allowed(module) else self._error("import", module, module)

    def object_error(self, module: str, name: str, value: Any) -> tuple[str, str] | None:
        """Returns (problem, remedy) of a reference to an object, or None if it is allowed.

        A module's imports are its attributes (`checkpoint.os.system`), so the module that defines the object is
        checked too.

        Args:
          module: the imported module.
          name: full name of the object in the file, beginning with the module's name.
          value: the object.
        """
        if name in ("gin.macro", "gin.singleton"):
            return None
        home = getattr(value, "__module__", None)
        is_allowed_module = isinstance(home, str) and _inside(home, (*PACKAGES, *self.modules))
        defined = f"{home}.{getattr(value, '__qualname__', '')}"
        refused = _refused(defined) and not _inside(defined, self.modules)
        if is_allowed_module and not refused and self._allowed(name):
            return None
        return self._error("use", name, module)

    def _allowed(self, name: str) -> bool:
        return _inside(name, self.modules) or _harmless(name)

    def _error(self, verb: str, name: str, module: str) -> tuple[str, str]:
        own = f"import {module} in a gin file of your own that you give too, or "
        return (
            f"a configuration beside a checkpoint may not {verb} '{name}', which could run "
            "anything",
            f"If you know the code, {'' if _inside(module, PACKAGES) else own}give the whole file: "
            f"--gin_file={self.file}",
        )


def trust(
    file: str,
    own_files: Iterable[str],
    search_paths: Sequence[str],
    own_modules: Iterable[str] = (),
) -> Trust | None:
    """Returns the names that `file` may use; None (any name) if it is also one of the user's own files.

    Args:
      file: the untrusted file.
      own_files: the user's files, whose imports are trusted.
      search_paths: folders of relative files.
      own_modules: more modules that the user's own files import.
    """
    if any(gin_source.same(path, file, search_paths) for path in own_files):
        return None
    modules = set(own_modules)
    seen: set[str] = set()
    paths = list(own_files)
    while paths:
        path = paths.pop()
        source = gin_source.find(path, search_paths)
        if source is None or source in seen:
            continue
        seen.add(source)
        try:
            text = gin_source.read(source)
        except (OSError, UnicodeDecodeError):
            continue  # reported when the file itself is read
        for statement in gin_source.parse(text, path):
            if isinstance(statement, config_parser.ImportStatement):
                modules.add(statement.module)
            elif isinstance(statement, config_parser.IncludeStatement):
                paths.append(statement.filename)
    return Trust(file, frozenset(module for module in modules if not _harmless(module)))


def _harmless(name: str) -> bool:
    private = any(part.startswith("_") for part in name.split("."))
    return _inside(name, PACKAGES) and not _refused(name) and not private


def _refused(name: str) -> bool:
    """Returns whether a name is in REFUSED or is a command, which would trust any gin file."""
    return _inside(name, REFUSED) or (name.startswith("launch.") and name.endswith(".main"))


def _inside(name: str, packages: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)
