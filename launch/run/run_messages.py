"""What a training run writes into its directory and prints of itself, before its first step and after its last."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from espalier.common import stages
from espalier.launch.run.resolved import ResolvedRun
from espalier.launch.run.run_dir import RunDir, mesh_facts
from espalier.trainers import partitioning
from espalier.trainers.batches import TrainStream
from espalier.trainers.checkpoints.restore import Restored
from espalier.trainers.loop import Loop
from espalier.trainers.recipe import Program
from espalier.trainers.telemetry import flops, lifetime
from espalier.trainers.telemetry.goodput import SHOWN, Goodput
from espalier.trainers.telemetry.lifetime import Start
from espalier.trainers.telemetry.progress import held_out_text

_HEADER = ("path", "shape", "dtype", "axes", "sharding", "count")  # of parameters.txt


def describe(run: ResolvedRun, folder: RunDir) -> None:
    """Writes the files on mesh, data and parameters; raises RunDirectoryError if the data has changed."""
    program = run.program
    folder.record(
        mesh=mesh_facts(program.mesh),
        initial=run.parent.record(),
        parameters=program.num_params(),
        data_fingerprint=run.stream.fingerprint,
        held_out_fingerprints={each.name: each.fingerprint for each in run.eval_streams},
        data=run.stream.summary(),
        epochs=run.stream.epochs(run.total_steps),
        **run.tasks,
    )
    table = parameter_table(program.boxed_params, program.abstract_state.params)
    folder.write("parameters.txt", table)
    if folder.writer and run.tasks:
        # It imports the readers of all kinds of tokenizers.
        from espalier.launch.run import run_vocabulary

        run_vocabulary.save(folder.path, run.vocabulary, run.chat_template)


def announce(run: ResolvedRun) -> None:
    """Prints a description of the run before its state is restored and its step compiled."""
    program, stream = run.program, run.stream
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    kind = f"{len(run.devices)} x {run.devices[0].device_kind}"
    trained = program.num_params(trained_only=True)
    method = partitioning.attention_method(program.mesh, program.rules, program.recipe.model)
    lines = [
        (
            "mesh",
            f"{mesh} ({kind}), rules {program.recipe.rules}{method and f', attention {method}'}",
        ),
        ("parameters", f"{program.num_params():,}, of which {trained:,} are trained"),
        *_dtype_line(program),
        ("data", f"{', '.join(stream.source_names)}; fingerprint {stream.fingerprint[:12]}"),
        (run.unit, _amount(run)),
        ("epochs", epochs_line(stream, run.total_steps)),
        *run.notices,
    ]
    _print(lines)
    for report in program.reports:
        print(report, flush=True)


def _amount(run: ResolvedRun) -> str:
    """Returns the units of a step and of all steps; of tokens, the positions of rows and how many of them have a token."""
    units, steps = run.units_per_batch, run.total_steps
    if run.unit != "tokens":
        return f"{units:,} a step, {units * steps:,} in {steps:,} steps"
    facts, full = run.stream.summary(), ""
    if "phases" in facts and facts["lengths"] == {"targets": run.program.recipe.length}:
        shares = facts["phases"][0]["row_shares"]
        fill = sum(share * facts["sources"][name]["fill"] for name, share in shares.items())
        full = f", about {units * fill:,.0f} tokens ({fill:.0%} full)"
    return f"{units:,} positions a step{full}; {units * steps:,} positions in {steps:,} steps"


def announce_start(run: ResolvedRun, start: Restored, life: Sequence[Start]) -> None:
    """Prints where the run goes on, and how long it may take; `life` has its starts, this one included."""
    remaining = (run.total_steps - start.step) * run.units_per_batch * run.flops_per_unit
    seconds = flops.estimate_seconds(remaining, run.devices)
    lines = [
        ("start", _start_line(start)),
        *([("life", lifetime.line(life))] if len(lifetime.counted(life)) > 1 else []),
        ("estimate", f"about {stages.duration(seconds)} of training steps"),
    ]
    _print(lines)


def _print(lines: Sequence[tuple[str, str]]) -> None:
    print("\n".join(f"{name:<11}{text}" for name, text in lines), flush=True)


def _dtype_line(program: Program) -> Iterator[tuple[str, str]]:
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
    return stages.size(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def summarise(
    path: str, loop: Loop, run: ResolvedRun, evaluation: Mapping[str, float], life: str
) -> None:
    """Prints how a run ended, with its losses.

    Args:
      path: the run's directory.
      loop, run: its loop, which has ended, and what it was resolved to.
      evaluation: held-out metrics of the last step, if any.
      life: a line on the run's whole life.
    """
    how = "stopped by a signal" if loop.interrupted else "done"
    if loop.ended and loop.step < run.total_steps:
        how = f"ended by {loop.ended_by}"
    print(f"{how} at step {loop.step}; the run is in {path}")
    losses = [f"training {loop.loss:.3f}"] if loop.loss is not None else []
    losses += [f"held out {text}"] if (text := held_out_text(evaluation)) else []
    if losses:
        print(f"loss: {'; '.join(losses)}")
    print(time_split(loop.outputs.goodput))
    print(f"life: {life}")
    print(f"read: {epochs_line(run.stream, loop.data_step)}", flush=True)


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
    text = ", ".join(
        f"{SHOWN.get(name, name)} {stages.duration(v)}" for name, v in parts.items() if v >= 0.5
    )
    return f"time: {text}; {share:.0%} in steps"


def parameter_table(params: Any, shardings: Any = None) -> str:
    """Returns a table with a row per parameter, and the totals.

    Args:
      params: nested dict of arrays or ShapeDtypeStructs; flax's boxes around them have the logical axes.
      shardings: a tree of the same structure of NamedSharding, PartitionSpec, or leaves with a `sharding`; or None.
    """
    specs = flatten_dict(shardings, sep="/") if shardings is not None else {}
    rows, total, size = [], 0, 0
    for path, leaf in flatten_dict(params, sep="/").items():
        names = getattr(leaf, "names", None)
        array = leaf.value if names is not None else leaf
        count = math.prod(array.shape)
        total, size = total + count, size + count * array.dtype.itemsize
        rows.append(
            (
                path,
                "x".join(map(str, array.shape)) or "scalar",
                str(array.dtype),
                "(" + ", ".join(map(_axis, names)) + ")" if names is not None else "-",
                _spec(specs.get(path)),
                f"{count:,}",
            )
        )
    rows = [_HEADER, *rows]
    *widths, last = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1].rjust(last)]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines.append("-" * len(lines[0]))
    lines.append(f"total {total:,} parameters in {len(rows) - 1} arrays, {size / 2**20:,.1f} MiB")
    return "\n".join(lines) + "\n"


def _axis(name: Any) -> str:
    if isinstance(name, tuple | list):
        return "+".join(map(str, name))
    return "-" if name is None else str(name)


def _spec(sharding: Any) -> str:
    if sharding is None:
        return "-"
    sharding = getattr(sharding, "sharding", sharding)
    axes = [_axis(axis) for axis in getattr(sharding, "spec", sharding)]
    return "(" + ", ".join(axes) + ")" if any(axis != "-" for axis in axes) else "replicated"
