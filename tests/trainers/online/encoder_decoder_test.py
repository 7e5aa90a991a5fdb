"""Encoder-decoders that learn from their own samples: the task, the rollouts and the methods are those of online_test.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.trainers.inputs import pack_encoded
from espalier.trainers.online import losses
from espalier.trainers.online.groups import Groups
from espalier.trainers.online.method import Samples
from espalier.trainers.online.policy_gradient import policy_gradient
from espalier.trainers.online.rollouts import RolloutError, Rollouts
from espalier.trainers.scoring.scoring import Row, Scorer
from tests.trainers.online import online_test
from tests.trainers.online.online_test import EOS, FIRST, PROMPTS, SIZES, START, Prompts, Run

T5 = EncoderDecoder(config=online_test.CONFIG)
# Two updates on each rollout, with the log-probabilities of policy and reference in the batch.
online_test.METHODS.setdefault(
    "grpo twice",
    (
        Groups(
            **SIZES,
            samples=4,
            updates=2,
            advantages=losses.group_normalised,
            reference=True,
            kl=0.1,
        ),
        functools.partial(policy_gradient, loss=functools.partial(losses.grpo, beta=0.2)),
    ),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name, each with the programs that it has compiled."""
    return functools.cache(lambda name: Run(name, tmp_path_factory.mktemp(name[:4]), lm=T5))


def moved(params, factor=1.1):
    return jax.tree.map(lambda x: factor * x, params)


def texts_of(batch, segment=1):
    """(prompt, completion) of a segment of each row, checked to be where an encoder-decoder reads them."""
    for b in range(len(batch["decoder_input_tokens"])):
        read = batch["encoder_segment_ids"][b] == segment
        here = batch["decoder_segment_ids"][b] == segment
        prompt = batch["encoder_input_tokens"][b][read].tolist()
        completion = batch["decoder_target_tokens"][b][here].tolist()
        assert batch["decoder_input_tokens"][b][here].tolist() == [START, *completion[:-1]]
        assert batch["decoder_loss_weights"][b][here].tolist() == [1] * len(completion)
        assert batch["decoder_positions"][b][here].tolist() == list(range(len(completion)))
        assert batch["encoder_positions"][b][read].tolist() == list(range(len(prompt)))
        yield prompt, completion


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, targets, inputs):
    return model.apply({"params": params}, targets, encoder_tokens_BS=inputs)


