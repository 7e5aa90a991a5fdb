"""The model of another run, as a teacher or reference: any run will do, whatever its architecture.

A run's config.gin says all of its model. It may be anyone's, so it may name only what is harmless
(launch/config/gin_trust.py) and what this run's own files import.
"""

from typing import Any

import gin

from launch.config import gin_reader, gin_source
from launch.config.gin_config import ConfigError
from launch.config.isolated import Isolated
from launch.run import load_run
from trainers.checkpoints import step_dir

MODEL = "MODEL"


def model(*, run: str | None, macro: str) -> Any:
    """Returns the linen module that RUN/config.gin describes; bindings of this run do not reach it.

    Args:
      run: run directory or one of its step directories.
      macro: name of the setting that `run` comes from, for messages.

    Raises:
      ValueError: no run, one without config.gin, or one whose config.gin is not that of a model.
      ConfigError: its config.gin has errors, or names what could run anything.
    """
    if run is None:
        raise ValueError(f"{macro} is None: set it to the directory of a run, --gin.{macro}=RUN.")
    try:
        step = step_dir.resolve(run)
    except FileNotFoundError as error:
        raise ValueError(f"{macro} = {run} is not a run with checkpoints: {error}") from error
    path = load_run.config_file(step)
    if path is None:
        raise ValueError(
            f"{macro} = {run} has no {load_run.CONFIG} beside its checkpoints, so its model is unknown: give the "
            "directory of a run, or put the file back."
        )
    reader = gin_reader.Reader(())
    reader.read_untrusted(path, (), modules=_own_modules())
    if problems := reader.refused or reader.checked.problems:
        raise ConfigError(problems)
    configuration = Isolated(reader.checked)
    try:
        return configuration.macro(MODEL)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{macro} = {run}: {path} does not describe a model: {error}.") from error


def _own_modules() -> list[str]:
    """Modules that the configuration of this process imports, all of which were trusted when it was loaded."""
    statements = gin_source.parse(gin.config_str(), "")
    return [s.module for s in statements if hasattr(s, "module") and hasattr(s, "is_from")]
