"""The messages that a training run prints before its first step and after its last."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from espalier.common.stages import duration
from espalier.data.stream import rows
from espalier.data.tasks import Tally
from espalier.launch.run.run_data import RunData
from espalier.trainers.batches import Stream, TrainStream
from espalier.trainers.checkpoints.restore import Restored
from espalier.trainers.loop import Loop
from espalier.trainers.recipe import Program
from espalier.trainers.telemetry import flops, lifetime
from espalier.trainers.telemetry.goodput import Goodput
from espalier.trainers.telemetry.lifetime import Start
from espalier.trainers.telemetry.progress import held_out_text

Line = rows.Notice


def announce(program: Program, data: RunData) -> None:
    """Prints a description of the run before its state is restored and its step compiled."""
    recipe, stream = program.recipe, data.stream
    units, unit = recipe.units_per_batch, recipe.inputs_spec.unit
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    devices = list(program.mesh.devices.flat)
    trained = program.num_params(trained_only=True)
    lines = [
        ("mesh", f"{mesh} ({len(devices)} x {devices[0].device_kind}), rules {recipe.rules}"),
        ("parameters", f"{program.num_params():,}, of which {trained:,} are trained"),
        *_dtype_line(program),
        ("data", f"{', '.join(stream.source_names)}; fingerprint {stream.fingerprint[:12]}"),
        (unit, f"{units:,} a step, {units * data.total_steps:,} in {data.total_steps:,} steps"),
        ("epochs", epochs_line(stream, data.total_steps)),
        *(("caps", line) for line in data.repeats),
        *data_notices(data.tasks, stream, data.eval_streams),
    ]
    _print(lines)
    for report in program.reports:
        print(report, flush=True)


def announce_start(program: Program, data: RunData, start: Restored, life: Sequence[Start]) -> None:
    """Prints where the run goes on, and how long it may take; `life` has its starts, this one included."""
    units = program.recipe.units_per_batch
    remaining = (data.total_steps - start.step) * units * program.train_flops_per_unit
    seconds = flops.estimate_seconds(remaining, list(program.mesh.devices.flat))
    lines = [
        ("start", _start_line(start)),
        *([("life", lifetime.line(life))] if len(lifetime.counted(life)) > 1 else []),
        ("estimate", f"about {duration(seconds)} of training steps"),
    ]
    _print(lines)


def _print(lines: Sequence[Line]) -> None:
    print("\n".join(f"{name:<11}{text}" for name, text in lines), flush=True)


def _dtype_line(program: Program) -> Iterator[Line]:
    """Yields a line on the dtype of the parameters and the memory that follows, where the model's config has a narrower one."""
    state, rounding = program.abstract_state, program.recipe.rounding
    sizes = f"parameters {_size(state.params)}, with the optimiser's state {_size(state)}"
    if program.widened:
        own = ", ".join(program.widened)
        yield (
            "dtype",
            f"the parameters are stored in float32, not in the model's {own}, in which small updates are lost: {sizes}",
        )
    elif rounding == "stochastic":
        yield "dtype", f"bfloat16 parameters, whose updates are rounded stochastically: {sizes}"
    elif rounding == "nearest":
        yield (
            "WARNING",
            f"updates of narrow parameters are rounded to nearest (Recipe.rounding), so that small ones are lost: {sizes}; start "
            "from them with Recipe.rounding = None (float32) or 'stochastic'",
        )


def _size(tree: Any) -> str:
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def summarise(
    path: str, loop: Loop, data: RunData, evaluation: Mapping[str, float], life: str
) -> None:
    """Prints how a run ended, with its losses.

    Args:
      path: the run's directory.
      loop, data: its loop, which has ended, and its data.
      evaluation: held-out metrics of the last step, if any.
      life: a line on the run's whole life.
    """
    how = "stopped by a signal" if loop.interrupted else "done"
    if loop.ended and loop.step < data.total_steps:
        how = "ended by a hook"
    print(f"{how} at step {loop.step}; the run is in {path}")
    losses = [f"training {loop.loss:.3f}"] if loop.loss is not None else []
    losses += [f"held out {text}"] if (text := held_out_text(evaluation)) else []
    if losses:
        print(f"loss: {'; '.join(losses)}")
    print(time_split(loop.outputs.goodput))
    print(f"life: {life}")
    print(f"read: {epochs_line(data.stream, loop.data_step)}", flush=True)


def epochs_line(stream: TrainStream, step: int) -> str:
    """Returns a line with the epochs of each source before `step`."""
    return ", ".join(f"{name} {epochs:.3g} epochs" for name, epochs in stream.epochs(step).items())


def _start_line(start: Restored) -> str:
    if start.source == "scratch":
        return "new parameters, step 0"
    skipped = "".join(f"; step {step} is damaged: {why}" for step, why in start.skipped)
    return f"step {start.step} from {start.path}{skipped}"


def time_split(goodput: Goodput) -> str:
    """Returns a line with the time of each part of the run."""
    parts = {name.removeprefix("time/"): v for name, v in goodput.metrics().items()}
    share = parts.pop("goodput")
    text = ", ".join(f"{name} {duration(v)}" for name, v in parts.items() if v >= 0.5)
    return f"time: {text}; {share:.0%} in steps"


def data_notices(
    tasks: Mapping[str, Any], stream: Stream, eval_streams: Sequence[Stream] = ()
) -> list[Line]:
    """Returns lines on sizes of supervised data, and on dropped and truncated data; above 5 % as WARNING.

    Args:
      tasks: `data.tasks.summary()`, with rows dropped and noted while files were read.
      stream: the training stream.
      eval_streams: the held-out splits.
    """
    tasks = tasks.get("tasks", {})
    notices = [line for task, facts in tasks.items() for line in _file_notices(task, facts)]
    for each in (stream, *eval_streams):
        notices += each.notices()
    return notices


def _file_notices(task: str, facts: Mapping[str, Any]) -> Iterator[Line]:
    """Yields lines on documents or rows that were dropped or noted while a task's files were read."""
    dropped, noted = facts.get("dropped", {}), facts.get("noted", {})
    documents = [
        f"{name} {count['documents']:,} documents ({count['bytes'] / 1e6:.1f} MB)"
        for name, count in dropped.items()
        if "documents" in count
    ]
    if documents:
        yield "dropped", f"{task}: {', '.join(documents)}"
    elif dropped:
        lost = sum(count["rows"] for count in dropped.values())
        share = lost / (lost + sum(facts["documents"].values()))
        yield rows.notice("dropped", share, f"{task}: {Tally(dropped)}, {share:.1%} of all rows")
    if noted:
        yield "noted", f"{task}: {Tally(noted)}"