def log_probs(params, texts):
    """Log-probabilities of the tokens of completions, float64, from rows without packing or padding of prompts."""
    inputs = np.array([prompt for prompt, _ in texts])
    targets = np.zeros((len(texts), SIZES["completion_length"]), np.int32)
    for row, (_, completion) in zip(targets, texts, strict=True):
        row[: len(completion)] = completion  # what pads it is not seen by what is before
    before = np.concatenate([np.full_like(targets[:, :1], START), targets[:, :-1]], axis=1)
    logits = np.asarray(apply(T5, params, before, inputs), np.float64)
    logits -= logits.max(-1, keepdims=True)
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(table, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("name", ["online_dpo", "rloo", "ppo", "grpo twice"])
def test_rollouts_are_rows_of_an_encoder_decoder(name, runs):
    run = runs(name)
    with run.mesh:
        batch = online_test.arrays(run.feed.get(6, run.state()))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in run.feed.abstract().items()
    }
    method = run.recipe.inputs_spec
    prompts = Prompts(method.updates).digits(6) + FIRST
    segments = (1, 2) if name == "online_dpo" else (1,)
    of_prompt = max(1, method.rows_per_prompt)
    for segment in segments:
        for b, (prompt, completion) in enumerate(texts_of(batch, segment)):
            assert prompt == prompts[b // of_prompt].tolist()
            right = completion == [prompts[b // of_prompt].max(), EOS]
            reward = np.reshape(batch["rewards"], (-1, len(segments)))[b, segment - 1]
            assert reward == right


def test_log_probabilities_are_those_of_score_and_the_loss_is_that_of_float64(runs):
    """GRPO with a reference, divergence in reward and loss, and a policy that has moved since it sampled."""
    run = runs("grpo twice")
    with run.mesh:
        state = run.state()
        sampled = state.replace(params=moved(state.params))
        batch = run.feed.get(8, sampled)
        now = moved(state.params, 1.2)
        objective = run.recipe.objective(model=T5)
        out = jax.jit(lambda params, batch: objective(params, batch, None))(now, batch)
    batch = online_test.arrays(batch)
    texts = list(texts_of(batch))
    rows = [Row(context=[START], targets=c, encoder_inputs=p) for p, c in texts]
    columns = {"old_log_probs": sampled.params, "reference_log_probs": online_test.trained(T5)}
    for column, params in columns.items():
        scores = Scorer(T5, jax.device_get(params), batch_size=64)(rows)
        for b, of_row in enumerate(scores):
            np.testing.assert_allclose(batch[column][b, : len(of_row)], of_row, atol=1e-5)

    mask = batch["decoder_loss_weights"]
    new, old, reference = (
        log_probs(jax.device_get(params), texts) for params in (now, *columns.values())
    )
    net = batch["rewards"] - 0.1 * ((old - reference) * mask).sum(1)
    groups = net.reshape(PROMPTS, 4).astype(np.float64)
    spread = groups.std(1, ddof=1, keepdims=True) + 1e-4
    advantages = ((groups - groups.mean(1, keepdims=True)) / spread).reshape(-1, 1)
    # A group of equal rewards has no spread, of which a rounding of one would be a part.
    np.testing.assert_allclose(batch["advantages"], advantages[:, 0], atol=1e-3)
    ratio = np.exp(new - old)
    difference = reference - new
    loss = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    loss += 0.2 * (np.exp(difference) - difference - 1)
    expected = ((loss * mask).sum(1) / mask.sum(1)).mean()
    np.testing.assert_allclose(out.sum / out.weight, expected, rtol=1e-4)
    np.testing.assert_allclose(
        np.divide(*out.metrics["ratio"]), (ratio * mask).sum() / mask.sum(), rtol=1e-5
    )


def test_a_run_goes_on_in_the_middle_of_a_rollout(runs):
    """Bit for bit, with PPO's values: the second update has the tokens and values of the first, and another process's state."""
    run = runs("ppo")
    with run.mesh:
        state, seen = run.state(), []
        for i in (100, 101, 102):
            batch = run.feed.get(i, state)
            seen.append(online_test.arrays(batch))
            state, _ = run.step(state, batch)
        saved = jax.device_get(state)
        last = run.feed.get(103, state)
        ended, _ = run.step(state, last)
        again = Run("ppo", run.feed._folder, lm=T5, program=run.program).feed.get(103, saved)
        online_test.assert_same(online_test.arrays(again), online_test.arrays(last))
        online_test.assert_same(online_test.arrays(last), seen[2])
        resumed, _ = run.step(jax.device_put(saved), again)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), ended.params, resumed.params)
    )


def test_it_learns_the_task(runs):
    run = runs("grpo twice")
    with run.mesh:
        state, rewards = run.state(), []
        for i in range(40):
            batch = run.feed.get(i, state)
            rewards.append(np.asarray(batch["rewards"]).mean())
            state, _ = run.step(state, batch)
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.1, rewards


def test_what_cannot_be_is_said(runs, monkeypatch):
    run = runs("rloo")
    stream = Prompts()
    monkeypatch.setattr(
        stream, "summary", lambda: {"start_token": None, "vocabulary": {"digest": "words"}}
    )
    with pytest.raises(RolloutError, match="DOCUMENT_START is None, and the targets"):
        Rollouts(
            stream=stream,
            program=run.program,
            folder="",
            reward=online_test.largest,
            vocabulary=online_test.VOCABULARY,
        )
    with pytest.raises(ValueError, match="A prompt is empty, .* PROMPT_EOS = True"):
        pack_encoded([[([START], [3, EOS])]], np.zeros(1), inputs=4, targets=3)


def test_a_pair_has_its_prompt_once_for_each_completion():
    """Prompts and completions of unequal lengths, and a reference whose log-probabilities are tokens."""
    prompts = [[START, 5], [START, 6, 7, 8]]
    completions = [[3, EOS], [4], [2, 2, 2], [EOS]]
    rewards = np.array([[0.0, 1.0], [0.5, -0.5]], np.float32)
    samples = Samples(prompts, completions, rewards, rewards > 0, np.array([0, 1]))
    method = online_test.METHODS["online_dpo"][0].read_by(T5.row)
    assert (
        method == dataclasses.replace(method).read_by(T5.row) != method.read_by(online_test.LM.row)
    )

    def score(columns):
        return {"reference_log_probs": -columns["decoder_target_tokens"].astype(np.float32)}

    batch = method.batch(samples, score)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in method.arrays(2).items()
    }
    for segment, expected in ((1, (1, 2)), (2, (0, 3))):
        texts = list(texts_of(batch, segment))
        for p, r in enumerate(expected):
            assert texts[p] == (prompts[p][1:], completions[r])
            assert batch["reference_log_probs"][p, segment - 1] == -sum(completions[r])
    assert jnp.asarray(batch["decoder_segment_ids"]).max() == 2
