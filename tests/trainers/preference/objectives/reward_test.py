"""Reward models: against transformers' and TRL's numbers, float64, and single texts."""

import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model import axes
from espalier.model.config import TransformerConfig
from espalier.model.heads.reward_model import RewardModel
from espalier.model.hf import registry
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Transformer
from espalier.trainers import initialise, inputs, partitioning
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.preference.objectives.reward import bradley_terry
from espalier.trainers.rewards.base import Completion
from espalier.trainers.rewards.model_reward import CheckpointReward, ModelReward
from espalier.trainers.step import make_train_step
from espalier.trainers.train_state import TrainState
from tests.model.hf import arrays

GOLDEN = pathlib.Path(__file__).parents[2] / "goldens" / "reward_model.npz"
LENGTH = 24
CONFIG = TransformerConfig(
    vocab_size=24, num_layers=1, scan_layers=False, embed_dim=16, num_heads=2, mlp_dim=24
)
MODEL = RewardModel(backbone=Transformer(config=CONFIG))


def parameters(model=MODEL, seed=0, head=True):
    boxed = jax.jit(lambda: initialise.variables(model, jax.random.key(seed))["params"])()
    params = jax.tree.map(axes.unboxed, boxed, is_leaf=lambda x: hasattr(x, "unbox"))
    if head:
        drawn = jax.random.normal(jax.random.key(seed + 1), (model.config.embed_dim, 1))
        params = {**params, "reward_head": {"kernel": drawn}}
    return params


PARAMS = parameters()


def batch_of(rows, *, slots=1, length=LENGTH, margins=None):
    """Columns of rows of pairs of texts, each (chosen, rejected), that are read whole."""
    names = ("input_tokens", "target_tokens", "segment_ids", "positions")
    out = {f"decoder_{name}": np.zeros((len(rows), length), np.int32) for name in names}
    for name in ("loss_weights", "ends"):
        out[f"decoder_{name}"] = np.zeros((len(rows), length), np.float32)
    out["pair_weights"] = np.zeros((len(rows), slots), np.float32)
    out["source_ids"] = np.arange(len(rows), dtype=np.int32) % 2
    out["chosen_tokens_per_pair"] = np.ones(len(rows), np.float32)
    for b, row in enumerate(rows):
        at = 0
        for k, pair in enumerate(row):
            out["pair_weights"][b, k] = 1
            for side, text in enumerate(pair):
                here = slice(at, at + len(text))
                out["decoder_input_tokens"][b, here] = text
                out["decoder_positions"][b, here] = np.arange(len(text))
                out["decoder_segment_ids"][b, here] = 2 * k + 1 + side
                at += len(text)
                out["decoder_ends"][b, at - 1] = 1
    if margins is not None:
        out["pair_margins"] = np.asarray(margins, np.float32).reshape(len(rows), slots)
    return jax.tree.map(jnp.asarray, out)


def pairs(count=4, seed=0):
    rng = np.random.default_rng(seed)

    def some():
        return rng.integers(1, CONFIG.vocab_size, rng.integers(2, 7)).tolist()

    return [(some(), some()) for _ in range(count)]


def reward_of(text, params=PARAMS, model=MODEL):
    """float64 head on the last hidden state of a text by itself."""
    padded = jnp.asarray([text + [0] * (8 - len(text))])  # which no token before it sees
    hidden = hidden_of(model.backbone)({"params": params["backbone"]}, padded).hidden_BTD
    kernel = np.asarray(params["reward_head"]["kernel"], np.float64)
    return float(np.asarray(hidden[0, len(text) - 1], np.float64) @ kernel[:, 0])


@functools.cache
def hidden_of(backbone):
    return jax.jit(functools.partial(backbone.apply, method="hidden"))


def expected(rewards, margins=0.0, center=0.0):
    chosen, rejected = np.asarray(rewards, np.float64).T
    difference = chosen - rejected - np.asarray(margins)
    return np.log1p(np.exp(-difference)) + center * (chosen + rejected) ** 2


