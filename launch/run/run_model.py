"""The model of another run, as a teacher or reference; its architecture may differ from this run's.

The other run's config.gin describes its model completely. It is not trusted, so it may use only harmless names
(launch/config/gin_trust.py) and modules that this run's own files import.
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
    """Returns the linen module described by RUN/config.gin; this run's bindings do not apply to it.

    Args:
      run: run directory or one of its step directories.
      macro: macro with the path `run`, for messages.

    Raises:
      ValueError: `run` is None, has no config.gin, or its config.gin does not describe a model.
      ConfigError: its config.gin has errors, or uses names that are not harmless.
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
    """Returns the modules that the configuration of this process imports; all were trusted when it was loaded."""
    statements = gin_source.parse(gin.config_str(), "")
    return [s.module for s in statements if hasattr(s, "module") and hasattr(s, "is_from")]
