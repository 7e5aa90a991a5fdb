"""What preference losses must be where it is known without their formulas, and settings that make no sense.

The formulas are in loss_formulas_test.py, the comparison with TRL in trl_losses_test.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.trainers.preference.losses import (
    absolute,
    direct,
    divergence,
    reference_free,
    terms,
    transport,
    unpaired,
)
from espalier.trainers.preference.losses.pairs import PairLogProbs

of = functools.partial


def make_pairs(size=5, seed=0, spread=6.0, labels=False, **given):
    """Random pairs, the reference `spread` nats away."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (2, size))
    chosen, rejected = -lengths * rng.uniform(0.2, 3.0, (2, size)) - 0.5
    fields = {
        "chosen": chosen,
        "rejected": rejected,
        "chosen_length": lengths[0],
        "rejected_length": lengths[1],
        "weights": np.ones(size),
        "mean_chosen_length": lengths[0].mean(),
        "ref_chosen": chosen + spread * rng.normal(size=size),
        "ref_rejected": rejected + spread * rng.normal(size=size),
        **({"labels": rng.integers(0, 2, size)} if labels else {}),
        **given,
    }
    return PairLogProbs(**{name: jnp.asarray(v, jnp.float32) for name, v in fields.items()})


# Policy and reference are the same; numbers of arXiv 2410.11677's losses and of TRL's.
AT_REFERENCE = {
    "dpo": (direct.dpo, {}, np.log(2)),
    "robust": (direct.robust, {"label_smoothing": 0.3}, np.log(2)),
    "aot": (transport.aot, {}, np.log(2)),
    "sigmoid_norm": (direct.sigmoid_norm, {}, np.log(2)),
    "ipo": (direct.ipo, {}, 0.25),
    "ipo_trl": (direct.ipo, {"tau": 0.2, "scale": "trl", "reduction": "mean"}, 1 / (4 * 0.2**2)),
    "hinge": (direct.hinge, {}, 1.0),
    "slic_regulariser": (terms.slic_regulariser, {}, np.log(1 + np.e)),
    "nca_pair": (absolute.nca_pair, {}, 2 * np.log(2)),
    "bco_pair": (absolute.bco_pair, {}, 2 * np.log(2)),
    "apo_zero": (absolute.apo_zero, {}, 1.0),
    "apo_down": (absolute.apo_down, {}, 1.0),
    "sppo_hard": (absolute.sppo_hard, {"beta": 0.2}, 1 / (2 * 0.2**2)),
    "discopop": (direct.discopop, {}, 0.846574),
    "js": (direct.dpo, {"divergence": divergence.js}, np.log(2)),
    "forward_kl": (direct.dpo, {"divergence": divergence.forward_kl}, np.log(2)),
    "dpop": (direct.dpop, {}, np.log(2)),
}


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_a_policy_that_is_its_reference(name):
    loss, settings, expected = AT_REFERENCE[name]
    np.testing.assert_allclose(loss(make_pairs(spread=0.0), **settings), expected, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("scale", ["paper", "trl"])
def test_ipo_converges_to_its_margin(reduction, scale):
    tau = 0.2
    pairs = make_pairs()
    loss = of(direct.ipo, tau=tau, reduction=reduction, scale=scale)
    step = jax.jit(jax.grad(lambda x: loss(pairs.replace(chosen=x)).sum()))
    length = pairs.chosen_length if reduction == "mean" else 1.0
    chosen = pairs.chosen
    for _ in range(60):
        chosen = chosen - 0.2 * (tau**-2 if scale == "paper" else 1.0) * length**2 * step(chosen)
    after = pairs.replace(chosen=chosen)
    margin = after.margin
    if reduction == "mean":
        margin = after.chosen_log_ratio / after.chosen_length
        margin -= after.rejected_log_ratio / after.rejected_length
    np.testing.assert_allclose(margin, 1 / (2 * tau), rtol=1e-3)


def test_dpo_pulls_both_completions_alike():
    pairs = make_pairs()
    chosen, rejected = jax.grad(
        lambda x, y: direct.dpo(pairs.replace(chosen=x, rejected=y), beta=0.3).sum(), (0, 1)
    )(pairs.chosen, pairs.rejected)
    z = 0.3 * np.asarray(pairs.margin, np.float64)
    np.testing.assert_allclose(chosen, -0.3 / (1 + np.exp(z)), rtol=1e-5)
    np.testing.assert_array_equal(chosen, -rejected)


def test_dpo_of_a_pair_and_of_the_swapped_pair():
    for spread, least in ((3.0, False), (0.0, True)):
        pairs = make_pairs(size=50, spread=spread)
        swapped = pairs.replace(
            chosen=pairs.rejected,
            rejected=pairs.chosen,
            ref_chosen=pairs.ref_rejected,
            ref_rejected=pairs.ref_chosen,
        )
        both = np.asarray(direct.dpo(pairs) + direct.dpo(swapped))
        assert (both == np.float32(2 * np.log(2))).all() if least else (both > 2 * np.log(2)).all()


def test_hinge_has_no_gradient_beyond_its_margin():
    pairs = make_pairs(size=40)
    gradient = jax.grad(lambda x: reference_free.slic_hinge(pairs.replace(chosen=x)).sum())(
        pairs.chosen
    )
    beyond = np.asarray(pairs.chosen_mean - pairs.rejected_mean) > 1
    assert 5 < beyond.sum() < 35
    np.testing.assert_array_equal(np.asarray(gradient) == 0, beyond)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (of(direct.robust, label_smoothing=0.0), of(direct.dpo)),
        (of(direct.dpo, divergence=of(divergence.alpha, coefficient=1.0)), of(direct.dpo)),
        (of(direct.dpo, divergence=of(divergence.alpha, coefficient=1.0001)), of(direct.dpo)),
        (
            of(direct.dpo, divergence=of(divergence.alpha, coefficient=0.0)),
            of(direct.dpo, divergence=divergence.forward_kl),
        ),
        (of(direct.ipo, tau=0.5, scale="trl"), lambda pairs: 4 * direct.ipo(pairs, tau=0.5)),
        (of(direct.dpop, penalty=1e-6), of(direct.dpo)),
        (of(reference_free.alpha_po, alpha=0.0), of(reference_free.simpo)),
        (of(reference_free.alpha_po, alpha=1e-4), of(reference_free.simpo)),
        (of(reference_free.simpo, gamma=0.0), lambda pairs: direct.sigmoid_norm(no_reference(pairs), beta=2.0)),
        (of(reference_free.cpo), lambda pairs: direct.dpo(no_reference(pairs))),
    ],
)  # fmt: skip
def test_limits(one, other):
    pairs = make_pairs(spread=1.0)
    np.testing.assert_allclose(one(pairs), other(pairs), rtol=2e-3)


