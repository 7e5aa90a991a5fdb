"""Shares of each task's tokens by expert and layer, and cosines of the experts' domain vectors.

Example, on a mixture of experts:

  espalier evaluate routing --checkpoint=runs/bam --trust_config --tasks lag_general lag_4 --figure=/tmp/r.png

Rows are from the validation splits of tasks in the run's config.gin; reading it calls the functions that it names, hence
--trust_config. A mixture that `espalier upcycle` has just made has no data of its own: --gin_file and --gin.NAME=VALUE give
them, such as --gin_file=t5x_configs/data/files_base.gin --gin.FILES="'*.jsonl'" --gin.MIXTURE_OR_TASK_NAME="'files'", and show
the routing before any training. For each layer and task, the table has the mean probability of every expert over tokens, and in brackets the share of tokens with this expert as first choice.

Shapes: B batch, T length, E experts, L layers of a router, M width of a domain's embedding, D model width.
"""

import argparse
import functools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from espalier.common.storage import output_files
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.evaluate import held_out
from espalier.launch.inference import row_files
from espalier.launch.load import load_run
from espalier.model import layer_groups

ROWS = 256
_FLAGS = ("tasks", "rows")
Tables = dict[str, list[list[float]]]  # router ('mlp', 'attention') -> by layer, by expert

_DOMAINS = re.compile(r"(ema_params|params)/(layers/block_(\d+)/mlp/router)/domains")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_trust_flag(load_run.add_flags(parser))
    setting_flags.add(parser, routing, names=_FLAGS)
    parser.add_argument(
        "--json", metavar="FILE", help="also write the shares by layer to this JSON file"
    )
    parser.add_argument(
        "--figure", metavar="FILE", help="draw the first choices, task by expert, as this PNG file"
    )


def _run(start: cli.Start) -> None:
    import jax

    flags = start.flags
    row_files.check_output(flags.json, "json")
    row_files.check_output(flags.figure, "figure")
    given = setting_flags.given(flags, routing, (*_FLAGS, "params"))
    shares = _measured(flags.checkpoint, start.config.arguments(), **given)
    if jax.process_index() != 0:
        return
    print(table(shares))
    if flags.json:
        row_files.write_json(flags.json, shares)
    if flags.figure:
        kind = pathlib.PurePath(flags.figure).suffix[1:] or "png"
        with output_files.opened(flags.figure) as file:
            figure(shares["chosen"], shares["experts"]).savefig(file, format=kind, dpi=130)


def routing(
    run_dir: str,
    *,
    tasks: Annotated[Sequence[setting_flags.Name], setting_flags.MANY] | None = None,
    rows: int = ROWS,
    params: str = "auto",
    trust_config: bool = False,
) -> dict[str, Any]:
    """Returns the shares of a run's experts on held-out rows; sweeps call it as an evaluation.

    Args:
      run_dir: run or step directory.
      tasks: evaluate these tasks (default: those of MIXTURE_OR_TASK_NAME).
      rows: maximum number of rows of each task.
      params: see launch/load/load_run.py.

    Returns:
      {"domains": {task: Tables}, "chosen": {task: Tables}, "gates": {task: {router: [by layer]}}, "tokens": {task: count},
      "experts": names}. "domains" has the mean probability of each expert, "chosen" the share of tokens with this expert as
      first choice, "gates" the mean probability of the first choice. Names are from espalier upcycle, and empty if it did not
      make the experts.

    Raises:
      LoadError: the run has no router, or `rows` is not positive.
      ValueError: none of the tasks has a held-out split.
    """
    from espalier.launch.config import gin_config

    _check_rows(rows)
    files = load_run.whole_files(run_dir, (), trust_config=trust_config, own=held_out.GIN)
    config = gin_config.load(entry="espalier.launch.evaluate.held_out:evaluate", defaults=files)
    return _measured(run_dir, config.arguments(), tasks=tasks, rows=rows, params=params)


def _check_rows(rows: int) -> None:
    if rows < 1:
        raise load_run.LoadError(f"--rows={rows} must be at least 1.")


def _measured(
    run_dir: str,
    configured: Mapping[str, Any],
    *,
    tasks: Sequence[str] | None = None,
    rows: int = ROWS,
    params: str,
) -> dict[str, Any]:
    """Returns `routing` of a run with the arguments of `held_out.evaluate`, which have its recipe and data."""
    import jax

    from espalier.trainers import partitioning
    from espalier.trainers.batches import global_batch

    _check_rows(rows)
    recipe = configured["recipe"]
    if not _routers(recipe.model):
        raise load_run.LoadError(
            f"MODEL has no router: give a mixture of experts, such as a run of methods/bam/btx.gin, as --checkpoint ({run_dir}), "
            "and as --gin_file files of data that set no MODEL."
        )
    program = recipe.program()
    values, meta = load_run.restore(
        run_dir, recipe.model, program.abstract_state.params, params=params
    )
    streams = held_out.open_streams(
        configured["stream"], configured["register"], tasks, configured["mixture_or_task_name"]
    )
    for stream in streams:
        held_out.check_vocabulary(stream, meta, run_dir)
    count = jax.jit(functools.partial(_sums, recipe.model))
    probable, chosen, gates, tokens = {}, {}, {}, {}
    with partitioning.use_mesh(program.mesh, program.rules):
        for stream in streams:
            steps = min(stream.num_steps, math.ceil(rows / stream.batch_size))
            total: Any = None
            for step in range(steps):
                batch = global_batch(stream, step, program.batch_sharding)
                left = min(rows - step * stream.batch_size, stream.batch_size)
                sums = jax.device_get(count(values, batch, left))
                total = sums if total is None else jax.tree.map(np.add, total, sums)
            *parts, all_tokens = total
            probable[stream.name], chosen[stream.name], tops = (
                _shares(part, float(all_tokens)) for part in parts
            )
            gates[stream.name] = {router: [gate for (gate,) in tops[router]] for router in tops}
            tokens[stream.name] = int(all_tokens)
    shares = {"domains": probable, "chosen": chosen, "gates": gates}
    return {**shares, "tokens": tokens, "experts": _experts(meta)}


