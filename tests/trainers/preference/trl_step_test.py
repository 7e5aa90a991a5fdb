"""One step of preference learning is TRL's: the same weights and batch give its losses and gradients.

The numbers are those of TRL's DPOTrainer, see goldens/trl_step.py.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model.hf import registry
from espalier.trainers.objectives.frozen_model import FrozenModel
from espalier.trainers.preference.losses import absolute, direct, terms
from espalier.trainers.preference.objectives.preference import preference
from espalier.trainers.scoring.scoring import Row, Scorer
from tests.model.hf import arrays

HERE = pathlib.Path(__file__).parents[1] / "goldens"
GOLDEN = json.loads((HERE / "trl_step.json").read_text())
BETA = 0.3
CASES = {
    "sigmoid": ([functools.partial(direct.dpo, beta=BETA)], None),
    "ipo": ([functools.partial(direct.ipo, tau=BETA, reduction="mean", scale="trl")], None),
    "hinge": ([functools.partial(direct.hinge, beta=BETA)], None),
    "mixture": (
        [
            functools.partial(direct.dpo, beta=BETA),
            functools.partial(absolute.bco_pair, beta=BETA),
            functools.partial(terms.nll, reduction="tokens"),
        ],
        [0.8, 0.2, 1.0],
    ),
}


@functools.cache
def models():
    """(model, policy, reference) with the golden's weights."""
    with np.load(HERE.parents[1] / "model/hf/goldens/parity/llama_0.npz") as case:
        config = json.loads(str(case["config"]))
        names = [name for name in case.files if name.startswith("tensor/")]
        tensors = {name.partition("/")[2]: case[name].astype(np.float32) for name in names}
    family = registry.family_of_config(config)
    model = family.model(config)
    moved = {
        name: x + 0.1 * np.roll(x.reshape(-1), 1).reshape(x.shape) for name, x in tensors.items()
    }
    policy, reference = (arrays.to_native(family, model, x) for x in (tensors, moved))
    return model, policy, reference


def sequences():
    """(ids, number of prompt tokens) of each sequence, chosen ones first."""
    columns = (GOLDEN["batch"][name] for name in ("ids", "attention_mask", "completion_mask"))
    found = []
    for ids, real, completion in zip(*columns, strict=True):
        assert real == sorted(real, reverse=True)
        found.append((ids[: sum(real)], sum(real) - sum(completion)))
    return found


@functools.cache
def batch():
    """A pair in each row, where nothing precedes the first token."""
    model, _, reference = models()
    found = sequences()
    B, T = len(found) // 2, 2 * max(len(ids) for ids, _ in found)
    columns = {
        name: np.zeros((B, T), np.int32)
        for name in ("input_tokens", "target_tokens", "segment_ids", "positions", "loss_weights")
    }
    for b in range(B):
        at = 0
        for side, (ids, prompt) in enumerate((found[b], found[B + b]), 1):
            here = slice(at, at + len(ids) - 1)
            columns["input_tokens"][b, here] = ids[:-1]
            columns["target_tokens"][b, here] = ids[1:]
            columns["segment_ids"][b, here] = side
            columns["positions"][b, here] = np.arange(len(ids) - 1)
            columns["loss_weights"][b, here] = np.arange(1, len(ids)) >= prompt
            at += len(ids) - 1
    scores = Scorer(model, reference, batch_size=2 * B)(
        [Row(context=ids[:prompt], targets=ids[prompt:]) for ids, prompt in found]
    )
    sums = np.array([log_p.sum() for log_p in scores], np.float32)
    lengths = [len(ids) - prompt for ids, prompt in found[:B]]
    out = {f"decoder_{name}": array for name, array in columns.items()}
    out["decoder_loss_weights"] = out["decoder_loss_weights"].astype(np.float32)
    out["pair_weights"] = np.ones((B, 1), np.float32)
    out["chosen_tokens_per_pair"] = np.full(B, np.mean(lengths), np.float32)
    out["reference_log_probs"] = np.stack([sums[:B], sums[B:]], axis=1)
    return jax.tree.map(jnp.asarray, out)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_trls(name):
    losses, weights = CASES[name]
    check(name, losses=losses, weights=weights)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_tails_weigh_as_trls_ld_alpha_has_it(name):
    live = FrozenModel(model=models()[0], checkpoint=None)  # which is never read
    check(f"ld_{name}", losses=CASES[name][0], reference=live, ld_alpha=0.4)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_pairs_weigh_as_trls_use_weighting_has_it(name):
    check(f"wpo_{name}", losses=CASES[name][0], on_policy_weights=True)


def check(name, **settings):
    model, policy, reference = models()
    objective, rows = preference(model=model, **settings), batch()

    @jax.jit
    @jax.value_and_grad
    def of(params):
        out = objective(params, rows, None, extras=reference)
        return out.sum / out.weight

    loss, gradients = of(policy)
    np.testing.assert_allclose(loss, GOLDEN[name]["loss"], rtol=1e-4)
    np.testing.assert_allclose(optax.tree.norm(gradients), GOLDEN[name]["gradient_norm"], rtol=1e-4)
