"""Compiles a program for absent TPUs, and reports its memory, FLOPs, traffic and least time per chip."""

import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax

from espalier.common import stages
from espalier.common.storage import output_files
from espalier.launch.precompile import compile_report, programs, tpu_topology
from espalier.launch.precompile.compile_report import Memory, Report
from espalier.launch.precompile.hlo import collectives
from espalier.launch.precompile.programs import Kind, Options, Work
from espalier.launch.precompile.tpu_topology import Topology
from espalier.model.kv_cache.base import CachePolicy
from espalier.model.kv_cache.full import FullCache
from espalier.trainers import partitioning
from espalier.trainers.optim import schedules
from espalier.trainers.recipe import Program, Recipe


def precompile(
    recipe: Recipe,
    topology_name: str,
    *,
    kind: Kind = "train",
    policy: CachePolicy | None = None,
    options: Options | None = None,
    json_file: str | None = None,
    hlo: str | None = None,
) -> bool:
    """Compiles a program of a recipe for a topology such as v5e:4x4, prints the report, and returns whether it fits.

    Writes the report to `json_file` and the compiled program's text to `hlo`, if they are not None.

    Args:
      recipe: the recipe.
      topology_name: see `tpu_topology.parse`.
      kind: the program, see programs.py; `policy` and `options` are of programs other than 'train'.
      json_file, hlo: paths.

    Raises:
      TopologyError: the topology is unknown, or libtpu is missing.
      ValueError: the model has no program of this kind.
    """
    topology = tpu_topology.parse(topology_name)
    program = resolved(recipe, tpu_topology.devices(topology))
    print("".join(line + "\n" for line in program.reports), end="")
    work = programs.work(kind, program, policy or FullCache(), options or Options())
    device = program.mesh.devices.flat[0].device_kind
    print(f"compiling for {topology.num_chips} x {device} ...", flush=True)
    began = time.perf_counter()
    report, text = compile_work(work, program, hbm_bytes=topology.chip.hbm_bytes)
    seconds = time.perf_counter() - began
    document = {
        **_header(topology, program, kind, work),
        "compile_seconds": round(seconds, 1),
        **report.as_json(),
        "roofline_seconds": _roofline(report, topology),
    }
    print(compile_report.table(report, _facts(document)))
    if json_file:
        write_json(json_file, document)
    if hlo and text is not None:
        _write(hlo, text)
    return report.fits


def resolved(recipe: Recipe, devices: Sequence[jax.Device] | int) -> Program:
    """Returns the program of a recipe on absent devices, see `Recipe.program`.

    Raises:
      ValueError: a mesh that does not fit the run, with one that does if there is one.
    """
    # The length of a schedule changes a constant of the program, not its cost.
    span = schedules.Span(total_steps=2**20, stopped_at=1e-4)
    return recipe.with_span(span).program(devices=devices)


def compile_work(work: Work, program: Program, *, hbm_bytes: float) -> tuple[Report, str | None]:
    """Compiles a function of a program, whose devices may be absent.

    Returns its report for devices with this memory, and its text, which is None if it does not fit.
    """
    with partitioning.use_mesh(program.mesh, program.rules):
        with stages.stage("tracing"):
            lowered = work.function.trace(*work.arguments).lower()
        try:
            with stages.stage("compiling"):
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            sizes = compile_report.out_of_memory(str(error))
            if sizes is None:
                raise
            return _too_large(work, needed=sizes[0]), None
    chips_of_mesh = program.mesh.devices.size
    report = compile_report.measure(
        compiled,
        model_flops=None if work.model_flops is None else work.model_flops / chips_of_mesh,
        mean_keys=work.mean_keys,
        hbm_bytes=hbm_bytes,
        open_loops=work.open_loops,
    )
    return report, compiled.as_text()


