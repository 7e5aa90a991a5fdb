"""Prompts read at once, in chunks and into every cache policy, and what generation makes of them.

Numbers in docstrings are those of the invariants of SnapKV that the project holds itself to: 1 a
capacity of the whole prompt changes nothing; 2 the first token is the full cache's; 11 a padded batch
equals its rows alone.

Shapes: B batch, T prompt length, M new tokens, S slots, K key/value heads, V vocabulary.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.kv_cache.by_layer import ByLayer
from espalier.model.kv_cache.policies import POLICIES, policy_named
from espalier.model.transformer import Transformer
from espalier.trainers.decoding.decode import decode
from espalier.trainers.decoding.decoder import Decoder
from espalier.trainers.decoding.prefill import empty_caches, prefill
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.partitioning import RULE_SETS, make_mesh, use_mesh

V, T, M = 31, 24, 5
LENGTHS = jnp.array([24, 17])
SMALL = {
    "full": {},
    "sliding": {"window": 7},
    "snapkv": {"capacity": 9, "window": 3, "kernel": 3},
    "pyramidkv": {"capacity": 9, "window": 3, "kernel": 3},
    "adakv": {"capacity": 9, "window": 3, "kernel": 3},
    "h2o": {"capacity": 9},
    "tova": {"capacity": 9},
    "streaming_llm": {"capacity": 9, "sinks": 2},
    "random": {"capacity": 9, "window": 3},
    "oracle": {"capacity": 9, "future": 2},
}


def make(pattern=("full", "sliding"), window=6, heads=4, **changes):
    config = TransformerConfig(
        vocab_size=V,
        num_layers=len(pattern),
        embed_dim=16,
        num_heads=heads,
        num_kv_heads=2,
        mlp_dim=16,
        layer_pattern=pattern,
        sliding_window=window,
        scan_layers=False,
        **changes,
    )
    return Transformer(config=config)


def init(model):
    params = jax.jit(lambda key: model.init(key, jnp.zeros((1, 4), jnp.int32)))(jax.random.key(0))
    # Larger than initialised, so that the choices are far from ties.
    return jax.tree.map(lambda x: x * (4.0 if x.ndim > 1 else 1.0), nn.meta.unbox(params)["params"])


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def params(model):
    return init(model)


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(1), (2, T), 0, V)


def generate(model, params, policy, ids, lengths, **how):
    """(logits after the prompts, caches after them, caches in the end, tokens [B, M])."""

    @jax.jit
    def run(params, ids, lengths):
        logits_BV, caches = prefill(model, params, policy, ids, lengths, room=M - 1, **how)
        active_B, keys_B = jnp.ones(len(ids), bool), jax.random.split(jax.random.key(0), len(ids))
        start_B = lengths - policy.future
        settings = Settings(max_new_tokens=M)
        decoded, after = decode(
            model, params, policy, logits_BV, caches, start_B, active_B, keys_B, settings
        )
        return logits_BV, caches, after, decoded.tokens_BM

    return run(params, ids, lengths)


@pytest.fixture(scope="module")
def generated(model, params, ids):
    """Returns `generate` of the prompts by a policy's name, each once."""
    return functools.cache(
        lambda name: generate(model, params, policy_named(name, **SMALL[name]), ids, LENGTHS)
    )


@pytest.fixture(scope="module")
def full(generated):
    return generated("full")


def test_every_policy_has_small_settings_here():
    assert set(SMALL) == set(POLICIES)


# As int8, one of each kind of state: slots, those of a head's own choice, a stream, a shared store.
AS_INT8 = ("full", "snapkv", "streaming_llm", "adakv")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, None) for name in sorted(SMALL)), *((name, "int8") for name in AS_INT8)],
)
def test_every_policy_generates(name, dtype, model, params, ids, full, generated):
    """2: the first token's logits are the full cache's, exactly, whatever is dropped after it."""
    policy = policy_named(name, **SMALL[name])
    logits, caches, after, tokens = (
        generate(model, params, policy, ids, LENGTHS, cache_dtype=dtype)
        if dtype
        else generated(name)
    )
    if policy.future == 0:
        np.testing.assert_array_equal(logits, full[0])
        np.testing.assert_array_equal(tokens[:, 0], full[3][:, 0])
    assert jax.tree.structure(caches) == jax.tree.structure(after)
    for leaf in jax.tree.leaves(caches):
        assert leaf.ndim == 0 or leaf.shape[0] == 2
    for cache in caches:
        held = cache if hasattr(cache, "k_BKSH") else cache.slots
        assert held.k_BKSH.dtype == (jnp.int8 if dtype else jnp.float32)
        assert policy.view(cache).k_BSKH.shape[1] <= (T + M if name == "full" else 2 * 9 + 2 * M)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"full"}))
