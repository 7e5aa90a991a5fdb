"""Applies --model_args of lm-evaluation-harness to a run (launch/evaluation/lm_eval/model.py)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from data.text import spelling
from launch.run.load_run import LoadedRun, LoadError
from model.kernels.platform import target_platform
from model.transforms import layer_stack

_LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")  # in the harness's order
_MAX_LENGTH = 2048  # if the model has no maximum length, as in the harness
_DTYPES = ("float32", "bfloat16", "float16")
_CACHE = "cache_"  # prefix of the policy's settings in model_args


def default_batch_tokens() -> int:
    # Few tokens saturate a CPU, and small batches have less padding.
    return 2048 if target_platform() == "cpu" else 16384


def unroll(run: LoadedRun) -> None:
    """Replaces the stacked layers of a run by unrolled ones, once for all users of the run."""
    import jax

    model, config = run.model, run.model.config
    if config.scan_layers:
        run.params = jax.jit(lambda params: layer_stack.unroll(params, config))(run.params)
        run.config = dataclasses.replace(run.config, model=layer_stack.unrolled(model))


def computing_in(dtype: str, model: Any) -> Any:
    if dtype not in _DTYPES:
        raise LoadError(f"--model_args: dtype={dtype} is none of {', '.join(_DTYPES)}.")
    return model.clone(config=dataclasses.replace(model.config, dtype=dtype))


def policy_settings(others: Mapping[str, Any], *, known: Iterable[str]) -> dict[str, str]:
    """Returns the settings of the cache policy, as texts; raises LoadError for any other argument.

    Args:
      others: unknown arguments of the model.
      known: names of the known arguments, for the error.
    """
    if unknown := [name for name in others if not name.startswith(_CACHE)]:
        known = [name for name in known if name not in ("self", "others")]
        raise LoadError(
            f"--model_args: there is no {unknown[0]!r} ({spelling.nearest(unknown[0], known)}). "
            f"Arguments: {', '.join(known)}, and {_CACHE}NAME for the settings of the cache policy."
        )
    return {name.removeprefix(_CACHE): str(value) for name, value in others.items()}


def max_length(run: LoadedRun, asked: int | None) -> int:
    learned = run.model.max_length
    if asked is not None:
        if asked < 1 or (learned is not None and asked > learned):
            limit = f", and the model has learned {learned} positions" if learned else ""
            raise LoadError(f"--model_args: max_length={asked} must be at least 1{limit}.")
        return asked
    if learned is not None:
        return learned
    published = run.meta.get("hf", {}).get("config", {})
    return next((published[key] for key in _LENGTH_KEYS if key in published), _MAX_LENGTH)


def rows_of_a_batch(asked: int | str | None, most: int | None) -> int | None:
    """Returns the maximum rows of a batch; None for as many as its tokens allow."""
    if asked is None or str(asked).startswith("auto") or int(asked) == 1:
        return most
    if int(asked) < 1:
        raise LoadError(f"--batch_size={asked} must be at least 1, or auto.")
    return int(asked) if most is None else min(int(asked), most)
