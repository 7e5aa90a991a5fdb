"""Writes ties.npz: what TIES of mergekit 0.1.5 computes of matrices of bfloat16, in which many deltas are equally large.

Run from the repository root with an environment that has mergekit (and with it torch):

  .venv-peers/bin/python tests/model/transforms/goldens/make_ties.py
"""

import pathlib

import numpy as np
import torch
from mergekit.merge_methods import merge_tensors

SHAPE = (24, 20)
# Powers of two: the sums of weighted deltas, whose signs are elected, are exact.
WEIGHTS = [0.5, 0.25, 1.0]
DENSITIES = {"half": [0.5, 0.5, 0.5], "few": [0.1, 0.25, 0.4]}


def main() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, SHAPE)
    models = [base] + [base + rng.normal(0, 0.02, SHAPE) for _ in WEIGHTS]
    inputs = [torch.tensor(x).bfloat16() for x in models]
    bits = [x.view(torch.int16).numpy().view(np.uint16) for x in inputs]
    arrays = {"inputs": np.stack(bits), "weights": np.array(WEIGHTS)}
    ids = [str(i) for i in range(len(inputs))]
    for case, densities in DENSITIES.items():
        own = {"weight": WEIGHTS, "density": densities}
        result = merge_tensors(
            inputs,
            "ties",
            parameters={key: dict(zip(ids[1:], x, strict=True)) for key, x in own.items()},
            ids=ids,
            base_index=0,
            dtype=torch.float32,
        )
        arrays[case] = result.numpy()
        arrays[f"{case}/densities"] = np.array(densities)
    np.savez_compressed(pathlib.Path(__file__).with_name("ties.npz"), **arrays)


if __name__ == "__main__":
    main()
