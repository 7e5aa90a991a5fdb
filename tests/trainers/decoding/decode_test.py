"""Generation against full forward passes, alone and in batches of unequal prompts."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from espalier.model.attention import Attention
from espalier.model.config import TransformerConfig
from espalier.model.embed import Positions
from espalier.model.kv_cache.full import FullCache
from espalier.model.kv_cache.policies import policy_named
from espalier.model.mlp import Mlp
from espalier.model.norm import RMSNorm
from espalier.model.rope import Rope
from espalier.model.transformer import Block, Transformer
from espalier.trainers.decoding.decoder import Decoder
from espalier.trainers.decoding.prefill import TooLargeError, prefill
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Beams, Settings

V, M = 29, 7
PROMPTS = [[0, 8, 1, 4, 4, 6, 2, 11, 3, 20, 21, 22, 1, 9, 8, 7, 2], [0, 5, 9, 2, 7], [0, 3], [0]]


def make(num_layers=2, sliding_window=4, scan_layers=True, **changes):
    config = TransformerConfig(
        vocab_size=V,
        num_layers=num_layers,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=16,
        layer_pattern=("sliding", "full_nope")[:num_layers],
        sliding_window=sliding_window,
        scan_layers=scan_layers,
    )
    return Transformer(config=config, **changes)


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
def log_probs(model, params):
    """(tokens) -> log p [T, V] of a full forward pass without cache, in float64 from the logits on."""
    forward = jax.jit(lambda ids: model.apply({"params": params}, ids)[0])

    def table(tokens):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(padded), np.float64)[: len(tokens)]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return table


@pytest.fixture(scope="module")
def greedy(model, params):
    decoder = Decoder(model, params, Settings(max_new_tokens=M), batch_size=4)
    return decoder, decoder(PROMPTS)


def stepwise(log_probs, prompt, *, eos=None, num_ids=V):
    tokens, chosen = list(prompt), []
    while len(chosen) < M and (not chosen or tokens[-1] != eos):
        row = log_probs(tokens)[-1][:num_ids]
        tokens.append(int(row.argmax()))
        chosen.append(row.max())
    return tokens[len(prompt) :], chosen


def test_greedy_equals_the_argmax_of_full_forward_passes(greedy, log_probs):
    for prompt, got in zip(PROMPTS, greedy[1], strict=True):
        tokens, chosen = stepwise(log_probs, prompt)
        assert got.tokens == tokens
        np.testing.assert_allclose(got.log_probs, chosen, atol=2e-5)


FURTHER = {
    # Norms after the sublayers and none before, norms over all heads, and two rotary embeddings.
    "post_norms": functools.partial(
        Block,
        norm=None,
        post_norm=RMSNorm,
        attention=functools.partial(
            Attention,
            qk_norm=RMSNorm,
            qk_norm_of="projection",
            rope=Rope(base=500.0, scaling="yarn", factor=4.0, original_length=16),
            local_rope=Rope(base=50.0),
        ),
    ),
    "parallel_norms": functools.partial(
        Block,
        layout="parallel_norms",
        mlp=functools.partial(Mlp, activation="xielu"),
        attention=functools.partial(Attention, rope=Rope(fraction=0.5)),
    ),
}


@pytest.mark.parametrize("name", FURTHER)
def test_greedy_equals_full_forward_passes_with_further_blocks(name):
    model = make(block=FURTHER[name])
    model = model.clone(config=dataclasses.replace(model.config, layer_pattern=("sliding", "full")))
    params = init(model)
    [got] = Decoder(model, params, Settings(max_new_tokens=M), batch_size=1)(PROMPTS[1:2])
    tokens = jnp.array([PROMPTS[1] + got.tokens])
    logits_TV = jax.jit(model.apply)({"params": params}, tokens)[0, len(PROMPTS[1]) - 1 : -1]
    assert np.argmax(logits_TV, -1).tolist() == got.tokens
    np.testing.assert_allclose(
        jax.nn.log_softmax(logits_TV).max(-1), got.log_probs, rtol=0, atol=2e-5
    )


def long_prompts(**changes):
    """(model, parameters, tokens, lengths) of two long prompts, one of them shorter."""
    model = make(sliding_window=150, scan_layers=False, **changes)
    ids = jax.random.randint(jax.random.key(1), (2, 300), 0, V)
    return model, init(model), ids, jnp.array([300, 170])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_read_by_index_equals_one_read_by_position(side):
    """With grouped heads, a window and a soft cap, whichever side the padding is on."""
    capped = functools.partial(Attention, softcap=2.0)
    model, params, ids, lengths = long_prompts(block=functools.partial(Block, attention=capped))
    at = jnp.arange(300)[None] - (300 - lengths[:, None] if side == "left" else 0)
    positions = jnp.where((at >= 0) & (at < lengths[:, None]), at, -1)
    caches = [
        FullCache().init(
            batch=2,
            length=300,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            dtype="float32",
            layer=layer,
            num_layers=2,
            kind=model.config.layer_kind(layer),
        )
        for layer in range(2)
    ]

    @jax.jit
    def read(segments):
        return model.apply(
            {"params": params},
            ids,
            positions_BT=positions,
            segments_BT=segments,
            caches=caches,
            policy=FullCache(),
            method="hidden",
        )

    got, want = read((positions >= 0).astype(jnp.int32)), read(None)
    real = np.asarray(positions >= 0)
    np.testing.assert_allclose(got.hidden_BTD[real], want.hidden_BTD[real], atol=2e-5)
    for new, old in zip(got.caches, want.caches, strict=True):
        np.testing.assert_array_equal(new.positions_BS, positions)
        for a, b in (
            (new.slots.k_BKSH, old.slots.k_BKSH),
            (new.slots.v_BKSH, old.slots.v_BKSH),
        ):
            np.testing.assert_allclose(a[:, 0][real], b[:, 0][real], atol=2e-5)


def test_reading_a_prompt_takes_no_more_memory_than_a_pass_without_cache():
    model, params, _, _ = long_prompts()

    def temporaries(function, *shapes):
        arrays = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)
        compiled = jax.jit(function).lower(params, *arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def without_cache(params, ids):
        return model.apply({"params": params}, ids, method="hidden").hidden_BTD

    def with_cache(params, ids, lengths):
        return prefill(model, params, FullCache(), ids, lengths, room=15)

    want = temporaries(without_cache, (8, 2048))
    assert temporaries(with_cache, (8, 2048), (8,)) < 2 * want


def test_prompts_alone_continue_as_in_a_batch(greedy, model, params):
    decoder = Decoder(model, params, Settings(max_new_tokens=M), batch_size=1)
    for prompt, together in zip(PROMPTS[1:], greedy[1][1:], strict=True):
        (alone,) = decoder([prompt])
        assert alone.tokens == together.tokens
        np.testing.assert_allclose(alone.log_probs, together.log_probs, atol=2e-5)


def test_few_programs_and_the_cache_are_accounted_for(greedy):
    decoder, _ = greedy
    # Lengths 17 and below share one batch, hence one program.
    assert list(decoder._programs) == [("prefill", 24), ("decode", 24)]
    stats = decoder.stats
    assert (stats.prompt_tokens, stats.new_tokens) == (17 + 5 + 2 + 1, 4 * M)
    assert stats.tokens_per_second > 0
    # Two layers of keys and values [4, S, 1, 8], positions [4, S] and counters, S being the window of
    # the first and 24 + M - 1 in the second.
    slots = 4 * (4 + 24 + M - 1)
    assert stats.cache_bytes == slots * (2 * 8 * 4 + 4) + 2 * 4


def test_rows_end_at_eos_and_ids_beyond_the_vocabulary_are_never_chosen(
    greedy, model, params, log_probs
):
    # Both take effect: the highest id chosen so far is excluded, and a token of row 1 ends rows.
    num_ids = max(max(row.tokens) for row in greedy[1])
    eos = stepwise(log_probs, PROMPTS[1], num_ids=num_ids)[0][3]
    settings = Settings(max_new_tokens=M, eos_ids=(eos,), num_ids=num_ids)
    found = Decoder(model, params, settings, batch_size=4)(PROMPTS)
    for prompt, got in zip(PROMPTS, found, strict=True):
        tokens, chosen = stepwise(log_probs, prompt, eos=eos, num_ids=num_ids)
        assert got.tokens == tokens
        np.testing.assert_allclose(got.log_probs, chosen, atol=2e-5)
    assert found[1].tokens[-1] == eos and len(found[1].tokens) <= 4


def test_any_of_several_eos_ids_ends_a_row(greedy, model, params):
    free = [row.tokens for row in greedy[1]]
    ends = [free[0][2], free[1][4]]
    settings = Settings(max_new_tokens=M, eos_ids=ends)
    found = Decoder(model, params, settings, batch_size=4)(PROMPTS)
    for tokens, row in zip(free, found, strict=True):
        stop = next((i for i, token in enumerate(tokens) if token in ends), M)
        assert row.tokens == tokens[: stop + 1]
    assert {row.tokens[-1] for row in found} >= set(ends)


def test_samples_depend_on_the_seed_and_not_on_the_batch(model, params, log_probs):
    settings = Settings(max_new_tokens=M, sampling=Sampling(temperature=1.5, top_k=10))
    decoder = Decoder(model, params, settings, batch_size=4)
    first = decoder(PROMPTS, seed=3)
    assert [row.tokens for row in decoder(PROMPTS, seed=3)] == [row.tokens for row in first]
    assert [row.tokens for row in decoder(PROMPTS, seed=4)] != [row.tokens for row in first]
    assert [row.tokens for row in decoder(PROMPTS[:2], seed=3)] == [row.tokens for row in first[:2]]
    # Log-probabilities are the model's own: neither temperature nor top_k is in them.
    for prompt, row in zip(PROMPTS, first, strict=True):
        table = log_probs([*prompt, *row.tokens])[len(prompt) - 1 : -1]
        np.testing.assert_allclose(row.log_probs, table[np.arange(M), row.tokens], atol=2e-5)


def test_another_length_gets_programs_of_its_own_only_if_they_pay(model, params):
    """Prompts of 32 and 16 tokens: a batch of two short ones has 32 tokens more in the long one's programs."""
    settings = Settings(max_new_tokens=2)
    long, short = [[1] * 30] * 2, [[1] * 9] * 2
    continued = [
        row.tokens for row in Decoder(model, params, settings, batch_size=1)([*short, *long])
    ]
    for cost, lengths in ((10**6, [32]), (20, [32]), (15, [32, 16])):
        decoder = Decoder(model, params, settings, batch_size=2)
        decoder._program_tokens = cost
        assert [row.tokens for row in decoder([*short, *long])] == continued
        assert decoder._programs.keys() == {(n, x) for n in ("prefill", "decode") for x in lengths}
    decoder = Decoder(model, params, settings, batch_size=2)
    decoder._program_tokens = 20
    decoder(long)
    decoder(short)
    assert len(decoder._programs) == 2
    decoder(short)  # the second time, they would have paid
    assert len(decoder._programs) == 4


