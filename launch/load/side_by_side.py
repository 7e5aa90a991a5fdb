"""Several adapters of one base model, whose parameters are loaded once. Adapters of equal settings also share programs."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.launch.load.load_run import RunConfig
from espalier.launch.load.loaded_run import LoadedRun, LoadError


@contextlib.contextmanager
def load(
    config: RunConfig, checkpoint: str, adapters: Sequence[str], *, params: str, **options: Any
) -> Iterator[list[tuple[str | None, LoadedRun]]]:
    """Context manager: loads a run's model with each of its adapters, and enters the mesh.

    Runs whose adapters have equal settings have the same `model`: programs for one serve all, with other parameters.

    Args:
      config: configuration of the run.
      checkpoint: step or run directory.
      adapters: run or step directories of adapters of this checkpoint; none for the run itself.
      params: see launch/load/load_run.py.
      **options: further arguments of `RunConfig.load`.

    Yields:
      (directory, run with these adapters) in order; (None, the run) without adapters.

    Raises:
      LoadError: adapters of another base, or none; see also `RunConfig.load`.
    """
    from espalier.launch.load import hf_checkpoint
    from espalier.model.adapters.adapter import adapters_of
    from espalier.trainers.checkpoints import base_step, step_dir

    with config.load(checkpoint, params=params, **options) as base:
        if not adapters:
            yield [(None, base)]
            return
        if adapters_of(base.model) is not None:
            raise LoadError(
                f"--checkpoint={checkpoint} has adapters itself: give the model that --adapter={adapters[0]} was trained on."
            )
        if hf_checkpoint.is_hf(checkpoint):
            raise LoadError(
                f"--checkpoint={checkpoint} is a Hugging Face checkpoint, and --adapter={adapters[0]} belongs to a run: import it "
                f"with espalier convert --from_hf={checkpoint} --to=RUN, and give that run."
            )
        part = base_step.base_of(step_dir.resolve(checkpoint), params)
        digest = base_step.digest(part.entries)
        runs: list[tuple[str | None, LoadedRun]] = []
        for path in adapters:
            run = _adapted(base, path, params, digest, f"--checkpoint={checkpoint}")
            equal = next((x for _, x in runs if _is_equal(x.model, run.model)), run)
            shared = dataclasses.replace(run.config, model=equal.model)
            runs.append((path, dataclasses.replace(run, config=shared)))
        yield runs


def _adapted(base: LoadedRun, path: str, params: str, digest: str, where: str) -> LoadedRun:
    """Returns the run with the adapters in a directory; `digest` is of the parameters that `where` names."""
    from espalier.launch.load import run_model
    from espalier.model.adapters.adapter import adapters_of, check_settings
    from espalier.model.protocol import inference_model
    from espalier.trainers.checkpoints import state_tree

    model = inference_model(run_model.model(run=path, macro="--adapter"))
    if adapters_of(model) is None:
        raise LoadError(
            f"--adapter={path} is of a model without adapters: give a run that trained some, or a folder of convert "
            "--to_adapter."
        )
    arrays, meta, own_digest = _read(path, model, base.config, params)
    if own_digest != digest:
        raise LoadError(
            f"--adapter={path} has adapters of another base model than {where}, whose parameters have another digest: give "
            "the model that they were trained on."
        )
    check_settings(model, meta.get("adapters"), path)
    merged = state_tree.nest({**state_tree.flatten(base.params), **arrays})
    return dataclasses.replace(
        base, config=dataclasses.replace(base.config, model=model), params=merged
    )


def _read(
    path: str, model: Any, config: RunConfig, params: str
) -> tuple[Mapping[str, Any], Mapping[str, Any], str]:
    """Returns the adapters' arrays by path, the run's record, and the digest of their base's parameters."""
    import jax
    import jax.numpy as jnp

    from espalier.model.adapters.adapter import is_adapter
    from espalier.trainers import initialise, partitioning
    from espalier.trainers.checkpoints import base_step, state_tree, step_dir
    from espalier.trainers.checkpoints.array_files import read_verified

    mesh = partitioning.make_mesh(shape=config.mesh)
    abstract = initialise.abstract_params(model, mesh, partitioning.rules_named(config.rules))
    wanted = {name: leaf for name, leaf in state_tree.flatten(abstract).items() if is_adapter(name)}

    def read(step: Any) -> tuple[Mapping[str, Any], Mapping[str, Any], str]:
        recorded = step_dir.read_manifest(step)
        root, entries = recorded.params(params)
        meta = step_dir.read_record(step, recorded)["meta"]
        own = {name: tuple(x.shape) for name, x in entries.items() if is_adapter(name)}
        if own != {name: tuple(leaf.shape) for name, leaf in wanted.items()}:
            raise LoadError(
                f"--adapter={path} has other parameters than the adapters in its model.json: use the folder as it was written."
            )
        arrays = read_verified(
            step,
            recorded,
            {
                root + name: jax.ShapeDtypeStruct(
                    leaf.shape, jnp.dtype(entries[name].dtype), sharding=leaf.sharding
                )
                for name, leaf in wanted.items()
            },
        )
        named = {name: arrays[root + name].astype(leaf.dtype) for name, leaf in wanted.items()}
        alone = len(own) == len(entries) and base_step.META in meta
        base = base_step.added(meta).base_of(entries)
        digest = meta[base_step.META]["digest"] if alone else base_step.digest(base)
        return named, meta, digest

    return step_dir.newest_good(path, read)


def _is_equal(one: Any, other: Any) -> bool:
    """Returns whether two models compute the same of the same parameters."""
    return repr(one) == repr(other) and one.config == other.config
