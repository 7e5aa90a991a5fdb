"""What each of SnapKV's neighbours keeps, against NumPy in float64.

Numbers in docstrings are those of the invariants of SnapKV that the project holds itself to, and of the
pitfalls of its first implementations.

Shapes: B batch, T prompt length, S slots, C capacity, N query heads, K key/value heads, G = N / K, H head
dim.
"""

import numpy as np
import pytest

from espalier.model.kv_cache.by_layer import ByLayer
from espalier.model.kv_cache.policies import policy_named
from espalier.model.kv_cache.snapkv import layer_budget
from tests.model.kv_cache.two_prompts import (
    FORM,
    LENGTHS,
    SNAP,
    B,
    H,
    K,
    N,
    compress,
    kept,
    pool,
    positions,
    read,
    reference_step,
    snap_scores,
    step,
    top,
    weights,
)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("renumber", [True, False])
def test_streaming_llm_keeps_sinks_and_a_ring(renumber, dtype):
    """Renumbered, the sinks stand right before the recent tokens; otherwise where they were."""
    policy = policy_named("streaming_llm", capacity=8, sinks=2, renumber=renumber)
    state = compress(policy, read(policy), 9, dtype)
    for m in range(9):
        position = LENGTHS + m
        got, state = step(policy, state, position)
        only = [{0, 1, *range(p - 5, p + 1)} for p in position]
        moved = [{0: p - 7, 1: p - 6} if renumber else {} for p in position]
        want = reference_step(position, FORM, only, moved)
        np.testing.assert_allclose(got, want, atol=0.1 if dtype else 1e-5)
        assert policy.view(state).k_BSKH.shape[1] == 8
    other = reference_step(position, FORM, only, [{} if renumber else moved[0]] * B)
    assert not renumber or np.abs(other - want).max() > 0.01


def test_sinks_that_a_short_prompt_lacks_leave_no_gap():
    """Of 3 tokens with 5 sinks, the ring of 2 drops the first of the generated ones."""
    policy = policy_named("streaming_llm", capacity=7, sinks=5)
    lengths = np.array([20, 3])
    state = compress(policy, read(policy, at=positions(lengths)), 4)
    for m in range(4):
        position = lengths + m
        got, state = step(policy, state, position)
        p, q = position
        only = [{*range(5), p - 1, p}, {0, 1, 2, *range(max(3, q - 1), q + 1)}]
        moved = [{j: p - 6 + j for j in range(5)}, {j: max(q - 4, 0) + j for j in range(3)}]
        np.testing.assert_allclose(got, reference_step(position, FORM, only, moved), atol=1e-5)


def test_sliding_keeps_the_last_tokens():
    policy = policy_named("sliding", window=5)
    state = compress(policy, read(policy), 7)
    for m in range(7):
        got, state = step(policy, state, LENGTHS + m)
        only = [set(range(p - 4, p + 1)) for p in LENGTHS + m]
        np.testing.assert_allclose(got, reference_step(LENGTHS + m, FORM, only), atol=1e-5)


POOLINGS = [
    {},
    {"kernel": 3},
    {"kernel": 5, "pooling": "average"},
]  # none by default, as in the papers


