"""Trains DPO with LoRA on eight simulated devices whose gradients are summed in bfloat16, in several orders.

The model is t5x_configs/models/tiny.gin in bfloat16, with the adapters of methods/adapters/lora.gin; the data are random pairs whose
chosen completions have more of one half of the tokens. Only the sum of gradients over the devices differs between runs of a seed.
Writes docs/evidence/numerics.json and its figure, in about four minutes of a core:

  python -m tests.numerics
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from espalier.launch.config import gin_config
from espalier.launch.precompile import precompile
from espalier.launch.precompile.__main__ import RECIPE, UNREAD
from espalier.model import axes
from espalier.trainers import initialise, inputs, trainable
from espalier.trainers.objectives.gradients import make_gradients
from espalier.trainers.objectives.own_base import OwnBase
from espalier.trainers.optim import schedules
from espalier.trainers.optim.gradient_terms import make_optimizer
from espalier.trainers.preference.losses import direct
from espalier.trainers.preference.objectives.preference import preference
from espalier.trainers.recipe import Recipe
from tests.numerics.orders import DEVICES, ORDERS, total

DOCS = pathlib.Path(__file__).parent.parent.parent / "docs" / "evidence"
LENGTH, ROWS, RATE = 48, 16, 5e-3
PROMPT, COMPLETION, TOKENS, SHARE = 8, 16, 128, 0.8
FILES = [
    f"t5x_configs/{name}.gin"
    for name in ("models/tiny", "runs/preference", "methods/adapters/lora")
]
SETTINGS = [
    *("TRAIN_STEPS=100", f"BATCH_SIZE={ROWS}", f"TASK_FEATURE_LENGTHS={{'targets': {LENGTH}}}"),
    *("DTYPE='bfloat16'", "attention.Attention.implementation='xla'"),
]
STARTS = {
    "B at 0": [],
    "A at 0": ["LORA_A_INIT=@jax.nn.initializers.zeros", "LORA_B_INIT=@lora.uniform_fan_in"],
}


def _recipe(bindings: list[str]) -> Recipe:
    entry = "espalier.launch.train:train"
    words = [*SETTINGS, *bindings]
    config = gin_config.load(FILES, words, entry=entry, arguments=RECIPE, unused=UNREAD)
    return config.arguments()["recipe"]


def batch(seed: int, step: int) -> dict[str, np.ndarray]:
    """Returns rows of one pair each; a token of a chosen completion is below TOKENS with probability SHARE, else above."""
    rng = np.random.default_rng((seed, step))
    prompts = rng.integers(4, 2 * TOKENS, (ROWS, PROMPT))
    low = rng.random((ROWS, 2, COMPLETION)) < np.array([SHARE, 1 - SHARE])[:, None]
    ids = rng.integers(4, TOKENS, low.shape) + np.where(low, 0, TOKENS)
    pairs = [
        [(prompt.tolist(), side.tolist()) for side in both]
        for prompt, both in zip(prompts, ids, strict=True)
    ]
    return {
        **inputs.pack(pairs, np.zeros(ROWS), length=LENGTH),
        "pair_weights": np.ones((ROWS, 1), np.float32),
        "chosen_tokens_per_pair": np.full(ROWS, COMPLETION, np.float32),
    }


class Example:
    """The compiled parts of the example; starts of the adapters differ in `init` alone."""

    def __init__(self):
        recipes = {start: _recipe(bindings) for start, bindings in STARTS.items()}
        recipe = next(iter(recipes.values()))
        self.mask, boxed = (
            (p := precompile.resolved(recipe, jax.devices()[:DEVICES])).mask,
            p.boxed_params,
        )
        optimizer = make_optimizer(
            recipe.optimizer, learning_rate=schedules.as_schedule(RATE), boxed_params=boxed
        )
        reference = OwnBase(model=recipe.model)
        objective = preference(model=recipe.model, losses=[direct.dpo], reference=reference)
        gradients = make_gradients(objective, mask=self.mask)
        mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
        split = {"in_specs": (P(), P("devices")), "out_specs": P("devices"), "check_vma": False}

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, **split)
        def local(params, rows):
            grads, out, _ = gradients(params, rows, jax.random.key(0), {}, {})
            flat, _ = ravel_pytree(grads)
            return flat.astype(jnp.bfloat16)[None], out.sum[None], out.weight[None]

        @jax.jit
        def update(params, state, terms_PN, weight, order):
            trained, frozen = trainable.split(params, self.mask)
            _, unravel = ravel_pytree(trained)
            ways = [functools.partial(total, order=name) for name in ORDERS]
            grads = unravel(jax.lax.switch(order, ways, terms_PN) / weight)
            updates, state = optimizer.update(grads, state, trained)
            return trainable.join(optax.apply_updates(trained, updates), frozen), state

        def init(recipe, seed):
            key = jax.random.key(seed)
            boxed = initialise.variables(recipe.model, key, recipe.inputs_spec)["params"]
            params = jax.tree.map(axes.unboxed, boxed, is_leaf=axes.is_boxed)
            return params, optimizer.init(trainable.split(params, self.mask)[0])

        self.local, self.update = local, update
        self.init = {s: jax.jit(functools.partial(init, one)) for s, one in recipes.items()}

    def run(
        self, start: str, seed: int, order: str, steps: int
    ) -> tuple[list[float], np.ndarray, np.ndarray]:
        """Returns the losses before each update, the trained parameters after all, and the gradients [P, N] of the first."""
        params, state = self.init[start](seed)
        losses, first = [], np.zeros(0)
        for step in range(steps):
            terms_PN, sums_P, weights_P = self.local(params, batch(seed, step))
            first = np.asarray(terms_PN, np.float64) if step == 0 else first
            weight = weights_P.sum()
            losses.append(float(sums_P.sum() / weight))
            params, state = self.update(
                params, state, jax.device_get(terms_PN), weight, ORDERS.index(order)
            )
        trained, _ = trainable.split(params, self.mask)
        return losses, np.asarray(ravel_pytree(trained)[0], np.float64), first


def signs(first_PN: np.ndarray) -> dict[str, float]:
    """Returns the share of gradients whose sum has another sign, or becomes 0, in each order; and how much terms cancel.

    Elements that are 0 on all devices, those of the factor that is multiplied by 0, are left out.
    """
    live_PN = first_PN[:, np.abs(first_PN).sum(0) > 0]
    exact_N = live_PN.sum(0)
    shares = {
        order: float(
            np.mean(np.sign(total(jnp.asarray(live_PN, jnp.float32), order)) != np.sign(exact_N))
        )
        for order in ORDERS
    }
    cancelled = float(np.median(np.abs(exact_N) / np.abs(live_PN).sum(0)))
    return {"sum over sum of sizes, median": cancelled, **shares}


def measure(seeds: int, steps: int) -> dict[str, object]:
    runs = []
    example = Example()
    for start in STARTS:
        for seed in range(seeds):
            reference = np.zeros(0)
            for order in ORDERS:
                losses, trained, first = example.run(start, seed, order, steps)
                reference = trained if order == "float32" else reference
                distance = np.linalg.norm(trained - reference) / np.linalg.norm(reference)
                runs.append(
                    {
                        **{"start": start, "order": order, "seed": seed},
                        "losses": [round(loss, 7) for loss in losses],
                        "distance": float(f"{distance:.3g}"),
                        **({"first signs": signs(first)} if order == "float32" else {}),
                    }
                )
                print(
                    start,
                    seed,
                    order,
                    losses[0],
                    losses[-1],
                    runs[-1]["distance"],
                    round(time.process_time()),
                    flush=True,
                )
    settings = {"rows": ROWS, "tokens of a row": LENGTH, "learning rate": RATE, "devices": DEVICES}
    return {
        "command": "python -m tests.numerics",
        "settings": {**settings, "updates": steps},
        "runs": runs,
    }


def figure(document: dict) -> object:
    """Returns the losses of both starts, and how far those of each order are from the run with sums in float32."""
    from espalier.launch.plots import panels

    made, (left, *right) = panels.panels(3, (9.2, 3.5))
    of = {(r["start"], r["order"], r["seed"]): np.array(r["losses"]) for r in document["runs"]}
    seeds = sorted({seed for *_, seed in of})
    updates = np.arange(document["settings"]["updates"])
    for start, colour in zip(STARTS, (panels.BLUE, panels.ORANGE), strict=True):
        for order in ORDERS:
            losses = np.array([of[start, order, seed] for seed in seeds])
            label = start if order == "float32" else None
            left.plot(updates, losses.mean(0), color=colour, lw=1, label=label)
            left.fill_between(updates, losses.min(0), losses.max(0), color=colour, alpha=0.04, lw=0)
    left.axhline(np.log(2), color=panels.GREY, ls="--", lw=1)
    left.text(updates[-1], np.log(2), "ln 2", ha="right", va="bottom", color=panels.GREY)
    left.set(xlabel="update", ylabel="DPO loss (nats per pair)", title="five orders of sums")
    left.legend(frameon=False, loc="lower left")
    for axis, start in zip(right, STARTS, strict=True):
        learnt = np.median([np.log(2) - of[start, "float32", seed] for seed in seeds], 0)
        axis.plot(updates[1:], learnt[1:], color=panels.GREY, ls="--", lw=1.2, label="ln 2 - loss")
        for order, colour in zip(ORDERS[1:], panels.colours(len(ORDERS) - 1), strict=True):
            gaps = np.array([of[start, order, seed] - of[start, "float32", seed] for seed in seeds])
            gaps = np.maximum(np.abs(gaps[:, 1:]), 1e-7)
            axis.fill_between(updates[1:], gaps.min(0), gaps.max(0), color=colour, alpha=0.1, lw=0)
            axis.plot(updates[1:], np.median(gaps, 0), color=colour, lw=1, label=order)
        axis.set(yscale="log", ylim=(1e-6, 10), xlabel="update", title=f"{start}: gap to float32")
        axis.legend(frameon=False, fontsize=9, loc="upper center", ncols=2, columnspacing=1)
    right[0].set_ylabel("difference of losses (nats per pair)")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="runs of each start and order (default 5)"
    )
    parser.add_argument("--updates", type=int, default=60, help="updates of a run (default 60)")
    parser.add_argument(
        "--plot_only", action="store_true", help="draws the figure from the JSON file"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=DOCS, metavar="DIR", help="default: docs/evidence"
    )
    flags = parser.parse_args()
    target = flags.out / "numerics.json"
    if not flags.plot_only:
        document = measure(flags.seeds, flags.updates)
        runs = ",\n".join(json.dumps(run) for run in document.pop("runs"))
        target.write_text(f'{json.dumps(document)[:-1]}, "runs": [\n{runs}\n]}}\n')
    figure(json.loads(target.read_text())).savefig(flags.out / "images" / "numerics.png", dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
