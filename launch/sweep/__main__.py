"""Runs a sweep: arms x sizes x seeds of one file, with shared parents, as a whole that can be resumed.

Started again, the command skips finished runs, continues stopped ones, and retries failed ones. Results are in
OUT/results.jsonl, a row per finished run. Example: what code does
to a tiny model of bytes, in five arms with two seeds, a few minutes on two cores:

  espalier sweep --sweep launch/papers/code_mix/tiny_sweep.py --out runs/tiny_code_mix

`--out DIR --status` in a second terminal shows its progress. The exit status is 0 when all runs are done, 1 when
some have failed, 2 for an error in the sweep, and 75 when it was stopped: the same command resumes it.
"""

import contextlib
import fnmatch
import functools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from espalier.common import stages
from espalier.launch import cli

if TYPE_CHECKING:
    from espalier.launch.submit.base import Submitter
    from espalier.launch.submit.launch_config import Launch
    from espalier.launch.sweep.folder import Planned, SweepFolder

# Seconds to wait for the runs of a killed sweep to save.
_SAVING_SECONDS = 60.0
_LISTED = 10


def run_sweep(
    *,
    out: pathlib.Path,
    sweep: str | None = None,
    workers: int | None = None,
    minutes: float | None = None,
    memory_gb: float | None = None,
    only: Sequence[str] | None = None,
    dry_run: bool = False,
    status: bool = False,
    rerun_changed: bool = False,
    cluster: str | None = None,
    cluster_setting: Sequence[str] | None = None,
) -> int:
    """Runs or shows a sweep; returns the exit status.

    Args:
      out: the sweep's folder.
      sweep: the sweep, FILE.py or FILE.py:TEXT; TEXT is the argument of its get_config.
      workers: runs at once, each with an equal share of the cores (default 1); on a cluster, its at_once says how many.
      minutes: after these, runs save and stop (status 75).
      memory_gb: peak memory that runs side by side may need.
      only: pattern of names of runs, such as 'text/*' or '*/seed0'; the runs they start from run too; repeatable.
      dry_run: checks and shows the sweep, and runs nothing.
      status: shows the progress of the sweep in --out.
      rerun_changed: moves runs with another configuration to OUT/replaced, and runs them again.
      cluster: launch configuration, such as launch/submit/configs/slurm.py, whose machines execute the runs.
      cluster_setting: NAME=VALUE, which replaces a value of the launch configuration; repeatable.

    Raises:
      ValueError: settings out of range, or a sweep that cannot be run.
    """
    from espalier.launch.submit.local import LocalSubmitter
    from espalier.launch.sweep import check, driver, file, screen
    from espalier.launch.sweep.folder import SweepFolder

    folder = SweepFolder(out.absolute())
    if status:
        _print_status(folder, only)
        return 0
    if not sweep:
        raise ValueError("give --sweep FILE.py, or --status.")
    runs = file.read(sweep)
    submitter: Submitter
    if cluster is None:
        if cluster_setting:
            raise ValueError(f"--cluster_setting {cluster_setting[0]} is of --cluster: give both.")
        workers = 1 if workers is None else workers
        submitter = LocalSubmitter(workers=workers, memory_gb=memory_gb)
        command = functools.partial(_command, folder, sys.executable)
    else:
        if workers is not None:
            raise ValueError(
                f"--workers {workers} is for runs on this machine: set at_once of --cluster, --cluster_setting at_once={workers}."
            )
        settings = _cluster(cluster, cluster_setting or (), memory_gb)
        submitter = settings.submitter()
        command = functools.partial(_command, folder, settings.interpreter)
        workers = len(runs)  # for the estimate of the remaining time
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes {minutes}: give a positive number of minutes.")
    for run in runs:
        if memory_gb is not None and (run.memory_gb or 0) > memory_gb:
            raise ValueError(
                f"{run.name} needs {run.memory_gb} GB by its memory_gb, more than --memory_gb "
                f"{memory_gb}: raise --memory_gb, or exclude the run (--only)."
            )
    plan = check.plan(sweep, runs, folder)
    wanted = _wanted(plan, only)
    if dry_run:
        _show(folder, plan, wanted)
        if cluster is not None:
            driver.submit(folder, plan, submitter, [run.name for run in wanted], command)
            print(f"\n{submitter.preview()}", end="")
        return 0
    with contextlib.closing(folder.lock()):
        if cluster is None:  # runs on a cluster outlive the sweep, which takes them over
            _await_runs(folder, wanted)
        _make_room(folder, plan, wanted, rerun_changed)
        folder.write_plan(sweep, plan)
        # It shows its runs itself: in a log file a line for each change, and one a minute.
        with stages.quiet(), screen.watching(folder.path.name, workers=workers) as watch:
            exit_status = driver.drive(
                folder,
                plan,
                submitter,
                wanted=[planned.name for planned in wanted],
                command=command,
                watch=watch,
                minutes=minutes,
            )
    print(f"results {folder.results}")
    if folder.results.exists() and folder.results.stat().st_size:
        print(f"report  espalier report --sweep {folder.path} --out=DIR")
    return exit_status


