"""Compiles a training run for absent TPUs and reports memory, FLOPs and communication per chip.

Example: Llama 2 7B on sixteen v5e chips, one or two minutes on one core (needs the extra `tpu`):

  python -m launch.precompile \\
    --gin_file=t5x_configs/models/llama2_7b.gin --gin_file=t5x_configs/runs/pretrain.gin \\
    --topology=v5e:4x4 --gin.BATCH_SIZE=16 --gin.TASK_FEATURE_LENGTHS='{"targets": 2048}'

Takes the gin arguments of `train`; data and directories are not read. Nothing is allocated and nothing
runs: the compiler reports memory; FLOPs and collectives are counted in its program.
Exit status: 0 the step fits, 1 it does not fit, 2 the configuration is wrong.
"""

if __name__ == "__main__":
    from launch import cli
    from launch.aot import tpu_topology

    def add_flags(parser):
        group = parser.add_argument_group("compilation")
        group.add_argument(
            "--topology",
            required=True,
            metavar="NAME",
            help="slice to compile for: v5e:4x4, v6e:8x8, v5p:4x4x4, v4:2x2x2, v5e:1x1, ...",
        )
        group.add_argument("--json", metavar="FILE", help="also writes the report here")
        group.add_argument(
            "--hlo", metavar="FILE", help="also writes the compiled program's text here"
        )

    def start_run(start):
        from launch import precompile

        precompile.run(start)

    tpu_topology.prepare_environment()
    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.train:train",
            command="precompile",
            extra_flags=add_flags,
            run=start_run,
            unused={"MODEL_DIR": "''", "MIXTURE_OR_TASK_NAME": "''", "TASKS": "()"},
        )
    )

import json
import math
import os
import pathlib
import time
from typing import Any

import jax

from launch.aot import compile_report, tpu_topology
from launch.aot.compile_report import Memory, Report
from launch.aot.tpu_topology import Topology
from model.flops import mean_keys
from trainers import partitioning
from trainers.optim import schedules
from trainers.recipe import Program, Recipe


def run(start: Any) -> None:
    """Compiles the run that gin configures, prints the report, and writes it to the flags' files.

    Raises:
      SystemExit: with status 1 when the step does not fit.
      TopologyError: no such topology, or no libtpu.
    """
    topology = tpu_topology.parse(start.flags.topology)
    devices = tpu_topology.devices(topology)
    # The length of a schedule changes a constant of the program, not its cost.
    span = schedules.Span(total_steps=2**20, stopped_at=1e-4)
    recipe: Recipe = start.arguments()["recipe"]
    program = recipe.with_span(span).program(devices=devices)
    print("".join(line + "\n" for line in program.reports), end="")
    print(f"compiling for {len(devices)} x {devices[0].device_kind} ...", flush=True)
    began = time.perf_counter()
    report, text = compile_step(program, hbm_bytes=topology.chip.hbm_bytes)
    seconds = time.perf_counter() - began
    header = _header(topology, program)
    print(compile_report.table(report, _facts(header, report, topology, seconds)))
    if start.flags.json:
        document = {**header, "compile_seconds": round(seconds, 1), **report.as_json()}
        _write(start.flags.json, json.dumps(document, indent=2) + "\n")
    if start.flags.hlo and text is not None:
        _write(start.flags.hlo, text)
    if not report.fits:
        raise SystemExit(1)


def compile_step(program: Program, *, hbm_bytes: float) -> tuple[Report, str | None]:
    """Compiles the train step of a program, whose devices may be absent, and measures it.

    Args:
      program: a recipe on a mesh.
      hbm_bytes: memory of one device.

    Returns:
      The report, and the program's text; None when it does not fit.
    """
    recipe = program.recipe
    batch = recipe.abstract_batch(program.batch_sharding)
    # Losses by data source would need the data; they cost next to nothing.
    step = program.steps(0).train
    with partitioning.use_mesh(program.mesh, program.rules):
        lowered = step.trace(program.abstract_state, batch).lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            sizes = compile_report.out_of_memory(str(error))
            if sizes is None:
                raise
            return _too_large(program, batch, needed=sizes[0]), None
    model_flops = program.train_flops_per_unit * recipe.units_per_batch / program.mesh.devices.size
    report = compile_report.measure(
        compiled, model_flops=model_flops, mean_keys=_mean_keys(recipe), hbm_bytes=hbm_bytes
    )
    return report, compiled.as_text()


def _too_large(program: Program, batch: Any, *, needed: int) -> Report:
    """Returns the memory of a program that the compiler refused; it counts arguments as temporaries."""
    state = sum(map(_shard_bytes, jax.tree.leaves(program.abstract_state)))
    arguments = state + sum(map(_shard_bytes, jax.tree.leaves(batch)))
    memory = Memory(
        arguments=arguments,
        temporaries=needed - arguments,
        outputs=state,
        aliased=state,
        peak=needed,
    )
    return Report(memory=memory, fits=False)


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _mean_keys(recipe: Recipe) -> float:
    """Returns the keys per query, on average over rows and layers; 0 without attention."""
    if recipe.inputs_spec.length is None:
        return 0.0
    windows = [layer.kind.window for layer in recipe.model.layer_settings()]
    return sum(mean_keys(recipe.length, window) for window in windows) / len(windows)


def _header(topology: Topology, program: Program) -> dict[str, Any]:
    """Facts about what was compiled."""
    recipe = program.recipe
    return {
        "topology": str(topology),
        "chips": topology.num_chips,
        "device": program.mesh.devices.flat[0].device_kind,
        "hbm_available_bytes": topology.chip.hbm_bytes,
        "mesh": dict(program.mesh.shape),
        "rules": recipe.rules,
        "parameters": program.num_params(),
        "batch_size": recipe.batch_size,
        "length": recipe.length,
        "unit": recipe.inputs_spec.unit,
        "versions": tpu_topology.versions(),
    }


def _facts(header: dict[str, Any], report: Report, topology: Topology, seconds: float):
    """Returns the lines above the table."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in header["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    facts = [
        ("topology", f"{topology}, {header['chips']} x {header['device']}"),
        ("mesh", f"{mesh}, rules {header['rules']}"),
        ("parameters", f"{header['parameters']:,}"),
        ("batch", _rows(header)),
        (
            "HBM limit",
            f"{topology.chip.hbm_bytes / 1e9:.2f} GB ({topology.chip.hbm_bytes / 2**30:.2f} GiB)",
        ),
        ("compiled in", f"{seconds:.0f} s with {versions}"),
    ]
    if report.flops:
        chip = topology.chip
        sent = sum(total.bytes for total in report.collectives.values())
        seconds_at_peak = {
            "products": report.flops.compiled / chip.peak_flops,
            "memory": report.traffic / chip.hbm_rate,
            "one ring of links": sent / chip.wire_rate,
        }
        times = ", ".join(f"{name} {value:.3g} s" for name, value in seconds_at_peak.items())
        facts.append(("at peak rates", times))
    return facts


def _rows(header: dict[str, Any]) -> str:
    if header["unit"] == "images":
        return f"{header['batch_size']} images"
    return f"{header['batch_size']} rows of {header['length']} tokens"


def _write(path: str, text: str) -> None:
    """Writes a file atomically."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)
