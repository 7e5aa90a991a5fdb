"""The preference objective: one forward pass over packed pairs against scores of single sequences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.transformer import Block, Transformer
from espalier.trainers import initialise, inputs
from espalier.trainers.objectives.forward import frozen_forward
from espalier.trainers.objectives.frozen_model import FrozenCheckpoint, FrozenModel
from espalier.trainers.preference.losses import direct, reference_free, terms, transport, unpaired
from espalier.trainers.preference.losses.pairs import (
    MissingReferenceError,
    by_completion,
    pairs_of,
    weights_on_policy,
)
from espalier.trainers.preference.objectives.preference import preference
from espalier.trainers.scoring.scoring import Row, Scorer
from espalier.trainers.step import make_eval_step, make_train_step
from espalier.trainers.train_state import TrainState

VOCAB, LENGTH = 24, 24
MODEL = Transformer(
    config=TransformerConfig(vocab_size=VOCAB, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24)
)


@functools.cache
def parameters(seed=0, model=MODEL):
    boxed = jax.jit(lambda key: initialise.variables(model, key))(jax.random.key(seed))["params"]
    return jax.tree.map(
        lambda box: box.value, boxed, is_leaf=lambda x: hasattr(x, "unbox") or hasattr(x, "value")
    )


@dataclasses.dataclass
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def pairs(count=4, seed=0):
    rng = np.random.default_rng(seed)

    def some(low, high):
        return rng.integers(1, VOCAB, rng.integers(low, high)).tolist()

    return [Pair(some(1, 4), some(1, 5), some(1, 5)) for _ in range(count)]


def batch_of(rows, *, slots, length=LENGTH, reference=None):
    """Columns of rows, each a list of pairs, made token by token."""
    names = ("input_tokens", "target_tokens", "segment_ids", "positions")
    out = {f"decoder_{name}": np.zeros((len(rows), length), np.int32) for name in names}
    out["decoder_loss_weights"] = np.zeros((len(rows), length), np.float32)
    out["pair_weights"] = np.zeros((len(rows), slots), np.float32)
    out["source_ids"] = np.arange(len(rows), dtype=np.int32) % 2
    tokens = 0
    for b, row in enumerate(rows):
        at = 0
        for k, pair in enumerate(row):
            out["pair_weights"][b, k] = 1
            tokens += len(pair.chosen)
            for side, completion in enumerate((pair.chosen, pair.rejected)):
                text = pair.prompt + completion
                for i, token in enumerate(text):
                    out["decoder_target_tokens"][b, at] = token
                    out["decoder_input_tokens"][b, at] = text[i - 1] if i else 0
                    out["decoder_positions"][b, at] = i
                    out["decoder_segment_ids"][b, at] = 2 * k + 1 + side
                    out["decoder_loss_weights"][b, at] = i >= len(pair.prompt)
                    at += 1
    mean = tokens / out["pair_weights"].sum()
    out["chosen_tokens_per_pair"] = np.full(len(rows), mean, np.float32)
    if reference is not None:
        out["reference_log_probs"] = np.zeros((len(rows), 2 * slots), np.float32)
        for b, row in enumerate(rows):
            for k, pair in enumerate(row):
                out["reference_log_probs"][b, 2 * k : 2 * k + 2] = reference(pair)
    return jax.tree.map(jnp.asarray, out)


@functools.cache
def scores(seed, model=MODEL):
    """(sum of chosen, sum of rejected) of each of the pairs, every sequence by itself."""
    rows = [
        Row(context=[0, *pair.prompt], targets=completion)
        for pair in pairs()
        for completion in (pair.chosen, pair.rejected)
    ]
    found = Scorer(model, parameters(seed, model), batch_size=8)(rows)
    sums = [float(np.sum(log_p, dtype=np.float64)) for log_p in found]
    return list(zip(sums[::2], sums[1::2], strict=True))


def scored(seed, model=MODEL):
    return lambda pair: scores(seed, model)[pairs().index(pair)]


def sigmoid_loss(given, *, beta=0.5):
    """-log sigmoid(beta margin), kept apart from the library's own."""
    return jnp.log1p(jnp.exp(-beta * given.margin))


def margin_of_means(given):
    return given.rejected_mean - given.chosen_mean


POLICY, REFERENCE = parameters(0), parameters(1)


def evaluated(batch, *losses, weights=None, num_sources=0):
    objective = preference(model=MODEL, losses=losses, weights=weights, num_sources=num_sources)
    return jax.jit(lambda batch: objective(POLICY, batch, None))(batch)


