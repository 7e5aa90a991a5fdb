"""A run that is not trained: a command makes it of other runs, such as launch.upcycle a mixture of branches."""

import contextlib
import shlex
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from launch.cluster import worker
from launch.sweeping import words
from launch.sweeping.file import Run
from launch.sweeping.folder import Planned, SweepFolder


class MadeError(ValueError):
    """A command has not made what it should."""


def command(folder: SweepFolder, run: Run, plan: Mapping[str, Planned]) -> tuple[str, ...]:
    """The words of the command that makes a run.

    Args:
      folder: of the sweep.
      run: that is made.
      plan: by name, the runs that it is made of among them.
    """
    places = {**folder.sources(run, plan), "run": str(folder.model_dir(run))}
    return words.filled(run.made, {**places, "python": sys.executable})


def make(folder: SweepFolder, entry: Planned, plan: Mapping[str, Planned]) -> dict[str, Any]:
    """Makes a run, anew after a stop; returns what the results say of it.

    Raises:
      SweepFolderError: what it is made of is not there, or another process makes it.
      MadeError: nothing was made.
      SystemExit: the command failed; the last error of the log is its own.
    """
    from trainers.checkpoints import step_dir

    for name in entry.run.above:
        folder.final_outcome(plan[name])
    target = folder.model_dir(entry.run)
    given = command(folder, entry.run, plan)
    with contextlib.closing(folder.lock_run(entry.name)):
        # The half of an earlier attempt.
        if target.is_file():
            target.unlink()
        shutil.rmtree(target, ignore_errors=True)
        print(shlex.join(given), flush=True)
        if (status := worker.run(given)) != 0:
            raise SystemExit(status)
    if not target.exists():
        raise MadeError(
            f"{entry.name}: its command ended well, but there is no {target}: let it make what {{run}} names."
        )
    # What holds no checkpoint, such as a file of embeddings, is for the commands of other made runs.
    steps = step_dir.complete_steps(step_dir.absolute(target / step_dir.CHECKPOINTS))
    checkpoint = target / step_dir.CHECKPOINTS / steps[max(steps)].name if steps else None
    return {
        "step": max(steps, default=0),
        "checkpoint": str(checkpoint.relative_to(folder.path)) if checkpoint else None,
        "held_out": {},
        "tokens": 0,
        "epochs": {},
    }
