"""Trains a model as gin configures it; started again, it continues where it stopped.

Example: a tiny model on the Python standard library's own sources, one minute on a laptop:

  espalier train \\
    --gin_file=t5x_configs/models/tiny.gin --gin_file=t5x_configs/data/bytes.gin \\
    --gin_file=t5x_configs/runs/pretrain.gin \\
    --gin.MODEL_DIR=/tmp/espalier_tiny --gin.MIXTURE_OR_TASK_NAME=python --gin.TRAIN_STEPS=50

SIGTERM saves and ends the run with status 75 (EX_TEMPFAIL): the same command continues it. The status
is 0 when the run is done and 2 for an error in the configuration or the data.
"""

if __name__ == "__main__":
    from espalier.launch import cli

    raise SystemExit(cli.main(__doc__, entry="espalier.launch.train:train"))

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from espalier.common.ranges import Positive, Size, Tokens
from espalier.launch.config import build
from espalier.launch.processes import hosts, peers
from espalier.launch.run import model_record, phase, resolved, run_dir, run_messages
from espalier.launch.run.resolved import ResolvedRun
from espalier.trainers import partitioning, signals
from espalier.trainers.batches import Feed, Prefetcher, TrainStream
from espalier.trainers.checkpoints import agreement
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.initial import NEW_PARAMETERS, InitialCheckpoint
from espalier.trainers.checkpoints.restore import Restored
from espalier.trainers.evaluate import EvalStream, Evaluation
from espalier.trainers.hooks import FeedFactory, HookFactory, RunContext, checked
from espalier.trainers.loop import Loop, Outputs, Schedule
from espalier.trainers.recipe import Program, Recipe
from espalier.trainers.telemetry import metric_writers, profiler
from espalier.trainers.telemetry.goodput import Goodput, process_start
from espalier.trainers.telemetry.lifetime import FILE, Lifetime, Unrecorded


