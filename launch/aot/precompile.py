"""Compiles a training step for absent TPUs, and reports its memory, FLOPs and traffic per chip."""

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


def precompile(
    recipe: Recipe, topology_name: str, *, json_file: str | None = None, hlo: str | None = None
) -> bool:
    """Compiles the train step of a recipe for a slice such as v5e:4x4, prints the report, and returns whether it fits.

    Writes the report to `json_file` and the compiled program's text to `hlo`, if they are not None.

    Raises:
      TopologyError: the topology is unknown, or libtpu is missing.
    """
    topology = tpu_topology.parse(topology_name)
    devices = tpu_topology.devices(topology)
    # The length of a schedule changes a constant of the program, not its cost.
    span = schedules.Span(total_steps=2**20, stopped_at=1e-4)
    program = recipe.with_span(span).program(devices=devices)
    print("".join(line + "\n" for line in program.reports), end="")
    print(f"compiling for {len(devices)} x {devices[0].device_kind} ...", flush=True)
    began = time.perf_counter()
    report, text = compile_step(program, hbm_bytes=topology.chip.hbm_bytes)
    seconds = time.perf_counter() - began
    header = _header(topology, program)
    print(compile_report.table(report, _facts(header, report, topology, seconds)))
    if json_file:
        document = {**header, "compile_seconds": round(seconds, 1), **report.as_json()}
        _write(json_file, json.dumps(document, indent=2) + "\n")
    if hlo and text is not None:
        _write(hlo, text)
    return report.fits


def compile_step(program: Program, *, hbm_bytes: float) -> tuple[Report, str | None]:
    """Compiles the train step of a program; its devices may be absent.

    Returns its report for devices with this memory, and its text, which is None if it does not fit.
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
    """Returns the report of a program that does not fit; the compiler's figure `needed` includes the arguments."""
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
    """Returns facts about the compiled program, for the JSON report."""
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
    """Returns (name, value) of the lines above the table."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in header["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    rows = "images" if header["unit"] == "images" else f"rows of {header['length']} tokens"
    facts = [
        ("topology", f"{topology}, {header['chips']} x {header['device']}"),
        ("mesh", f"{mesh}, rules {header['rules']}"),
        ("parameters", f"{header['parameters']:,}"),
        ("batch", f"{header['batch_size']} {rows}"),
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


def _write(path: str, text: str) -> None:
    """Writes a file atomically."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)