def _too_large(work: Work, *, needed: int) -> Report:
    """Returns the report of a program that does not fit; the compiler's figure `needed` includes the arguments."""
    arguments = argument_bytes(work.arguments)
    outputs = 0 if work.donated is None else argument_bytes(work.arguments[work.donated])
    memory = Memory(
        arguments=arguments,
        temporaries=needed - arguments,
        outputs=outputs,
        aliased=outputs,
        peak=needed,
    )
    return Report(memory=memory, fits=False)


def argument_bytes(arguments: Any) -> int:
    """Returns the bytes that abstract arrays with shardings have on one chip."""
    return sum(map(_shard_bytes, jax.tree.leaves(arguments)))


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _roofline(report: Report, topology: Topology) -> dict[str, Any] | None:
    """Returns the seconds of an execution at the chip's published rates; None for a program that does not fit."""
    if report.flops is None or report.collectives is None or report.traffic is None:
        return None
    within, between = collectives.sent(report.collectives)
    return tpu_topology.roofline(
        topology.chip,
        flops=report.flops.compiled,
        hbm_bytes=report.traffic,
        sent=within,
        sent_between_slices=between,
        model_flops=report.flops.analytic,
    ).as_json()


def _header(topology: Topology, program: Program, kind: Kind, work: Work) -> dict[str, Any]:
    """Returns facts about the compiled program, for the JSON report."""
    recipe = program.recipe
    return {
        "program": kind,
        "per": work.per,
        "topology": str(topology),
        "chips": topology.num_chips,
        "device": program.mesh.devices.flat[0].device_kind,
        "hbm_available_bytes": topology.chip.hbm_bytes,
        "mesh": dict(program.mesh.shape),
        "rules": recipe.rules,
        "remat": getattr(recipe.model.config, "remat", "none"),
        "parameters": program.num_params(),
        "trained_parameters": program.num_params(trained_only=True),
        "batch_size": recipe.batch_size,
        "microbatches": recipe.microbatches,
        "length": recipe.length,
        "unit": recipe.inputs_spec.unit,
        "versions": tpu_topology.versions(),
    }


def _facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, value) of the lines above the table."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in document["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    images = document["unit"] == "images"
    rows = "images" if images else f"rows of {document['length']} tokens"
    hbm = document["hbm_available_bytes"]
    facts = [
        ("program", f"{document['program']}, figures of one {document['per']}"),
        ("topology", f"{document['topology']}, {document['chips']} x {document['device']}"),
        ("mesh", f"{mesh}, rules {document['rules']}, remat {document['remat']}"),
        ("parameters", f"{document['parameters']:,}, trained {document['trained_parameters']:,}"),
        ("batch", f"{document['batch_size']} {rows}, microbatches {document['microbatches']}"),
        ("HBM limit", f"{hbm / 1e9:.2f} GB ({hbm / 2**30:.2f} GiB)"),
        ("compiled in", f"{document['compile_seconds']:.0f} s with {versions}"),
    ]
    if times := document["roofline_seconds"]:
        busy = {
            "compute": "compute",
            "hbm": "main memory",
            "links": "links",
            "one_ring": "links of one ring",
            "network": "between slices",
        }
        at_peak = ", ".join(f"{busy[name]} {times[name]:.3g} s" for name in busy if times[name])
        facts.append(("at peak rates", at_peak))
        bound = f"at least {times['step']:.3g} s, {times['step_one_ring']:.3g} s with one ring"
        facts.append((f"a {document['per']}", f"{bound}; busiest: {busy[times['bound_by']]}"))
        if times["mfu_bound"] is not None:
            mfu = (
                f"at most {times['mfu_bound']:.1%}, {times['mfu_bound_one_ring']:.1%} with one ring"
            )
            facts.append(("MFU", mfu))
    return facts


def write_json(path: str | pathlib.Path, document: Any) -> None:
    """Writes a document atomically."""
    _write(path, json.dumps(document, indent=2) + "\n")


def _write(path: str | pathlib.Path, text: str) -> None:
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    output_files.write(target, text)
