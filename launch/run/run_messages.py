"""What a training run says on the terminal before its first step and after its last."""

from collections.abc import Sequence

from launch.run.host_metrics import flops_per_unit
from trainers.batches import TrainStream
from trainers.checkpoints import restore
from trainers.recipe import Program, Recipe
from trainers.telemetry import flops
from trainers.telemetry.goodput import Goodput


def announce(
    recipe: Recipe,
    program: Program,
    data: TrainStream,
    start: restore.Restored,
    total_steps: int,
    told: Sequence[tuple[str, str]],
) -> None:
    """What is about to run, in a few lines."""
    units, unit = recipe.batch_size * recipe.length, recipe.reads.unit
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    device = program.mesh.devices.flat[0].device_kind
    trained = program.num_params(trained_only=True)
    lines = [
        ("mesh", f"{mesh} ({program.mesh.devices.size} x {device}), rules {recipe.rules}"),
        ("parameters", f"{program.num_params():,}, of which {trained:,} are trained"),
        ("data", f"{', '.join(data.source_names)}; fingerprint {data.fingerprint[:12]}"),
        (unit, f"{units:,} a step, {units * total_steps:,} in {total_steps:,} steps"),
        ("epochs", epochs_line(data, total_steps)),
        *told,
        ("start", _start_line(start)),
    ]
    remaining = (total_steps - start.step) * units * flops_per_unit(recipe, program)
    seconds = flops.estimate_seconds(remaining, list(program.mesh.devices.flat))
    lines.append(("estimate", f"about {_duration(seconds)} of training steps"))
    print(
        "\n".join([f"{name:<11}{text}" for name, text in lines] + list(program.reports)), flush=True
    )


def epochs_line(data: TrainStream, step: int) -> str:
    """How often each source has been read by then; above 1 its documents repeat."""
    return ", ".join(f"{name} {epochs:.3g} epochs" for name, epochs in data.epochs(step).items())


def _start_line(start: restore.Restored) -> str:
    if start.source == "scratch":
        return "new parameters, step 0"
    skipped = "".join(f"; step {step} is damaged: {why}" for step, why in start.skipped)
    return f"step {start.step} from {start.path}{skipped}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def time_split(goodput: Goodput) -> str:
    parts = {name.removeprefix("time/"): v for name, v in goodput.metrics().items()}
    share = parts.pop("goodput")
    text = ", ".join(f"{name} {_duration(v)}" for name, v in parts.items() if v >= 0.5)
    return f"time: {text}; {share:.0%} in steps"
