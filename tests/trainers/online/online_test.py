"""Training on a policy's own samples: a task that every method learns, and what rollouts are functions of.

Encoder-decoders are in encoder_decoder_test.py, with the runs of this file.

The task: three digits, of which the largest is the answer. A start that has been trained on answers with any of the
three gives each of them about alike.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model import axes
from espalier.model.config import TransformerConfig
from espalier.model.heads.actor_critic import ActorCritic
from espalier.model.transformer import Transformer
from espalier.trainers import initialise, partitioning
from espalier.trainers.inputs import PackedPairs, pack, pack_encoded
from espalier.trainers.objectives.frozen_model import FrozenModel
from espalier.trainers.objectives.lm import language_modelling
from espalier.trainers.online import losses as policy_gradient
from espalier.trainers.online.critic import Valued
from espalier.trainers.online.groups import Groups
from espalier.trainers.online.method import Samples
from espalier.trainers.online.pairs import BestAndWorst
from espalier.trainers.online.policy_gradient import actor_critic
from espalier.trainers.online.policy_gradient import policy_gradient as objective_of
from espalier.trainers.online.rollouts import RolloutError, Rollouts
from espalier.trainers.preference.losses import direct
from espalier.trainers.preference.objectives.preference import preference
from espalier.trainers.recipe import Recipe
from espalier.trainers.step import make_train_step
from espalier.trainers.train_state import TrainState

START, EOS, FIRST, DIGITS = 0, 1, 2, 8
SIZES = {"prompt_length": 5, "completion_length": 3}
CONFIG = TransformerConfig(
    vocab_size=12,
    num_layers=1,
    embed_dim=32,
    num_heads=2,
    mlp_dim=64,
    scan_layers=False,
)
LM = Transformer(config=CONFIG)
VOCABULARY = types.SimpleNamespace(
    eos_id=EOS, vocab_size=10, decode=lambda ids: " ".join(str(id - FIRST) for id in ids)
)
PROMPTS = 32


class Prompts:
    """Three digits each, one to three of which are there, a function of the step."""

    batch_size, length, fingerprint, source_names = PROMPTS, 5, "", ("digits",)

    def __init__(self, updates=1):
        self.updates = updates

    def digits(self, step):
        rng = np.random.default_rng([7, step // self.updates])
        return rng.integers(0, DIGITS, (PROMPTS, 3))

    def batch(self, step, lo, hi):
        digits = self.digits(step)[lo:hi]
        tokens = np.zeros((len(digits), self.length), np.int32)
        tokens[:, 1:4] = digits + FIRST
        lengths = np.full(len(digits), 4, np.int32)
        return {
            "prompt_tokens": tokens,
            "prompt_lengths": lengths,
            "source_ids": np.zeros(len(digits), np.int32),
        }

    def info(self, step, lo, hi):
        return [{"digits": row.tolist()} for row in self.digits(step)[lo:hi]]

    def summary(self):
        return {"start_token": START, "vocabulary": {"digest": "words"}}


def largest(completions):
    for completion in completions:
        assert list(completion.prompt) == [d + FIRST for d in completion.info["digits"]]
    return np.array(
        [list(c.tokens) == [max(c.info["digits"]) + FIRST] for c in completions], np.float32
    )


def parameters(model, seed=0):
    boxed = jax.jit(lambda: initialise.variables(model, jax.random.key(seed))["params"])()
    return jax.tree.map(axes.unboxed, boxed, is_leaf=lambda x: hasattr(x, "unbox"))


@functools.cache
def trained(lm=LM):
    """Parameters after fine-tuning on any of the three digits."""
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(loss_fn=language_modelling(model=lm), optimizer=optimizer))
    params = parameters(lm)
    lengths = {"length": 7}
    if lm.row.encodes:
        lengths = {"inputs": 4, "targets": 3}
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    stream, rng = Prompts(), np.random.default_rng(0)
    for i in range(100):
        digits = stream.digits(1000 + i) + FIRST
        texts = [[([START, *row], [row[rng.integers(3)], EOS])] for row in digits.tolist()]
        packed = pack_encoded if lm.row.encodes else pack
        state, _ = step(state, packed(texts, np.zeros(PROMPTS), **lengths))
    return jax.device_get(state.params)


METHODS = {
    "online_dpo": (
        BestAndWorst(**SIZES),
        functools.partial(preference, losses=[functools.partial(direct.dpo, beta=0.1)]),
    ),
    "rloo": (
        Groups(**SIZES, samples=4, advantages=policy_gradient.leave_one_out, kl=0.05),
        functools.partial(objective_of, loss=policy_gradient.rloo),
    ),
    "grpo": (
        Groups(**SIZES, samples=8, advantages=policy_gradient.group_normalised),
        functools.partial(objective_of, loss=policy_gradient.grpo),
    ),
    "ppo": (Valued(**SIZES, samples=4, updates=2), functools.partial(actor_critic)),
}


class Run:
    """A run of a method without the command around it."""

    def __init__(
        self, name, folder="", *, devices=1, reward=largest, seed=0, program=None, lm=LM, **settings
    ):
        method, objective = METHODS[name]
        model, params = lm, trained(lm)
        if isinstance(method, Valued):
            model = ActorCritic(backbone=lm)
            head = jax.device_get(parameters(model)["value_head"])
            params = {"backbone": params, "value_head": head}
        self.recipe = Recipe(
            model=model,
            batch_size=PROMPTS * method.rows_per_prompt,
            inputs=method,
            optimizer=optax.adam,
            learning_rate=lambda step: 3e-3,
            objective=objective,
            anomaly=None,
            mesh={"fsdp": devices},
        )
        self.program = program or self.recipe.program(devices=jax.devices()[:devices])
        shardings = jax.tree.map(lambda x: x.sharding, self.program.abstract_state.params)
        self.params = lambda: jax.device_put(params, shardings)
        self.feed = Rollouts(
            stream=Prompts(method.updates),
            program=self.program,
            folder=folder,
            reward=reward,
            vocabulary=VOCABULARY,
            reference=Reference(model=lm, checkpoint=None),
            seed=seed,
            **settings,
        )

    @functools.cached_property
    def step(self):
        return self.program.steps(1).train

    @property
    def mesh(self):
        return partitioning.use_mesh(self.program.mesh, self.program.rules)

    def state(self):
        params = self.params()
        optimizer = self.recipe.optimizer(learning_rate=self.recipe.learning_rate)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


class Reference(FrozenModel):
    """A live reference whose parameters are at hand."""

    def check(self, mesh, rules, meta):
        assert meta == {"vocabulary": "words", "start_token": START}

    def read(self, mesh, rules):
        return trained(self.model)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name, each with the programs that it has compiled."""
    return functools.cache(
        lambda name: Run(name, tmp_path_factory.mktemp(name), missing_end_penalty=0.25)
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_task(name, runs):
    run = runs(name)
    with run.mesh:
        state, found = run.state(), []
        for i in range(40):
            batch = run.feed.get(i, state)
            assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
                k: (v.shape, v.dtype) for k, v in run.feed.abstract().items()
            }
            found.append(np.asarray(batch["rewards"]).ravel())
            state, metrics = run.step(state, batch)
            assert float(metrics["reward"][0] / metrics["reward"][1]) == pytest.approx(
                found[-1].mean(), rel=1e-5
            )
    before, after = np.concatenate(found[:4]), np.concatenate(found[-4:])
    error = np.sqrt(before.var() / before.size + after.var() / after.size)
    assert after.mean() - before.mean() > max(4 * error, 0.1), (before.mean(), after.mean())


