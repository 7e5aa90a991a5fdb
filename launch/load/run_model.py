"""The model of another run, as a teacher or reference; its architecture may differ from this run's.

The other run's model.json describes its model completely (launch/config/model_file.py). It is data, so nothing that its
author named is run, except classes of modules that this run's own files import.
"""

import os
from typing import Any

from espalier.launch.config import build, gin_config, gin_reader, model_file
from espalier.launch.config.gin_config import ConfigError
from espalier.launch.load import load_run
from espalier.trainers.checkpoints import step_dir


def model(*, run: str | None, macro: str) -> Any:
    """Returns the linen module described by RUN/model.json; this run's bindings do not apply to it.

    Args:
      run: run directory or one of its step directories.
      macro: macro with the path `run`, for messages.

    Raises:
      ValueError: `run` is None, has no model.json, or its model.json does not describe a model.
      ConfigError: its model.json is damaged, or names code that this run's files do not import.
    """
    if run is None:
        raise ValueError(f"{macro} is None: set it to the directory of a run, --gin.{macro}=RUN.")
    try:
        step = step_dir.resolve(run)
    except FileNotFoundError as error:
        raise ValueError(f"{macro} = {run} is not a run with checkpoints: {error}") from error
    path = load_run.file_of_run(step, model_file.NAME)
    if path is None:
        raise ValueError(
            f"{macro} = {run} has no {model_file.NAME} beside its checkpoints, so its model is unknown: give the "
            "directory of a run, or put the file back."
        )
    return of_file(path, f"{macro} = {run}")


def of_checkpoint(checkpoint: str, *, macro: str) -> Any:
    """Returns the linen module of a run, or of a Hugging Face directory; see `model`."""
    from espalier.launch.load import hf_checkpoint

    if not hf_checkpoint.is_hf(checkpoint):
        return model(run=checkpoint, macro=macro)
    folder, _ = hf_checkpoint.recorded(checkpoint)
    return of_file(os.path.join(folder, model_file.NAME), f"{macro} = {checkpoint}")


def of_file(path: str, where: str) -> Any:
    """Returns the linen module that a model.json describes; see `model`. `where` names its run in errors.

    Raises:
      ValueError: it does not describe a model.
      ConfigError: it is damaged, or names code that this run's files do not import.
    """
    running = build.running()  # whose modules were trusted when it was loaded
    reader = gin_reader.Reader(own_modules=running.modules if running else ())
    reader.read_file(path)
    problems = [reader.refused] if reader.refused else reader.checked.problems
    if problems := problems or list(gin_config.mistyped(reader.checked)):
        raise ConfigError(problems)
    configuration = build.Configuration(reader.checked, shows_bindings=True)
    try:
        return configuration.macro(model_file.MODEL)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {path} does not describe a model: {error}.") from error