def first_state(optimizer):
    return TrainState(jnp.zeros((), jnp.int32), POLICY, optimizer.init(POLICY))


@pytest.mark.parametrize("layout", ["one pair a row", "packed"])
def test_the_loss_is_that_of_single_sequences(layout):
    given = pairs()
    rows = (
        [[p] for p in given] if layout == "one pair a row" else [given[:2], given[2:3], given[3:]]
    )
    policy, reference = scored(0), scored(1)
    batch = batch_of(rows, slots=max(map(len, rows)), length=40, reference=reference)
    out = evaluated(batch, sigmoid_loss, num_sources=2)
    margins = []
    for pair in given:
        (chosen, rejected), (ref_chosen, ref_rejected) = policy(pair), reference(pair)
        margins.append(chosen - ref_chosen - rejected + ref_rejected)
    losses = np.log1p(np.exp(-0.5 * np.array(margins)))
    assert float(out.weight) == len(given)
    np.testing.assert_allclose(out.sum, losses.sum(), rtol=1e-5)
    found = {
        name: float(total / weight)
        for name, (total, weight) in out.metrics.items()
        if weight.ndim == 0
    }
    np.testing.assert_allclose(found["log_ratio/margin"], np.mean(margins), rtol=1e-4, atol=1e-5)
    assert found["accuracy"] == np.mean(np.array(margins) > 0)
    means = [policy(p)[0] / len(p.chosen) for p in given]
    np.testing.assert_allclose(found["llh/chosen"], np.mean(means), rtol=1e-5)
    by_source = np.array([0.0, 0.0])
    sources = [b % 2 for b, row in enumerate(rows) for _ in row]
    np.add.at(by_source, sources, losses)
    np.testing.assert_allclose(out.metrics["source_loss"][0], by_source, rtol=1e-5)


def test_padding_order_and_splits_change_no_pair():
    given = pairs()
    policy, reference = scored(0), scored(1)
    expected = []
    for pair in given:
        (chosen, rejected), (ref_chosen, ref_rejected) = policy(pair), reference(pair)
        margin = chosen - ref_chosen - rejected + ref_rejected
        means = rejected / len(pair.rejected) - chosen / len(pair.chosen)
        expected.append(np.log1p(np.exp(-0.5 * margin)) + 0.3 * means)
    assert np.abs(np.subtract.outer(expected, expected))[np.triu_indices(4, 1)].min() > 1e-2

    @jax.jit
    def each(batch):
        log_probs_BT = frozen_forward(MODEL, POLICY, batch).log_probs_BT()
        sums_BS = by_completion(batch, log_probs_BT)
        found = pairs_of(batch, sums_BS, batch["reference_log_probs"])
        return sigmoid_loss(found) + 0.3 * margin_of_means(found)

    def values(rows, slots, length):
        """Of each pair, in the order of the rows."""
        batch = batch_of(rows, slots=slots, length=length, reference=reference)
        return each(batch)[batch["pair_weights"].reshape(-1) > 0]

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    for length in (16, 30):
        close(values([[p] for p in given], 1, length), expected)
    close(values([[p] for p in given[::-1]], 3, 16), expected[::-1])
    close(values([given[2:], given[:2]], 2, 40), expected[2:] + expected[:2])
    for part in (slice(0, 2), slice(2, 4)):
        close(values([[p] for p in given[part]], 1, 16), expected[part])
    batch = batch_of([[p] for p in given], slots=1, length=16, reference=reference)
    out = evaluated(batch, sigmoid_loss, margin_of_means, weights=[1.0, 0.3])
    close(out.sum, sum(expected))


def test_microbatches_and_rows_without_pairs_change_no_update():
    given = pairs()
    batch = batch_of([[p] for p in given] + [[]] * 4, slots=2, reference=scored(1))

    def nll_of_tokens(found):
        return -found.chosen / found.mean_chosen_length

    def updated(microbatches, batch):
        optimizer = optax.sgd(0.1)
        objective = preference(model=MODEL, losses=[sigmoid_loss, nll_of_tokens])
        step = make_train_step(loss_fn=objective, optimizer=optimizer, microbatches=microbatches)
        return jax.jit(step)(first_state(optimizer), batch)[0].params

    whole = updated(1, batch)
    full = updated(1, jax.tree.map(lambda x: x[:4], batch))
    split = updated(4, batch)
    for other in (full, split):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, other)
    assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), whole))