def evaluated(batch, model=MODEL, params=PARAMS, **settings):
    objective = bradley_terry(model=model, **settings)
    return jax.jit(lambda params, batch: objective(params, batch, None))(params, batch)


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_that_of_single_texts(packed):
    given = pairs()
    rows = [given[:3], given[3:]] if packed else [[pair] for pair in given]
    slots = max(map(len, rows))
    margins = np.zeros((len(rows), slots))
    flat = [0.3, 0.0, 0.7, 0.2]
    for b, row in enumerate(rows):
        margins[b, : len(row)] = [flat[given.index(pair)] for pair in row]
    batch = batch_of(rows, slots=slots, length=40, margins=margins)
    out = evaluated(batch, num_sources=2, center=0.1)
    rewards = [[reward_of(text) for text in pair] for pair in given]
    losses = expected(rewards, flat, 0.1)
    assert float(out.weight) == len(given)
    np.testing.assert_allclose(out.sum, losses.sum(), rtol=1e-5)
    found = {k: float(t / w) for k, (t, w) in out.metrics.items() if w.ndim == 0}
    chosen, rejected = np.transpose(rewards)
    assert found["accuracy"] == np.mean(chosen > rejected)
    np.testing.assert_allclose(found["margin"], np.mean(chosen - rejected), rtol=1e-4)
    np.testing.assert_allclose(found["reward/chosen"], np.mean(chosen), rtol=1e-4)
    by_source = np.zeros(2)
    np.add.at(by_source, [b % 2 for b, row in enumerate(rows) for _ in row], losses)
    np.testing.assert_allclose(out.metrics["source_loss"][0], by_source, rtol=1e-5)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        case = dict(file)
    config = json.loads(str(case["config"]))
    family = registry.family_of_config({**config, "tie_word_embeddings": True})
    tensors = {
        name.removeprefix("tensor/"): value.astype(np.float32)
        for name, value in case.items()
        if name.startswith("tensor/")
    }
    head = tensors.pop("score.weight")
    backbone = family.model({**config, "tie_word_embeddings": True})
    params = {
        "backbone": arrays.to_native(family, backbone, tensors),
        "reward_head": {"kernel": head.T},
    }
    return case, RewardModel(backbone=backbone), params


def test_rewards_are_those_of_transformers(golden):
    case, model, params = golden
    texts = [row[:n].tolist() for row, n in zip(case["tokens"], case["lengths"], strict=True)]
    reward = ModelReward(model, params, start_token=None, end_token=2, batch_size=3)
    # Cut anywhere, prompt and completion are one text, whose last token ends it.
    cut = [Completion(text[:1], text[1:-1], ended=True) for text in texts]
    found = reward(cut)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, case["rewards"], atol=2e-5)
    np.testing.assert_allclose(
        reward([Completion(text[:2], text[2:], ended=False) for text in texts]), found, atol=1e-6
    )


