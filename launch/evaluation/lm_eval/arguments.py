"""Applies --model_args of lm-evaluation-harness to a run (launch/evaluation/lm_eval/model.py)."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from espalier.common import spelling
from espalier.launch.run.load_run import LoadedRun, LoadError
from espalier.model.kernels.platform import target_platform

_LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")  # in the harness's order
_MAX_LENGTH = 2048  # if the model has no maximum length, as in the harness
_DTYPES = ("float32", "bfloat16", "float16")
_CACHE = "cache_"  # prefix of the policy's settings in model_args


def default_batch_tokens() -> int:
    # Few tokens saturate a CPU, and small batches have less padding.
    return 2048 if target_platform() == "cpu" else 16384


def default_generation_tokens() -> int:
    # A CPU reads all weights for each new token of a batch, which a larger batch shares.
    return 8192 if target_platform() == "cpu" else 16384


def computing_in(dtype: str, model: Any) -> Any:
    if dtype not in _DTYPES:
        raise LoadError(f"--model_args: dtype={dtype} must be one of {', '.join(_DTYPES)}.")
    return model.clone(config=dataclasses.replace(model.config, dtype=dtype))


def policy_settings(others: Mapping[str, Any], *, known: Iterable[str]) -> dict[str, str]:
    """Returns the settings of the cache policy among the unknown arguments `others`; raises LoadError for any other."""
    if unknown := [name for name in others if not name.startswith(_CACHE)]:
        known = [name for name in known if name not in ("self", "others")]
        raise LoadError(
            f"--model_args: there is no {unknown[0]!r} ({spelling.nearest(unknown[0], known)}). "
            f"Arguments: {', '.join(known)}, and {_CACHE}NAME for the settings of the cache policy."
        )
    return {name.removeprefix(_CACHE): str(value) for name, value in others.items()}


def max_length(run: LoadedRun, length: int | None) -> int:
    """Returns the maximum length of inputs; `length` is the argument of --model_args."""
    learned = run.model.max_length
    if length is None:
        published = run.meta.get("hf", {}).get("config", {})
        known = (published[key] for key in _LENGTH_KEYS if key in published)
        return next(known, _MAX_LENGTH) if learned is None else learned
    if length < 1 or (learned is not None and length > learned):
        limit = f" and at most the model's {learned} positions" if learned else ""
        raise LoadError(f"--model_args: max_length={length} must be at least 1{limit}.")
    return length


def cut_of(place: str) -> Callable[[list[int], int], list[int]]:
    """Returns a function (tokens, room) -> at most `room` tokens, without those at the place that --model_args names."""
    cuts: dict[str, Callable[[list[int], int], list[int]]] = {
        "beginning": lambda tokens, room: tokens[-room:],
        "middle": _without_middle,
    }
    if place not in cuts:
        raise LoadError(f"--model_args: cut={place} must be one of {', '.join(cuts)}.")
    return cuts[place]


def _without_middle(tokens: list[int], room: int) -> list[int]:
    if len(tokens) <= room:
        return tokens
    end = room // 2
    return tokens[: room - end] + (tokens[-end:] if end else [])


def max_rows(batch_size: int | str | None, limit: int | None) -> int | None:
    """Returns the maximum rows of a batch; None for as many as its tokens allow."""
    if batch_size is None or str(batch_size).startswith("auto") or int(batch_size) == 1:
        return limit
    if int(batch_size) < 1:
        raise LoadError(f"--batch_size={batch_size} must be at least 1, or auto.")
    return int(batch_size) if limit is None else min(int(batch_size), limit)
