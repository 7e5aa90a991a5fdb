"""How answer choices are ranked and routers are read, against the scorer, plain Python and hand-made routers."""

import functools
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.papers.mov import compositions, evaluations, rows
from espalier.model.adapters import adapter
from espalier.model.attention import Attention, CrossAttention
from espalier.model.config import TransformerConfig
from espalier.model.mlp import GatedMlp
from espalier.model.mov.mov import Mov
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Block
from espalier.trainers.scoring.scoring import Row, Scorer

CONFIG = TransformerConfig(
    vocab_size=99, num_layers=1, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=12
)
close = functools.partial(np.testing.assert_allclose, atol=1e-5)


class Words:
    """A vocabulary of words and of letters with their places."""

    eos_id = 1

    def __init__(self):
        words = {word for text in rows.TEMPLATES.values() for word in text.split()}
        self._ids = {word: 2 + at for at, word in enumerate(sorted({*rows.pieces(), *words}))}

    def encode(self, text):
        letters = re.sub(r"([a-l]\d)(?=[a-l]\d)", r"\1 ", text)
        return [self._ids[word.rstrip(":")] for word in letters.split()]


@pytest.fixture(scope="module", params=["site_tensor", "sentence"])
def run(request):
    """A run of a tiny model with MoV and random parameters; its routers read each token or the sentence."""
    mov = functools.partial(Mov, num_experts=3, router_input=request.param)
    adapters = {"adapters": adapter.named(mov=mov)}
    block = functools.partial(
        Block,
        attention=functools.partial(Attention, rope=None, scale=1.0, **adapters),
        cross_attention=functools.partial(CrossAttention, scale=1.0, **adapters),
        mlp=functools.partial(GatedMlp, activation="gelu", **adapters),
    )
    model = EncoderDecoder(config=CONFIG, block=block)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), nn.meta.unbox(shapes)
    )
    return types.SimpleNamespace(model=model, params=params["params"], vocabulary=Words())


def test_log_likelihoods_are_the_scorers(run, monkeypatch):
    monkeypatch.setattr(evaluations, "BATCH", 8)
    pairs = compositions.split_pairs(0)[1][:2]
    drawn = evaluations._drawn(pairs, 3)
    examples = [(text, choice) for text, row in drawn for choice in row["choices"]]
    ids = [[[*run.vocabulary.encode(x), 1] for x in example] for example in examples]
    scored = Scorer(run.model, run.params, batch_size=32)(
        [Row(context=[0], targets=targets, encoder_inputs=inputs) for inputs, targets in ids]
    )
    close(evaluations.log_likelihoods(run, examples), [x.sum() for x in scored])


def test_the_right_choices_probability_is_among_the_choices():
    names = [*rows.TEMPLATES]
    scores = np.log([[0.02, 0.02, 0.06, 0.1], [0.3, 0.1, 0.1, 0.1]] * len(names))
    labels = np.array([2, 0] * len(names))
    found = evaluations.scored(scores, labels)
    assert found["accuracy"] == 0.5
    assert found["probability"] == pytest.approx((0.3 + 0.5) / 2)
    assert found["log_probability"] == pytest.approx((np.log(0.3) + np.log(0.5)) / 2)
    # The median over templates.
    scores[:2] = scores[:2, ::-1]
    assert evaluations.scored(scores, labels)["accuracy"] == 0.5


def test_each_composition_has_as_many_rows_of_each_template():
    pairs = compositions.split_pairs(0)[0][:2]
    drawn = evaluations._drawn(pairs, 6)
    words = [(row["first"], row["second"]) for _, row in drawn]
    names = [tuple(rows.NEW_WORDS[letter] for letter in pair) for pair in pairs]
    assert words == [names[0]] * 6 + [names[1]] * 6
    assert [" then " in text for text, _ in drawn] == [True, True, *[False] * 4] * 2
    assert drawn == evaluations._drawn(pairs, 6)  # the same for all runs


def test_groups_of_examples_are_read_apart(run, monkeypatch):
    monkeypatch.setattr(evaluations, "BATCH", 6)
    drawn = evaluations._drawn(compositions.split_pairs(0)[1][:2], 3)
    examples = [(text, row["choices"][row["label"]]) for text, row in drawn]
    (batch,) = evaluations._batches(run, examples)
    means = functools.partial(evaluations._means, run.model)
    read = functools.partial(jax.jit(means, static_argnames="groups"), run.params)
    whole, halves = read(batch, groups=1), read(batch, groups=2)
    assert set(whole["probable"]) == set(evaluations.KINDS)
    for at in range(2):
        half = {name: x[3 * at : 3 * at + 3] for name, x in batch.items()}
        alone = read(half, groups=1)
        for kind in evaluations.KINDS:
            close(halves["probable"][kind][at], alone["probable"][kind][0])
            close(halves["chosen"][kind][at], alone["chosen"][kind][0])
            close(alone["chosen"][kind].sum(-1), 1)


def test_what_routers_choose_is_a_mean_over_real_tokens_sites_and_heads():
    layers, rows_, tokens, heads, experts = 2, 3, 4, 2, 5
    rng = np.random.default_rng(0)
    real = {"encoder": rng.integers(2, size=(rows_, tokens)) > 0}
    real["encoder"][0] = True
    real["decoder"] = np.ones((rows_, 2), bool)

    def drawn(*shape):
        return rng.dirichlet(np.ones(experts), shape)

    key = drawn(layers, rows_, tokens, heads)
    value = drawn(layers, rows_, tokens, heads)
    down, cross = drawn(layers, rows_, 2), drawn(layers, rows_, tokens, heads)

    def at(name, probs):
        return {name: {"adapter_mov": {"router_probs": (probs,)}}}

    sown = {
        "encoder": {"layers": {"block_0": {"attention": at("key", key) | at("value", value)}}},
        "decoder": {
            "layers": {"block_0": {"mlp": at("down", down), "cross_attention": at("key", cross)}}
        },
    }
    found = jax.device_get(evaluations.means(sown, real))
    found = {name: {kind: x[0] for kind, x in every.items()} for name, every in found.items()}
    kept = real["encoder"]
    both = np.mean([key[:, kept].mean((1, 2)), value[:, kept].mean((1, 2))], axis=0)
    close(found["probable"]["attention"], both)
    close(found["probable"]["mlp"], down.mean((1, 2)))
    close(found["probable"]["cross_attention"], cross[:, kept].mean((1, 2)))
    close(found["chosen"]["mlp"].sum(-1), 1)


def test_distances_are_of_tasks_wordings_and_rows():
    a, b = [[1.0, 0.0]], [[0.0, 1.0]]  # of one layer
    for probable, apart in (
        ([[[a, a], [a, a]], [[b, b], [b, b]]], (1, 0, 0)),
        ([[[a, a], [b, b]], [[a, a], [b, b]]], (0, 1, 0)),
        ([[[a, b], [a, b]], [[a, b], [a, b]]], (0, 0, 1)),
    ):
        (layer,) = evaluations.distances({"mlp": np.array(probable)})["mlp"]
        assert (layer["tasks"], layer["wordings"], layer["rows"]) == apart
