"""Preference losses and their gradients against their formulas in float64, beside slots without a pair.

The comparison with TRL is in trl_losses_test.py, what is known without formulas in losses_test.py.
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
from espalier.trainers.preference.losses.pairs import MissingReferenceError, PairLogProbs

BETA = 0.3
SLOTS = 8
REAL = np.array([0, 2, 3, 6, 7])  # the others hold no pair
FIELDS = tuple(PairLogProbs.__dataclass_fields__)
FILLER = {"chosen_length": 1.0, "rejected_length": 1.0, "weights": 0.0, "labels": 0.0}


def batch_of(**given):
    """A batch of SLOTS with pairs in the REAL ones, of values that float32 holds exactly."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (2, len(REAL)))
    chosen, rejected = -lengths * rng.uniform(0.2, 3.0, (2, len(REAL))) - 0.5
    pairs = {
        "chosen": chosen,
        "rejected": rejected,
        "chosen_length": lengths[0],
        "rejected_length": lengths[1],
        "weights": np.ones(len(REAL)),
        "ref_chosen": chosen + 2 * rng.normal(size=len(REAL)),
        "ref_rejected": rejected - 1 + 2 * rng.normal(size=len(REAL)),
        "labels": np.array([1, 0, 0, 1, 1]),
        **given,
    }
    slots = {
        name: jnp.full(SLOTS, FILLER.get(name, -1.0), jnp.float32).at[REAL].set(values)
        for name, values in pairs.items()
    }
    return PairLogProbs(mean_chosen_length=jnp.float32(lengths[0].mean()), **slots)


def sigma(x):
    return 1 / (1 + np.exp(-x))


def nats(p):
    """-log sigma, the naive form of the logistic loss."""
    return -np.log(sigma(p))


def smooth(z, eps):
    return (1 - eps) * nats(z) + eps * nats(-z)


def odds(a):
    return np.exp(a) / (1 - np.exp(a))


def kto_formula(p):
    z0 = max(0.0, np.mean(p.rejected - p.ref_rejected))
    gain = BETA * (p.c - z0)
    return np.where(p.labels == 1, 1.5 * (1 - sigma(gain)), 0.7 * (1 - sigma(-gain)))


class Doubles:
    """The real pairs of a batch in float64, with the letters of the formulas."""

    def __init__(self, batch, **given):
        for name in FIELDS:
            value = np.asarray(given.get(name, getattr(batch, name)), np.float64)
            setattr(self, name, value[REAL] if value.ndim else value)
        self.c, self.r = self.chosen - self.ref_chosen, self.rejected - self.ref_rejected
        self.z = BETA * (self.c - self.r)
        self.n, self.m = self.chosen_length, self.rejected_length
        self.means = self.chosen / self.n - self.rejected / self.m


def alpha_score(u):
    return (np.exp(u) ** (0.4 - 1) - 1) / (0.4 - 1)


def aot_formula(p):
    d = p.chosen - p.rejected
    sorted_reference = np.sort(p.ref_chosen - p.ref_rejected)
    return smooth(BETA * (d - sorted_reference[np.argsort(np.argsort(d))]), 0.1)


def aot_unpaired_formula(p):
    return smooth(BETA * (p.c - np.sort(p.r)[np.argsort(np.argsort(p.c))]), 0.1)


def alpha_po_formula(p):
    a, b = np.exp(p.chosen / p.n), np.exp(p.rejected / p.m)
    return smooth(2.0 * ((1 - a**-0.25) / 0.25 - (1 - b**-0.25) / 0.25) - 0.7, 0.1)


def of(loss, **settings):
    return functools.partial(loss, **settings)


