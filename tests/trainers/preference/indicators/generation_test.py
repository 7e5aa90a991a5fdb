"""Reading and writing in the training loop: against single sequences, the plain decoder, and other meshes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from espalier.model.config import TransformerConfig
from espalier.model.embed import Positions
from espalier.model.transformer import Transformer
from espalier.trainers import initialise, partitioning
from espalier.trainers.decoding.decoder import Decoder
from espalier.trainers.decoding.policy_sampler import Generator, PolicySampler
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.preference.indicators.reader import Reader
from espalier.trainers.scoring.scoring import Row

VOCAB, EOS = 24, 1
MODEL = Transformer(
    config=TransformerConfig(
        vocab_size=VOCAB, num_layers=1, scan_layers=False, embed_dim=16, num_heads=2, mlp_dim=24
    )
)
MESH = partitioning.make_mesh(devices=jax.devices()[:1])
ONE = NamedSharding(MESH, PartitionSpec())


@functools.cache
def parameters(seed=0):
    """Drawn without compiling anything; far from uniform predictions, so that the most probable tokens are no ties."""
    rng = np.random.default_rng(seed)

    def draw(box):
        return 0.5 * rng.normal(size=box.value.shape).astype(np.float32)

    boxed = initialise.abstract_variables(MODEL)["params"]
    return jax.tree.map(draw, boxed, is_leaf=lambda x: hasattr(x, "value"))


RNG = np.random.default_rng(0)
PROMPTS = [[0, *RNG.integers(2, VOCAB, size).tolist()] for size in (3, 1, 5, 2, 4)]
ROWS = [Row(context=p, targets=RNG.integers(1, VOCAB, 1 + 2 * i)) for i, p in enumerate(PROMPTS)]
GREEDY = Sampling(temperature=0.0)


def settings_of(sampling):
    return Settings(max_new_tokens=6, sampling=sampling, eos_ids=(EOS,), num_ids=VOCAB - 2)


def generator(sampling, *, batch_size=2, sharding=ONE, prompts=PROMPTS, model=MODEL):
    return Generator(
        model, prompts, settings_of(sampling), batch_size=batch_size, sharding=sharding, seed=0
    )


@functools.cache
def greedy():
    return [found.tokens for found in Decoder(MODEL, parameters(), settings_of(GREEDY))(PROMPTS)]


@functools.cache
def readings():
    return Reader(MODEL, batch_size=2, sharding=ONE, k=4)(parameters(), ROWS)


def test_readings_are_those_of_single_sequences():
    @jax.jit
    def logits(text):
        hidden = MODEL.apply({"params": parameters()}, text, method="hidden").hidden_BTD
        return MODEL.apply({"params": parameters()}, hidden, method="logits")[0]

    for row, got in zip(ROWS, readings(), strict=True):
        text = [*row.context, *row.targets]
        # What follows is not seen.
        padded = np.array([text + [0] * (16 - len(text))])
        logits_TV = np.asarray(logits(padded), np.float64)[len(row.context) - 1 : len(text) - 1]
        p_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(-1, keepdims=True)
        top_TK = np.sort(p_TV, -1)[:, -4:]
        q_TK = top_TK / top_TK.sum(-1, keepdims=True)
        log_p_T = np.log(p_TV[np.arange(len(row.targets)), row.targets])
        assert got.length == len(row.targets)
        assert got.log_prob == pytest.approx(log_p_T.sum(), rel=1e-5)
        assert got.mean_log_prob == pytest.approx(log_p_T.mean(), rel=1e-5)
        assert got.mass == pytest.approx(top_TK.sum(-1).mean(), rel=1e-5)
        assert got.entropy == pytest.approx(-(q_TK * np.log2(q_TK)).sum(-1).mean(), rel=1e-4)


def test_outputs_are_a_function_of_weights_step_and_prompt():
    sampling = Sampling(temperature=1.5, top_p=0.9)
    made, counted = generator(sampling), []
    found = made(parameters(), 3, done=lambda: counted.append(1))
    assert len(counted) == made.batches == 3
    assert made(parameters(), 3) == found
    assert made(parameters(), 4) != found
    assert made(parameters(1), 3) != found
    assert generator(sampling, batch_size=4, prompts=PROMPTS[:3])(parameters(), 3) == found[:3]
    for tokens in found:
        assert EOS not in tokens[:-1] and max(tokens) < VOCAB - 2
        assert tokens[-1] == EOS or len(tokens) == 6
    assert (
        made._sampler._sample._cache_size() == 1
    )  # one program for all batches, steps and weights


def test_samples_of_a_prompt_depend_on_its_place_and_not_on_its_batch():
    settings = dataclasses.replace(settings_of(Sampling()), num_samples=3)
    sampler = PolicySampler(MODEL, settings, sharding=ONE, seed=0)
    tokens, lengths = np.zeros((4, 8), np.int32), np.ones(4, np.int32)
    for row, prompt in enumerate(PROMPTS[:4]):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    whole = sampler(parameters(), tokens, lengths, number=5)
    assert len(whole) == 12 and len(set(map(tuple, whole))) > 8
    half = sampler(parameters(), tokens[2:], lengths[2:], number=5, first=2)
    assert half == whole[6:]
    assert [sampler.ended(row) for row in whole] == [row[-1] == EOS for row in whole]
    assert whole != sampler(parameters(), tokens, lengths, number=6)
    filled = sampler(parameters(), tokens, lengths, number=5, active_P=np.arange(4) < 2)
    assert filled[:6] == whole[:6]


def test_a_mesh_that_splits_weights_and_batches_reads_and_writes_the_same():
    """Greedy outputs are those of trainers/decoding/decoder.py on one device."""
    mesh = partitioning.make_mesh(shape={"fsdp": 4}, devices=jax.devices()[:4])
    rules = partitioning.rules_named("fsdp")
    boxed = initialise.abstract_variables(MODEL)["params"]
    shardings = initialise.param_shardings(boxed, mesh, rules)
    rows = partitioning.batch_sharding(mesh, rules)
    with partitioning.use_mesh(mesh, rules):
        params = jax.device_put(parameters(), shardings)
        outputs = generator(GREEDY, batch_size=4, sharding=rows)(params, 0)
        found = Reader(MODEL, batch_size=4, sharding=rows, k=4)(params, ROWS)
    assert outputs == greedy()
    for got, want in zip(found, readings(), strict=True):
        assert got.log_prob == pytest.approx(want.log_prob, rel=1e-5)
        assert got.entropy == pytest.approx(want.entropy, rel=1e-5)


def test_learned_positions_bound_prompt_and_output():
    limited = MODEL.clone(position_embed=functools.partial(Positions, num_positions=8))
    with pytest.raises(ValueError, match="with 6 new ones.*8 positions.*Lower max_new_tokens"):
        generator(Sampling(), model=limited)(parameters(), 0)
    with pytest.raises(ValueError, match="only 8 positions"):
        Reader(limited, batch_size=2, sharding=ONE)(parameters(), ROWS)
