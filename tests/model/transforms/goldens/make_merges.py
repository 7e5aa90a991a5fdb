"""Writes merges.npz: what mergekit 0.1.5 computes in memory for one matrix and one vector of four models.

Run from the repository root with an environment that has mergekit (and with it torch):

  .venv-peers/bin/python tests/model/transforms/goldens/make_merges.py

Its random masks are replaced by stored 32-bit words: a value is kept where its word is below 2^32 times its probability.
"""

import json
import pathlib

import numpy as np
import torch
from mergekit.merge_methods import merge_tensors

SHAPES = {"matrix": (24, 20), "vector": (37,)}
WEIGHTS = [0.5, 0.3, 0.9]

# name of a case: method, number of models besides the base, shared parameters, parameters of each model
CASES = {
    "linear": ("linear", 3, {}, {"weight": WEIGHTS}),
    "linear_sum": ("linear", 3, {"normalize": False}, {"weight": WEIGHTS}),
    "slerp": ("slerp", 1, {"t": 0.3}, {}),
    "nuslerp": ("nuslerp", 2, {}, {"weight": WEIGHTS[:2]}),
    "nuslerp_rows": ("nuslerp", 2, {"nuslerp_flatten": False}, {"weight": WEIGHTS[:2]}),
    "nuslerp_columns": (
        "nuslerp",
        2,
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        {"weight": WEIGHTS[:2]},
    ),
    "nuslerp_plain": ("nuslerp -base", 2, {}, {"weight": WEIGHTS[:2]}),
    "multislerp": ("multislerp", 3, {}, {"weight": WEIGHTS}),
    "multislerp_plain": (
        "multislerp -base",
        3,
        {"normalize_weights": False},
        {"weight": WEIGHTS},
    ),
    "karcher": ("karcher -base", 3, {}, {}),
    "karcher_two_steps": ("karcher -base", 3, {"max_iter": 2}, {}),
    "task_arithmetic": ("task_arithmetic", 3, {"lambda": 0.7}, {"weight": WEIGHTS}),
    "task_arithmetic_mean": ("task_arithmetic", 3, {"normalize": True}, {"weight": WEIGHTS}),
    "ties": ("ties", 3, {}, {"weight": WEIGHTS, "density": [0.5, 0.2, 1.0]}),
    "ties_rescaled": (
        "ties",
        3,
        {"rescale": True, "normalize": False, "lambda": 1.3},
        {"weight": WEIGHTS, "density": [0.5, 0.001, 0.9]},
    ),
    "dare_linear": ("dare_linear", 3, {}, {"weight": WEIGHTS, "density": [0.5, 0.2, 1.0]}),
    "dare_ties": ("dare_ties", 3, {}, {"weight": WEIGHTS, "density": [0.5, 0.2, 0.9]}),
    "dare_ties_plain": (
        "dare_ties",
        3,
        {"rescale": False, "normalize": True},
        {"weight": WEIGHTS, "density": [0.5, 0.2, 0.9]},
    ),
    "della": (
        "della",
        3,
        {},
        {"weight": WEIGHTS, "density": [0.5, 0.4, 0.6], "epsilon": [0.1, 0.2, 0.15]},
    ),
    "della_linear": (
        "della_linear",
        3,
        {"lambda": 0.5},
        {"weight": WEIGHTS, "density": [0.5, 0.4, 0.6], "epsilon": [0.1, 0.2, 0.15]},
    ),
    "breadcrumbs": (
        "breadcrumbs",
        3,
        {},
        {"weight": WEIGHTS, "density": [0.9, 0.5, 0.98], "gamma": [0.05, 0.0, 0.3]},
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties",
        3,
        {},
        {"weight": WEIGHTS, "density": [0.9, 0.5, 0.7], "gamma": [0.05, 0.001, 0.1]},
    ),
    "sce": ("sce", 3, {}, {}),
    "sce_selected": ("sce", 3, {"select_topk": 0.3}, {}),
    "model_stock": ("model_stock", 3, {}, {}),
    "model_stock_rows": ("model_stock", 3, {"filter_wise": True}, {}),
    "nearswap": ("nearswap", 1, {"t": 0.05}, {}),
    "ram": ("ram", 3, {"epsilon": 0.05}, {}),
    "passthrough": ("passthrough -base", 1, {}, {"scale": [0.7]}),
}


def main() -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for kind, shape in SHAPES.items():
        base = rng.normal(0, 1, shape).astype(np.float32)
        arrays[f"{kind}/0"] = base
        for i in range(1, 4):
            arrays[f"{kind}/{i}"] = base + rng.normal(0, 0.1 * i, shape).astype(np.float32)
            arrays[f"{kind}/words{i}"] = rng.integers(0, 2**32, shape, dtype=np.uint32)
    for kind in SHAPES:
        for case, (named, count, shared, each) in CASES.items():
            method, _, bare = named.partition(" ")
            based = not bare and method != "linear"
            first = 0 if based else 1
            inputs = [torch.tensor(arrays[f"{kind}/{i}"]) for i in range(first, count + 1)]
            names = [f"m{i}" for i in range(first, count + 1)]
            own = {
                key: dict(zip(names[based:], values, strict=True)) for key, values in each.items()
            }
            words = iter([arrays[f"{kind}/words{i}"] for i in range(1, 4)])

            def bernoulli(chances: torch.Tensor, words=words) -> torch.Tensor:
                limits = chances.double().numpy() * 2.0**32
                kept = next(words).reshape(limits.shape) < limits
                return torch.tensor(kept).to(chances.dtype)

            torch.bernoulli = bernoulli
            result = merge_tensors(
                inputs,
                method,
                parameters={**shared, **own},
                ids=names,
                base_index=0 if based else None,
            )
            arrays[f"{kind}/{case}"] = result.numpy()
            # Deltas of bfloat16 have equal sizes, of which each library keeps others: no method that drops values.
            narrow = (
                merge_tensors(
                    [x.bfloat16() for x in inputs],
                    method,
                    parameters={**shared, **own},
                    ids=names,
                    base_index=0 if based else None,
                    dtype=torch.float32,
                    out_dtype=torch.bfloat16,
                )
                if method in ("linear", "slerp", "task_arithmetic", "model_stock")
                else None
            )
            if narrow is not None:
                arrays[f"{kind}/{case}/bfloat16"] = narrow.view(torch.int16).numpy().view(np.uint16)
    cases = json.dumps({name: list(case) for name, case in CASES.items()})
    arrays["cases"] = np.frombuffer(cases.encode(), np.uint8)
    np.savez_compressed(pathlib.Path(__file__).with_name("merges.npz"), **arrays)


if __name__ == "__main__":
    main()