def no_reference(pairs):
    return pairs.replace(
        ref_chosen=jnp.zeros_like(pairs.chosen), ref_rejected=jnp.zeros_like(pairs.chosen)
    )


def test_robust_is_unbiased_and_exo_is_a_divergence():
    pairs = make_pairs(size=20, spread=2.0)
    swapped = pairs.replace(
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        ref_chosen=pairs.ref_rejected,
        ref_rejected=pairs.ref_chosen,
    )
    robust = of(direct.robust, label_smoothing=0.2)
    noisy = 0.8 * robust(pairs) + 0.2 * robust(swapped)
    np.testing.assert_allclose(noisy, direct.dpo(pairs), rtol=1e-5)
    exo = of(direct.exo_pair, label_smoothing=0.2, beta=1.0)
    assert (np.asarray(exo(pairs)) >= 0).all()
    target = pairs.replace(chosen=pairs.ref_chosen + np.log(4.0), rejected=pairs.ref_rejected)
    np.testing.assert_allclose(exo(target), 0.0, atol=1e-6)


def test_transport_does_not_see_the_order_and_pairs_one_as_dpo():
    pairs = make_pairs(size=7)
    order = np.array([3, 0, 6, 1, 5, 4, 2])
    of_pairs = {name: getattr(pairs, name) for name in ("chosen", "rejected", "ref_chosen")}
    permuted = pairs.replace(
        **{name: value[order] for name, value in of_pairs.items()},
        ref_rejected=pairs.ref_rejected[order],
    )
    one = make_pairs(size=1)
    for loss in (transport.aot, transport.aot_unpaired):
        np.testing.assert_array_equal(loss(pairs)[order], loss(permuted))
        np.testing.assert_allclose(loss(one), direct.dpo(one), rtol=1e-6)


