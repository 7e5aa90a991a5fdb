"""What all policies have in common, and SnapKV's invariants.

Numbers in docstrings are those of the invariants of SnapKV that the project holds itself to, and of the
pitfalls of its first implementations.

Shapes: B batch, T prompt length, S slots, C capacity, N query heads, K key/value heads, G = N / K, H head
dim.
"""

import numpy as np
import pytest

from espalier.model.kv_cache.base import AttentionForm
from espalier.model.kv_cache.policies import policy_named
from tests.model.kv_cache.two_prompts import (
    FORM,
    LENGTHS,
    ROPE,
    SNAP,
    B,
    K,
    N,
    compress,
    kept,
    positions,
    read,
    reference_step,
    snap_scores,
    step,
    top,
)


@pytest.mark.parametrize("group_vote", ["mean", "max"])
@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("window", [None, 11])
def test_snapkv_keeps_what_its_definition_says(pooling, group_vote, window):
    """3, 4 and pitfall 2: each row's own last tokens, and each head's best before them."""
    form = AttentionForm(scale=1.0, rope=ROPE, window=window)
    policy = policy_named("snapkv", **SNAP, pooling=pooling, group_vote=group_vote)
    state = read(policy, form)
    small = compress(policy, state, 2)
    assert small.length == 8 + 2
    for b, row in enumerate(kept(policy, small)):
        scores = snap_scores(b, 3, 3, pooling, group_vote, form)
        last = set(range(LENGTHS[b] - 3, LENGTHS[b]))
        for head, found in enumerate(row):
            assert len(found) == len(set(found)) == 8
            assert set(found) == top(scores[head], 5) | last
    # What is kept is bitwise what was there.
    for b in range(B):
        for head in range(K):
            for s, position in enumerate(small.positions_BXS[b, head][:8]):
                for held, whole in (
                    (small.k_BKSH, state.slots.k_BKSH),
                    (small.v_BKSH, state.slots.v_BKSH),
                ):
                    np.testing.assert_array_equal(held[b, head, s], whole[b, head, position])


@pytest.mark.parametrize(
    ("name", "settings", "layer"),
    [
        ("snapkv", {"window": 3}, 0),
        ("h2o", {}, 0),
        ("tova", {}, 0),
        ("random", {"window": 3}, 0),
        ("adakv", {"window": 3}, 0),
        ("streaming_llm", {}, 0),
        *(("pyramidkv", {"window": 3, "beta": 5}, layer) for layer in range(3)),
    ],
)
@pytest.mark.parametrize("capacity", [8, 14])
def test_a_padded_batch_equals_its_rows_alone(name, settings, layer, capacity):
    """11 and pitfall 2: same indices, and the same outputs after them; a row that fits is whole."""
    policy = policy_named(name, **settings, capacity=capacity)
    depth = {"layer": layer, "num_layers": 3}
    together = compress(policy, read(policy, **depth), 1)
    outputs, _ = step(policy, together, LENGTHS)
    for b in range(B):
        at = positions(LENGTHS[b : b + 1], LENGTHS[b])
        alone = compress(policy, read(policy, at=at, row=b, **depth), 1)
        assert kept(policy, alone)[0] == kept(policy, together)[b]
        output, _ = step(policy, alone, LENGTHS[b : b + 1], rows=[b])
        np.testing.assert_allclose(output[0], outputs[b], atol=1e-5)
    if capacity >= LENGTHS[1]:
        assert kept(policy, together)[1] == [list(range(LENGTHS[1]))] * K


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "adakv", "oracle"])
def test_chunks_are_compressed_together(name):
    """Pitfall 5: what is kept of a prompt that is read in chunks is what is kept of it at once."""
    settings = {"future": 4} if name == "oracle" else {}
    policy = policy_named(
        name, capacity=8, **settings, **({"window": 5} if name in ("snapkv", "adakv") else {})
    )
    at_once = kept(policy, compress(policy, read(policy), 1))
    assert kept(policy, compress(policy, read(policy, chunks=7), 1)) == at_once


def test_cache_length_grows_by_what_is_generated_and_positions_are_the_true_ones():
    """4: C + m after m steps. 10: what a head sees is as if the full cache were masked to it."""
    policy = policy_named("snapkv", **SNAP)
    state = compress(policy, read(policy), 3)
    for m in range(3):
        got, state = step(policy, state, LENGTHS + m)
        held = kept(policy, state)
        assert {len(found) for row in held for found in row} == {8 + m + 1}
        for head in range(K):
            only = [set(row[head]) for row in held]
            want = reference_step(LENGTHS + m, FORM, only)
            mine = slice(head * (N // K), (head + 1) * (N // K))
            np.testing.assert_allclose(got[:, :, mine], want[:, :, mine], atol=1e-5)


def test_a_short_row_keeps_everything():
    """What is left of its slots is empty; another row may be compressed beside it."""
    policy = policy_named("snapkv", capacity=15, window=3)
    rows = kept(policy, compress(policy, read(policy), 1))
    assert rows[1] == [list(range(13))] * K
    assert {len(found) for found in rows[0]} == {15}


def test_windows_as_long_as_the_prompt_but_one_still_leave_a_vote():
    """Pitfall 6: a tiny prefix, and a window that is nearly all there is."""
    policy = policy_named("snapkv", capacity=13, window=12)
    rows = kept(policy, compress(policy, read(policy), 1))
    for head, found in enumerate(rows[0]):
        (voted,) = set(found) - set(range(8, 20))
        assert voted == snap_scores(0, 12, 7, "max", "mean")[head].argmax()


def test_layers_with_a_short_window_keep_a_ring_of_it():
    """Pitfall 10: nothing is selected where a window hides the rest; a long window hides less."""
    short, long = (AttentionForm(scale=1.0, rope=ROPE, window=w) for w in (6, 11))
    for name in ("snapkv", "h2o", "tova", "streaming_llm", "adakv", "random", "full"):
        window = {"window": 3} if name in ("snapkv", "adakv", "random") else {}
        policy = policy_named(name, **window, **({} if name == "full" else {"capacity": 8}))
        state = compress(policy, read(policy, short), 3)
        assert state.length == 6 and state.ring == 0
        for m in range(3):
            got, state = step(policy, state, LENGTHS + m, short)
            want = reference_step(LENGTHS + m, short)
            np.testing.assert_allclose(got, want, atol=1e-5)
    snap = policy_named("snapkv", **SNAP)
    assert compress(snap, read(snap, long), 3).length == 8 + 3
