"""Routers that read embeddings of sentences: the mean of an example's inputs, and those of another model."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.adapters import adapter
from espalier.model.adapters.adapter import AdapterError
from espalier.model.attention import Attention, CrossAttention
from espalier.model.config import TransformerConfig
from espalier.model.heads.actor_critic import ActorCritic
from espalier.model.mlp import GatedMlp
from espalier.model.mov import sentence
from espalier.model.mov.mov import Mov
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Block, Transformer
from espalier.trainers.decoding.decoder import Decoder
from espalier.trainers.decoding.settings import Beams, Settings
from espalier.trainers.objectives.forward import frozen_forward
from espalier.trainers.scoring.scoring import Row, Scorer

CONFIG = TransformerConfig(
    vocab_size=31, num_layers=1, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=12
)


@pytest.fixture(scope="module")
def made():
    """A model with MoV of sentences, and random parameters."""
    adapters = adapter.named(mov=functools.partial(Mov, num_experts=3, router_input="sentence"))
    with_adapters = {"adapters": adapters}
    block = functools.partial(
        Block,
        attention=functools.partial(Attention, rope=None, scale=1.0, **with_adapters),
        cross_attention=functools.partial(CrossAttention, scale=1.0, **with_adapters),
        mlp=functools.partial(GatedMlp, activation="gelu", **with_adapters),
    )
    model = EncoderDecoder(config=CONFIG, block=block)
    return model, filled(model)


def filled(model):
    shapes = nn.meta.unbox(
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)
    return params["params"]


def batch_of(*examples):
    """One row with these examples: (inputs, targets)."""
    sides = {"encoder": [x for x, _ in examples], "decoder": [y for _, y in examples]}
    out = {}
    for side, texts in sides.items():
        columns = {
            "input_tokens": np.concatenate(texts),
            "segment_ids": np.repeat(np.arange(len(texts)) + 1, [len(x) for x in texts]),
            "positions": np.concatenate([np.arange(len(x)) for x in texts]),
        }
        out |= {f"{side}_{name}": jnp.asarray(x[None], jnp.int32) for name, x in columns.items()}
    return {**out, "decoder_target_tokens": out["decoder_input_tokens"]}


@functools.partial(jax.jit, static_argnums=0)
def log_probs(model, params, batch):
    return frozen_forward(model, params, batch).log_probs_BT()


def test_a_packed_example_is_routed_by_its_own_inputs(made):
    model, params = made
    examples = [([3, 4, 5], [6, 7]), ([8, 9, 10, 11], [12, 13, 14])]
    packed, *alone = (
        log_probs(model, params, batch_of(*some))[0]
        for some in (examples, examples[:1], examples[1:])
    )
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-5)
    found = sentence.of_batch(model, {"params": params}, batch_of(*examples))
    assert found.inputs.shape == (1, 7, 8) and found.targets.shape == (1, 5, 8)
    table = np.asarray(params["token_embed"]["embedding"], np.float64)
    mean = table[[3, 4, 5]].mean(0)
    mean /= np.sqrt((mean**2).mean() + 1e-6)
    for token in (*found.inputs[0, :3], *found.targets[0, :2]):
        np.testing.assert_allclose(token, mean, rtol=1e-5, atol=1e-6)
    assert np.abs(found.targets[0, 2] - mean).max() > 0.01


def test_an_encoder_below_another_head_is_routed_by_its_inputs_too(made):
    """Inputs and targets have one length, and their examples begin at different places."""
    model, params = made
    batch = batch_of(([3, 4, 5], [6, 7]), ([8, 9], [12, 13, 14]))
    want = frozen_forward(model, params, batch).log_probs_BT()
    with_value_head = frozen_forward(ActorCritic(backbone=model), {"backbone": params}, batch)
    np.testing.assert_allclose(with_value_head.log_probs_BT(), want, atol=1e-6)


@pytest.mark.parametrize("beams", [None, Beams(num_beams=2)])
def test_generated_tokens_have_the_probabilities_of_scoring(made, beams):
    """Generation routes by the inputs of each row, short ones padded, as a batch of rows does."""
    model, params = made
    prompts = [[3, 4, 5, 6], [8, 9]]
    settings = Settings(max_new_tokens=4, num_samples=1, beams=beams)
    decoder = Decoder(model, params, settings, batch_size=2)
    for inputs, continued in zip(prompts, decoder(prompts), strict=True):
        read = [0, *continued.tokens[:-1]]
        batch = batch_of((inputs, read))
        batch["decoder_target_tokens"] = jnp.asarray([continued.tokens], jnp.int32)
        scored = log_probs(model, params, batch)[0]
        np.testing.assert_allclose(continued.log_probs, scored, atol=1e-4)


def test_without_a_batch_there_is_no_sentence(made):
    model, params = made
    ids = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(AdapterError, match="of an encoder-decoder's inputs"):
        model.apply({"params": params}, ids, encoder_tokens_BS=ids)


def with_columns(batch, embeddings):
    return {**batch, sentence.COLUMN: jnp.asarray(embeddings, jnp.float32)}


@pytest.mark.parametrize("decoder", [False, True])
def test_packed_examples_have_embeddings_of_another_model(made, decoder):
    """Of another width; each example as alone in a row, also where it is scored and continued."""
    width = 5
    adapters = functools.partial(Mov, num_experts=3, router_input="sentence", sentence_dim=width)
    block = made[0].block
    parts = {}
    for name in ("attention", "cross_attention", "mlp"):
        own = {**block.keywords[name].keywords, "adapters": adapter.named(mov=adapters)}
        parts[name] = functools.partial(block.keywords[name].func, **own)
    if decoder:
        del parts["cross_attention"]
        model = Transformer(config=CONFIG, block=functools.partial(Block, **parts))
    else:
        model = EncoderDecoder(config=CONFIG, block=functools.partial(Block, **parts))
    params = filled(model)
    embeddings = np.random.default_rng(1).normal(size=(1, 2, width)).astype(np.float32)
    examples = [([3, 4, 5], [6, 7]), ([8, 9, 10, 11], [12, 13, 14])]

    def scored(some, given=None):
        batch = batch_of(*some) if given is None else with_columns(batch_of(*some), given)
        if decoder:
            batch = {name: x for name, x in batch.items() if not name.startswith("encoder")}
        return np.asarray(log_probs(model, params, batch)[0])

    packed = scored(examples, embeddings)
    alone = [scored(examples[k : k + 1], embeddings[:, k]) for k in (0, 1)]
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-5)
    assert np.abs(scored(examples, embeddings[:, ::-1]) - packed).max() > 1e-3
    with pytest.raises(AdapterError, match="have 4 numbers, and the router reads 5"):
        scored(examples, embeddings[..., :4])
    with pytest.raises(AdapterError, match="and there are none"):
        scored(examples)
    if not decoder:
        with pytest.raises(AdapterError, match="of width 5, and the router reads the model's own"):
            frozen_forward(*made, with_columns(batch_of(*examples), embeddings))

    columns = [{sentence.COLUMN: x} for x in embeddings[0]]
    prompts = [[3, 4, 5, 6], [8, 9]]
    made_by = Decoder(model, params, Settings(max_new_tokens=4), batch_size=2)
    rows = []
    for prompt, continued, own in zip(
        prompts, made_by.stream(prompts, columns=columns), columns, strict=True
    ):
        where = {"context": [0], "encoder_inputs": prompt}
        where = {"context": prompt} if decoder else where
        rows.append((continued, Row(targets=continued.tokens, columns=own, **where)))
    scores = Scorer(model, params, batch_size=2)([row for _, row in rows])
    for (continued, _), found in zip(rows, scores, strict=True):
        np.testing.assert_allclose(continued.log_probs, found, atol=1e-4)
    mixed = [rows[0][1], dataclasses.replace(rows[1][1], columns={})]
    with pytest.raises(ValueError, match="Row 1 has no column besides its tokens"):
        Scorer(model, params, batch_size=2)(mixed)


def test_the_width_of_sentences_is_refused_where_none_are_read():
    with pytest.raises(ValueError, match="sentence_dim"):
        Mov(sentence_dim=4)