def test_prompt_targets_and_masked_positions_are_not_read():
    batch = batch_of([[p] for p in pairs()], slots=1, reference=scored(1))
    masked = batch["decoder_loss_weights"] == 0
    other = {**batch, "decoder_target_tokens": jnp.where(masked, 5, batch["decoder_target_tokens"])}
    padding = batch["decoder_segment_ids"] == 0
    other["decoder_input_tokens"] = jnp.where(padding, 7, batch["decoder_input_tokens"])
    assert evaluated(batch, sigmoid_loss).sum == evaluated(other, sigmoid_loss).sum


class Fixed(FrozenModel):
    """A live reference whose parameters are at hand."""

    def abstract(self, mesh, rules):
        return jax.eval_shape(lambda: REFERENCE)

    def read(self, mesh, rules):
        return REFERENCE


def test_a_live_reference_is_the_stored_one_and_gets_no_gradient():
    rows = [[p] for p in pairs()]
    stored = batch_of(rows, slots=1, reference=scored(1))
    batch = {k: v for k, v in stored.items() if k != "reference_log_probs"}
    objective = preference(
        model=MODEL, losses=[sigmoid_loss], reference=Fixed(model=MODEL, checkpoint=None)
    )
    from_store = evaluated(stored, sigmoid_loss)

    def loss(params, extras):
        return objective(params, batch, None, extras=extras).sum

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (policy, reference) = gradients(POLICY, REFERENCE)
    np.testing.assert_allclose(value, from_store.sum, rtol=1e-5)
    assert not any(np.any(g) for g in jax.tree.leaves(reference))
    assert any(np.any(g) for g in jax.tree.leaves(policy))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_tails_count_in_part(alpha):
    """As alpha of whole completions and the rest of those cut to the length that both have."""
    given = pairs(seed=11)
    shorter = [min(len(p.chosen), len(p.rejected)) for p in given]
    assert {np.sign(len(p.chosen) - len(p.rejected)) for p in given} == {-1, 0, 1}
    rows = [
        Row(context=[0, *pair.prompt], targets=completion[:most])
        for sizes in (shorter, [None] * 4)
        for pair, most in zip(given, sizes, strict=True)
        for completion in (pair.chosen, pair.rejected)
    ]

    def expected(params):
        found = Scorer(MODEL, params, batch_size=len(rows))(rows)
        cut, whole = np.array([np.sum(x, dtype=np.float64) for x in found]).reshape(2, -1, 2)
        return alpha * whole + (1 - alpha) * cut

    policy_P2, reference_P2 = expected(POLICY), expected(REFERENCE)
    margins_P = (policy_P2 - reference_P2) @ [1, -1]
    batch = batch_of([given[:2], given[2:3], given[3:]], slots=2, length=40)
    objective = preference(
        model=MODEL,
        losses=[sigmoid_loss],
        reference=Fixed(model=MODEL, checkpoint=None),
        ld_alpha=alpha,
    )
    out = jax.jit(lambda extras: objective(POLICY, batch, None, extras=extras))(REFERENCE)
    np.testing.assert_allclose(out.sum, np.log1p(np.exp(-0.5 * margins_P)).sum(), rtol=1e-5)
    total, weight = out.metrics["llh/chosen"]
    means_P = policy_P2[:, 0] / [len(p.chosen) for p in given]
    np.testing.assert_allclose(total / weight, means_P.mean(), rtol=1e-5)


