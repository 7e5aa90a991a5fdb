"""Decoders and scorers of another process find the programs of the first, with the same results."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.kv_cache.policies import policy_named
from espalier.model.transformer import Transformer
from espalier.model.transforms import layer_stack
from espalier.trainers.decoding.decoder import Decoder
from espalier.trainers.decoding.memory import TooLargeError
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Beams, Settings
from espalier.trainers.scoring.likelihoods import LikelihoodScorer
from espalier.trainers.scoring.scoring import Row, Scorer

PROMPTS = [[1, 2, 3, 4, 5], [6, 7]]


@pytest.fixture(scope="module")
def model():
    sizes = {"vocab_size": 16, "num_layers": 2, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8}
    return Transformer(config=TransformerConfig(**sizes))


@pytest.fixture(scope="module")
def params(model):
    whole = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return nn.meta.unbox(whole)["params"]


SETTINGS = {
    "greedy": Settings(max_new_tokens=4, sampling=Sampling(temperature=0.0)),
    "beams": Settings(max_new_tokens=4, beams=Beams(num_beams=2)),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_decoder_finds_its_programs(kind, model, params, stored_programs, traces, monkeypatch):
    def continued(**changes):
        options = {"batch_size": 2} | changes
        return Decoder(model, params, SETTINGS[kind], **options)(PROMPTS, seed=3)

    with monkeypatch.context() as patch:
        patch.setenv("ESPALIER_PROGRAMS", "0")
        expected = continued()
    traces.clear()
    assert continued() == expected and len(traces) == 2
    assert continued() == expected and len(traces) == 2
    if kind == "greedy":
        continued(policy=policy_named("sliding", window=3))
        assert len(traces) == 4
        monkeypatch.setattr("espalier.trainers.decoding.memory._limit", lambda devices: 8)
        with pytest.raises(TooLargeError):
            continued()


def test_scorers_find_their_programs(model, params, stored_programs, traces):
    rows = [Row(context=PROMPTS[0], targets=[3, 1]), Row(context=PROMPTS[1], targets=[2])]
    unrolled = layer_stack.unroll(params, model.config)

    def scored():
        scorer = Scorer(model, params, batch_size=2)
        likelihoods = LikelihoodScorer(layer_stack.unrolled(model), unrolled, batch_tokens=64)
        scores = [row.tolist() for row in scorer(rows)]
        return scores, sorted(likelihoods.stream(rows, quiet=True))

    first = scored()
    count = len(traces)
    assert count >= 2 and scored() == first and len(traces) == count