def test_a_capacity_of_the_whole_prompt_changes_nothing(name, model, params, ids, full):
    """1: same greedy tokens as the full cache's."""
    at_most = {"window": T + M} if name == "sliding" else {"capacity": T + M}
    policy = policy_named(name, **{**SMALL[name], **at_most})
    lengths = LENGTHS
    if policy.future:  # the continuation that is known is the true one
        ids = jnp.concatenate([ids, ids[:, :2]], axis=1)
        for row, length in enumerate(LENGTHS):
            ids = ids.at[row, length : length + 2].set(full[3][row, :2])
        lengths = LENGTHS + policy.future
    logits, _, _, tokens = generate(model, params, policy, ids, lengths)
    np.testing.assert_allclose(logits, full[0], atol=1e-5)
    np.testing.assert_array_equal(tokens, full[3])


def read(model, params, policy, ids, **how):
    """(logits, caches) of the prompts."""
    run = lambda *arrays: prefill(model, arrays[0], policy, *arrays[1:], **how)  # noqa: E731
    return jax.jit(run)(params, ids, LENGTHS)


CHUNKS = itertools.cycle((6, 7, 30))  # that divide the prompt, or not, or exceed it


@pytest.mark.parametrize(("name", "chunk"), zip(sorted(SMALL), CHUNKS, strict=False))
def test_a_prompt_read_in_chunks_is_compressed_after_the_last(
    name, chunk, model, params, ids, generated
):
    """Every policy: the logits, slots, positions and owners of slots of a prompt that is read whole."""
    policy = policy_named(name, **SMALL[name])
    want, whole, _, _ = generated(name)
    got, parts = read(model, params, policy, ids, room=M - 1, chunk=chunk)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert jax.tree.structure(whole) == jax.tree.structure(parts)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        exact = jnp.issubdtype(one.dtype, jnp.integer)
        np.testing.assert_allclose(other, one, atol=0 if exact else 1e-5)


def test_layers_with_policies_of_their_own_hold_what_each_keeps(model, params, ids, generated):
    """No layer reads what another has dropped of the prompt, so both caches are those of either policy, bit for bit."""
    tova = policy_named("tova", capacity=5)
    logits, caches, after, tokens = generate(
        model, params, ByLayer((policy_named("full"), tova)), ids, LENGTHS
    )
    of_full, of_tova = generated("full"), read(model, params, tova, ids, room=M - 1)
    np.testing.assert_array_equal(logits, of_full[0])
    for got, want in zip(caches, (of_full[1][0], of_tova[1][1]), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got.state, want)
    assert jax.tree.structure(caches) == jax.tree.structure(after)
    parts = read(model, params, ByLayer((policy_named("full"), tova)), ids, room=M - 1, chunk=7)[1]
    for got, want in zip(jax.tree.leaves(parts), jax.tree.leaves(caches), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_chunk_without_tokens_is_refused(model, params, ids):
    with pytest.raises(ValueError, match="chunk = 0 must be at least 1"):
        prefill(model, params, policy_named("full"), ids, LENGTHS, room=1, chunk=0)


def memory(policy, layers, length):
    """Bytes of temporaries and outputs that reading a prompt takes."""
    model = make(("full",) * layers)
    params = jax.eval_shape(lambda: init(model))
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, length), (1,)))
    run = jax.jit(lambda *arrays: prefill(model, arrays[0], policy, *arrays[1:], room=1))
    used = run.lower(params, ids, lengths).compile().memory_analysis()
    return used.temp_size_in_bytes + used.output_size_in_bytes


