"""Hit rates and overlaps against hand-made cases, and attention weights against the model's own.

Shapes: B prompts, T tokens, N query heads, Q queries, P positions.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.papers.snapkv import attention
from espalier.model.config import TransformerConfig
from espalier.model.kv_cache.full import FullCache
from espalier.model.kv_cache.selecting import Random
from espalier.model.kv_cache.snapkv import PyramidKV, SnapKV
from espalier.model.transformer import Transformer
from espalier.trainers.decoding.decode import decode
from espalier.trainers.decoding.prefill import prefill
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.snapkv import replay
from tests.drawn import drawn

CONFIG = TransformerConfig(
    vocab_size=13,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=16,
    scan_layers=False,
)
MODEL = Transformer(config=CONFIG)
LENGTHS = jnp.array([9, 12])


@pytest.fixture(scope="module")
def prompts():
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 12), 1, 13)
    params = nn.meta.unbox(drawn(MODEL, tokens_BT))
    return jax.tree.map(lambda x: 3 * x, params), tokens_BT  # far from uniform attention


@pytest.fixture(scope="module")
def recording(prompts):
    return jax.jit(lambda *args: replay.record(MODEL, *args))(*prompts, LENGTHS)


def test_hits_of_a_case_made_by_hand():
    weights_BNQP = jnp.array([[[[0.5, 0.3, 0.0, 0.2], [0.1, 0.0, 0.9, 0.0]]]])
    chosen_BNP = jnp.array([[[True, False, False, True]]])
    # Above 0.15 lie positions 0, 1, 3 of the first query and 2 of the second; 0 and 3 are chosen.
    found_B2 = attention.hits(chosen_BNP, weights_BNQP, 0.15)
    assert found_B2.tolist() == [[2, 4]]


def test_when_every_position_is_chosen_all_that_is_attended_to_is_hit(recording):
    ends_B = LENGTHS - 2
    found_WB2 = attention.hits_by_window(
        recording.layers[0],
        ends_B,
        windows=2,
        window=2,
        answer=2,
        prefix=3,
        count=3,
        threshold=1e-12,
    )
    hit_WB, attended_WB = found_WB2[..., 0], found_WB2[..., 1]
    assert (attended_WB > 0).all()
    assert (hit_WB == attended_WB).all()


def test_weights_are_those_of_a_softmax_by_hand_and_of_real_tokens_alone(recording):
    shown = recording.layers[1]
    at_BQ = LENGTHS[:, None] - jnp.array([[2, 1]])
    found_BNQP = attention.attention_weights(shown, at_BQ, 12)
    for b, length in enumerate(LENGTHS.tolist()):
        for n in range(4):
            for i, at in enumerate((length - 2, length - 1)):
                q_H, k_TH = shown.q_BTNH[b, at, n], shown.k_BTKH[b, : at + 1, n // 2]
                logits_T = np.asarray(k_TH @ q_H, np.float64) / 2.0  # head size 4
                wanted_T = np.exp(logits_T) / np.exp(logits_T).sum()
                np.testing.assert_allclose(found_BNQP[b, n, i, : at + 1], wanted_T, atol=1e-5)
                assert not found_BNQP[b, n, i, at + 1 :].any()


def test_top_positions_and_overlap_count_positions():
    votes_BNP = jnp.array([[[1.0, 4.0, 2.0, 3.0], [9.0, 1.0, 8.0, 0.0]]])
    one = attention.top_positions(votes_BNP, 2)
    assert one.astype(int).tolist() == [[[0, 1, 0, 1], [1, 0, 1, 0]]]
    other = attention.top_positions(-votes_BNP, 2)
    assert attention.overlap(one, one).tolist() == [1.0]
    assert attention.overlap(one, other).tolist() == [0.0]
    third = one.at[0, 0].set(other[0, 0])  # one head of two in common
    assert attention.overlap(one, third).tolist() == [0.5]


def test_held_positions_leave_out_empty_slots_and_what_is_past_the_prefix():
    held = attention.held_positions(jnp.array([[[4, -1, 0, 2]]]), 4)
    assert held.astype(int).tolist() == [[[1, 0, 1, 0]]]


@pytest.mark.parametrize(
    "policy",
    [
        FullCache(),
        SnapKV(capacity=6, window=2, kernel=3),
        Random(capacity=6, window=2),
        PyramidKV(capacity=6, window=2, kernel=3),
    ],
)
def test_a_replayed_policy_answers_as_if_it_had_read_the_prompt(prompts, recording, policy):
    params, tokens_BT = prompts
    settings = Settings(max_new_tokens=4)

    @jax.jit
    def both(params, recording):
        logits_BV, caches = prefill(MODEL, params, policy, tokens_BT, LENGTHS, room=4)
        keys_B = jax.random.split(jax.random.key(0), 2)
        args = (logits_BV, caches, LENGTHS, jnp.ones(2, bool), keys_B, settings)
        wanted, _ = decode(MODEL, params, policy, *args)
        caches = replay.compressed(MODEL, policy, recording, room=4)
        after = replay.decoding_policy(policy)
        return wanted, replay.answer(
            MODEL, params, after, caches, LENGTHS, recording.logits_BV, settings
        )

    wanted, found = both(params, recording)
    assert (found.tokens_BM == wanted.tokens_BM).all()
    np.testing.assert_allclose(found.log_probs_BM, wanted.log_probs_BM, atol=1e-5)


def test_a_question_read_later_is_as_if_the_prompt_had_gone_on(prompts):
    params, tokens_BT = prompts

    @jax.jit
    def both(params):
        # Rows of 6 and 9 tokens that go on by three.
        before = replay.record(MODEL, params, tokens_BT, LENGTHS - 3)
        at_BX = LENGTHS[:, None] - 3 + jnp.arange(4)[None]  # the fourth is padding
        more_BX = jnp.take_along_axis(tokens_BT, jnp.minimum(at_BX, 11), axis=1)
        later = replay.record_more(MODEL, params, before, more_BX, jnp.array([3, 3]))
        return replay.record(MODEL, params, tokens_BT, LENGTHS), later

    whole, later = both(params)
    np.testing.assert_allclose(later.logits_BV, whole.logits_BV, atol=1e-4)
    assert later.lengths_B.tolist() == LENGTHS.tolist()
    for row, length in zip(later.layers[1].positions_BT.tolist(), (9, 12), strict=True):
        assert sorted(row)[-length:] == list(range(length))