def _experts(meta: Mapping[str, Any]) -> list[str]:
    """Returns the names of the experts, if the run's mixture was made from named experts."""
    return list(meta.get("upcycled", {}).get("experts", ()))


def _sums(
    model: Any, params: Any, batch: Mapping[str, Any], rows: int
) -> tuple[dict, dict, dict, Any]:
    """Returns sums over tokens of the first rows, by router and layer, and the tokens: of probabilities, first choices, and
    their probabilities.

    The first two are [E], the last is [1].
    """
    import jax
    import jax.numpy as jnp

    segments_BT = batch["decoder_segment_ids"]
    _, written = model.apply(
        {"params": params},
        batch["decoder_input_tokens"],
        positions_BT=batch["decoder_positions"],
        segments_BT=segments_BT,
        mutable=["intermediates"],
        method="hidden",
    )
    is_read_B1 = jnp.arange(len(segments_BT))[:, None] < rows
    real_BT = ((segments_BT != 0) & is_read_B1).astype(jnp.float32)
    probable, chosen, gates = {}, {}, {}
    for router, layers in _routers(model).items():
        sown = functools.partial(_sown, model.config, written["intermediates"], router=router)
        probs = [sown(layer) for layer in layers]
        # Biases that balance the load enter the choice: the first expert need not be the most probable one.
        first = [sown(layer, name="router_experts")[..., 0] for layer in layers]
        firsts = [jax.nn.one_hot(at, x.shape[-1]) for at, x in zip(first, probs, strict=True)]
        tops = [(x * one).sum(-1, keepdims=True) for x, one in zip(probs, firsts, strict=True)]
        probable[router], chosen[router], gates[router] = (
            [jnp.einsum("bte,bt->e", x_BTE, real_BT) for x_BTE in each]
            for each in (probs, firsts, tops)
        )
    return probable, chosen, gates, real_BT.sum()


def _routers(model: Any) -> dict[str, list[int]]:
    """Returns the layers that have a router, by kind of expert: 'attention' or 'mlp'."""
    settings = model.layer_settings()
    routers = {
        "attention": [i for i, layer in enumerate(settings) if layer.attention.experts],
        "mlp": [i for i, layer in enumerate(settings) if layer.mlp.experts],
    }
    return {router: layers for router, layers in routers.items() if layers}


def _sown(
    config: Any,
    intermediates: Mapping[str, Any],
    layer: int,
    router: str,
    name: str = "router_probs",
) -> Any:
    """Returns the probabilities [B, T, E], or the experts [B, T, K] in their order, that a layer's router sowed."""
    block, index = layer, None
    if config.scan_layers:
        block, index = layer_groups.place(config.layer_groups, layer)
    (values,) = intermediates["layers"][f"block_{block}"][router][name]
    return values if index is None else values[index]


def _shares(sums: Mapping[str, Sequence[np.ndarray]], tokens: float) -> Tables:
    """Returns shares of the tokens by router, layer and expert."""
    return {
        router: [[round(float(x) / tokens, 5) for x in sum_E] for sum_E in layers]
        for router, layers in sums.items()
    }