def arrays(batch):
    return {name: np.asarray(array) for name, array in batch.items()}


def assert_same(one, other):
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_rollouts_are_functions_of_parameters_and_number(runs):
    run = runs("grpo")
    with run.mesh:
        state = run.state()
        third, second = (arrays(run.feed.get(number, state)) for number in (3, 2))
        assert_same(arrays(run.feed.get(3, state)), third)
        assert (second["decoder_target_tokens"] != third["decoder_target_tokens"]).any()
        moved = state.replace(params=jax.tree.map(lambda x: -x, state.params))
        changed = arrays(run.feed.get(2, moved))
    own = "decoder_input_tokens"
    np.testing.assert_array_equal(second[own][:, :4], changed[own][:, :4])  # the prompts
    assert (second["decoder_target_tokens"] != changed["decoder_target_tokens"]).any()


def test_the_mesh_and_the_process_change_no_sample(runs):
    alone, spread = runs("grpo"), Run("grpo", devices=4)
    with alone.mesh:
        one = arrays(alone.feed.get(5, alone.state()))
    with spread.mesh:
        other = arrays(spread.feed.get(5, spread.state()))
    assert_same(one, other)


def test_a_run_goes_on_in_the_middle_of_a_rollout(runs):
    """Bit for bit: the second update on a rollout is made with the tokens and values of the first."""
    run = runs("ppo")
    folder = run.feed._folder
    with run.mesh:
        state, seen = run.state(), []
        for i in (100, 101, 102, 103):
            batch = run.feed.get(i, state)
            seen.append(arrays(batch))
            if i == 103:
                saved = jax.device_get(state)
            state, _ = run.step(state, batch)
        assert_same(seen[0], seen[1])
        assert_same(seen[2], seen[3])
        assert_same(arrays(Run("ppo", folder).feed.get(103, saved)), seen[3])
        whole = (folder / "51.npz").read_bytes()
        for damaged in (b"cut", whole[:-100], b""):
            (folder / "51.npz").write_bytes(damaged)
            with pytest.raises(RolloutError, match="multiple of UPDATES = 2"):
                run.feed._read(51)