def train(
    *,
    recipe: Recipe,
    model_dir: str,
    stream: Callable[..., TrainStream],
    total_steps: Size | None = None,
    total_tokens: Tokens | None = None,
    total_epochs: Positive | None = None,
    tasks: Sequence[Callable[[], Any]] = (),
    eval_stream: Callable[..., EvalStream] | None = None,
    eval_tasks: Sequence[str] | None = None,
    eval_period: Size = 1000,
    eval_steps: Size | None = None,
    checkpoint_period: Size = 1000,
    checkpointer: Callable[..., Checkpointer] = Checkpointer,
    initial: InitialCheckpoint = NEW_PARAMETERS,
    log_period: Size = 10,
    step_timeout: Positive | None = 600.0,
    writers: Sequence[Callable[[], metric_writers.MetricWriter]] = (),
    profile: profiler.ProfilerWindow | None = None,
    hooks: Sequence[HookFactory] = (),
    rollouts: FeedFactory | None = None,
    started: float | None = None,
) -> dict[str, float]:
    """Trains `recipe` on `stream` up to `total_steps` updates.

    Args:
      recipe: model, objective, optimiser, mesh.
      model_dir: the run's directory; an interrupted run continues from its newest undamaged checkpoint.
      stream: opens the training data; called with (positions=) to continue at the position where another run stopped.
      total_steps: total updates, including those of earlier starts of this run.
      total_tokens: instead of total_steps: total loss-bearing tokens (or images).
      total_epochs: instead of total_steps: how often the data are read.
      tasks: functions that register SeqIO tasks.
      eval_stream: opens the held-out split of a task; called with (task=).
      eval_tasks: tasks to evaluate; None for the sources of the training stream.
      eval_period: updates between evaluations; the last update is always followed by one.
      eval_steps: batches per task; None for whole splits.
      checkpoint_period: updates between checkpoints; the last update is always saved.
      checkpointer: factory, called with the directory.
      initial: the start of a run without checkpoints of its own.
      log_period: updates per row of metrics.
      step_timeout: seconds without progress after which Python's stacks are written to standard error; the run goes on.
      writers: factories of further metric writers; called only in the process that writes, after all checks.
      profile: a window of steps to profile.
      hooks: factories of further hooks, called with (run=), a trainers.hooks.RunContext.
      rollouts: makes the batches of a run that trains on its own samples, from a stream of prompts;
        called with (stream=, program=, folder=), see trainers.hooks.FeedFactory.
      started: value of time.monotonic at which the run's time begins; None for the start of this process.

    Returns:
      The last evaluation, and 'interrupted' = 1.0 if a signal ended the run early (status 75 of the command).

    Raises:
      ValueError: a configuration, mesh, data or run directory that does not match the run.
      AnomalousStepError: the loss policy ended the run.
    """
    goodput = Goodput(started=process_start() if started is None else started)
    # All checks that need no data come before any data are opened.
    if (total_steps, total_tokens, total_epochs).count(None) != 2:
        raise ValueError(
            f"TRAIN_STEPS = {total_steps} and TRAIN_TOKENS = {total_tokens} and TRAIN_EPOCHS = {total_epochs}: set "
            "one of them, and the others to None."
        )
    initial.check()
    program = recipe.program()
    resolved.check(program)
    with contextlib.ExitStack() as stack:
        primary = jax.process_index() == 0
        folder = run_dir.prepare(model_dir, _config_text(program), writer=primary)
        stack.enter_context(contextlib.closing(folder))
        peers.note_run(folder.address)
        life = None
        if primary:
            write = functools.partial(folder.write_through, FILE)
            life = stack.enter_context(Lifetime(folder.file(FILE), write, goodput))
        hosts.check_shared(folder.address)
        with goodput.measure("data"):
            run = resolved.resolve(
                program,
                parent=phase.find_parent(folder.checkpoints, initial),
                checkpoints=folder.checkpoints,
                stream=stream,
                tasks=tasks,
                eval_stream=eval_stream,
                eval_tasks=eval_tasks,
                total_steps=total_steps,
                total_tokens=total_tokens,
                total_epochs=total_epochs,
                of_prompts=rollouts is not None,
            )
        run_messages.describe(run, folder)
        if primary:
            run_messages.announce(run)

        program = run.program
        stack.enter_context(partitioning.use_mesh(program.mesh, program.rules))
        stop = stack.enter_context(signals.StopRequest())
        steps = program.steps(len(run.stream.source_names))
        saver = stack.enter_context(contextlib.closing(checkpointer(folder.checkpoints)))
        feed: Feed = Prefetcher(run.stream, program.batch_sharding)
        if rollouts is not None:
            feed = rollouts(stream=run.stream, program=program, folder=folder.file("rollouts"))
        # 'compile' counts only the time that remains after the state is restored.
        with (
            goodput.measure("compile"),
            program.compiling(steps.train, feed.abstract()),
            goodput.measure("restore"),
        ):
            start, meta = resolved.restore_start(run, saver, initial)
        recorded = _last_row(folder) if primary else 0
        rows = (
            stack.enter_context(contextlib.closing(_open_rows(folder, start))) if primary else None
        )
        steps_of_rows = {start.step, *saver.all_steps()}
        saved = agreement.gather(_rows_of(folder, steps_of_rows) if primary else [])[0]
        for step, row in saved:
            saver.note(step, row)
        written = [row for step, row in saved if step == start.step]
        writer = _open_writers(folder, start.step, rows, written, writers)
        stack.enter_context(contextlib.closing(writer))
        if life is not None:
            life.goes_on_from(start.step, of_run=start.source == "run", recorded=recorded)
            run_messages.announce_start(run, start, life.starts)

        context = RunContext(
            path=folder.path,
            writer=primary,
            step=start.step,
            program=program,
            learning_rate=run.learning_rate,
            should_stop=stop.requested,
        )
        evaluation = Evaluation(
            every=eval_period,
            eval_step=steps.evaluate,
            streams=run.eval_streams,
            sharding=program.batch_sharding,
            max_steps=eval_steps,
            stop=stop.requested,
            unit=run.loss_per,
        )
        evaluations = [evaluation] if run.eval_streams else []
        if profile is not None and profile.directory is None:
            profile.directory = folder.file("profile")
        loop = Loop(
            start=start,
            train_step=steps.train,
            abstract_state=program.abstract_state,
            stream=run.stream,
            feed=feed,
            schedule=Schedule(
                total_steps=run.total_steps,
                log_period=log_period,
                checkpoint_period=checkpoint_period,
                step_timeout=step_timeout,
            ),
            outputs=Outputs(
                folder=folder.path,
                writer=writer,
                checkpointer=saver,
                goodput=goodput,
                profiler=profile,
                row_metrics=run.row_metrics,
                checkpoint_meta=_checkpoint_meta(run, meta, writer, folder),
                life=life or Unrecorded(),
                unit=run.unit,
            ),
            hooks=(*evaluations, *(checked(make(run=context)) for make in hooks)),
            written={name for row in written for name in row},
            anomaly=program.recipe.anomaly,
            stop=stop,
        )
        # Everything that is configured has been called by now, except functions that hooks call.
        folder.write("operative_config.gin", _operative_text())
        loop.run()
        folder.write("operative_config.gin", _operative_text())
        of_life = life.ends(interrupted=loop.interrupted) if life is not None else ""
    last = evaluation.results.get(loop.step, {})
    if primary:
        # A run that was done already has evaluated its last step in an earlier start.
        earlier = (
            {k: v for row in written for k, v in row.items()} if loop.step == start.step else {}
        )
        run_messages.summarise(folder.address, loop, run, {**earlier, **last}, of_life)
    return {**last, "interrupted": float(loop.interrupted)}