def test_one_layers_keys_are_in_memory_whole():
    """A layer more takes its compressed cache more, where a full cache takes all of its keys."""
    length = 1024
    layer_bytes = 2 * length * 2 * 4 * 4  # keys and values of 2 heads of 4 floats
    grown = {
        name: (memory(policy, 3, length) - memory(policy, 2, length)) / layer_bytes
        for name, policy in (
            ("snapkv", policy_named("snapkv", capacity=32, window=8)),
            ("full", policy_named("full")),
        )
    }
    assert grown["full"] > 0.99
    assert grown["snapkv"] < 0.05


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_bytes_of_caches_are_proportional_to_key_value_heads(heads):
    config = TransformerConfig(
        vocab_size=48,
        num_layers=2,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=heads,
        mlp_dim=128,
        scan_layers=False,
    )
    model = Transformer(config=config)
    caches = jax.eval_shape(lambda: empty_caches(model, policy_named("full"), batch=1, length=64))
    arrays = [array for cache in caches for array in (cache.slots.k_BKSH, cache.slots.v_BKSH)]
    layers, both, floats = 2, 2, 4
    size = sum(array.size * array.dtype.itemsize for array in arrays)
    assert size == heads * layers * both * 64 * 16 * floats


def test_int8_takes_a_quarter_of_the_bytes_and_its_scales(model, params, ids):
    policy = policy_named("snapkv", **SMALL["snapkv"])

    floats, integers = (
        read(model, params, policy, ids, room=2, cache_dtype=dtype)[1] for dtype in (None, "int8")
    )
    for wide, small in zip(floats, integers, strict=True):
        rows = wide.k_BKSH.size // 4  # vectors of head dim 4
        scales = small.k_scale_BKS.nbytes + small.v_scale_BKS.nbytes
        assert small.k_BKSH.nbytes + small.v_BKSH.nbytes == 2 * 4 * rows
        assert wide.k_BKSH.nbytes + wide.v_BKSH.nbytes == 4 * 2 * 4 * rows
        assert scales == 2 * 4 * rows


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_a_mesh_splits_key_value_heads(name, model, params, ids):
    """Same tokens; each device holds its own heads (Ada-KV's one store is whole on all)."""
    policy = policy_named(name, **SMALL[name])
    alone = generate(model, params, policy, ids, LENGTHS)
    mesh = make_mesh(shape={"tensor": 2}, devices=jax.devices()[:2])
    with use_mesh(mesh, RULE_SETS["tp"]):
        _, caches, after, tokens = generate(model, params, policy, ids, LENGTHS)
    np.testing.assert_array_equal(tokens, alone[3])
    for states in (caches, after):
        held = getattr(states[0], "slots", states[0]).k_BKSH
        heads = held.sharding.shard_shape(held.shape)[1]
        assert heads == 1 and held.shape[1] == (1 if name == "adakv" else 2)


def test_a_mesh_that_splits_lengths_changes_no_token(model, params, ids):
    """Parts of the prompt go round a ring, of which SnapKV keeps what it keeps of whole rows."""
    policy = policy_named("snapkv", **SMALL["snapkv"])
    alone = generate(model, params, policy, ids, LENGTHS)
    mesh = make_mesh(shape={"context": 4}, devices=jax.devices()[:4])
    with use_mesh(mesh, RULE_SETS["fsdp_cp"]):
        _, caches, _, tokens = generate(model, params, policy, ids, LENGTHS)
    np.testing.assert_array_equal(tokens, alone[3])
    for found, expected in zip(*map(jax.tree.leaves, (caches, alone[1])), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_oracles_prompts_end_before_their_continuation(model, params, ids, full):
    """The decoder starts where the known continuation does, and needs a prompt before it."""
    decoder = Decoder(
        model,
        params,
        Settings(max_new_tokens=M),
        policy=policy_named("oracle", capacity=T, future=3),
        batch_size=2,
    )
    known = [ids[row, :length].tolist() + [1, 2, 3] for row, length in enumerate(LENGTHS.tolist())]
    found = decoder(known)
    assert [row.tokens for row in found] == full[3].tolist()
    with pytest.raises(ValueError, match="Prompt 1 has 3 tokens.*last 3"):
        decoder([[1, 2, 3, 4], [1, 2, 3]])
