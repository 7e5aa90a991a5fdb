"""Trains a model as gin says, and goes on where it stopped when it is started again.

Example: a tiny model on the Python standard library's own sources, one minute on a laptop:

  python -m launch.train \\
    --gin_file=t5x_configs/models/tiny.gin --gin_file=t5x_configs/data/bytes.gin \\
    --gin_file=t5x_configs/runs/pretrain.gin \\
    --gin.MODEL_DIR=/tmp/espalier_tiny --gin.MIXTURE_OR_TASK_NAME=python --gin.TRAIN_STEPS=50

SIGTERM saves and ends the run with status 75 (EX_TEMPFAIL): the same command goes on from there. The
status is 0 when the run is done and 2 for an error in the configuration or the data.
"""

if __name__ == "__main__":
    from launch import cli

    raise SystemExit(cli.main(__doc__, entry="launch.train:train"))

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from data import cpu_tensorflow
from data import tasks as task_registry
from data.stream import stream as streams
from launch.config import gin_config
from launch.run import (
    host_metrics,
    left_out,
    phase,
    run_checks,
    run_dir,
    run_messages,
    run_vocabulary,
)
from launch.run.parameter_table import parameter_table
from model.transforms.base import TreeTransform
from trainers import partitioning, signals
from trainers.batches import Feed, FeedFactory, Prefetcher, Stream, TrainStream
from trainers.checkpoints import checkpoint, restore
from trainers.compile_ahead import compiling
from trainers.evaluate import EvalStream, Evaluation
from trainers.hooks import HookFactory, RunContext
from trainers.loop import Loop
from trainers.optim import schedules
from trainers.recipe import Recipe
from trainers.telemetry import metric_writers, profiler
from trainers.telemetry.goodput import Goodput, process_start


