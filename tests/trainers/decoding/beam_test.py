"""Beam search and greedy rows against transformers' generate, on tiny random models.

goldens/make_generation.py says how the numbers were made.
"""

import functools
import pathlib

import flax.traverse_util
import jax
import numpy as np
import pytest

from espalier.model.attention import Attention
from espalier.model.config import TransformerConfig
from espalier.model.embed import Positions
from espalier.model.mlp import Mlp
from espalier.model.norm import LayerNorm
from espalier.model.transformer import Block, Transformer
from espalier.trainers.decoding.decoder import Decoder
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Beams, Settings

GOLDENS = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "generation.npz")
PROMPTS = [[0, 8, 1, 4, 4, 6, 2, 11, 3, 20, 21], [0, 5, 9, 2, 7], [0, 3]]
NEW = 12
# As in goldens/make_generation.py: settings of the search, penalty, beams returned.
CASES = {
    "plain": (Beams(num_beams=3), 1.0, 3),
    "long": (Beams(num_beams=4, length_penalty=2.0), 1.0, 2),
    "short": (Beams(num_beams=3, length_penalty=-1.0, early_stopping="never"), 1.0, 1),
    "never": (Beams(num_beams=3, early_stopping="never"), 1.0, 3),
    "early": (Beams(num_beams=3, early_stopping=True), 1.0, 2),
    "penalty": (Beams(num_beams=2), 1.7, 2),
}


@functools.cache
def peer(name):
    """(model, parameters) with the peer's weights."""
    config = TransformerConfig(
        vocab_size=40,
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=1 if name == "llama" else 2,
        mlp_dim=24,
        scan_layers=False,
    )
    if name == "llama":
        model = Transformer(config=config, tie_embeddings=False)
    else:
        norm = functools.partial(LayerNorm, use_bias=True)
        attention = functools.partial(Attention, rope=None, qkv_bias=True, out_bias=True)
        mlp = functools.partial(Mlp, use_bias=True)
        model = Transformer(
            config=config,
            block=functools.partial(Block, attention=attention, mlp=mlp, norm=norm),
            norm=norm,
            position_embed=functools.partial(Positions, num_positions=64),
        )
    prefix = f"{name}/weights/"
    flat = {
        key.removeprefix(prefix): jax.numpy.asarray(GOLDENS[key])
        for key in GOLDENS.files
        if key.startswith(prefix)
    }
    return model, flax.traverse_util.unflatten_dict(flat, sep="/")


def decoder(name, *, batch_size=3, **settings):
    return Decoder(*peer(name), Settings(max_new_tokens=NEW, **settings), batch_size=batch_size)


def golden_rows(key):
    return [[t for t in row if t >= 0] for row in GOLDENS[key].tolist()]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unequal_prompts_continue_as_in_transformers(name):
    found = decoder(name)(PROMPTS)
    assert [row.tokens for row in found] == golden_rows(f"{name}/greedy")


def test_a_repetition_penalty_is_of_prompt_and_continuation():
    sampling = Sampling(temperature=0.0, repetition_penalty=1.7)
    found = [row.tokens for row in decoder("llama", sampling=sampling)(PROMPTS)]
    assert found == golden_rows("llama/penalty")
    assert found != golden_rows("llama/greedy")


@pytest.mark.parametrize(
    ("name", "case"), [*[("llama", case) for case in CASES], ("gpt2", "plain"), ("gpt2", "early")]
)
def test_beams_are_those_of_transformers(name, case):
    beams, penalty, returned = CASES[case]
    search = decoder(
        name,
        beams=beams,
        num_samples=returned,
        eos_ids=GOLDENS[f"{name}/eos"].tolist(),
        sampling=Sampling(temperature=0.0, repetition_penalty=penalty),
    )
    found = search(PROMPTS)
    assert [row.tokens for row in found] == golden_rows(f"{name}/beams/{case}/tokens")
    want = GOLDENS[f"{name}/beams/{case}/scores"]
    np.testing.assert_allclose([row.score for row in found], want, rtol=2e-5)
    assert list(search._programs) == [("prefill", 16), ("decode", 16)]
    if penalty == 1:  # else beams are not ranked by the model's own log-probabilities
        lengths = np.array([len(row.tokens) for row in found], np.float64)
        sums = np.array([sum(row.log_probs) for row in found])
        np.testing.assert_allclose(sums / lengths**beams.length_penalty, want, rtol=2e-5)


def test_a_prompt_alone_has_the_beams_it_has_in_a_batch():
    beams, _, returned = CASES["early"]
    eos = GOLDENS["llama/eos"].tolist()
    alone = decoder("llama", batch_size=1, beams=beams, num_samples=returned, eos_ids=eos)
    found = alone([PROMPTS[1]])
    assert [row.tokens for row in found] == golden_rows("llama/beams/early/tokens")[2:4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": Beams(num_beams=2), "num_samples": 3}, "num_samples = 3 exceeds num_beams = 2"),
        ({"beams": Beams(num_beams=2), "sampling": Sampling()}, "searched, not drawn"),
        ({"num_samples": 2}, "would all be the same"),
        ({"num_samples": 0}, "num_samples = 0"),
    ],
)
def test_settings_that_contradict_each_other_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


@pytest.mark.parametrize("bad", [{"num_beams": 1}, {"num_beams": 2, "early_stopping": "soon"}])
def test_bad_searches_are_named(bad):
    with pytest.raises(ValueError, match=list(bad)[-1]):
        Beams(**bad)