def _cluster(file: str, overrides: Sequence[str], memory_gb: float | None) -> "Launch":
    """Returns a launch configuration's settings; raises SubmitError for those that cannot run a sweep."""
    from espalier.launch.submit import launch_config
    from espalier.launch.submit.base import SubmitError

    settings = launch_config.read(file, overrides)
    if memory_gb is not None:
        raise SubmitError(
            "--memory_gb is for the runs of one machine: a cluster has its own limits."
        )
    if not settings.SWEEPS:
        raise SubmitError(
            f"{file}: {settings.BACKEND} cannot run a sweep, whose runs wait for each other in one folder: use SLURM, or this "
            "machine (without --cluster)."
        )
    if settings.processes > 1:
        raise SubmitError(
            f"{file}: a run of a sweep is one process, not {settings.processes}; it uses all devices of a host "
            "(--cluster_setting nodes=1 --cluster_setting tasks_per_node=1)."
        )
    if getattr(settings, "logs", ""):
        raise SubmitError(f"{file}: logs: the logs of a sweep's runs are in --out: remove it.")
    return settings


def _print_status(folder: "SweepFolder", only: Sequence[str] | None) -> None:
    """Prints the states of the runs in the folder, without disturbing a running sweep."""
    from rich.console import Console

    from espalier.launch.sweep import driver, screen

    runs = driver.progress(folder, _wanted(folder.read_plan(), only))
    Console().print(screen.table(folder.path.name, runs))
    if not folder.driven() and any(run.state is not driver.RunState.DONE for run in runs):
        print("The sweep is not running: start it again to resume it.")


def _command(folder: "SweepFolder", python: str, run: str) -> tuple[str, ...]:
    """Returns the words of the command that executes a run."""
    program = (python, "-m", "espalier.launch.sweep.run")
    return (*program, f"--out={folder.path}", f"--run={run}")


def _wanted(plan: "Sequence[Planned]", patterns: Sequence[str] | None) -> "tuple[Planned, ...]":
    """Returns the runs that a pattern matches, and all runs they depend on."""
    if not patterns:
        return tuple(plan)
    names = [planned.name for planned in plan]
    chosen: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            from espalier.common import spelling

            hint = spelling.nearest(pattern, names)
            raise ValueError(f"--only {pattern!r} matches none of the {len(names)} runs; {hint}")
        chosen.update(matched)
    for planned in reversed(plan):  # children come after their parents
        if planned.name in chosen:
            chosen.update(planned.run.above)
    return tuple(planned for planned in plan if planned.name in chosen)


def _await_runs(folder: "SweepFolder", wanted: "Sequence[Planned]") -> None:
    """Waits for runs of a killed sweep that are still saving."""
    until = time.monotonic() + _SAVING_SECONDS
    for planned in wanted:
        if folder.in_use(planned.name):
            print(f"{planned.name}: waiting for another process to end.", flush=True)
        while folder.in_use(planned.name):
            if time.monotonic() > until:
                raise ValueError(
                    f"{folder.directory(planned.name)} is in use by another process. Stop it, "
                    "or exclude the run (--only)."
                )
            time.sleep(0.5)


def _make_room(
    folder: "SweepFolder", plan: "Sequence[Planned]", wanted: "Sequence[Planned]", rerun: bool
) -> None:
    """Raises an error for runs that began with another configuration or, with `rerun`, moves them to `replaced/`."""
    from espalier.launch.sweep import check

    changed = {planned.name: folder.changed(planned) for planned in wanted}
    begun = [planned for planned in wanted if changed[planned.name]]
    if begun and not rerun:
        by_name = {planned.name: planned for planned in plan}
        lines = [
            f"  {p.name}: {check.difference(p, by_name, folder, changed[p.name])}"
            for p in begun[:_LISTED]
        ]
        more = f"\n  and {len(begun) - _LISTED} more" if len(begun) > _LISTED else ""
        raise ValueError(
            f"{len(begun)} runs in {folder.path} have another configuration:\n"
            + "\n".join(lines)
            + f"{more}\nRestore it, use another --out, or repeat them with --rerun_changed."
        )
    for planned in begun:
        folder.set_aside(planned)


def _show(folder: "SweepFolder", plan: "Sequence[Planned]", wanted: "Sequence[Planned]") -> None:
    """Prints the planned runs, and a command for each kind of arm."""
    from rich.console import Console

    from espalier.launch.sweep import check, driver, screen
    from espalier.launch.sweep import run as sweep_run
    from espalier.launch.sweep.parts import command_line

    chosen = {planned.name for planned in wanted}
    runs = [run for run in driver.progress(folder, plan) if run.planned.name in chosen]
    Console().print(screen.table(folder.path.name, runs))
    by_name = {planned.name: planned for planned in plan}
    kinds = {planned.run.kind: planned for planned in reversed(wanted)}
    for planned in reversed(kinds.values()):
        run = planned.run
        if run.made:
            command = sweep_run.made_command(folder, run, by_name)
            print(f"\n{run.name}: made\n  {command_line(command)}")
            continue
        start = folder.model_dir(by_name[run.parent].run) if run.parent else None
        bindings = check.bindings_of(run, folder, start, folder.sources(run, by_name))
        words = [
            *(f"--gin_file={name}" for name in run.gin_files),
            *(f"--gin.{binding}" for binding in bindings),
        ]
        steps = (planned.total_steps or 0) - (planned.first_step or 0)
        print(f"\n{run.name}: {f'{steps:,}' if steps > 0 else 'data-dependent'} steps")
        print(f"  espalier train {command_line(words)}")
    changed = [planned.name for planned in wanted if folder.changed(planned)]
    if changed:
        print(f"\nwith another configuration than in {folder.path}: {', '.join(changed)}")


main = cli.command(__doc__, "sweep", run_sweep, huge_pages=False)

if __name__ == "__main__":
    raise SystemExit(main())