def train(
    *,
    recipe: Recipe,
    model_dir: str,
    stream: Callable[..., TrainStream],
    total_steps: int | None = None,
    total_tokens: float | None = None,
    tasks: Sequence[Callable[[], Any]] = (),
    eval_stream: Callable[..., EvalStream] | None = None,
    eval_tasks: Sequence[str] | None = None,
    eval_period: int = 1000,
    eval_steps: int | None = None,
    checkpoint_period: int = 1000,
    checkpointer: Callable[..., checkpoint.Checkpointer] = checkpoint.Checkpointer,
    initial_checkpoint_path: str | None = None,
    initial_scope: restore.Scope = "params",
    initial_data: phase.Data = "restart",
    initial_assignment: Sequence[tuple[str, str | None]] = (),
    initial_strict: bool = True,
    initial_use_ema: bool = False,
    initial_transform: TreeTransform | None = None,
    initial_moments: restore.Moments = "reset",
    log_period: int = 10,
    writers: Sequence[Callable[[], metric_writers.MetricWriter]] = (),
    profile: profiler.ProfilerWindow | None = None,
    hooks: Sequence[HookFactory] = (),
    rollouts: FeedFactory | None = None,
    started: float | None = None,
) -> dict[str, float]:
    """Trains `recipe` on `stream` up to `total_steps` updates.

    Args:
      recipe: model, objective, optimiser, mesh.
      model_dir: the run's directory; an interrupted run goes on from its newest good checkpoint.
      stream: opens the training data; to read on where another run stopped, called with (positions=).
      total_steps: updates in all, those of earlier starts of this run included.
      total_tokens: in its place, loss-bearing tokens (or images) in all: as many updates as reach them.
      tasks: functions that register SeqIO tasks.
      eval_stream: opens the held-out split of a task, called with (task=).
      eval_tasks: tasks to evaluate; the sources of the training stream when None.
      eval_period: updates between evaluations; there is always one after the last update.
      eval_steps: batches per task; None for whole splits.
      checkpoint_period: updates between checkpoints; the last update is always saved.
      checkpointer: factory, called with the directory.
      initial_checkpoint_path: what a run without checkpoints of its own starts from: a step directory, or
        a run directory for its newest good step.
      initial_scope: 'params' takes its parameters; 'phase' also averages and moments, at step 0 of a
        schedule of its own; 'state' also the step, as if this were the same run.
      initial_data: 'restart' reads every source from its beginning, 'continue' from where that run
        stopped, whatever the mixture ('state' goes on at that run's next batch).
      initial_assignment: with 'params', (pattern, checkpoint path or None) for parameters under other names.
      initial_strict: with 'params', each of this model's parameters must be found there, and none more.
      initial_use_ema: with 'params', starts from the averaged parameters.
      initial_transform: makes that checkpoint's parameters into this model's (model/transforms/base.py);
        with the scopes 'phase' and 'state' step and schedule are as these say.
      initial_moments: with a transform, whether the optimiser's moments begin anew ('reset') or go
        through it ('carry').
      log_period: updates per row of metrics.
      writers: factories of more metric writers, beside metrics.jsonl and TensorBoard in the run's
        directory; called once all is checked, by the one process that writes.
      profile: a window of steps to profile.
      hooks: factories of further hooks, called with (run=), a trainers.hooks.RunContext.
      rollouts: makes the batches of a run that trains on its own samples, from a stream of prompts; see
        trainers/online/rollouts.py.
      started: reading of time.monotonic from which the run's time is counted; the start of this
        process when None.

    Returns:
      The last evaluation, and 'interrupted' = 1.0 if a signal ended the run early
      (status 75 of the command).

    Raises:
      ValueError: a configuration, mesh, data or run directory that does not fit.
      AnomalousStepError: the loss policy ended the run.
    """
    goodput = Goodput(started=process_start() if started is None else started)
    primary = jax.process_index() == 0
    if (total_steps is None) == (total_tokens is None):
        raise ValueError(
            f"TRAIN_STEPS = {total_steps} and TRAIN_TOKENS = {total_tokens}: give one of them, and None "
            "for the other."
        )
    run_checks.numbers(
        TRAIN_STEPS=1 if total_steps is None else total_steps,
        TRAIN_TOKENS=1 if total_tokens is None else total_tokens,
        BATCH_SIZE=recipe.batch_size,
        EVAL_PERIOD=eval_period,
        EVAL_STEPS=1 if eval_steps is None else eval_steps,
        CHECKPOINT_PERIOD=checkpoint_period,
        LOG_PERIOD=log_period,
    )
    with contextlib.ExitStack() as stack:
        # Everything that can be wrong without data is checked before any data is touched.
        program = recipe.program()
        run_checks.extras(recipe, program, {})
        run = stack.enter_context(
            contextlib.closing(run_dir.prepare(model_dir, gin_config.config_str(), writer=primary))
        )
        if tasks:  # a stream over token caches needs no TensorFlow, which takes seconds to import
            cpu_tensorflow.load()
        for register in tasks:
            register()
        begun = phase.initial(
            run.checkpoints, initial_checkpoint_path, scope=initial_scope, data=initial_data
        )
        data = stream(positions=begun["positions"]) if begun.get("positions") else stream()
        if rollouts is None:
            run_checks.stream(recipe, data)
        else:
            run_checks.vocabulary(recipe, data)
        if total_steps is None:
            total_steps = data.steps_for_tokens(total_tokens)
        if isinstance(recipe.learning_rate, schedules.Unspanned):
            since, rate = begun.get("step", 0), begun.get("learning_rate")
            recipe = recipe.over(schedules.Span(total_steps, rate, since))
            program = recipe.program()
        registered = task_registry.summary() if tasks else {}
        told = [("caps", line) for line in data.check_repeats(total_steps)]
        if primary and tasks:
            run_vocabulary.save(run.path, task_registry.vocabulary(data.source_names[0]))
        eval_tasks = data.source_names if eval_tasks is None else tuple(eval_tasks)
        held_out = streams.held_out(eval_stream, eval_tasks) if eval_stream else ()
        told += left_out.lines(registered, data, held_out)
        run.record(
            mesh=run_dir.mesh_facts(program.mesh),
            data_fingerprint=data.fingerprint,
            data=data.summary(),
            epochs=data.epochs(total_steps),
            initial=begun,
            parameters=program.num_params(),
            **registered,
        )
        run.write(
            "parameters.txt", parameter_table(program.boxed_params, program.abstract_state.params)
        )
        if profile is not None and profile.directory is None:
            profile.directory = run.file("profile")
        steps = program.steps(len(data.source_names))
        meta = _meta(recipe, data)
        run_checks.extras(recipe, program, meta)
        stack.enter_context(partitioning.use_mesh(program.mesh, program.rules))
        stop = stack.enter_context(signals.StopRequest())
        evaluation = Evaluation(
            every=eval_period,
            eval_step=steps.evaluate,
            streams=held_out,
            sharding=program.batch_sharding,
            max_steps=eval_steps,
            stop=stop.asked,
            unit=recipe.reads.loss_per,
        )
        saver = stack.enter_context(contextlib.closing(checkpointer(run.checkpoints)))
        feed: Feed = Prefetcher(data, program.batch_sharding)
        if rollouts is not None:
            folder = run.file("rollouts")
            feed = rollouts(stream=data, recipe=recipe, program=program, folder=folder)
        # What is left to compile when the state is there counts as compilation.
        with (
            goodput.measure("compile"),
            compiling(program, steps.train, feed.abstract()),
            goodput.measure("init"),
        ):
            start = restore.restore_or_initialise(
                saver,
                program.abstract_state,
                program.init,
                expected_meta=meta,
                initial_checkpoint_path=initial_checkpoint_path,
                initial_scope=initial_scope,
                assignment=tuple(initial_assignment),
                strict=initial_strict,
                use_ema=initial_use_ema,
                transform=initial_transform,
                moments=initial_moments,
            )
            run_checks.same_vocabulary(start, meta)
            run_checks.same_beginnings(recipe, start, meta)
            begun = phase.begun(start, begun)
            meta |= _origin(start) | ({"initial": begun} if begun else {})
        writer = stack.enter_context(
            contextlib.closing(metric_writers.MultiWriter(_writers(run, start.step, writers)))
        )
        if primary:
            run_messages.announce(recipe, program, data, start, total_steps, told)
        rates = host_metrics.rates_of(recipe, total_steps)
        context = RunContext(
            path=run.path,
            writer=primary,
            step=start.step,
            recipe=recipe,
            program=program,
            learning_rate=lambda updates: float(rates[updates]),
            give_up=stop.asked,
        )
        loop = Loop(
            state=start.state,
            step=start.step,
            data_step=_first_batch(start),
            skipped=start.meta.get("skipped", 0) if start.step else 0,
            total_steps=total_steps,
            train_step=steps.train,
            stream=data,
            feed=feed,
            run_dir=pathlib.Path(run.path),
            writer=writer,
            goodput=goodput,
            checkpointer=saver,
            checkpoint_period=checkpoint_period,
            meta=meta,
            log_period=log_period,
            unit=recipe.reads.unit,
            host_metrics=host_metrics.host_metrics(recipe, program, rates),
            data_metrics=lambda batches: {
                f"epochs/{name}": epochs for name, epochs in data.epochs(batches).items()
            },
            position=lambda updates, batches: {
                "learning_rate": float(rates[updates]),
                "positions": {**begun.get("positions", {}), **data.positions(batches)},
            },
            hooks=(*([evaluation] if held_out else []), *(make(run=context) for make in hooks)),
            hooks_left_out=start.source == "run" and bool(start.meta.get("hooks_left_out")),
            written=_written(run, start.step),
            begins=start.source != "run",
            anomaly=recipe.anomaly,
            stop=stop,
            abstract_state=program.abstract_state,
            profiler=profile,
        )
        # All that gin configures has been called; again at the end for what hooks call.
        run.write_operative_config(gin_config.operative_config_str())
        loop.run()
        run.write_operative_config(gin_config.operative_config_str())
    last = evaluation.results.get(loop.step, {})
    if primary:
        how = "stopped by a signal" if loop.interrupted else "done"
        if loop.ended and loop.step < total_steps:
            how = "ended by a hook"
        print(
            f"{how} at step {loop.step}; the run is in {run.path}\n{run_messages.time_split(goodput)}"
        )
        print(f"read: {run_messages.epochs_line(data, loop.data_step)}", flush=True)
    return {**last, "interrupted": float(loop.interrupted)}


