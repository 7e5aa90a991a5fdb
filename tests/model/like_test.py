"""`like`: which settings of a plain module its replacement gets, and what is refused."""

import functools

import jax.numpy as jnp
import pytest

from espalier.model.attention import Attention
from espalier.model.bam import moa
from espalier.model.config import TransformerConfig
from espalier.model.linear import Dense
from espalier.model.low_rank import lowrank
from espalier.model.mlp import GatedMlp, Mlp
from espalier.model.moe import moe
from espalier.model.moe.moe import ExpertDense

CONFIG = TransformerConfig(vocab_size=8, num_layers=1, embed_dim=4, num_heads=1, mlp_dim=4)
PASSED = {"config": CONFIG, "name": None, "parent": None}


class Other(Attention):
    pass


def test_a_mixture_has_every_setting_of_the_plain_attention():
    settings = {"qkv_bias": True, "softcap": 3.0, "scale": 0.5, "rope": None, "dropout": 0.1}
    plain = functools.partial(Attention, **settings)
    made = functools.partial(moa.MixtureOfAttention, num_experts=3)
    mixture = moa.experts_of(attention=plain, moa=made)(**PASSED)
    assert {name: getattr(mixture, name) for name in settings} == settings
    assert (type(mixture), mixture.num_experts) == (moa.MixtureOfAttention, 3)


def test_factorised_layers_have_the_settings_of_the_dense_ones():
    plain = functools.partial(Dense, use_bias=True, kernel_init=jnp.ones)
    rank = lowrank.Factorisation(rank=2)
    make = lowrank.factorised(factorisation=rank, dense=plain)
    sizes = {"features": 3, "axes": ("a", "b"), "name": None, "parent": None}
    layer = make(**sizes)
    assert (layer.use_bias, layer.kernel_init, layer.factorisation) == (True, jnp.ones, rank)
    assert not make(**sizes, use_bias=False).use_bias  # what the owner passes wins


def test_a_module_of_another_class_is_refused():
    with pytest.raises(ValueError, match="a module of Attention, not of Other, whose computation"):
        moa.experts_of(attention=Other)(**PASSED)
    with pytest.raises(ValueError, match="MoeMlp takes the settings of a module of GatedMlp, not"):
        moe.experts_of(mlp=Mlp)(**PASSED)
    make = lowrank.factorised(factorisation=lowrank.Factorisation(), dense=lowrank.LowRankDense)
    with pytest.raises(ValueError, match="Dense or ExpertDense, not of LowRankDense"):
        make(features=3, axes=("a", "b"), name=None, parent=None)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"use_bias": True}, "use_bias has no effect on MoeMlp.*remove one of the two"),
        ({"dropout": 0.1}, "dropout has no effect on MoeMlp.*remove one of the two"),
        ({"dense": lowrank.LowRankDense}, "dense has no effect on.*: set MoeMlp.expert_dense too"),
        ({"adapters": lambda dense: dense}, "adapters has no effect.*: set MoeMlp.adapters too"),
    ],
)
def test_a_setting_that_experts_do_not_have_is_refused(settings, remedy):
    plain = functools.partial(GatedMlp, **settings)
    with pytest.raises(ValueError, match=remedy):
        moe.experts_of(mlp=plain)(**PASSED)
    own = {"expert_dense": lowrank.LowRankExpertDense, "adapters": lambda dense: dense}
    if "dense" in settings or "adapters" in settings:
        moe.experts_of(mlp=plain, moe=functools.partial(moe.MoeMlp, **own))(**PASSED)


def test_a_default_that_is_set_again_is_no_setting():
    @functools.wraps(Dense)  # as gin wraps what a file names
    def wrapped(**settings):
        return Dense(**settings)

    plain = functools.partial(GatedMlp, dense=wrapped, use_bias=False, activation="gelu")
    mixture = moe.experts_of(mlp=plain)(**PASSED)
    assert (mixture.activation, mixture.expert_dense) == ("gelu", ExpertDense)
