"""A launch script for XManager: one experiment from a file that `espalier submit` wrote.

It imports nothing of this project, because XManager may live in an environment of its own:

  xmanager launch launch/submit/xmanager_script.py -- --job=/tmp/run/logs/log.txt.xm.json
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

_JOB = flags.DEFINE_string("job", None, "file with the job", required=True)


def main(argv: Sequence[str]) -> None:
    """Runs the experiment; ends with the exit status of the job, where the executor tells it."""
    del argv
    try:
        from xmanager import xm, xm_local
    except ImportError as error:
        print(
            f"error: xmanager cannot be imported here ({error}): install the extra 'xmanager', in an environment of its "
            "own if you like, and give --config.xmanager_python=PATH.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    job = json.loads(pathlib.Path(_JOB.value).read_bytes())
    executor = executor_of(job, xm, xm_local)
    if job["executor"] == "local":
        os.chdir(job["folder"])
    try:
        with contextlib.ExitStack() as stack:
            with _alone():
                created = xm_local.create_experiment(experiment_title=job["title"])
                experiment = stack.enter_context(created)
            packageable = xm.Packageable(
                executable_spec=specification(job, xm), executor_spec=executor.Spec()
            )
            [executable] = experiment.package([packageable])
            experiment.add(
                xm.Job(
                    executable=executable,
                    executor=executor,
                    args=job["arguments"],  # quoted by XManager where there is a shell
                    env_vars=job["environment"],
                )
            )
    except RuntimeError as error:
        if code := re.search(r"non-zero code: (-?\d+)", str(error)):
            raise SystemExit(int(code[1])) from None
        raise


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Context manager: no other such script is in it, because two cannot make XManager's database at once."""
    folder = pathlib.Path.home() / ".xmanager"
    folder.mkdir(exist_ok=True)
    with open(folder / ".espalier.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def executor_of(job: dict[str, Any], xm: Any, xm_local: Any) -> Any:
    """Returns the executor of a job with what it asks for."""
    requirements = xm.JobRequirements(**job["requirements"])
    if job["executor"] == "vertex":
        return xm_local.Vertex(requirements=requirements)
    if job["executor"] == "kubernetes":
        return xm_local.Kubernetes(requirements=requirements)
    return xm_local.Local(requirements=requirements)


def specification(job: dict[str, Any], xm: Any) -> Any:
    """Returns what is executed: this machine's Python, or the image."""
    if job["executor"] == "local":
        return xm.Binary(path=job["program"])
    return xm.Container(image_path=job["image"])


if __name__ == "__main__":
    app.run(main)