ALPHA = of(divergence.alpha, coefficient=0.4)
# Each loss with settings that are all in use, and its formula written down naively.
FORMULAS = {
    "dpo": (of(direct.dpo, beta=BETA), lambda p: nats(p.z)),
    "cdpo": (of(direct.dpo, beta=BETA, label_smoothing=0.2), lambda p: smooth(p.z, 0.2)),
    "dpo_forward_kl": (
        of(direct.dpo, beta=BETA, divergence=divergence.forward_kl),
        lambda p: nats(BETA * (np.exp(-p.r) - np.exp(-p.c))),
    ),
    "dpo_js": (
        of(direct.dpo, beta=BETA, divergence=divergence.js),
        lambda p: nats(BETA * np.log(np.exp(p.c - p.r) * (1 + np.exp(p.r)) / (1 + np.exp(p.c)))),
    ),
    "dpo_alpha": (
        of(direct.dpo, beta=BETA, divergence=ALPHA),
        lambda p: nats(BETA * (alpha_score(p.c) - alpha_score(p.r))),
    ),
    "robust": (
        of(direct.robust, beta=BETA, label_smoothing=0.1),
        lambda p: (0.9 * nats(p.z) - 0.1 * nats(-p.z)) / 0.8,
    ),
    "ipo": (of(direct.ipo, tau=BETA), lambda p: (p.z - 0.5) ** 2),
    "ipo_mean_trl": (
        of(direct.ipo, tau=BETA, reduction="mean", scale="trl"),
        lambda p: (p.c / p.n - p.r / p.m - 1 / (2 * BETA)) ** 2,
    ),
    "hinge": (of(direct.hinge, beta=BETA), lambda p: np.maximum(0, 1 - p.z)),
    "exo_pair": (
        of(direct.exo_pair, beta=BETA, label_smoothing=0.01),
        lambda p: sigma(p.z) * np.log(sigma(p.z) / 0.99) + sigma(-p.z) * np.log(sigma(-p.z) / 0.01),
    ),
    "discopop": (
        of(direct.discopop, beta=BETA, tau=0.5),
        lambda p: sigma(-p.z / 0.5) * nats(p.z) + sigma(p.z / 0.5) * np.exp(-p.z),
    ),
    "sigmoid_norm": (
        of(direct.sigmoid_norm, beta=BETA),
        lambda p: nats(BETA * (p.c / p.n - p.r / p.m)),
    ),
    "dpop": (
        of(direct.dpop, beta=BETA, penalty=3.0),
        lambda p: nats(p.z - BETA * 3.0 * np.maximum(0, p.ref_chosen - p.chosen)),
    ),
    "nca_pair": (
        of(absolute.nca_pair, beta=BETA),
        lambda p: nats(BETA * p.c) + 0.5 * nats(-BETA * p.c) + 0.5 * nats(-BETA * p.r),
    ),
    "bco_pair": (
        of(absolute.bco_pair, beta=BETA),
        lambda p: nats(BETA * p.c) + nats(-BETA * p.r),
    ),
    "sppo_hard": (
        of(absolute.sppo_hard, beta=BETA),
        lambda p: (p.c - 1 / (2 * BETA)) ** 2 + (p.r + 1 / (2 * BETA)) ** 2,
    ),
    "apo_zero": (
        of(absolute.apo_zero, beta=BETA),
        lambda p: 1 - sigma(BETA * p.c) + sigma(BETA * p.r),
    ),
    "apo_down": (of(absolute.apo_down, beta=BETA), lambda p: sigma(BETA * p.c) + 1 - sigma(p.z)),
    "aot": (of(transport.aot, beta=BETA, label_smoothing=0.1), aot_formula),
    "aot_unpaired": (
        of(transport.aot_unpaired, beta=BETA, label_smoothing=0.1),
        aot_unpaired_formula,
    ),
    "slic_hinge": (of(reference_free.slic_hinge), lambda p: np.maximum(0, 1 - p.means)),
    "simpo": (
        of(reference_free.simpo, beta=2.0, gamma=0.7, label_smoothing=0.1),
        lambda p: smooth(2.0 * p.means - 0.7, 0.1),
    ),
    "alpha_po": (
        of(reference_free.alpha_po, beta=2.0, gamma=0.7, alpha=0.25, label_smoothing=0.1),
        alpha_po_formula,
    ),
    "cpo": (
        of(reference_free.cpo, beta=BETA, label_smoothing=0.1),
        lambda p: smooth(BETA * (p.chosen - p.rejected), 0.1),
    ),
    "orpo": (
        of(reference_free.orpo, beta=BETA),
        lambda p: BETA * nats(np.log(odds(p.chosen / p.n) / odds(p.rejected / p.m))),
    ),
    "nll": (of(terms.nll), lambda p: -p.chosen / p.n),
    "nll_sum": (of(terms.nll, reduction="sum"), lambda p: -p.chosen),
    "nll_tokens": (
        of(terms.nll, reduction="tokens"),
        lambda p: -p.chosen / p.mean_chosen_length,
    ),
    "slic_regulariser": (of(terms.slic_regulariser), lambda p: np.log(1 + np.exp(1 - p.c))),
    "kto": (
        of(unpaired.kto, beta=BETA, desirable_weight=1.5, undesirable_weight=0.7),
        kto_formula,
    ),
    "apo_zero_unpaired": (
        of(unpaired.apo_zero_unpaired, beta=BETA),
        lambda p: sigma(BETA * np.where(p.labels == 1, -p.c, p.c)),
    ),
}
DETACHED = {"kto": "rejected"}
WITHOUT_REFERENCE = {
    "slic_hinge", "simpo", "alpha_po", "cpo", "orpo", "nll", "nll_sum", "nll_tokens"
}  # fmt: skip
each_loss = pytest.mark.parametrize("name", FORMULAS)