def texts_of(batch):
    """(prompt, completion, rewards...) of rows of one segment, token by token."""
    for b in range(len(batch["decoder_input_tokens"])):
        size = int((batch["decoder_segment_ids"][b] == 1).sum())
        weights = batch["decoder_loss_weights"][b, :size]
        first = int(np.argmax(weights))
        text = [
            *batch["decoder_input_tokens"][b, :1],
            *batch["decoder_target_tokens"][b, :size],
        ]
        yield b, first, text[: first + 1], text[first + 1 :]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_and_advantages_are_those_of_single_completions(temperature, runs):
    """RLOO's rewards less the divergence, against scores of each text by itself, by the distribution that is sampled."""
    other = jax.tree.map(lambda x: 1.1 * x, trained())
    run = runs("rloo")
    if temperature != 1:
        of_samples = functools.partial(METHODS["rloo"][1], temperature=temperature)
        program = dataclasses.replace(
            run.program, recipe=dataclasses.replace(run.recipe, objective=of_samples)
        )
        run = Run("rloo", program=program, temperature=temperature, missing_end_penalty=0.25)
    with run.mesh:
        state = run.state().replace(params=jax.device_put(other))
        batch = arrays(run.feed.get(70, state))

    listed = [(prompt, completion) for _, _, prompt, completion in texts_of(batch)]
    tokens = np.zeros((len(listed), 8), np.int32)  # what pads them is not seen by what is before
    for row, (prompt, completion) in zip(tokens, listed, strict=True):
        row[: len(prompt) + len(completion)] = prompt + completion

    @jax.jit
    def logits_of(params):
        return LM.apply({"params": params}, tokens)

    def scores(params):
        logits = np.asarray(logits_of(params), np.float64) / temperature
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, (prompt, completion) in zip(logp, listed, strict=True):
            yield sum(row[len(prompt) - 1 + t, token] for t, token in enumerate(completion))

    policy, reference = ([*scores(params)] for params in (other, trained()))
    net = (batch["rewards"] - 0.05 * (np.array(policy) - reference)).reshape(PROMPTS, 4)
    expected = [row - [np.delete(row, i).mean() for i in range(4)] for row in net]
    np.testing.assert_allclose(batch["advantages"], np.ravel(expected), atol=2e-5)
    prompts = Prompts().digits(70) + FIRST
    for b, _, prompt, completion in texts_of(batch):
        assert prompt == [START, *prompts[b // 4]]
        assert batch["ended"][b] == (completion[-1] == EOS)
        ended = completion[-1] == EOS
        right = completion[: len(completion) - ended] == [prompts[b // 4].max()]
        assert batch["rewards"][b] == right - 0.25 * (not ended)


def test_a_pair_is_the_better_and_the_worse_sample():
    prompts = [[START, 5], [START, 6, 7, 8], [START, 9]]
    completions = [[3, EOS], [4], [2, 2, 2], [EOS], [5, EOS], [6, EOS]]
    rewards = np.array([[0.0, 1.0], [0.5, -0.5], [0.25, 0.25]], np.float32)  # of equals the first
    ended = np.array([[True, False], [False, True], [True, True]])
    samples = Samples(prompts, completions, rewards, ended, np.array([0, 1, 0]))

    def score(columns):
        # Tokens as their log-probabilities: sums show which were counted.
        return {"reference_log_probs": -columns["decoder_target_tokens"].astype(np.float32)}

    method = METHODS["online_dpo"][0]
    batch = method.batch(samples, score)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in method.arrays(3).items()
    }
    assert set(PackedPairs({"targets": 14}).arrays(3)) <= set(batch)
    for p, pair in enumerate([(1, 0), (2, 3), (4, 5)]):
        for segment, r in enumerate(pair, 1):
            text = [*prompts[p], *completions[r]]
            here = batch["decoder_segment_ids"][p] == segment
            assert batch["decoder_input_tokens"][p][here].tolist() == text[:-1]
            assert batch["decoder_target_tokens"][p][here].tolist() == text[1:]
            assert batch["decoder_positions"][p][here].tolist() == list(range(len(text) - 1))
            counted = here & (batch["decoder_loss_weights"][p] > 0)
            assert batch["decoder_target_tokens"][p][counted].tolist() == completions[r]
            assert batch["reference_log_probs"][p, segment - 1] == -sum(completions[r])
            assert batch["rewards"][p, segment - 1] == rewards.ravel()[r]
            assert batch["ended"][p, segment - 1] == ended.ravel()[r]
    np.testing.assert_allclose(batch["chosen_tokens_per_pair"], (1 + 3 + 2) / 3)
    assert batch["source_ids"].tolist() == [0, 1, 0]
    np.testing.assert_array_equal(batch["mean_reward"], rewards.mean(1))
    assert batch["pair_weights"].tolist() == [[1.0], [1.0], [1.0]]
    for gap, weights, length in ((0.0, [1, 1, 0], 2), (1.0, [0, 0, 0], 1), (0.5, [1, 1, 0], 2)):
        skipping = dataclasses.replace(method, gap=gap).batch(samples, score)
        assert skipping.pop("pair_weights").ravel().tolist() == weights
        assert (skipping.pop("chosen_tokens_per_pair") == length).all()  # of (1 + 3) / 2 tokens
        for name, value in skipping.items():
            np.testing.assert_array_equal(value, batch[name])


def test_a_pair_of_several_samples_is_of_their_extremes():
    method = dataclasses.replace(METHODS["online_dpo"][0], samples=4, reference=False, gap=0.0)
    completions = [[token, EOS] for token in range(2, 10)]
    rewards = np.array([[0.5, 2.0, -1.0, 2.0], [1.0, 1.0, 1.0, 1.0]], np.float32)
    samples = Samples(
        [[START, 5], [START, 6]], completions, rewards, np.ones((2, 4), bool), np.zeros(2, int)
    )
    batch = method.batch(samples, None)
    tokens_PL, segments_PL = batch["decoder_target_tokens"], batch["decoder_segment_ids"]
    counted_PL = batch["decoder_loss_weights"] > 0
    first = [
        [int(tokens_PL[p][(segments_PL[p] == side) & counted_PL[p]][0]) for side in (1, 2)]
        for p in (0, 1)
    ]
    assert first == [[3, 4], [6, 9]]  # the first of the best, the last of the worst
    assert batch["rewards"].tolist() == [[2.0, -1.0], [1.0, 1.0]]
    assert batch["mean_reward"].tolist() == [0.875, 1.0]
    assert batch["pair_weights"].tolist() == [[1.0], [0.0]]
    assert method.rows_per_prompt == 1


def test_what_cannot_be_is_said(runs, monkeypatch):
    run = runs("grpo")
    known = dict(
        stream=Prompts(),
        program=run.program,
        folder="",
        reward=largest,
        vocabulary=VOCABULARY,
    )
    stream = Prompts()
    stream.batch_size = 3
    with pytest.raises(RolloutError, match="BATCH_SIZE = 256 is not PROMPTS = 3 times"):
        Rollouts(**{**known, "stream": stream})
    of_eight = Run("grpo", devices=8)
    some = Prompts()
    some.batch_size, few = 4, dataclasses.replace(of_eight.recipe, batch_size=32)
    with pytest.raises(RolloutError, match="PROMPTS = 4 do not divide over the 8 parts"):
        program = dataclasses.replace(of_eight.program, recipe=few)
        Rollouts(**{**known, "stream": some, "program": program})
    with pytest.raises(RolloutError, match="UPDATES is 1 for the method, but 2"):
        Rollouts(**{**known, "stream": Prompts(updates=2)})
    with pytest.raises(RolloutError, match="bind Rollouts.reference"):
        asks = dataclasses.replace(
            run.recipe, inputs=dataclasses.replace(METHODS["grpo"][0], kl=0.1)
        )
        Rollouts(**{**known, "program": dataclasses.replace(run.program, recipe=asks)})
    with pytest.raises(RolloutError, match="is not a method of trainers/online"):
        pairs = dataclasses.replace(run.recipe, inputs=PackedPairs({"targets": 8}))
        Rollouts(**{**known, "program": dataclasses.replace(run.program, recipe=pairs)})
    with pytest.raises(
        RolloutError, match="temperature is 0.7, but the objective's .* 1.0: set TEMP"
    ):
        Rollouts(**known, temperature=0.7)
    with pytest.raises(RolloutError, match="TOP_P = 0.9 and .* a part of the tokens"):
        Rollouts(**known, top_p=0.9)
    with pytest.raises(RolloutError, match="Rollouts.top_k = 2 draw"):
        Rollouts(**known, top_k=2)
    with pytest.raises(ValueError, match="temperature = 0"):
        objective_of(model=LM, loss=policy_gradient.grpo, temperature=0.0)
    with pytest.raises(ValueError, match="SAMPLES = 1"):
        Groups(**SIZES, samples=1, advantages=policy_gradient.leave_one_out)
    with pytest.raises(ValueError, match="SAMPLES = 1"):
        BestAndWorst(**SIZES, samples=1)
    with pytest.raises(ValueError, match="gap"):
        BestAndWorst(**SIZES, gap=-1.0)
    with pytest.raises(ValueError, match="completion_length = 0"):
        BestAndWorst(prompt_length=1, completion_length=0)
    with pytest.raises(ValueError, match="decay"):
        Valued(**SIZES, decay=2.0)
    monkeypatch.setattr(run.feed, "_reward", lambda completions: [np.nan] * len(completions))
    with run.mesh, pytest.raises(ValueError, match="REWARD returned .* one finite number for each"):
        run.feed.get(1000, run.state())
