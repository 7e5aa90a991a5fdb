"""Preference losses and their gradients against TRL's; goldens/trl_losses.py says how its numbers were made."""

import json
import pathlib

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

GOLDENS = json.loads(
    (pathlib.Path(__file__).parents[1] / "goldens" / "trl_losses.json").read_text()
)
# TRL's names, where ours differ or more than one module could have them.
NAMES = {
    "sigmoid": direct.dpo,
    "sft": lambda pairs: terms.nll(pairs, reduction="tokens"),
    "ipo": lambda pairs, *, beta, **more: direct.ipo(
        pairs, tau=beta, reduction="mean", scale="trl", **more
    ),
}
# Some of TRL's settings are not read by every loss, and some have other names here.
RENAMED = {"discopop_tau": "tau", "simpo_gamma": "gamma"}
READ = {
    "cpo": ("beta", "label_smoothing"),
    "simpo": ("beta", "label_smoothing", "simpo_gamma"),
    "alpha_po": ("beta", "label_smoothing", "simpo_gamma", "alpha"),
    "sft": (),
    "apo_zero_unpaired": ("beta",),
}


def loss_named(name):
    if name in NAMES:
        return NAMES[name]
    modules = (direct, absolute, transport, reference_free, unpaired)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def settings_of(case):
    read = READ.get(case["name"], case["settings"])
    return {
        RENAMED.get(key, key): value
        for key, value in case["settings"].items()
        if key in read and key not in ("loss_type", "loss_weights")
    }


def array(name):
    return jnp.asarray(GOLDENS[name], jnp.float32)


@pytest.fixture(scope="module")
def pairs():
    lengths = array("chosen_length")
    return PairLogProbs(
        chosen=array("chosen"),
        rejected=array("rejected"),
        chosen_length=lengths,
        rejected_length=array("rejected_length"),
        weights=jnp.ones(len(lengths)),
        mean_chosen_length=lengths.mean(),
        ref_chosen=array("ref_chosen"),
        ref_rejected=array("ref_rejected"),
    )


def check(loss, pairs, case, of=("chosen", "rejected"), per=(1.0, 1.0)):
    """A loss equals TRL's, each value where there are values, and its gradients by log-probabilities."""

    def mean(given):
        values = loss(pairs.replace(**given))
        return values.mean(), values

    given = {name: getattr(pairs, name) for name in of}
    (total, values), gradients = jax.value_and_grad(mean, has_aux=True)(given)
    assert values.dtype == jnp.float32 and values.shape == pairs.chosen.shape
    np.testing.assert_allclose(total, case["loss"], rtol=1e-6)
    if "values" in case:
        np.testing.assert_allclose(values, case["values"], rtol=1e-6)
    # Of the largest gradient: some of the small ones are differences of near equals.
    atol = 1e-6 * np.abs(case["gradients"]).max()
    for name, length, expected in zip(of, per, case["gradients"], strict=True):
        np.testing.assert_allclose(gradients[name] * length, expected, rtol=1e-6, atol=atol)


def case_id(case):
    more = [case.get("divergence", "")] + [
        f"{value}" for value in case["settings"].values() if isinstance(value, float)
    ]
    return "-".join([case["name"], *filter(None, more)])


@pytest.mark.parametrize("case", GOLDENS["dpo"], ids=case_id)
def test_dpo_trainer(case, pairs):
    if case["name"] == "mixture":
        beta = case["settings"]["beta"]
        losses = [loss_named(name) for name in case["settings"]["loss_type"]]
        weights = case["settings"]["loss_weights"]

        def loss(pairs):
            parts = [losses[0](pairs, beta=beta), losses[1](pairs, beta=beta), losses[2](pairs)]
            return sum(weight * part for weight, part in zip(weights, parts, strict=True))
    else:
        more = settings_of(case)
        if case.get("divergence") == "alpha":
            more["divergence"] = lambda u: divergence.alpha(u, coefficient=0.3)
        elif "divergence" in case:
            more["divergence"] = getattr(divergence, case["divergence"])

        def loss(pairs):
            return loss_named(case["name"])(pairs, **more)

    check(loss, pairs, case)


@pytest.mark.parametrize("case", GOLDENS["cpo"], ids=case_id)
def test_cpo_trainer(case, pairs):
    loss = loss_named(case["name"])
    # SimPO's gradients there are of means.
    means = case["name"] != "cpo"
    per = (pairs.chosen_length, pairs.rejected_length) if means else (1.0, 1.0)
    check(lambda pairs: loss(pairs, **settings_of(case)), pairs, case, per=per)


@pytest.mark.parametrize("case", GOLDENS["orpo"], ids=case_id)
def test_orpo_trainer(case, pairs):
    per = (-pairs.chosen_length, -pairs.rejected_length)  # there it is subtracted
    case = {**case, "loss": -case["loss"], "values": [-value for value in case["values"]]}
    check(lambda pairs: reference_free.orpo(pairs, **settings_of(case)), pairs, case, per=per)


@pytest.mark.parametrize("case", GOLDENS["kto"], ids=case_id)
def test_kto_trainer(case, pairs):
    examples = pairs.replace(labels=array("labels"))
    if "ref_others" in case:
        examples = examples.replace(ref_rejected=jnp.asarray(case["ref_others"], jnp.float32))
    loss = loss_named(case["name"])
    check(
        lambda pairs: loss(pairs, **settings_of(case)), examples, case, of=("chosen",), per=(1.0,)
    )


def test_every_loss_of_the_trainers_was_compared():
    named = {case["name"] for key in ("dpo", "cpo", "orpo", "kto") for case in GOLDENS[key]}
    assert len(named) == 15 + 1 + 3 + 1 + 2