def structure(run_dir: str, *, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns cosines of the experts' domain vectors before and after the projection, not levelled; sweeps use it as an evaluation.

    Args:
      run_dir: run or step directory of a model with projection routers (methods/nexus/nexus.gin).
      names: names of the domains, in the order of the experts; None for the experts' names, or numbers.

    Returns:
      {"domains": names, "vectors": [[cosine]], "projected": {layer: [[cosine]]}}.

    Raises:
      LoadError: the model has no such router, or its number of experts is not that of `names`.
    """
    from espalier.model.nexus.domain_router import expert_vectors
    from espalier.trainers.checkpoints import step_dir
    from espalier.trainers.checkpoints.array_files import StoredArray

    step = step_dir.resolve(run_dir)
    stored = step_dir.read_manifest(step).arrays
    matches = [match for name in sorted(stored) if (match := _DOMAINS.fullmatch(name))]
    # Like other commands, this one uses averaged parameters if a run has them.
    averaged = any(match[1] == "ema_params" for match in matches)
    root = "ema_params" if averaged else "params"
    matches = [match for match in matches if match[1] == root]
    if not matches:
        raise load_run.LoadError(
            f"{run_dir} has no projection router: give a run of methods/nexus/nexus.gin."
        )
    arrays = {match[0]: stored[match[0]].shape for match in matches}
    stacked = any(len(shape) == 3 for shape in arrays.values())
    groups = layer_groups.in_stacks(arrays, scanned=stacked)[f"{root}/layers"]
    projected = {}
    for match in matches:
        kernels = {
            part: StoredArray(step, f"{root}/{match[2]}/{part}/kernel").read()
            for part in ("gate", "up", "down")
        }
        domains = StoredArray(step, match[0]).read()
        layers = layer_groups.layers_of(groups, int(match[3]))
        for i, domains_EM in enumerate(domains if stacked else domains[None]):
            router = {
                part: {"kernel": kernel[i] if stacked else kernel}
                for part, kernel in kernels.items()
            }
            projected[layers[i]] = cosines(expert_vectors(router, domains_EM))
    names = names or _experts(step_dir.read_meta(run_dir)) or [*map(str, range(len(domains_EM)))]
    if len(names) != len(domains_EM):
        raise load_run.LoadError(
            f"{run_dir} has {len(domains_EM)} experts; `names` has {len(names)} names of domains."
        )
    return {
        "domains": list(names),
        "vectors": cosines(domains_EM),  # the same in every layer
        "projected": {str(layer): projected[layer] for layer in sorted(projected)},
    }


def cosines(vectors_EM: np.ndarray) -> list[list[float]]:
    """Returns the cosines of all pairs of vectors; 0 if one of them is 0."""
    vectors_EM = np.asarray(vectors_EM, np.float64)
    norms_E = np.linalg.norm(vectors_EM, axis=-1, keepdims=True)
    unit_EM = vectors_EM / np.where(norms_E, norms_E, 1.0)
    return np.round(unit_EM @ unit_EM.T, 5).tolist()


_CELLS = "mean probability (share of first choices)"


def table(shares: Mapping[str, Any]) -> str:
    """Returns a table for each router and layer."""
    probable, chosen = shares["domains"], shares["chosen"]
    width = max(map(len, (*probable, "task")))
    lines = []
    for router, layers in next(iter(probable.values())).items():
        count = len(layers[0])
        names = shares["experts"]
        if len(names) != count:
            names = [f"expert {e}" for e in range(count)]
        space = max(15, *(len(name) + 2 for name in names))
        heads = "".join(f"{name:>{space}}" for name in names)
        for layer in range(len(layers)):
            lines += [
                "",
                f"router of {router}, layer {layer}: {_CELLS}",
                f"{'task':{width}}{heads}",
            ]
            for task in probable:
                pairs = zip(probable[task][router][layer], chosen[task][router][layer], strict=True)
                cells = "".join(f"{f'{p:.3f} ({c:.3f})':>{space}}" for p, c in pairs)
                lines.append(f"{task:{width}}{cells}")
            loads_E = np.mean([chosen[task][router][layer] for task in chosen], axis=0)
            lines.append(f"largest load, all tasks in equal parts: {loads_E.max():.3f}")
    meaning = "mean probability of each expert (share of the tokens whose first choice it is)"
    return "\n".join([meaning, *lines])


def figure(domains: Mapping[str, Mapping[str, Any]], experts: Sequence[str] = ()) -> Any:
    """Returns a figure of the shares of first choices: task by expert, for each router and layer.

    Args:
      domains: task -> router -> [layer][expert].
      experts: names of the experts; a router with another number of experts gets numbers instead.
    """
    from espalier.launch.plots import panels

    tables = {
        router: np.array([domains[task][router] for task in domains])  # [task, layer, expert]
        for router in next(iter(domains.values()))
    }
    layers = max(values.shape[1] for values in tables.values())
    names = {
        router: list(experts) if len(experts) == values.shape[-1] else range(values.shape[-1])
        for router, values in tables.items()
    }
    size = (len(domains), max(values.shape[-1] for values in tables.values()))
    drawn, axes = panels.heat_map_grid(len(tables), layers, size)
    for line, (router, values) in zip(axes, tables.items(), strict=True):
        shown = {f"layer {i}": values[:, i] for i in range(values.shape[1])}
        for panel, (title, matrix) in zip(line, shown.items(), strict=False):
            panels.heat_map(
                panel,
                matrix,
                list(domains),
                [str(name) for name in names[router]],
                title=f"router of {router}, {title}",
                row_names=panel is line[0],
            )
            panel.set_xlabel("expert", fontsize=8)
        line[0].set_ylabel("tokens of the task", fontsize=8)
        for unused in line[len(shown) :]:
            unused.set_visible(False)
    drawn.suptitle("share of first choices", fontsize=10)
    return drawn


main = load_run.trusting_command(
    __doc__,
    "evaluate routing",
    _run,
    _add_flags,
    entry="espalier.launch.evaluate.held_out:evaluate",  # which reads the same model and data
    own=held_out.GIN,
)

if __name__ == "__main__":
    raise SystemExit(main())