def test_unpaired_losses_tell_labels_apart():
    pairs = make_pairs(size=4)
    ones, zeros = jnp.ones(4), jnp.zeros(4)
    below = pairs.replace(labels=ones, rejected=pairs.ref_rejected - 3.0)
    # A negative estimate of a divergence counts as 0.
    np.testing.assert_array_equal(unpaired.kto(below), unpaired.apo_zero_unpaired(below))
    bad = pairs.replace(chosen=pairs.rejected, ref_chosen=pairs.ref_rejected, labels=zeros)
    both = unpaired.apo_zero_unpaired(pairs.replace(labels=ones)) + unpaired.apo_zero_unpaired(bad)
    np.testing.assert_allclose(both, absolute.apo_zero(pairs), rtol=1e-6)
    mixed = pairs.replace(labels=jnp.array([1.0, 0.0, 0.0, 1.0]))
    for side, kept in (("desirable", mixed.labels == 0), ("undesirable", mixed.labels > 0)):
        without = unpaired.kto(mixed, **{f"{side}_weight": 0.0})
        np.testing.assert_array_equal(without, jnp.where(kept, unpaired.kto(mixed), 0.0))
    with pytest.raises(ValueError, match="reads labels"):
        unpaired.kto(pairs)


def test_odds_near_certainty():
    a = -np.array([1e-6, 1e-4, 1e-2, 0.5, 5.0, 50.0])
    pairs = make_pairs(size=6, chosen=a, rejected=np.full(6, -1.0), chosen_length=np.ones(6))
    pairs = pairs.replace(rejected_length=jnp.ones(6))
    precise = np.asarray(pairs.chosen, np.float64)  # what float32 makes of a
    expected = precise - np.log(-np.expm1(precise)) + 1 + np.log(-np.expm1(-1.0))
    np.testing.assert_allclose(
        reference_free.orpo(pairs, beta=1.0), np.log1p(np.exp(-expected)), rtol=1e-5
    )
    certain = pairs.replace(chosen=jnp.zeros(6), rejected=jnp.zeros(6))
    value, gradient = jax.value_and_grad(
        lambda x: reference_free.orpo(certain.replace(chosen=x), beta=1.0).sum()
    )(certain.chosen)
    assert float(value) == pytest.approx(6 * np.log(2), rel=1e-6)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (direct.dpo, {"beta": 0}, r"beta = 0 must be positive"),
        (direct.dpo, {"beta": float("nan")}, r"beta = nan must be positive"),
        (direct.dpo, {"label_smoothing": 0.5}, r"label_smoothing = 0.5, .* must lie in \[0, 0.5\)"),
        (direct.dpo, {"divergence": "js"}, r"divergence = 'js' .* such as @divergence.js"),
        (direct.robust, {"label_smoothing": -0.1}, r"label_smoothing = -0.1, .* must lie in \[0"),
        (direct.exo_pair, {"label_smoothing": 0.0}, r"label_smoothing = 0.0, .* must lie in \(0, 0.5"),
        (direct.ipo, {"tau": -1.0}, r"tau = -1.0 must be positive"),
        (direct.ipo, {"reduction": "tokens"}, "reduction is 'tokens'.* one of 'sum', 'mean'"),
        (direct.ipo, {"scale": "TRL"}, "scale is 'TRL'.* one of 'paper', 'trl'"),
        (direct.discopop, {"tau": 0.0}, r"tau = 0.0 must be positive"),
        (direct.dpop, {"penalty": 0.0}, r"penalty = 0.0 must be positive"),
        (transport.aot, {"label_smoothing": 0.7}, r"label_smoothing = 0.7, .* must lie"),
        (reference_free.slic_hinge, {"gamma": 0.0}, r"gamma = 0.0 must be positive"),
        (terms.nll, {"reduction": "token"}, "reduction is 'token'.* one of 'mean', 'sum', 'tokens'"),
        (unpaired.kto, {"desirable_weight": -1.0}, r"desirable_weight = -1.0 must be 0 or positive"),
        (unpaired.kto, {"undesirable_weight": float("nan")}, r"undesirable_weight = nan must be"),
        (unpaired.kto, {"desirable_weight": 0.0, "undesirable_weight": 0.0}, r"are both 0"),
        *(
            (loss, {"beta": -0.1}, r"beta = -0.1 must be positive")
            for loss in (
                direct.robust, direct.hinge, direct.exo_pair, direct.discopop, direct.sigmoid_norm,
                direct.dpop, absolute.nca_pair, absolute.bco_pair, absolute.sppo_hard,
                absolute.apo_zero, absolute.apo_down, transport.aot, transport.aot_unpaired,
                reference_free.simpo, reference_free.alpha_po, reference_free.cpo,
                reference_free.orpo, unpaired.kto, unpaired.apo_zero_unpaired,
            )
        ),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(loss, settings, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(of(loss, **settings), make_pairs(labels=True))