@functools.cache
def compiled(name):
    """Values of a loss, and the gradients of their weighted sum by chosen and rejected."""
    loss, _ = FORMULAS[name]

    def total(given, pairs):
        values = loss(pairs.replace(**given))
        return (values * pairs.weights).sum(), values

    def run(pairs):
        given = {"chosen": pairs.chosen, "rejected": pairs.rejected}
        gradients, values = jax.grad(total, has_aux=True)(given, pairs)
        return values, gradients

    return jax.jit(run)


@each_loss
def test_values_and_gradients_are_the_formulas_of_the_real_pairs(name):
    _, formula = FORMULAS[name]
    batch = batch_of()
    values, gradients = compiled(name)(batch)
    assert values.dtype == jnp.float32 and values.shape == (SLOTS,)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values[REAL], formula(Doubles(batch)), rtol=1e-5, atol=1e-6)
    for field, gradient in gradients.items():
        np.testing.assert_array_equal(np.delete(gradient, REAL), 0.0)
        if DETACHED.get(name) == field:  # the formula depends on it
            np.testing.assert_array_equal(gradient, 0.0)
            continue
        at = np.asarray(getattr(batch, field), np.float64)
        numeric = []
        for step in 1e-6 * np.eye(SLOTS)[REAL]:
            up, down = (formula(Doubles(batch, **{field: at + s})).sum() for s in (step, -step))
            numeric.append((up - down) / 2e-6)
        np.testing.assert_allclose(gradient[REAL], numeric, rtol=1e-4, atol=1e-6)


@each_loss
def test_a_batch_without_a_pair_has_no_gradient(name):
    empty = {field: np.full(5, FILLER.get(field, -1.0)) for field in FIELDS}
    del empty["mean_chosen_length"]
    values, gradients = compiled(name)(batch_of(**empty))
    assert np.isfinite(values).all()
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, 0.0)


@each_loss
def test_log_ratios_of_thousands_stay_finite(name):
    far = -np.array([3000.0, 300.0, 50.0, 0.0, 3000.0])
    # Chosen log-ratios from -3000 to 3000, and differences of them from -6000 to 6000.
    batch = batch_of(
        chosen=far,
        rejected=far[::-1],
        ref_chosen=-3000 - far,
        ref_rejected=np.array([-6000.0, 0.0, 0.0, 2700.0, 0.0]),
    )
    values, gradients = compiled(name)(batch)
    assert np.isfinite(values).all()
    for gradient in gradients.values():
        assert np.isfinite(gradient).all()


@each_loss
def test_a_missing_reference_is_named_where_it_is_needed(name):
    loss, _ = FORMULAS[name]
    pairs = batch_of().replace(ref_chosen=None, ref_rejected=None)
    if name in WITHOUT_REFERENCE:
        assert np.isfinite(loss(pairs)).all()
        return
    with pytest.raises(MissingReferenceError, match="bind REFERENCE"):
        loss(pairs)
