"""Path patterns to masks, and the split that keeps frozen parameters away from the optimiser."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from espalier.model import axes
from espalier.trainers import trainable

PARAMS = {
    "layers": {"block_0": {"mlp": {"kernel": 1, "bias": 2}, "attention": {"kernel": 3}}},
    "token_embed": {"embedding": 4},
}


def names(mask):
    return {
        trainable.path_name(path)
        for path, keep in jax.tree_util.tree_leaves_with_path(mask)
        if keep
    }


def test_last_matching_pattern_decides():
    mask = trainable.match([r"layers/.*", r"!.*/bias"], PARAMS)
    assert names(mask) == {"layers/block_0/mlp/kernel", "layers/block_0/attention/kernel"}


def test_a_pattern_matches_the_whole_path():
    with pytest.raises(ValueError, match="matches none of the 4 parameters.*layers/block_0"):
        trainable.match([r"mlp"], PARAMS)


def test_a_pattern_that_is_no_regular_expression_is_named():
    with pytest.raises(ValueError, match=r"The trainable pattern '\*kernel' is not a regular"):
        trainable.match(["*kernel"], PARAMS, what="trainable pattern")


@pytest.mark.parametrize("patterns", [["!layers/.*"], ["a", "!a"], ["bias"]])
def test_patterns_that_leave_nothing_to_train_are_refused(patterns):
    names = {"a": (axes.EMBED,), "bias": (axes.CONSTANT,), "layers": (axes.EMBED,)}
    boxed = {k: {"b": nn.LogicallyPartitioned(np.ones(1), v)} for k, v in names.items()}
    patterns = [f"{p}/b" if p[-1] != "*" else p for p in patterns]
    with pytest.raises(ValueError, match="leave no parameter to train"):
        trainable.mask_of(patterns, boxed)


def test_split_and_join_are_inverse():
    mask = trainable.match([r".*/mlp/.*"], PARAMS)
    trained, frozen = trainable.split(PARAMS, mask)
    assert jax.tree.leaves(trained) == [2, 1]
    assert jax.tree.leaves(frozen) == [3, 4]
    assert trainable.join(trained, frozen) == PARAMS