def _config_text(program: Program) -> str:
    """Returns the configuration to record, whose model has the dtype of this run's checkpoints: no reader rounds them."""
    running = build.running()
    text, model = running.text if running else "", program.recipe.model
    if program.widened and hasattr(model.config, "param_dtype"):
        text = model_record.with_param_dtype(text, model, "float32")
    return text


def _operative_text() -> str:
    """Returns the bindings that the run has used so far, and the defaults of what it has called."""
    running = build.running()
    return running.operative_text() if running else ""


def _open_rows(folder: run_dir.RunDir, start: Restored) -> metric_writers.JsonlWriter:
    """Opens metrics.jsonl with the rows that belong to the state that the run starts from."""
    if start.source != "run":
        return metric_writers.JsonlWriter(folder.metrics, marks=())
    # Checkpoints of earlier versions have no marks.
    marks = start.meta.get(metric_writers.MARKS)
    return metric_writers.JsonlWriter(folder.metrics, first_step=start.step + 1, marks=marks)


def _last_row(folder: run_dir.RunDir) -> int:
    """Returns the last step in metrics.jsonl; 0 if it has none, or is damaged, which opening it repairs."""
    try:
        rows = metric_writers.rows_in_force(folder.metrics)
    except (FileNotFoundError, metric_writers.DamagedRowsError):
        return 0
    return max((int(row["step"]) for row in rows), default=0)


def _rows_of(folder: run_dir.RunDir, steps: Collection[int]) -> list[tuple[int, dict[str, float]]]:
    """Returns the metrics that earlier starts of this run wrote for some steps, by step."""
    rows = [(row.pop("step"), row) for row in metric_writers.rows_in_force(folder.metrics)]
    others = ("time", "rollback_to")  # no rollback is made again
    return [(n, {k: v for k, v in row.items() if k not in others}) for n, row in rows if n in steps]


def _open_writers(
    folder: run_dir.RunDir,
    step: int,
    rows: metric_writers.JsonlWriter | None,
    written: Sequence[Mapping[str, float]],
    more: Sequence[Callable[[], metric_writers.MetricWriter]],
) -> metric_writers.MultiWriter:
    """Returns the writer of a process; only one has files, of which `rows` is the first."""
    if rows is None:
        return metric_writers.MultiWriter([])
    board = metric_writers.TensorBoardWriter(folder.file("tensorboard"), first_step=step)
    for row in written:  # its points are hidden with those after them
        board.write(step, row)
    return metric_writers.MultiWriter([rows, board, *(make() for make in more)])


def _checkpoint_meta(
    run: ResolvedRun,
    meta: Mapping[str, Any],
    writer: metric_writers.MultiWriter,
    folder: run_dir.RunDir,
) -> Callable[[int, int], Mapping[str, Any]]:
    """Returns a function that computes the facts in a checkpoint: `meta`, rate, positions, and what writers record.

    The run's files are in its directory before the checkpoint that continues them.
    """
    before = meta.get("initial", {}).get("positions", {})

    def facts(updates: int, batches: int) -> Mapping[str, Any]:
        written = writer.sync()
        folder.publish()
        return {
            **meta,
            "learning_rate": run.learning_rate(updates),
            "positions": {**before, **run.stream.positions(batches)},
            **written,
        }

    return facts
