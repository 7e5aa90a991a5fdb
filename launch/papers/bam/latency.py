"""Seconds to read a prompt, to answer it and to score a text, of a dense model, BTX and BAM beside each other.

The models have the shapes of the paper's 590M seed, with random parameters: routers send tokens to different experts. All
compute in float32. In a round each model has its turn, in a random order, so that a change of the machine's load meets all of
them; a model's time is the median over rounds. A process is one session; compilation is not counted.

Shapes: B batch, T length, V vocabulary.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.launch.papers.bam import experiment
from espalier.model.kv_cache.policies import policy_named
from espalier.trainers.decoding.decode import decode
from espalier.trainers.decoding.prefill import prefill
from espalier.trainers.decoding.settings import Settings

ARMS = ("dense", "btx", "bam", "bam_shared_kv")
PROMPT, NEW = 256, 16  # tokens, as in the paper's table
ROUNDS = 3
STD = 0.02  # of the parameters
UNROLLED = ("config.TransformerConfig.scan_layers=False", "DTYPE='float32'")


def session(seed: int, *, rounds: int = ROUNDS, bindings: Sequence[str] = ()) -> dict[str, Any]:
    """Returns {arm: {"read", "generate", "score": seconds, "parameters": count}, ...} and the 'device'.

    Args:
      seed: of the parameters, the prompt and the order of turns.
      rounds: of which the median is taken.
      bindings: of gin, that change the models.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[Any, jax.Array] = {}
    programs, counts = {}, {}
    for arm in ARMS:
        model = experiment.paper_recipe(arm, PROMPT, *UNROLLED, *bindings).model
        params, counts[arm] = _random(model, rng, drawn)
        tokens_BT = jnp.asarray(rng.integers(1, model.config.vocab_size, (1, PROMPT)), jnp.int32)
        programs[arm] = _programs(model, params, tokens_BT)
    seconds: dict[str, dict[str, list[float]]] = {
        arm: {name: [] for name in programs[arm]} for arm in ARMS
    }
    for _ in range(rounds):
        for arm in rng.permutation(ARMS):
            for name, run in programs[arm].items():
                began = time.perf_counter()
                jax.block_until_ready(run())
                seconds[arm][name].append(time.perf_counter() - began)
    medians = {
        arm: {name: round(statistics.median(values), 5) for name, values in by_name.items()}
        for arm, by_name in seconds.items()
    }
    arms = {arm: {**medians[arm], "parameters": counts[arm]} for arm in ARMS}
    return {**arms, "device": jax.devices()[0].device_kind}


def _random(model: Any, rng: np.random.Generator, drawn: dict[Any, jax.Array]) -> tuple[Any, int]:
    """Returns random parameters and their number; those outside of the blocks, most of all, are the same arrays in all models."""
    import flax.linen as nn

    from espalier.trainers import initialise

    shapes = nn.meta.unbox(initialise.abstract_variables(model)["params"])

    def draw(path: Any, shape: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if name.endswith("['scale']"):  # of norms
            return jnp.ones(shape.shape, jnp.float32)
        key = None if "layers" in name else (name, shape.shape)
        if key in drawn:
            return drawn[key]
        values = jnp.asarray(STD * rng.standard_normal(shape.shape, np.float32))
        if key is not None:
            drawn[key] = values
        return values

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return params, sum(leaf.size for leaf in jax.tree.leaves(params))


def _programs(model: Any, params: Any, tokens_BT: jax.Array) -> Mapping[str, Callable[[], Any]]:
    """Returns the compiled programs of a model, each run once."""
    policy, batch = policy_named("full"), len(tokens_BT)
    lengths_B = jnp.full(batch, tokens_BT.shape[1], jnp.int32)
    # The first new token follows from the prompt's logits.
    settings = Settings(max_new_tokens=NEW + 1)

    @jax.jit
    def read(params: Any, tokens_BT: jax.Array) -> Any:
        return prefill(model, params, policy, tokens_BT, lengths_B, room=NEW)

    @jax.jit
    def generate(params: Any, logits_BV: jax.Array, caches: Any) -> Any:
        keys_B = jax.random.split(jax.random.key(0), batch)
        active_B = jnp.ones(batch, bool)
        return decode(
            model, params, policy, logits_BV, caches, lengths_B, active_B, keys_B, settings
        )

    @jax.jit
    def score(params: Any, tokens_BT: jax.Array) -> jax.Array:
        logits_BTV = model.apply({"params": params}, tokens_BT[:, :-1])
        of_next_BT = jnp.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
        return of_next_BT - jax.nn.logsumexp(logits_BTV, axis=-1)

    logits_BV, caches = jax.block_until_ready(read(params, tokens_BT))
    programs = {
        "read": functools.partial(read, params, tokens_BT),
        "generate": functools.partial(generate, params, logits_BV, caches),
        "score": functools.partial(score, params, tokens_BT),
    }
    for run in programs.values():
        jax.block_until_ready(run())
    return programs


def main(argv: Sequence[str] | None = None) -> int:
    """Measures one session and writes it as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("json", help="write the times to this JSON file")
    parser.add_argument("seed", type=int, help="random seed of the session")
    flags = parser.parse_args(argv)
    pathlib.Path(flags.json).write_text(json.dumps(session(flags.seed)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