SAMPLED = {"max_new_tokens": M, "sampling": Sampling(temperature=1.5, min_p=0.01)}


def test_samples_of_a_prompt_differ_and_the_first_is_the_only_one_there_would_be(model, params):
    decoder = Decoder(model, params, Settings(num_samples=3, **SAMPLED), batch_size=4)
    rows = [row.tokens for row in decoder(PROMPTS, seed=3)]
    assert len(rows) == 3 * len(PROMPTS)
    assert len(set(map(tuple, rows))) == len(rows)
    single = Decoder(model, params, Settings(**SAMPLED), batch_size=2)
    assert [row.tokens for row in single(PROMPTS, seed=3)] == rows[::3]
    # Prompts are read once, and the caches of 12 rows are counted.
    assert decoder.stats.prompt_tokens == sum(map(len, PROMPTS))
    assert decoder.stats.new_tokens == 12 * M
    assert list(decoder._programs) == [("prefill", 24), ("decode", 24)]


def test_rows_that_a_watch_ends_leave_the_others_as_they_are(greedy, model, params):
    free = [row.tokens for row in greedy[1]]
    seen = {}

    def watch(prompt, sample, tokens):
        seen.setdefault((prompt, sample), []).extend(tokens)
        if prompt == 1 and len(seen[1, 0]) >= 4:
            return len(tokens) - (len(seen[1, 0]) - 4)
        return None

    settings = Settings(max_new_tokens=M)
    for every in (1, 5):
        seen.clear()
        decoder = Decoder(model, params, settings, batch_size=4, watch=watch, watch_every=every)
        found = decoder(PROMPTS)
        assert [row.tokens for row in found] == [free[0], free[1][:4], *free[2:]]
        assert [len(row.log_probs) for row in found] == [M, 4, M, M]
        assert [seen[i, 0] for i in (0, 2, 3)] == [free[i] for i in (0, 2, 3)]
        # However often it looks, there is one program.
        assert list(decoder._programs) == [("prefill", 24), ("decode", 24)]
    beams = Settings(max_new_tokens=M, beams=Beams(num_beams=2))
    with pytest.raises(ValueError, match="not supported with beams"):
        Decoder(model, params, beams, watch=watch)