def test_a_reward_of_an_encoder_decoder_is_of_the_last_token_that_its_decoder_reads():
    """Two pairs packed into a row, against float64 heads on each prompt and completion alone."""
    model = RewardModel(backbone=EncoderDecoder(config=CONFIG))
    params = parameters(model)
    prompts = [[5, 9, 3, 2], [7, 2]]
    completions = [[4, 6, 2], [8, 2], [11, 12, 13, 2], [2]]
    kernel = np.asarray(params["reward_head"]["kernel"], np.float64)
    hidden = hidden_of(model.backbone)

    def alone(prompt, completion):
        count = len(completion)
        read = jnp.array([[1, *completion, *[0] * (4 - count)]])  # no token sees what is after it
        out = hidden({"params": params["backbone"]}, read, encoder_tokens_BS=jnp.array([prompt]))
        return float(np.asarray(out.hidden_BTD[0, count], np.float64) @ kernel[:, 0])

    rewards = [alone(prompts[i // 2], completion) for i, completion in enumerate(completions)]
    assert len({round(reward, 3) for reward in rewards}) == 4
    reward = ModelReward(model, params, start_token=1, end_token=2, batch_size=3)
    asked = [
        Completion(prompts[i // 2], completion[:-1], ended=True)
        for i, completion in enumerate(completions)
    ]
    np.testing.assert_allclose(reward(asked), rewards, atol=2e-5)
    cut = [Completion(prompts[0], completions[0], ended=False)]
    np.testing.assert_allclose(reward(cut), rewards[:1], atol=2e-5)

    texts = [[[1, *completion] for completion in completions[i : i + 2]] for i in (0, 2)]
    batch = batch_of([texts], slots=2)
    read = [prompts[0], prompts[0], prompts[1], prompts[1]]
    columns = {name: np.zeros((1, LENGTH), np.int32) for name in ("tokens", "ids", "positions")}
    at = 0
    for segment, prompt in enumerate(read, 1):
        here = slice(at, at + len(prompt))
        columns["tokens"][0, here], columns["ids"][0, here] = prompt, segment
        columns["positions"][0, here] = np.arange(len(prompt))
        at += len(prompt)
    names = ("encoder_input_tokens", "encoder_segment_ids", "encoder_positions")
    batch |= dict(zip(names, map(jnp.asarray, columns.values()), strict=True))
    out = evaluated(batch, model, params, center=0.1)
    losses = expected(np.reshape(rewards, (2, 2)), 0.0, 0.1)
    np.testing.assert_allclose(out.sum, losses.sum(), rtol=1e-5)
    assert float(out.weight) == 2

    with pytest.raises(ValueError, match="Completion 0 has an empty prompt"):
        reward([Completion([], [3], ended=True)])
    with pytest.raises(ValueError, match="start_token is None, and the completions"):
        ModelReward(model, params, start_token=None)


def test_a_run_has_one_reward_model_of_its_own_data(tmp_path):
    """A newer checkpoint of the reward model does not change the rewards of a run that goes on."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    data = {"vocabulary": "our words", "start_token": 0}
    completions = [Completion([5, 9], [3, 4], ended=True), Completion([7], [8], ended=False)]

    def save(step, params):
        with Checkpointer(tmp_path / "rm" / "checkpoints") as checkpointer:
            checkpointer.save(step, {"params": params}, meta=data)

    def rewards(run, start_token=0, **other):
        vocabulary = types.SimpleNamespace(eos_id=1)
        stored = CheckpointReward(
            model=MODEL,
            checkpoint=tmp_path / "rm",
            vocabulary=vocabulary,
            start_token=start_token,
            batch_size=2,
        )
        rules = partitioning.rules_named("fsdp")
        return stored.on(mesh, rules, meta=data | other, folder=tmp_path / run)(completions)

    save(1, PARAMS)
    first = rewards("run")
    expected = [reward_of([0, 5, 9, 3, 4, 1]), reward_of([0, 7, 8])]
    np.testing.assert_allclose(first, expected, atol=1e-5)
    newer = jax.tree.map(lambda x: -x, PARAMS["reward_head"])
    save(2, {**PARAMS, "reward_head": newer})
    np.testing.assert_array_equal(rewards("run"), first)
    np.testing.assert_allclose(rewards("another"), -first, atol=1e-5)
    with pytest.raises(ValueError, match="REWARD_CHECKPOINT: .*another vocabulary"):
        rewards("run", vocabulary="other words")
    with pytest.raises(ValueError, match="REWARD_CHECKPOINT: .*set DOCUMENT_START = 0"):
        rewards("run", start_token=5)


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_the_loss_is_that_of_trl(golden, center):
    case, model, params = golden
    texts = [row[:n].tolist() for row, n in zip(case["tokens"], case["lengths"], strict=True)]
    rows = [[pair] for pair in zip(texts[:4], texts[4:], strict=True)]
    out = evaluated(batch_of(rows, margins=case["margins"]), model, params, center=center)
    np.testing.assert_allclose(out.sum / out.weight, case[f"loss/{center}"], rtol=1e-5)


def test_a_fresh_head_gives_log_two_and_learns():
    rows = [[pair] for pair in pairs(8)]
    batch = batch_of(rows)
    params = parameters(head=False)
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(loss_fn=bradley_terry(model=MODEL), optimizer=optimizer))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    state, first = step(state, batch)
    assert float(first["loss"][0] / first["loss"][1]) == pytest.approx(np.log(2), rel=1e-6)
    for _ in range(40):
        state, metrics = step(state, batch)
    assert float(metrics["loss"][0] / metrics["loss"][1]) < 0.05
    assert float(metrics["accuracy"][0] / metrics["accuracy"][1]) == 1


def test_a_batch_has_the_arrays_that_inputs_say():
    batch = batch_of([[pair] for pair in pairs()], slots=2)
    said = inputs.PackedPairs(
        {"targets": LENGTH}, pairs=2, stored_reference=False, read_last=True
    ).arrays(4)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in said.items()
    }


def test_what_cannot_be_is_said():
    batch = batch_of([[pair] for pair in pairs()])
    del batch["decoder_ends"]
    with pytest.raises(ValueError, match="read_last = True"):
        evaluated(batch)
    with pytest.raises(ValueError, match="center"):
        bradley_terry(model=MODEL, center=-1.0)
    reward = ModelReward(MODEL, PARAMS, start_token=None)
    with pytest.raises(ValueError, match="Completion 0 and its prompt are empty"):
        reward([Completion([], [], ended=False)])
