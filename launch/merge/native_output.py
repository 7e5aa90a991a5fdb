"""Writes a merge of runs as a run directory, which every command reads."""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.merge import output
from espalier.launch.merge.models import NativeModel
from espalier.launch.merge.output import Journal, Workers, progress
from espalier.launch.merge.plan import Planned, Planner
from espalier.launch.merge.settings import MergeError
from espalier.launch.weights.target_folder import check_space
from espalier.model import layer_groups
from espalier.model.protocol import inference_model
from espalier.model.transforms.merge_blocks import promoted
from espalier.trainers.checkpoints import step_dir, stream_checkpoint
from espalier.trainers.checkpoints.stream_checkpoint import Interrupted, StreamedArray

_CHUNK_BYTES = 16 << 20
_OF_EXPERTS = ("experts", "sources", "domains")  # of the record of a mixture
_STORE = "merge.arrays"  # of a killed merge, on the way into the checkpoint


def write(planner: Planner, planned: Sequence[Planned], target: str, *, workers: Workers) -> None:
    """Writes the run directory `target`, which must not exist.

    Raises:
      MergeError, TransformError, ConvertError, CheckpointSaveError.
    """
    from espalier.launch.weights import transformed_run

    donor = planner.donor
    assert isinstance(donor, NativeModel)
    fields = changed_fields(planner, planned)
    lines = [f"config.TransformerConfig.{name} = {value!r}" for name, value in fields.items()]
    lines = ["from espalier.model import config", *lines] if lines else []
    text = "\n".join([donor.source.config(whole=False), *lines, ""])
    mark = output.fingerprint(planner, planned, config=text)
    with transformed_run.new_run(
        *(target, text, donor.source),
        goes_on=lambda folder: output.finished(folder, mark) is not None,
    ) as (folder, model):
        journal, interrupted = _interrupted(folder, mark)
        if interrupted.store is None:
            check_space(folder, output.out_bytes(planned))
        leaves = transformed_run.abstract_params(model)
        with progress(planned) as bar:
            arrays = {
                path: streamed(parts, planner, workers, bar)
                for path, parts in by_array(inference_model(model).config, planned).items()
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
            meta = facts_of(record, planner, changed=bool(fields))
            transformed_run.save(folder, arrays, meta, interrupted)
            journal.finish()


def _interrupted(folder: str, fingerprint: str) -> tuple[Journal, Interrupted]:
    """Returns the journal of a merge, and what a killed merge has left in the folder."""
    entries = output.finished(folder, fingerprint)
    store = os.path.join(folder, _STORE)
    there = stream_checkpoint.take_store(os.path.join(folder, step_dir.CHECKPOINTS), store)
    journal = Journal(folder, fingerprint, again=entries is not None and there)
    digests = dict(entries or ()) if there else {}
    return journal, Interrupted(
        store if there else None, digests, lambda name, digest: journal.add([[name, digest]])
    )


def facts_of(record: Mapping[str, Any], planner: Planner, *, changed: bool) -> dict[str, Any]:
    """Returns the facts of the result: the first model's facts that hold for a merge, and the record of the merge."""
    first, *others = (planner.models[path].source for path in planner.merge.models())  # type: ignore[union-attr]
    origin = first.origin_meta()
    if changed:  # the record of an import has the dtypes of its tensors, which a change of depth or dtype makes wrong
        origin.pop("hf", None)
    if (
        "upcycled" in origin
    ):  # how experts are added, and what all mixtures say of those that are there
        own, records = origin["upcycled"], [x.meta.get("upcycled", {}) for x in others]
        differ = {k for k in _OF_EXPERTS if any(r.get(k) != own.get(k) for r in records)}
        origin["upcycled"] = {key: x for key, x in own.items() if key not in differ}
    facts = {key: value for key, value in record.items() if key not in ("made_of", "inputs")}
    return {**first.text_meta(), **origin, "made_of": record["made_of"], "merged": facts}


def changed_fields(planner: Planner, planned: Sequence[Planned]) -> dict[str, Any]:
    """Returns the fields of the result's TransformerConfig, a depth or dtypes, that differ from the first model's.

    Raises:
      MergeError: layers of other kinds, or another depth of an encoder-decoder.
    """
    import jax.numpy as jnp

    merge, donor = planner.merge, planner.donor
    assert isinstance(donor, NativeModel)
    fields: dict[str, Any] = {}
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
            fields["num_layers"] = len(origins)
        fields |= _pattern(planner, config, origins)
    configs = [planner.models[path].model.config for path in merge.merged_models()]  # type: ignore[union-attr]
    for field in (
        "dtype",
        "param_dtype",
    ):  # of models that differ, so that their order does not decide
        dtype = promoted([jnp.dtype(getattr(config, field)) for config in configs]).name
        if field == "param_dtype":
            dtype = merge.out_dtype or merge.dtype or dtype
        if dtype != jnp.dtype(getattr(donor.model.config, field)).name:
            fields[field] = dtype
    return fields


def _pattern(
    planner: Planner, config: Any, origins: Sequence[tuple[str, int]]
) -> dict[str, tuple[str, ...]]:
    """Returns the field with the layers' kinds, unless the first model's pattern gives them."""
    sources = [(planner.models[path].model.config, layer) for path, layer in origins]  # type: ignore[union-attr]
    kinds = tuple(own.kind_names[layer] for own, layer in sources)
    deep = dataclasses.replace(config, num_layers=len(origins), layer_pattern=kinds)
    for i, (own, layer) in enumerate(sources):
        if own.layer_kind(layer) != deep.layer_kind(i):
            raise MergeError(
                f"{planner.merge.file}: layer {layer} of {origins[i][0]} has another window than layers of the first model: merge "
                "models of one architecture."
            )
    pattern = tuple(config.layer_pattern)
    repeated = pattern * -(-len(kinds) // len(pattern))
    if len(pattern) <= len(kinds) and kinds == repeated[: len(kinds)]:
        return {}
    return {"layer_pattern": kinds}


def by_array(config: Any, planned: Sequence[Planned]) -> dict[str, list[Planned]]:
    """Returns the tensors of each array of a model with this TransformerConfig, in the order of their rows."""
    depths = collections.Counter(
        stack for stack, _ in {(x.stack, x.layer) for x in planned if x.stack is not None}
    )
    result: dict[str, list[Planned]] = {}
    for x in planned:
        if x.stack is None or x.layer is None:
            path = x.rest
        else:
            block, own = x.layer, config
            if own.scan_layers:
                if "encoder" in x.stack.split("/"):
                    own = own.bidirectional(depths[x.stack])
                block, _ = layer_groups.place(own.layer_groups, x.layer)
            path = f"{x.stack}/block_{block}/{x.rest}"
        result.setdefault(path, []).append(x)
    return {path: sorted(parts, key=lambda x: x.layer or 0) for path, parts in result.items()}


def streamed(
    parts: Sequence[Planned], planner: Planner, workers: Workers, bar: Any
) -> StreamedArray:
    """Returns an array that is merged while it is written, a layer or a block of rows at a time."""
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
