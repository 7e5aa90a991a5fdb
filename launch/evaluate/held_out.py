"""Held-out loss, perplexity and bits per byte of a checkpoint, for each task of its run.

Example, after a run in /tmp/espalier_tiny (see espalier train --help):

  espalier evaluate loss --checkpoint=/tmp/espalier_tiny --trust_config --json=/tmp/eval.json

The tasks are in the run's config.gin, and reading it calls the functions that it names, hence --trust_config. --gin_file
and --gin.NAME=VALUE change it, such as --gin.MIXTURE_OR_TASK_NAME for other tasks or --gin.MESH for other devices. A Hugging
Face directory has no data: --gin_file=RUN/config.gin takes those of a run with its vocabulary, whose model is not used.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espalier.common.ranges import Size
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.inference import row_files
from espalier.launch.load import load_run

if TYPE_CHECKING:
    from espalier.trainers.evaluate import EvalStream

GIN = "t5x_configs/runs/evaluate.gin"
_FLAGS = ("tasks", "max_batches", "json")
_COLUMNS = ("loss", "perplexity", "bits_per_byte", "tokens")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = load_run.add_flags(parser)
    load_run.add_trust_flag(group)
    setting_flags.add(group, evaluate, names=_FLAGS)


def _run(start: cli.Start) -> None:
    row_files.check_output(getattr(start.flags, "json", None), "json")
    start(**dict.fromkeys(_FLAGS) | setting_flags.given(start.flags, evaluate))


def evaluate(
    *,
    recipe: Any,
    register: Sequence[Callable[[], Any]],
    stream: Callable[..., Any],
    mixture_or_task_name: str,
    checkpoint: str = "",
    params: str = "auto",
    tasks: setting_flags.Names | None = None,
    max_batches: Size | None = None,
    json: setting_flags.File | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates a checkpoint on held-out splits and prints a table.

    Args:
      recipe: the `Recipe` of the checkpoint's run; a Hugging Face directory has a model of its own.
      register: functions that register tasks.
      stream: opens the held-out split of a task; called with (task=).
      mixture_or_task_name: the mixture whose tasks are evaluated.
      checkpoint: step or run directory.
      params: see launch/load/load_run.py.
      tasks: names of tasks to evaluate instead of those of MIXTURE_OR_TASK_NAME.
      max_batches: maximum batches per task; None for whole splits.
      json: also write the results to this JSON file; NaN and infinities as in metrics.jsonl.

    Returns:
      Metrics by task.

    Raises:
      LoadError: the data's vocabulary is not the checkpoint's.
    """
    import jax

    from espalier.launch.load import hf_checkpoint, run_model
    from espalier.trainers import evaluate as evaluation
    from espalier.trainers import partitioning
    from espalier.trainers.telemetry import metric_writers

    if hf_checkpoint.is_hf(checkpoint):
        model = run_model.of_checkpoint(checkpoint, macro="checkpoint")
        recipe = dataclasses.replace(recipe, model=model)
    program = recipe.program()
    values, meta = load_run.restore(
        checkpoint, recipe.model, program.abstract_state.params, params=params
    )
    streams = open_streams(stream, register, tasks, mixture_or_task_name)
    for opened in streams:
        check_vocabulary(opened, meta, checkpoint)
    step = program.steps(0).evaluate
    with partitioning.use_mesh(program.mesh, program.rules):
        results = {
            opened.name: evaluation.evaluate(
                step, values, opened, program.batch_sharding, max_steps=max_batches
            )
            for opened in streams
        }
    if jax.process_index() == 0:
        print(_table(results))
        if json:
            document = {
                "checkpoint": os.path.abspath(checkpoint),
                "params": params,
                "max_batches": max_batches,
                "tasks": metric_writers.jsonable(results),
            }
            row_files.write_json(json, document)
    return results


def open_streams(
    stream: Callable[..., Any],
    register: Sequence[Callable[[], Any]],
    tasks: Sequence[str] | None,
    mixture_or_task_name: str,
) -> "Sequence[EvalStream]":
    """Returns the held-out splits of tasks, or of a mixture's tasks.

    Args:
      stream: opens the split of one task, called with (task=).
      register: functions that register SeqIO tasks.
      tasks: names; None for the tasks of `mixture_or_task_name`.
      mixture_or_task_name: a registered name.

    Raises:
      ValueError: no task has a held-out split.
    """
    from espalier.data.stream import mixing
    from espalier.data.stream.stream import held_out

    for call in register:
        call()
    names = tasks or [task.name for task in mixing.find_tasks(mixture_or_task_name)[0]]
    if not (streams := held_out(stream, names)):
        raise ValueError(f"None of the tasks {', '.join(names)} has held-out data.")
    return streams


def check_vocabulary(stream: "EvalStream", meta: Mapping[str, Any], checkpoint: str) -> None:
    """Raises LoadError if held-out data have another vocabulary than the checkpoint with these facts."""
    trained = meta.get("vocabulary")
    if trained is not None and stream.summary()["vocabulary"]["digest"] != trained:
        raise load_run.LoadError(
            f"The task {stream.name!r} has another vocabulary than the checkpoint {checkpoint}. Use the "
            "run's own: do not set VOCABULARY."
        )


def _table(results: Mapping[str, Mapping[str, float]]) -> str:
    width = max(map(len, (*results, "task")))
    lines = [f"{'task':{width}}" + "".join(f"{name:>15}" for name in _COLUMNS)]
    for task, values in results.items():
        cells = [_cell(name, values.get(name)) for name in _COLUMNS]
        lines.append(f"{task:{width}}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if name == "tokens" else f"{value:.4f}"


main = load_run.trusting_command(
    __doc__,
    "evaluate loss",
    _run,
    _add_flags,
    entry="espalier.launch.evaluate.held_out:evaluate",
    own=GIN,
)

if __name__ == "__main__":
    raise SystemExit(main())
