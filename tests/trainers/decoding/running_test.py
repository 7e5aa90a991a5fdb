"""Rows that join and leave a running batch, against the decoder with each of them by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from espalier.model.attention import Attention
from espalier.model.embed import Positions
from espalier.model.kv_cache import slots
from espalier.model.kv_cache.policies import policy_named
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Block
from espalier.trainers.decoding.decoder import Decoder
from espalier.trainers.decoding.prefill import TooLargeError
from espalier.trainers.decoding.prefixes import Prefixes
from espalier.trainers.decoding.running import RunningBatch
from espalier.trainers.decoding.settings import Beams, Draw, Sampling, Settings
from tests.trainers.decoding.decode_test import PROMPTS, V, init, make

SETTINGS = Settings(max_new_tokens=12, eos_ids=(3,))
SYSTEM = [0, *np.random.default_rng(0).integers(4, V, 30).tolist()]
# (prompt, most new tokens, temperature); two begin alike, and one comes twice.
REQUESTS = [
    *zip(PROMPTS, (12, 3, 12, 1), (0.0, 1.0, 0.0, 1.0), strict=True),
    (SYSTEM + [5, 6], 7, 0.0),
    (SYSTEM + [7, 8, 9], 9, 1.0),
    (SYSTEM + [5, 6], 12, 0.7),
]


def draw_of(i, requests=REQUESTS):
    return Draw(seed=i, temperature=requests[i][2])


def by_themselves(model, params, **options):
    """Returns (continuation, most new tokens) of each request, in a batch of one row."""
    decoders = {
        t: Decoder(
            *(model, params, dataclasses.replace(SETTINGS, sampling=Sampling(temperature=t))),
            batch_size=1,
            **options,
        )
        for _, _, t in REQUESTS
    }
    return [
        (next(decoders[t].stream([prompt], seed=i)), most)
        for i, (prompt, most, t) in enumerate(REQUESTS)
    ]


def continued(batch, requests=REQUESTS, *, at_once=3, steps=2):
    """Returns (tokens, log-probabilities) of requests, each of which joins while others are continued."""
    made = {i: ([], []) for i in range(len(requests))}

    def add(news):
        for i, new in news.items():
            made[i][0].extend(new.tokens)
            made[i][1].extend(new.log_probs)

    for i, (prompt, most, _) in enumerate(requests):
        while len(batch.keys) >= at_once:
            add(batch.advance(steps, leave=True))
        between = lambda: add(batch.advance(1))  # noqa: E731
        add({i: batch.join(i, prompt, draw_of(i, requests), most, together=2, between=between)})
        add(batch.advance(steps))
    while batch.keys:
        add(batch.advance(16))
    return [made[i] for i in range(len(requests))]


def compiled(batch):
    """The number of compiled programs."""
    return sum(program._cache_size() for program in batch._programs.values())


def check(found, want):
    """Other shapes of products round otherwise: the difference is of a few float32 steps of logits of up to about 20."""
    for (tokens, log_probs), (row, most) in zip(found, want, strict=True):
        assert tokens == row.tokens[:most]
        np.testing.assert_allclose(log_probs, row.log_probs[:most], atol=2e-5)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def params(model):
    return init(model)


@pytest.fixture(scope="module")
def alone(model, params):
    """Each request by itself, in a batch of one row."""

    return functools.cache(functools.partial(by_themselves, model, params))


def make_batch(model, params, **options):
    options = {"sizes": (1, 3), "longest": 200, "prefill_chunk": 16, **options}
    return RunningBatch(model, params, SETTINGS, **options)


@pytest.fixture(scope="module")
def batch(model, params):
    return make_batch(model, params)


def test_rows_are_those_of_the_rows_alone_whatever_joins_and_leaves(batch, alone):
    """A layer with a window of 4 and one without; prompts that are read in parts, and in part already."""
    found = continued(batch)
    check(found, alone())
    # A prompt of up to 16 tokens is one part, read whole. The first that begins with SYSTEM shares its first token with an
    # earlier one, the second all of SYSTEM, and the last is there already.
    assert batch.prompt_tokens_read == 17 + 5 + 2 + 1 + (33 - 1) + 3 + 0
    assert not batch.keys


def test_rows_of_their_own_settings_are_those_of_decoders_of_these(batch, model, params):
    def decoded(seed, **settings):
        own = dataclasses.replace(SETTINGS, **settings)
        return [row.tokens for row in Decoder(model, params, own)(PROMPTS, seed=seed)]

    wide = Sampling(temperature=1.5)
    want = [
        decoded(9)[0],
        decoded(5, sampling=wide, num_samples=3)[3 * 1 + 2],
        decoded(2**32 - 1, sampling=Sampling(temperature=0.9, top_p=0.7))[2],
    ]
    draws = [
        Draw(seed=9, temperature=0.0),
        Draw(seed=5, index=1, sample=2, temperature=1.5),
        Draw(seed=2**32 - 1, index=2, temperature=0.9, top_p=0.7),
    ]
    tokens = {
        i: [*batch.join(i, PROMPTS[i], draw, 12, together=3).tokens] for i, draw in enumerate(draws)
    }
    for i, news in batch.advance(16).items():
        tokens[i] += news.tokens
    assert [tokens[i] for i in range(3)] == want
    with pytest.raises(ValueError, match="temperature = -1"):
        Draw(seed=0, temperature=-1)


def test_nothing_is_compiled_once_the_shapes_are_known(batch):
    """Other prompts of the same lengths, with and without what was read of earlier ones."""

    def work(seed):
        rng = np.random.default_rng(seed)
        system = rng.integers(4, V, 31).tolist()
        requests = [
            (
                (system + prompt)[-len(prompt) :] if len(prompt) < 20 else system + prompt[31:],
                most,
                t,
            )
            for prompt, most, t in REQUESTS
        ]
        for kept in (0, 10**6):
            batch.prefixes = Prefixes(kept)
            continued(batch, requests)
            continued(batch, requests[::-1], steps=3 + seed)

    work(0)
    before = compiled(batch)
    work(1)
    assert compiled(batch) == before
    # A program for one row and one for three, of 64 slots.
    assert batch._programs["advance"]._cache_size() == 2


def test_a_row_ends_when_its_request_does(batch):
    """The others of a batch are not affected."""
    prompt = PROMPTS[0]
    want = batch.join("a", prompt, Draw(seed=0, temperature=0.0), 12).tokens
    want = [*want, *batch.advance(16)["a"].tokens]
    first = batch.join("a", prompt, Draw(seed=0, temperature=0.0), 12, together=2).tokens
    batch.join("b", PROMPTS[1], Draw(seed=1), 12, together=2)
    first = [*first, *batch.advance(2)["a"].tokens]
    batch.leave("b")
    rest = batch.advance(16)["a"]
    assert [*first, *rest.tokens] == want and rest.ended and not batch.keys
    assert batch.advance(16) == {}


def test_caches_of_int8_are_those_of_the_row_alone(model, params, alone):
    """Beginnings of prompts are kept as they were computed, so that a prompt never reads rounded keys."""
    check(
        continued(make_batch(model, params, cache_dtype="int8", prefill_chunk=None)),
        alone(cache_dtype="int8"),
    )


def test_on_two_devices_as_on_one(model, params, alone):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        found = continued(make_batch(model, placed, sharding=rows, sizes=(2, 4)))
    check(found, alone())


def test_a_prompt_that_fits_the_learned_positions_is_read():
    """18 tokens would be padded to 32, more than the table has."""
    model = make(
        num_layers=1,
        position_embed=functools.partial(Positions, num_positions=24),
        block=functools.partial(Block, attention=functools.partial(Attention, rope=None)),
    )
    params, prompt = init(model), [*range(4, 22)]
    settings = dataclasses.replace(SETTINGS, max_new_tokens=6)
    want = Decoder(model, params, settings, batch_size=1)([prompt])
    batch = make_batch(model, params, sizes=(1,), longest=24, prefill_chunk=None)
    check(continued(batch, [(prompt, 6, 0.0)]), [(want[0], 6)])


def test_an_encoder_decoder_reads_inputs_of_every_length():
    model = EncoderDecoder(config=dataclasses.replace(make().config, layer_pattern=("full",)))
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"]
    want = by_themselves(model, params, decoder_start=2)
    batch = make_batch(model, params, prefill_chunk=None, decoder_start=2)
    check(continued(batch), want)
    assert batch.most_bytes[1:] == (0, 0) and batch.prefixes.size == 0
    for options in ({"prefix_bytes": 1}, {"prefill_chunk": 16}):
        with pytest.raises(ValueError, match="An encoder reads each prompt whole"):
            make_batch(model, params, **{"prefill_chunk": None, **options})


def test_what_a_running_batch_cannot_do_is_refused_by_name(model, params):
    with pytest.raises(ValueError, match="SnapKV compresses each prompt.*remove cache_policy"):
        make_batch(model, params, policy=policy_named("snapkv"))
    with pytest.raises(ValueError, match="prefix_cache_bytes = -1"):
        make_batch(model, params, prefix_bytes=-1)
    with pytest.raises(ValueError, match="prefill_chunk = 0"):
        make_batch(model, params, prefill_chunk=0)
    for own in ({"sampling": Sampling()}, {"beams": Beams(num_beams=2)}):
        with pytest.raises(ValueError, match="has no effect where rows join a batch"):
            RunningBatch(model, params, Settings(**own), sizes=(1,), longest=8)


def test_a_row_has_no_more_new_tokens_at_a_time_than_there_is_room_for(batch):
    def tokens(*counts):
        batch.join("a", PROMPTS[1], Draw(seed=0, temperature=0.0), 40)
        news = [batch.advance(count)["a"].tokens for count in counts]
        batch.leave("a")
        return news

    assert tokens(19, 16) == tokens(16, 16)


def test_a_row_that_has_no_memory_leaves_the_others_as_they_are(batch, monkeypatch):
    draw = Draw(seed=0, temperature=0.0)
    want = batch.join("a", PROMPTS[0], draw, 12).tokens + batch.advance(16)["a"].tokens
    first = batch.join("a", PROMPTS[0], draw, 12).tokens
    with monkeypatch.context() as patch:
        patch.setattr("espalier.trainers.decoding.prefill._memory_limit", lambda _: 1e5)
        with pytest.raises(TooLargeError, match="3 rows"):
            batch.join("b", PROMPTS[1], draw, 5000, together=2)
    assert batch.keys == ["a"] and first + batch.advance(16)["a"].tokens == want


def test_a_prompt_that_is_read_in_parts_and_gets_no_row_leaves_the_others(batch, monkeypatch):
    """One row has room; the batch would grow for the prompt while the first parts of it are read."""
    draw = Draw(seed=0, temperature=0.0)
    want = batch.join("a", PROMPTS[0], draw, 12).tokens + batch.advance(16)["a"].tokens

    def of_one_row(_, length, size):
        if size > 1:
            raise TooLargeError(f"{size} rows")

    found = batch.join("a", PROMPTS[0], draw, 12).tokens
    between = lambda: found.extend(batch.advance(1)["a"].tokens)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_check_memory", of_one_row)
        with pytest.raises(TooLargeError, match="3 rows"):
            batch.join("b", [1, *SYSTEM], draw, 5, together=3, between=between)
        assert len(found) == 2 and batch.keys == ["a"]
        found += batch.advance(16)["a"].tokens
        # By itself it has room, though others are expected.
        assert batch.join("b", [1, *SYSTEM], draw, 5, together=3).tokens
        batch.leave("b")
    assert found == want


def test_the_memory_that_is_told_is_that_of_the_largest_batch(model, params):
    """Two layers of one head of 8: keys and values of float32, of 256 slots, or 4 where the window is as long."""
    batch = make_batch(model, params, prefix_bytes=5)
    of_rows, of_prompt, of_prefixes = batch.most_bytes
    keys_and_values = 3 * 2 * 8 * 4 * (256 + 4)
    positions = 3 * 4 * (256 + 4)
    assert 0 < of_rows - keys_and_values - positions < 200 and of_prefixes == 5
    # One row of 256 slots in each layer, with a window too, in which the longest prompt is read.
    assert 0 <= of_prompt - (2 * 2 * 8 * 4 * 256 + 2 * 4 * 256) < 50


def test_the_least_recently_used_prompt_is_dropped():
    value = np.zeros(10, np.int8)
    kept = Prefixes(25)
    for prompt in ([1, 2, 3], [4, 5]):
        kept.add(prompt, value)
    assert kept.longest([1, 2, 9])[0] == 2 and kept.longest([7])[:2] == (0, None)
    kept.add([6], value)
    assert [kept.longest(p)[0] for p in ([4, 5], [1, 2, 3], [6, 1])] == [0, 3, 1]
    assert kept.longest([1, 2, 3])[2] and not kept.longest([1, 2])[2] and kept.size == 20
    # A prompt stands for those that it begins with, and what is too large is not kept.
    kept.add([6, 7], value)
    kept.add([8], np.zeros(26, np.int8))
    assert kept.size == 20 and kept.longest([8])[0] == 0
    assert kept.longest([6, 7])[2] and not kept.longest([6])[2]


@pytest.mark.parametrize("length", [3, 6, 9])
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_a_row_in_a_ring_holds_its_latest_tokens(length, tokens):
    """A ring of 6 slots at slot 4, which then has `length`, and a row of 8 slots that joins it; by hand with numpy."""
    at = jnp.arange(6, dtype=jnp.int32)
    held = slots.empty((2, 1, 6, 1), "float32").put(
        *[at[None, :, None, None] * jnp.ones((2, 6, 1, 1))] * 2,
        at[None] + jnp.zeros((2, 1), jnp.int32),
    )
    held = dataclasses.replace(held, ring=0, at=jnp.int32(4))
    values = 10.0 + jnp.arange(8)[None, :, None, None]
    positions = jnp.where(jnp.arange(8) < tokens, jnp.arange(8), -1)[None]
    row = slots.empty((1, 1, 8, 1), "float32").put(values, values, positions)
    joined = held.with_row(1, row, tokens).resized(jnp.array([1, 0]), length)
    for _ in range(2):  # the next tokens, at positions of their own
        new = jnp.full((2, 1, 1, 1), 99.0)
        joined = joined.put(new, new, jnp.array([[tokens + _], [6 + _]], jnp.int32))

    def found(row):
        kept = np.asarray(joined.positions_BXS[row, 0])
        order = [s for s in np.argsort(kept) if kept[s] >= 0]
        return [(int(kept[s]), float(joined.k_BKSH[row, 0, s, 0])) for s in order]

    own = [(i, 10.0 + i) for i in range(tokens)][-min(6, length) :] + [
        (tokens, 99.0),
        (tokens + 1, 99.0),
    ]
    # The other row's oldest token is in slot 4, as slots are overwritten from there on.
    other = [(i, float(i)) for i in (4, 5, 0, 1, 2, 3)][-length:] + [(6, 99.0), (7, 99.0)]
    assert found(0) == own[-length:]
    assert found(1) == sorted(other[-length:])
