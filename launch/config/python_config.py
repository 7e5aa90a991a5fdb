"""Loads ml_collections configurations from Python files with a function `get_config()` or `get_config(text)`."""

import importlib.util
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class PythonConfigError(ValueError):
    """A file does not return a configuration."""


def load(file: str, text: str = "") -> "ConfigDict":
    """Returns what a file's `get_config` returns, called with the text unless that is empty.

    Raises:
      PythonConfigError: the file is no Python file, raises an error, or returns something else.
    """
    import ml_collections

    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise PythonConfigError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*([text] if text else []))
    except (Exception, SystemExit) as error:  # the file's code may raise any error
        raise PythonConfigError(
            f"get_config() could not be called: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise PythonConfigError(
            f"get_config() returned {type(config).__name__}; return ml_collections.ConfigDict."
        )
    return config
