"""The contract of tree transforms: a plan explains every parameter, and plans are executed in memory and chained."""

import numpy as np
import pytest

from espalier.model.low_rank.decompose import Decompose, Recompose
from espalier.model.transforms import base
from espalier.model.transforms.base import Recipe, Source, TransformError
from espalier.model.transforms.experts import Mixture, Upcycle

LAYERS, WIDTH, HIDDEN = 3, 4, 10
DENSE = {
    "layers/block_0/norm/scale": (LAYERS, WIDTH),
    "layers/block_0/mlp/gate/kernel": (LAYERS, WIDTH, HIDDEN),
    "layers/block_0/mlp/up/kernel": (LAYERS, WIDTH, HIDDEN),
    "layers/block_0/mlp/down/kernel": (LAYERS, HIDDEN, WIDTH),
}
MIXED = {
    path: (LAYERS, 2, *shape[1:]) if "/mlp/" in path else shape for path, shape in DENSE.items()
} | {"layers/block_0/mlp/router/kernel": (LAYERS, WIDTH, 2)}


def values(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


class Scaled:
    """Halves one parameter, and copies no other."""

    def plan(self, sources, target):
        (source,) = sources
        return [
            Recipe(
                outputs={"w": source.shape("w")},
                inputs=((source.name, "w"),),
                origin="halved",
                compute=lambda parts, _: [parts[0] / 2],
                slices="rows",
            )
        ]


def test_what_is_not_explained_is_named():
    one = Source("runs/a", {"w": (2, 3)})
    with pytest.raises(TransformError, match=r"b \[3\] of the new model has no source"):
        base.plan(Scaled(), [one], {"w": (2, 3), "b": (3,)})
    with pytest.raises(TransformError, match="runs/a has b, which the new model lacks"):
        base.plan(Scaled(), [Source("runs/a", {"w": (2, 3), "b": (3,)})], {"w": (2, 3)})
    with pytest.raises(TransformError, match=r"w would be \[2, 3\].*has \[2, 4\]"):
        base.plan(Scaled(), [one], {"w": (2, 4)})
    with pytest.raises(TransformError, match=r"w would be \[2, 3\].*has none"):
        base.plan(Scaled(), [one], {})
    with pytest.raises(TransformError, match="runs/b has no w"):
        base.plan(Scaled(), [Source("runs/b", {})], {"w": (2, 3)})


def test_the_table_has_a_row_for_every_parameter():
    recipes = base.plan(Scaled(), [Source("a", {"w": (2, 3)})], {"w": (2, 3)})
    lines = base.table(recipes, {"w": ", for a test"})
    assert lines == ["path  shape  values  from", "w     2 x 3       6  halved, for a test"]


def test_layers_that_are_stacked_are_made_one_by_one():
    """Redrawn units differ between layers, as they do where layers are separate arrays."""
    mixture = Mixture(experts=2, scanned=True, drop_ratio=0.5)
    sources = [Source(name, DENSE) for name in "ab"]
    recipes = base.plan(Upcycle(mixture), sources, MIXED)
    arrays = {name: values(DENSE, seed) for seed, name in enumerate("ab")}
    made = base.apply(recipes, lambda name, path: arrays[name][path])
    path = "layers/block_0/mlp/up/kernel"
    dense = np.stack([arrays[name][path] for name in "ab"], axis=1)
    redrawn = (made[path] != dense).any(axis=-2)  # [layer, expert, unit]
    assert (redrawn.sum(-1) == HIDDEN // 2).all()
    assert len({row.tobytes() for row in redrawn.reshape(-1, HIDDEN)}) == 2 * LAYERS


def test_recomposing_is_the_inverse_of_decomposing_at_full_rank():
    dense, low = {"q/kernel": (3, 6, 4)}, {"q/u": (3, 6, 4), "q/v": (3, 4, 4)}
    kernel = values(dense)["q/kernel"]
    there = base.plan(Decompose(), [Source("dense", dense)], low)
    back = base.plan(Recompose(), [Source("low", low)], dense)
    factors = base.apply(there, lambda *_: kernel)
    made = base.apply(back, lambda _, path: factors[path])["q/kernel"]
    np.testing.assert_allclose(made, kernel, atol=1e-5)
    with pytest.raises(TransformError, match="factorised already"):
        base.plan(Decompose(), [Source("low", low)], low)
    with pytest.raises(TransformError, match="has no factors"):
        base.plan(Recompose(), [Source("dense", dense)], dense)