def test_the_first_token_needs_the_program_that_reads_the_prompt_alone(greedy, model, params):
    first = [row.tokens[:1] for row in greedy[1]]
    decoder = Decoder(model, params, Settings(max_new_tokens=1), batch_size=4)
    assert [row.tokens for row in decoder(PROMPTS)] == first
    assert list(decoder._programs) == [("prefill", 24)]
    programs = []

    def watch(prompt, sample, tokens):
        programs.append(list(decoder._programs))

    settings = Settings(max_new_tokens=M)
    decoder = Decoder(model, params, settings, batch_size=4, watch=watch, watch_every=M)
    decoder(PROMPTS)
    assert programs[: len(PROMPTS)] == [[("prefill", 24)]] * len(PROMPTS)
    assert programs[-1] == [("prefill", 24), ("decode", 24)]


@pytest.mark.parametrize(
    "settings",
    [
        Settings(num_samples=2, **SAMPLED),
        Settings(max_new_tokens=M, beams=Beams(num_beams=2), num_samples=2),
    ],
    ids=["samples", "beams"],
)
def test_samples_and_beams_on_two_devices_as_on_one(model, params, settings):
    ids = PROMPTS[1:3]
    want = Decoder(model, params, settings, batch_size=2)(ids, seed=5)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    watch = None if settings.beams else lambda prompt, sample, tokens: None
    with jax.set_mesh(mesh):
        decoder = Decoder(
            model,
            jax.device_put(params, whole),
            settings,
            batch_size=2,
            sharding=rows,
            watch=watch,
            watch_every=3,
        )
        found = decoder(ids, seed=5)
    assert [row.tokens for row in found] == [row.tokens for row in want]
    for got, row in zip(found, want, strict=True):
        np.testing.assert_allclose(got.log_probs, row.log_probs, atol=2e-5)