def _meta(recipe: Recipe, data: Stream) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that continues from it."""
    return {
        "data_fingerprint": data.fingerprint,
        **(_text_meta(data) if recipe.reads.unit == "tokens" else {}),
        "model": dataclasses.asdict(recipe.model.config),
        "seed": recipe.seed,
    }


def _text_meta(data: Stream) -> dict[str, Any]:
    return {
        "vocabulary": data.summary()["vocabulary"]["digest"],
        "add_bos": _adds_bos(data),
        "start_token": data.summary()["start_token"],
    }


def _origin(start: restore.Restored) -> dict[str, Any]:
    """What is known of the start that its parameters do not say.

    Of an imported model what its files said, for export after training; of a mixture what it was made of,
    for its extension.
    """
    said = start.meta.get("hf", {})
    kept = {key: said[key] for key in ("family", "config", "generation_config") if key in said}
    made = {"upcycled": start.meta["upcycled"]} if "upcycled" in start.meta else {}
    return {**({"hf": kept} if kept else {}), **made}


def _adds_bos(data: Stream) -> bool:
    """Whether all documents begin with BOS, as prompts then must too."""
    tasks = task_registry.summary()["tasks"]
    return all(tasks.get(name, {}).get("add_bos", False) for name in data.source_names)


def _written(run: run_dir.RunDir, step: int) -> set[str]:
    """Names of the metrics that are written for a step, those of earlier starts of this run."""
    rows = metric_writers.read_jsonl(run.metrics) if os.path.exists(run.metrics) else []
    return {name for row in rows if row["step"] == step for name in row}


def _first_batch(start: restore.Restored) -> int:
    """The first batch that the state has not seen; a state of step 0 has seen none."""
    return start.meta.get("data_step", start.step) if start.step else 0


def _writers(
    run: run_dir.RunDir, first_step: int, more: Sequence[Callable[[], metric_writers.MetricWriter]]
) -> list[metric_writers.MetricWriter]:
    if not run.writer:
        return []
    after = first_step + 1 if first_step else 0  # step 0 has a row where hooks ran before it
    return [
        metric_writers.JsonlWriter(run.metrics, first_step=after),
        metric_writers.TensorBoardWriter(run.tensorboard, first_step=after),
        *(make() for make in more),
    ]
