"""Writes a merge of runs as a run directory, which every command reads."""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.merge import output
from espalier.launch.merge.models import ARRAY, NativeModel
from espalier.launch.merge.output import Workers, progress
from espalier.launch.merge.plan import Planned, Planner
from espalier.launch.merge.settings import MergeError
from espalier.launch.weights.target_folder import check_space
from espalier.model.transforms.merge_blocks import promoted

_CHUNK_BYTES = 16 << 20


def write(planner: Planner, planned: Sequence[Planned], target: str, *, workers: Workers) -> None:
    """Writes the run directory `target`, which must not exist.

    Raises:
      MergeError, TransformError, ConvertError, CheckpointSaveError.
    """
    from espalier.launch.weights import transformed_run

    donor = planner.donor
    assert isinstance(donor, NativeModel)
    lines = _config_lines(planner, planned)
    text = "\n".join([donor.source.config(whole=False), *lines, ""])
    with transformed_run.new_run(target, text, donor.source) as (folder, model):
        check_space(folder, output.out_bytes(planned))
        leaves = transformed_run.abstract_params(model)
        with progress(planned) as bar:
            arrays = {
                path: _streamed(parts, planner, workers, bar)
                for path, parts in _by_array(donor, planned).items()
            }
            wanted = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
            made = {path: array.shape for path, array in arrays.items()}
            if wanted != made:
                path = min(x for x in {*wanted, *made} if wanted.get(x) != made.get(x))
                raise MergeError(
                    f"{planner.merge.file}: {path} would be {made.get(path)}, and the model has {wanted.get(path)}: merge models of "
                    "one architecture."
                )
            record = output.record(planner)
            pathlib.Path(folder, output.RECORD).write_text(json.dumps(record, indent=2) + "\n")
            transformed_run.save(folder, arrays, _meta(record, donor, changed=bool(lines)))


def _meta(record: Mapping[str, Any], donor: NativeModel, *, changed: bool) -> dict[str, Any]:
    # The record of an import has the dtypes of its tensors, which a change of depth or dtype makes wrong.
    hf = {} if changed else donor.source.hf_meta()
    facts = {key: value for key, value in record.items() if key != "made_of"}
    return {**donor.source.text_meta(), **hf, "made_of": record["made_of"], "merged": facts}


def _config_lines(planner: Planner, planned: Sequence[Planned]) -> list[str]:
    """Returns the gin lines of a depth and dtypes that are not those of the first model."""
    import jax.numpy as jnp

    merge, donor = planner.merge, planner.donor
    assert isinstance(donor, NativeModel)
    lines = []
    for stack, origins in planner.layers.items():
        config = donor.model.config
        if (
            origins == [(path, i) for i, (path, _) in enumerate(origins)]
            and len(planner.layers) > 1
        ):
            continue
        if len(planner.layers) > 1:
            raise MergeError(
                f"{merge.file}: {stack}: the depth of encoder-decoders cannot change: give whole stacks in their order."
            )
        if len(origins) != config.num_layers:
            lines.append(f"config.TransformerConfig.num_layers = {len(origins)}")
        period = len(config.layer_pattern)
        for i, (path, layer) in enumerate(origins):
            if period > 1 and layer % period != i % period:
                raise MergeError(
                    f"{merge.file}: layer {layer} of {path} would become layer {i}, which has another kind of attention: "
                    f"move layers by multiples of {period}."
                )
        if len(origins) % period:
            raise MergeError(f"{merge.file}: the number of layers must be a multiple of {period}.")
    configs = [planner.models[path].model.config for path in merge.merged_models()]  # type: ignore[union-attr]
    for field in (
        "dtype",
        "param_dtype",
    ):  # of models that differ, so that their order does not decide
        dtype = promoted([jnp.dtype(getattr(config, field)) for config in configs]).name
        if field == "param_dtype":
            dtype = merge.out_dtype or merge.dtype or dtype
        if dtype != jnp.dtype(getattr(donor.model.config, field)).name:
            lines.append(f"config.TransformerConfig.{field} = {dtype!r}")
    return ["from espalier.model import config", *lines] if lines else []


def _by_array(donor: NativeModel, planned: Sequence[Planned]) -> dict[str, list[Planned]]:
    """Returns the tensors of each array of the output, in the order of their rows."""
    periods: dict[str, int] = {}
    for match in filter(None, map(ARRAY.fullmatch, donor.arrays)):
        periods[match[1]] = max(periods.get(match[1], 0), int(match[2]) + 1)
    result: dict[str, list[Planned]] = {}
    for x in planned:
        if x.stack is None or x.layer is None:
            path = x.rest
        else:
            block = x.layer % periods[x.stack] if donor.scanned else x.layer
            path = f"{x.stack}/block_{block}/{x.rest}"
        result.setdefault(path, []).append(x)
    return {path: sorted(parts, key=lambda x: x.layer or 0) for path, parts in result.items()}


def _streamed(parts: Sequence[Planned], planner: Planner, workers: Workers, bar: Any) -> Any:
    """Returns an array that is merged while it is written, a layer or a block of rows at a time."""
    from espalier.trainers.checkpoints.stream_checkpoint import StreamedArray

    first, donor = parts[0], planner.donor
    assert isinstance(donor, NativeModel)
    stacked = first.stack is not None and donor.scanned
    shape = (len(parts), *first.shape) if stacked else first.shape
    dtype = promoted([x.out_dtype for x in parts])  # layers of models with other dtypes
    width = math.prod(first.shape[1:]) * dtype.itemsize
    rows = max(1, min(first.shape[0], _CHUNK_BYTES // max(1, width))) if first.shape else 1
    chunk = (1, *first.shape) if stacked else (rows, *first.shape[1:]) if first.shape else ()

    def blocks() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for i, x in enumerate(parts):
            reads = [planner.models[p].read(name) for p, name in x.inputs]
            merged = workers.run(x, reads)
            for low, values in _regrouped(merged, math.prod(chunk), dtype):
                row = i if stacked else low // max(1, math.prod(shape[1:]))
                start = (row, *(0 for _ in shape[1:])) if shape else ()
                yield start, values.reshape(-1, *shape[1:]) if shape else values.reshape(())
                bar.update(values.nbytes)

    return StreamedArray(shape, dtype, chunk, blocks)


def _regrouped(
    merged: Iterator[tuple[int, np.ndarray]], size: int, dtype: np.dtype
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields blocks of exactly `size` values, but the last."""
    start, count, block = 0, 0, np.empty(size, dtype)
    for _, part in merged:
        while part.size:
            taken = part[: size - count]
            block[count : count + taken.size] = taken
            count += taken.size
            part = part[taken.size :]
            if count == size:
                yield start, block
                start, count, block = start + size, 0, np.empty(size, dtype)
    if count:
        yield start, block[:count]