@pytest.mark.parametrize("pooling", POOLINGS)
def test_h2o_sums_the_attention_of_all_queries(pooling):
    policy = policy_named("h2o", capacity=9, window=3, **pooling)
    for b, row in enumerate(kept(policy, compress(policy, read(policy), 1))):
        received = weights(b).sum(1).reshape(K, N // K, -1).mean(1)[:, :-3]
        scores = pool(received, policy.kernel, policy.pooling)
        for head, found in enumerate(row):
            last = set(range(LENGTHS[b] - 3, LENGTHS[b]))
            assert set(found) == top(scores[head], 6) | last
            assert not pooling or top(scores[head], 6) != top(received[head], 6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_tova_asks_the_last_query_alone_for_all_heads(pooling):
    policy = policy_named("tova", capacity=8, **pooling)
    state = compress(policy, read(policy), 1)
    assert state.positions_BXS.shape == (B, 1, 9)
    for b, row in enumerate(kept(policy, state)):
        votes = weights(b)[:, -1].mean(0)[None, :-1]
        scores = pool(votes, policy.kernel, policy.pooling)
        assert not pooling or top(scores[0], 7) != top(votes[0], 7)
        assert set(row[0]) == top(scores[0], 7) | {LENGTHS[b] - 1}


def test_each_layer_has_the_policy_that_a_list_repeats():
    """Bit for bit: what is held, and what a token after it reads."""
    policies = [
        policy_named("full"),
        policy_named("adakv", **SNAP),
        policy_named("h2o", capacity=8),
    ]
    listed = ByLayer(tuple(policies))
    for layer in (0, 4, 5):
        alone, depth = policies[layer % 3], {"layer": layer, "num_layers": 6}
        want, got = (compress(one, read(one, **depth), 1) for one in (alone, listed))
        assert kept(listed, got) == kept(alone, want)
        (want, _), (got, _) = step(alone, want, LENGTHS), step(listed, got, LENGTHS)
        np.testing.assert_array_equal(got, want)


def test_lists_of_policies_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="2 cache policies, .* do not divide their number, 3"):
        read(ByLayer((policy_named("full"), policy_named("tova"))), num_layers=3)
    for wrong in (policy_named("oracle"), ByLayer((policy_named("full"),))):
        with pytest.raises(ValueError, match=f"{type(wrong).__name__} cannot be the cache policy"):
            ByLayer((policy_named("full"), wrong))
    with pytest.raises(ValueError, match="at least one policy"):
        ByLayer(())


def test_oracle_keeps_what_the_continuation_attends_to():
    policy = policy_named("oracle", capacity=8, future=4)
    state = compress(policy, read(policy), 1)
    for b, row in enumerate(kept(policy, state)):
        prompt = LENGTHS[b] - 4
        votes = weights(b)[:, -4:, :prompt].sum(1).reshape(K, N // K, prompt).mean(1)
        for head, found in enumerate(row):
            assert set(found) == top(votes[head], 8)


def test_random_draws_depend_on_seed_layer_and_head():
    found = {
        (seed, layer): kept(policy, compress(policy, read(policy, layer=layer), 1))
        for seed in (0, 1)
        for layer in (0, 1)
        for policy in [policy_named("random", capacity=8, window=3, seed=seed)]
    }
    assert len({str(rows) for rows in found.values()}) == 4
    assert found[0, 0][0][0] != found[0, 0][0][1]
    for row in found[0, 0]:
        assert {len(head) for head in row} == {8}
    assert all(set(head) >= {17, 18, 19} for head in found[0, 0][0])


def test_adakv_shares_a_budget_among_heads():
    """K * C slots hold the layer's best votes; every head has at least its guaranteed part."""
    policy = policy_named("adakv", capacity=8, window=3, kernel=1, safeguard=0.2)
    state = compress(policy, read(policy), 4)
    assert state.slots.k_BKSH.shape == (B, 1, K * 8 + K * 4, H)
    for b, row in enumerate(kept(policy, state)):
        scores = snap_scores(b, 3, 1, "max", "mean")
        scores[np.arange(K), scores.argmax(1)] = np.inf  # int(0.2 * 5) = 1 is guaranteed
        last = {(h, j) for h in range(K) for j in range(LENGTHS[b] - 3, LENGTHS[b])}
        best = {divmod(i, scores.shape[1]) for i in top(scores.reshape(-1), K * 5)}
        assert {(h, j) for h in range(K) for j in row[h]} == best | last
    for m in range(4):
        only = kept(policy, state)
        got, state = step(policy, state, LENGTHS + m)
        for head in range(K):  # each head against a reference of its own tokens
            sets = [{*only[b][head], LENGTHS[b] + m} for b in range(B)]
            want = reference_step(LENGTHS + m, FORM, sets)
            mine = slice(head * (N // K), (head + 1) * (N // K))
            np.testing.assert_allclose(got[:, :, mine], want[:, :, mine], atol=1e-5)


def test_adakv_with_everything_guaranteed_is_snapkv():
    ada = policy_named("adakv", **SNAP, safeguard=1.0)
    snap = policy_named("snapkv", **SNAP)
    assert kept(ada, compress(ada, read(ada), 1)) == kept(snap, compress(snap, read(snap), 1))


@pytest.mark.parametrize("layers", [1, 2, 5, 32])
@pytest.mark.parametrize(("average", "first"), [(100, 195), (100, 131), (7, 14), (50, 50)])
def test_pyramid_budgets_average_to_the_target(layers, average, first):
    """13: exactly, and each is within one token of a straight line."""
    found = [
        layer_budget(first, average=average, layer=layer, num_layers=layers)
        for layer in range(layers)
    ]
    assert sum(found) == average * layers
    line = np.linspace(first, 2 * average - first, layers) if layers > 1 else [average]
    np.testing.assert_allclose(found, line, atol=1)
    assert min(found) >= 0


def test_pyramidkv_compresses_each_layer_by_its_budget():
    """Of 20 tokens, 9, 5 and 1 before the window; of 13, as of 20; the deepest could keep 8."""
    policy = policy_named("pyramidkv", capacity=8, window=3, kernel=3, beta=5)
    for layer, (slots, before) in enumerate([(3 + 9, 9), (8, 5), (8, 1)]):
        state = compress(policy, read(policy, layer=layer, num_layers=3), 0)
        assert state.length == slots
        for b, row in enumerate(kept(policy, state)):
            scores = snap_scores(b, 3, 3, "max", "mean")
            last = set(range(LENGTHS[b] - 3, LENGTHS[b]))
            for head, found in enumerate(row):
                assert set(found) == top(scores[head], before) | last


def test_pyramidkv_is_flatter_for_a_short_row():
    """Of 13 tokens the first layer keeps all; what it cannot keep, the last keeps more."""
    policy = policy_named("pyramidkv", capacity=10, window=3, kernel=3, beta=5)
    sizes = [
        [len(row[0]) for row in kept(policy, compress(policy, state, 0))]
        for state in (read(policy, layer=layer, num_layers=3) for layer in range(3))
    ]
    assert sizes == [[3 + 13, 3 + 10], [3 + 7, 3 + 7], [3 + 1, 3 + 4]]