def test_pairs_weigh_by_how_likely_the_policy_samples_them():
    """WPO's weights, written out in float64: the logits of all tokens, completion by completion."""
    given, beta = pairs(), 0.5
    reference = scored(1)
    batch = batch_of([given[:2], given[2:3], given[3:]], slots=2, length=40, reference=reference)

    @jax.jit
    def factors(params):
        forward = frozen_forward(MODEL, params, batch)
        return forward.hidden_XD, forward.head_VD()

    hidden_XD, head_VD = factors(POLICY)
    logits_XV = np.asarray(hidden_XD, np.float64) @ np.asarray(head_VD).T
    logits_XV *= MODEL.logit_scale
    p_XV = np.exp(logits_XV - logits_XV.max(-1, keepdims=True))
    p_XV /= p_XV.sum(-1, keepdims=True)
    targets_X = np.asarray(batch["decoder_target_tokens"]).ravel()
    counted_X = np.asarray(batch["decoder_loss_weights"]).ravel() > 0
    ratio_X = p_XV[np.arange(len(targets_X)), targets_X] / np.square(p_XV).sum(-1)
    row_X, segment_X = (
        np.indices(batch["decoder_segment_ids"].shape)[0].ravel(),
        np.asarray(batch["decoder_segment_ids"]).ravel(),
    )
    weights, losses = [], []
    for row, k, pair in [(0, 0, 0), (0, 1, 1), (1, 0, 2), (2, 0, 3)]:
        sides = [
            np.log(ratio_X[counted_X & (row_X == row) & (segment_X == 2 * k + 1 + side)]).mean()
            for side in (0, 1)
        ]
        weights.append(min(1.0, np.exp(sum(sides))))
        margin = np.subtract(scored(0)(given[pair]), reference(given[pair])) @ [1, -1]
        losses.append(np.log1p(np.exp(-beta * margin)))
    assert 0 < min(weights) < max(weights)

    objective = preference(model=MODEL, losses=[sigmoid_loss], on_policy_weights=True)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def of(params):
        out = objective(params, batch, None)
        return out.sum, out.metrics

    (total, metrics), gradients = of(POLICY)
    np.testing.assert_allclose(total, np.dot(weights, losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy_weight"][0], np.sum(weights), rtol=1e-5)
    assert float(metrics["policy_weight"][1]) == len(given)

    # Weights are constants to the gradient: that of plain losses, weighted pair by pair.
    plain = preference(model=MODEL, losses=[sigmoid_loss])
    slots = (
        jnp.zeros((3, 2))
        .at[jnp.array([0, 0, 1, 2]), jnp.array([0, 1, 0, 0])]
        .set(jnp.array(weights, jnp.float32))
    )

    def weighted(params, k):
        one_pair = jnp.zeros(6).at[k].set(1.0).reshape(3, 2) * batch["pair_weights"]
        return slots.reshape(-1)[k] * plain(params, {**batch, "pair_weights": one_pair}, None).sum

    expected = jax.jit(jax.grad(lambda params: sum(weighted(params, k) for k in (0, 1, 2, 4))))(
        POLICY
    )
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_weight_of_a_pair_is_one_where_its_tokens_are_as_likely_as_sampled_ones():
    batch = batch_of([[p] for p in pairs()], slots=1)
    shape = batch["decoder_target_tokens"].shape
    even = jnp.full(shape, -jnp.log(VOCAB))  # a uniform policy: sum of p^2 is 1 / V
    np.testing.assert_allclose(weights_on_policy(batch, even, even), 1.0, rtol=1e-6)
    likelier = weights_on_policy(batch, even + 1.0, even)
    np.testing.assert_allclose(likelier, 1.0, rtol=1e-6)  # at most 1
    rarer = weights_on_policy(batch, even - 0.5, even)
    np.testing.assert_allclose(rarer, np.exp(-1.0), rtol=1e-6)  # whatever the lengths


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_policy_and_reference_alike_give_log_two(dtype, tolerance):
    """The reference scores sequences one by one, so that in bfloat16 its sums are rounded otherwise."""
    model = Transformer(config=dataclasses.replace(MODEL.config, dtype=dtype))
    losses = [direct.dpo, direct.robust, transport.aot, direct.sigmoid_norm]
    batch = batch_of([pairs()[:2], pairs()[2:]], slots=2, length=40, reference=scored(0, model))
    objective = preference(model=model, losses=losses)
    metrics = jax.jit(lambda batch: objective(POLICY, batch, None).metrics)(batch)
    for loss in losses:
        total, weight = metrics[f"loss/{loss.__name__}"]
        np.testing.assert_allclose(total / weight, np.log(2), atol=tolerance)
    assert float(metrics["log_ratio/margin"][0]) == pytest.approx(0, abs=10 * tolerance)


def dropping(rate=0.1):
    """A model with dropout in its layers, and its parameters: those of the model without."""
    return MODEL.clone(block=functools.partial(Block, dropout=rate))


def test_dropout_is_refused_where_a_reference_without_it_is_compared():
    batch = batch_of([[p] for p in pairs()], slots=1, reference=scored(0))
    start = {"params": POLICY, "batch": batch, "rng": jax.random.key(0)}
    compared = preference(model=dropping(), losses=[direct.dpo])
    with pytest.raises(ValueError, match=r"^layers/block_0 draws .*DROPOUT_RATE.*LORA_DROPOUT"):
        jax.eval_shape(compared, *start.values())
    # Evaluation draws nothing, and neither does a rate of 0: the policy is its reference.
    for objective, rng in (
        (compared, None),
        (preference(model=dropping(0.0), losses=[direct.dpo]), start["rng"]),
    ):
        out = jax.jit(objective)(POLICY, batch, rng)
        np.testing.assert_allclose(float(out.sum / out.weight), np.log(2), rtol=1e-6)
    # Without a reference, dropout regularises as in other training.
    free = preference(model=dropping(), losses=[reference_free.simpo])
    assert float(jax.jit(free)(POLICY, batch, start["rng"]).weight) == len(pairs())


def test_one_batch_is_learned():
    batch = batch_of([[p] for p in pairs()], slots=1, reference=scored(0))
    objective = preference(model=MODEL, losses=[functools.partial(direct.dpo, beta=0.5)])
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(loss_fn=objective, optimizer=optimizer))
    state = first_state(optimizer)
    for _ in range(60):
        state, metrics = step(state, batch)
    assert metrics["loss"][0] / metrics["loss"][1] < 0.05


def test_evaluation_sums_the_same():
    batch = batch_of([[p] for p in pairs()], slots=1, reference=scored(1))
    step = make_eval_step(loss_fn=preference(model=MODEL, losses=[sigmoid_loss]), microbatches=2)
    found = jax.jit(step)(POLICY, batch)
    np.testing.assert_allclose(found["loss"][0], evaluated(batch, sigmoid_loss).sum, rtol=1e-6)


def test_unpaired_examples_are_reported_by_label():
    batch = batch_of([[p] for p in pairs()], slots=1, reference=scored(1))
    batch["pair_labels"] = jnp.array([[1.0], [0.0], [0.0], [1.0]])
    out = evaluated(batch, functools.partial(unpaired.kto, beta=0.5, desirable_weight=2.0))
    sums = np.array([scored(0)(p)[0] for p in pairs()])
    ratios = np.array([np.subtract(scored(0)(p), scored(1)(p)) for p in pairs()])
    gain = 0.5 * (ratios[:, 0] - max(0.0, ratios[:, 1].mean())) * [1, -1, -1, 1]
    np.testing.assert_allclose(out.sum, np.sum([2, 1, 1, 2] / (1 + np.exp(gain))), rtol=1e-5)
    total, weight = out.metrics["logps/undesirable"]
    np.testing.assert_allclose(total / weight, sums[1:3].mean(), rtol=1e-5)
    assert "accuracy" not in out.metrics


def test_what_cannot_be_is_said_before_a_step():
    with pytest.raises(ValueError, match="LOSSES is empty"):
        preference(model=MODEL, losses=[])
    with pytest.raises(ValueError, match="LOSS_WEIGHTS"):
        preference(model=MODEL, losses=[sigmoid_loss], weights=[1.0, 2.0])
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=f"LOSS_WEIGHTS: the weight of nll is {wrong} and must"
        ):
            preference(model=MODEL, losses=[sigmoid_loss, terms.nll], weights=[1.0, wrong])
    batch = batch_of([[p] for p in pairs()], slots=1)
    with pytest.raises(MissingReferenceError, match="REFERENCE"):
        evaluated(batch, sigmoid_loss)
    with pytest.raises(ValueError, match="PAIRS_KIND"):
        evaluated({**batch, "pair_labels": batch["pair_weights"]}, terms.nll)
    with pytest.raises(ValueError, match="LD_ALPHA = 1.5 must lie in"):
        preference(model=MODEL, losses=[sigmoid_loss], ld_alpha=1.5)
    with pytest.raises(ValueError, match="LD_ALPHA = 0.5 .*ld_dpo.gin"):
        preference(model=MODEL, losses=[sigmoid_loss], ld_alpha=0.5)
    with pytest.raises(ValueError, match="LD_ALPHA = 0.5 .* single completions"):
        preference(
            model=MODEL,
            losses=[unpaired.kto],
            reference=Fixed(model=MODEL, checkpoint=None),
            ld_alpha=0.5,
        )
    with pytest.raises(ValueError, match="on_policy_weights .* single completions"):
        preference(model=MODEL, losses=[unpaired.kto], on_policy_weights=True)
    for sorting in (transport.aot, functools.partial(transport.aot_unpaired, beta=0.5)):
        with pytest.raises(ValueError, match="on_policy_weights .*sorts the pairs of a batch"):
            preference(model=MODEL, losses=[sigmoid_loss, sorting], on_policy_weights=True)
    with pytest.raises(ValueError, match="REFERENCE is None"):
        FrozenCheckpoint(macro="REFERENCE", path=None, model_dir="/unread")


def test_a_batch_has_the_arrays_that_inputs_say():
    batch = batch_of([[p] for p in pairs()], slots=2, reference=scored(1))
    said = inputs.PackedPairs({"targets": LENGTH}, pairs=2).arrays(4)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in said.items()
    }
    more = inputs.PackedPairs({"targets": LENGTH}, pairs=2, labels=True, margins=True).arrays(4)
    assert more.keys() - said.keys() == {"pair_labels", "pair_margins"}
    assert more["pair_margins"] == more["pair_labels"] == said["pair_weights"]