def test_on_a_mesh_as_on_one_device(greedy, model, params):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp"))  # noqa: E731
    placed = jax.tree.map(lambda x: jax.device_put(x, split(x)), params)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        decoder = Decoder(model, placed, Settings(max_new_tokens=M), batch_size=4, sharding=rows)
        found = decoder(PROMPTS)
    assert [row.tokens for row in found] == [row.tokens for row in greedy[1]]
    # Unrolling the layers has not gathered them.
    whole = [x.shape for x in jax.tree.leaves(decoder._params) if x.sharding.is_fully_replicated]
    assert whole == []


def test_learned_positions_are_not_exceeded():
    model = make(
        num_layers=1,
        position_embed=functools.partial(Positions, num_positions=20),
        block=functools.partial(Block, attention=functools.partial(Attention, rope=None)),
    )
    decoder = Decoder(model, init(model), Settings(max_new_tokens=4), batch_size=1)
    # 17 tokens would be padded to 24, more than the table has.
    assert len(decoder([list(range(17))])[0].tokens) == 4
    with pytest.raises(ValueError, match="Prompt 1 has 18 tokens.*20 positions"):
        decoder([[1], list(range(18))])


def test_bad_requests_are_named(greedy):
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        greedy[0]([[1], []])
    with pytest.raises(ValueError, match="max_new_tokens"):
        Settings(max_new_tokens=0)
    with pytest.raises(ValueError, match="'snap'.*full"):
        policy_named("snap")


@pytest.mark.parametrize("beams", [None, Beams(num_beams=2)])
@pytest.mark.parametrize("number", [10**9, 2**31 - 1])
def test_a_cache_larger_than_the_memory_is_refused_before_it_is_allocated(
    model, params, beams, number
):
    decoder = Decoder(model, params, Settings(max_new_tokens=number, beams=beams))
    with pytest.raises(
        TooLargeError, match=rf"max_new_tokens = {number:,} for 8 rows .* GB: lower"
    ):
        decoder(PROMPTS)


def test_more_tokens_than_positions_can_number_are_refused():
    with pytest.raises(ValueError, match="positions are numbers below"):
        Settings(max_new_tokens=2**31)
