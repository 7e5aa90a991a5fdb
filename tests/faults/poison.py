"""A language model's objective that spoils some batches, and what it spoils them with."""

from typing import Any

import jax
import jax.numpy as jnp

from espalier.trainers.objectives import lm

KINDS = ("nan", "inf", "gradient", "spike")


@jax.custom_vjp
def _bad_gradient(x: jax.Array, on: jax.Array) -> jax.Array:
    del on
    return x


_bad_gradient.defvjp(lambda x, on: (x, on), lambda on, g: (jnp.where(on, jnp.nan, g), None))


def spoilt(loss: jax.Array, on: jax.Array, kind: str) -> jax.Array:
    """Returns a summed loss, spoilt where `on`: NaN, infinite, with a NaN gradient, or 50 times as large."""
    if kind == "gradient":
        return _bad_gradient(loss, on)
    bad = {"nan": jnp.nan, "inf": jnp.inf, "spike": loss * 50}[kind]
    return jnp.where(on, bad, loss)


def objective(
    *, model: Any, num_sources: int, kind: str = "nan", every: int = 9, at: int = 0
) -> Any:
    """Returns language modelling in which batches whose digest is `at` modulo `every` are spoilt."""
    base = lm.language_modelling(model=model, num_sources=num_sources)

    def loss_fn(params: Any, batch: Any, rng: Any) -> Any:
        out = base(params, batch, rng)
        tokens = batch["decoder_target_tokens"].astype(jnp.uint32).reshape(-1)
        places = 1 + jnp.arange(tokens.size, dtype=jnp.uint32) % 97
        on = jnp.sum(tokens * places) % every == at
        total = spoilt(out.sum, on, kind)
        metrics = dict(out.metrics)
        if kind != "gradient":
            metrics["loss"] = (total, metrics["loss"][1])
        return out.replace(sum=total, metrics=metrics)

    return loss_fn
