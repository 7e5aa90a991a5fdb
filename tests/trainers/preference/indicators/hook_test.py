"""The hook on a tiny model: what it reads, keeps and says, and what a run that goes on finds again."""

import dataclasses
import functools
import json
import logging
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from espalier.launch.config.parameters import passed
from espalier.model.config import TransformerConfig
from espalier.model.heads.actor_critic import ActorCritic
from espalier.model.transformer import Transformer
from espalier.trainers import initialise, partitioning
from espalier.trainers.hooks import HookInterruptedError, RunContext
from espalier.trainers.preference.indicators import samples
from espalier.trainers.preference.indicators.alarm import StoppingRule
from espalier.trainers.preference.indicators.hook import PreferenceIndicators
from espalier.trainers.telemetry import metric_writers
from espalier.trainers.train_state import TrainState

MODEL = Transformer(
    config=TransformerConfig(
        vocab_size=32, num_layers=1, scan_layers=False, embed_dim=16, num_heads=2, mlp_dim=16
    )
)
MESH = partitioning.make_mesh(devices=jax.devices()[:1])
PROGRAM = types.SimpleNamespace(
    mesh=MESH, rules=(), batch_sharding=NamedSharding(MESH, PartitionSpec())
)


class Letters:
    """Ids 2 to 27 are letters; 1 ends a text."""

    eos_id, vocab_size = 1, 28

    def decode(self, ids):
        ids = ids[: ids.index(1)] if 1 in ids else ids  # as SeqIO does
        return "".join(chr(97 + id - 2) if id >= 2 else "?" for id in ids)

    def encode(self, text):
        return [ord(letter) - 95 for letter in text]


@functools.cache
def parameters(seed=0):
    """Drawn without compiling anything; far from uniform predictions, so that the most probable tokens are no ties."""
    rng = np.random.default_rng(seed)

    def draw(box):
        return 0.5 * rng.normal(size=box.value.shape).astype(np.float32)

    boxed = initialise.abstract_variables(MODEL)["params"]
    return jax.tree.map(draw, boxed, is_leaf=lambda x: hasattr(x, "value"))


def state(seed):
    return TrainState(step=0, opt_state=(), params=parameters(seed), ema_params=None)


@jax.jit
def all_log_probs(params, text):
    hidden = MODEL.apply({"params": params}, text, method="hidden").hidden_BTD
    return jax.nn.log_softmax(MODEL.apply({"params": params}, hidden, method="logits"))[0]


def log_probs(seed, prompt, targets):
    """Of each target after the prompt, each sequence by itself."""
    text = [0, *prompt, *targets]
    found = all_log_probs(parameters(seed), np.array([text + [0] * (16 - len(text))]))
    return np.asarray(found)[np.arange(len(prompt), len(text) - 1), targets].astype(np.float64)


class Pairs:
    kind = "paired"

    def __init__(self, name="a", start=0, count=6):
        rng = np.random.default_rng(len(name))
        self.start = start
        self.found = [
            (f"{name}{i}", *(rng.integers(2, 28, size) for size in (1 + i // 2, 3, 2)))
            for i in range(count)
        ]
        if count:  # two pairs of one prompt
            self.found[1:2] = [(f"{name}1", self.found[0][1], *self.found[1][2:])]

    def pairs(self):
        return self.found

    def summary(self):
        return {
            "kind": self.kind,
            "start_token": self.start,
            "vocabulary": {"digest": "words"},
        }


class Reference:
    model = MODEL

    def check(self, mesh, rules, meta):
        assert meta == {"vocabulary": "words", "start_token": 0}

    def read(self, mesh, rules):
        return parameters(0)


def vowels(completions):
    """The share of vowels: judges by the text alone."""
    texts = [Letters().decode(list(c.tokens)) for c in completions]
    return np.array([np.mean([x in "aeiou" for x in t] or [0.0]) for t in texts], np.float32)


def hook(path, *, step=0, should_stop=lambda done: False, model=MODEL, **settings):
    run = RunContext(
        path=path, writer=True, step=step,
        program=types.SimpleNamespace(**vars(PROGRAM), recipe=types.SimpleNamespace(language_model=model)),
        learning_rate=lambda step: 0.0, should_stop=should_stop,
    )  # fmt: skip
    given = {"pairs": lambda task: Pairs(task), "tasks": ["a"], "vocabulary": Letters()}
    settings = {"max_new_tokens": 5, "batch_size": 4, "num_prompts": 3, **settings}
    made = PreferenceIndicators(run=run, **given | settings)
    # Compiled once for the hooks of this file, which are of one shape.
    for part, name in ((made._reader, "_read"), (made._generator._sampler, "_sample")):
        setattr(part, name, COMPILED.setdefault(name, getattr(part, name)))
    return made


COMPILED = {}


def test_the_numbers_are_those_of_the_pairs_and_of_the_outputs(tmp_path):
    made = hook(tmp_path, reference=Reference(), reward=vowels)
    first = made(0, state(0), {})
    assert first["indicators/kl"] == first["indicators/llh_distance"] == 0.0
    assert first["indicators/p_win"] == 0.5
    found = {name.removeprefix("indicators/"): x for name, x in made(7, state(1), {}).items()}

    pairs = Pairs().pairs()
    ours, theirs = (
        [[log_probs(seed, prompt, side).mean() for side in sides] for _, prompt, *sides in pairs]
        for seed in (1, 0)
    )
    likely, unlikely = np.mean(ours, axis=0)
    assert found["llh_chosen"] == pytest.approx(likely, rel=1e-5)
    assert found["llh_rejected"] == pytest.approx(unlikely, rel=1e-5)
    assert found["llh_gap"] == pytest.approx(likely - unlikely, rel=1e-4)
    away = np.subtract(ours, theirs)[:, 0]
    assert found["llh_distance"] == pytest.approx(np.sqrt(np.mean(away**2)), rel=1e-4)

    written = metric_writers.read_jsonl(samples.path_of(tmp_path, 7))
    prompts = [tuple(map(int, pairs[i][1])) for i in (0, 2, 3)]
    assert [tuple(row["prompt"]) for row in written] == prompts
    outputs = [row["tokens"] + [1] * (row["ended"] == "eos") for row in written]
    ratios = [
        (log_probs(1, prompt, out) - log_probs(0, prompt, out)).sum()
        for prompt, out in zip(prompts, outputs, strict=True)
    ]
    assert found["kl"] == pytest.approx(np.mean(ratios), rel=1e-4)
    assert [row["log_ratio"] for row in written] == pytest.approx(ratios, rel=1e-4)
    assert found["length"] == np.mean([len(out) for out in outputs])
    assert found["ended"] == np.mean([row["ended"] == "eos" for row in written])
    for name in ("entropy", "mass", "reward"):
        assert found[name] == pytest.approx(np.mean([row[name] for row in written]))
    assert [row["text"] for row in written] == [Letters().decode(row["tokens"]) for row in written]
    before = metric_writers.read_jsonl(samples.path_of(tmp_path, 0))
    wins = [
        1 / (1 + np.exp(b["reward"] - a["reward"])) for a, b in zip(written, before, strict=True)
    ]
    assert found["p_win"] == pytest.approx(np.mean(wins), rel=1e-6)
    assert found["retain"] == found["reward"]


def written(path, rows):
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step, row in rows:
            file.write(json.dumps({"step": step, **row}) + "\n")


def test_a_run_that_goes_on_is_the_run_that_was_never_interrupted(tmp_path, caplog):
    """Weights shrink towards uniform predictions; the alarm comes after the interruption."""
    scales = dict(zip((0, 2, 4, 6, 8, 10), np.float32([1, 1.1, 1.2, 0.8, 0.4, 0.2]), strict=True))
    steps = list(scales)

    def run(path, made, part):
        found = []
        for step in part:
            weights = jax.tree.map(functools.partial(np.multiply, scales[step]), parameters(0))
            reached = TrainState(step=0, opt_state=(), params=None, ema_params=weights)
            found.append((step, dict(made(step, reached, {}))))
            written(path, found[-1:])
        return found

    settings = {"reward": vowels}
    whole_path, path = tmp_path / "whole", tmp_path / "parts"
    whole_path.mkdir(), path.mkdir()
    whole = run(whole_path, hook(whole_path, **settings), steps)
    first = run(path, hook(path, **settings), steps[:4])
    # Stopped after step 6, saved last at step 4: the row of step 6 is written once more.
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:3]))
    second = run(path, hook(path, step=4, **settings), steps[3:])
    assert [*first[:3], *second] == whole
    alarms = [row["indicators/alarm"] for _, row in whole]
    assert alarms[:3] == [0] * 3 and alarms[-1] == 1, [r["indicators/mass"] for _, r in whole]
    assert len(caplog.records) == 2  # one for each of the two runs
    for step in steps:
        name = f"{samples.FOLDER}/{step}.jsonl"
        assert (path / name).read_bytes() == (whole_path / name).read_bytes()


class Falling:
    """Readings of a made-up run, in place of the model's."""

    def __init__(self, made, entropies):
        self.made, self.entropies = made, entropies
        made._pair_indicators = lambda params, done: {"llh_chosen": -1.0 - self.step}
        made._output_indicators = lambda *_: {"entropy": self.entropies[self.step], "mass": 0.9}
        made._generator = lambda *_, **__: []
        made._generator.batches = 1

    def __call__(self, step):
        self.step = step
        return self.made(step, TrainState(step=0, opt_state=(), params=None, ema_params=None), {})


ENTROPIES = [2.0, 2.4, 2.3, 2.2, 2.1, 2.0, 1.9]
EXACT = StoppingRule(smoothing=0.0)


def test_the_alarm_is_in_the_metrics_and_once_in_the_log(tmp_path, caplog):
    made = hook(tmp_path, rule=EXACT)
    run = Falling(made, ENTROPIES)
    with caplog.at_level(logging.WARNING):
        found = [run(step) for step in range(7)]
    assert [row["indicators/alarm"] for row in found] == [0, 0, 0, 0, 1, 1, 1]
    # The last evaluation before the alarm has the largest value of what decides which checkpoint stays.
    assert [row.get("indicators/retain") for row in found] == [0, 1, 2, 3, None, None, None]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("step 4: signs of over-optimisation: the entropy") and "step 3" in line
    assert "The run continues" in line and "BETA" in line
    assert not made.ended
    at_start = dataclasses.replace(made._monitor.alarm, before=0)  # has no checkpoint
    assert "Use the model that the run began with, or" in made._advice(at_start)


def test_an_alarm_ends_the_run_that_asks_for_it_and_the_one_that_goes_on(tmp_path, caplog):
    made = hook(tmp_path, rule=EXACT, stop="alarm")
    run = Falling(made, ENTROPIES)
    ended = []
    for step in range(5):
        written(tmp_path, [(step, run(step))])
        ended.append(made.ended)
    assert ended == [False] * 4 + [True]
    assert not hook(tmp_path, step=3, rule=EXACT, stop="alarm").ended
    caplog.clear()
    again = hook(tmp_path, step=4, rule=EXACT, stop="alarm")
    assert again.ended
    assert Falling(again, ENTROPIES)(5)["indicators/alarm"] == 1 and not caplog.records
    assert not hook(tmp_path, step=4, rule=EXACT).ended


def test_a_rollback_takes_its_readings_back(tmp_path):
    run = Falling(hook(tmp_path, rule=EXACT), dict(enumerate(ENTROPIES)))
    for step in range(5):
        found = run(step)
    assert found["indicators/alarm"] == 1
    run.entropies = {3: 2.45, 4: 2.44}
    assert run(3)["indicators/alarm"] == 0 and run(4)["indicators/alarm"] == 0


def test_a_request_to_stop_is_heard_between_batches(tmp_path):
    asked = []
    made = hook(tmp_path, should_stop=lambda done: asked.append(done) or done == 2)
    with pytest.raises(HookInterruptedError):
        made(0, state(0), {})
    assert asked == [1, 2] and not samples.path_of(tmp_path, 0).exists()


def test_outputs_of_another_model_compete(tmp_path):
    prompts = samples.read_held_out(
        lambda task: Pairs(), ["a"], num_pairs=None, num_prompts=3
    ).prompts
    texts = ["aaa", "aab", "bbb"]
    rows = [
        {"prompt": list(prompts[0]), "text": texts[0]},
        {"prompt": Letters().decode(list(prompts[1])), "text": texts[1], "tokens": [99]},
        {"prompt": list(prompts[2]), "tokens": [3, 3, 3, 1], "ended": "eos"},
    ]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = hook(tmp_path, reward=vowels, competitor=str(path))(0, state(0), {})
    ours = [row["reward"] for row in metric_writers.read_jsonl(samples.path_of(tmp_path, 0))]
    wins = [1 / (1 + np.exp(b - a)) for a, b in zip(ours, [1, 2 / 3, 0], strict=True)]
    assert found["indicators/p_win"] == pytest.approx(np.mean(wins), rel=1e-6)

    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with pytest.raises(samples.CompetitorError, match="no output for prompt 2"):
        hook(tmp_path, reward=vowels, competitor=str(path))
    path.write_text('{"text": "a"}\n')
    with pytest.raises(samples.CompetitorError, match="line 1: KeyError"):
        hook(tmp_path, reward=vowels, competitor=str(path))
    with pytest.raises(samples.CompetitorError, match="do not exist"):
        hook(tmp_path, reward=vowels, competitor=str(tmp_path / "none.jsonl"))


def test_a_verifier_is_told_the_texts_of_the_pair_of_policy_and_competitor_alike(tmp_path):
    told = []

    def reward(completions):
        told.append([c.info for c in completions])
        return np.zeros(len(completions), np.float32)

    hook(tmp_path, reward=reward)(0, state(0), {})
    hook(tmp_path, reward=reward, competitor=str(samples.path_of(tmp_path, 0)))
    first = [
        Pairs().found[i] for i in (0, 2, 3)
    ]  # of the two pairs of one prompt, that of the first digest
    texts = [[Letters().decode(list(side)) for side in pair[2:]] for pair in first]
    expected = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in texts]
    assert told == [expected, expected]


def test_texts_go_on_after_the_end_of_a_turn():
    assert samples.Texts(Letters(), {1}).text([2, 1, 3]) == "ab"


def test_which_pairs_are_read_does_not_depend_on_the_order_of_files():
    class Reversed(Pairs):
        def pairs(self):
            return self.found[::-1]

    settings = {"num_pairs": 3, "num_prompts": 2}
    found = samples.read_held_out(lambda task: Pairs(task), ["b", "a"], **settings)
    again = samples.read_held_out(lambda task: Reversed(task), ["a", "b"], **settings)
    assert found == again and len(found.pairs) == 3 and len(found.prompts) == 2
    assert found.start == (0,)


class Unpaired(Pairs):
    kind = "unpaired"


class WithoutEnd(Letters):
    eos_id = -1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pairs": lambda task: Pairs(count=0)}, "no pairs are held out"),
        ({"pairs": lambda task: Unpaired()}, "single completions"),
        (
            {"pairs": lambda task: Pairs(start=len(task)), "tasks": ["a", "bb"]},
            "different start tokens",
        ),
        ({"vocabulary": None}, "VOCABULARY"),
        ({"vocabulary": WithoutEnd()}, "give eos_ids"),
        ({"competitor": "x"}, "without a reward"),
        ({"stop": "now"}, "'never', 'alarm'"),
        ({"every": 0}, "every = 0"),
        ({"num_pairs": 0}, "num_pairs = 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        hook(tmp_path, **settings)


def test_a_reward_on_disk_is_put_on_the_mesh(tmp_path):
    class Stored:
        def on(self, mesh, rules, *, meta, folder):
            assert (mesh, rules, folder) == (MESH, (), tmp_path)
            assert meta == {"vocabulary": "words", "start_token": 0}
            return vowels

    found = hook(tmp_path, reward=Stored())(0, state(0), {})
    written = metric_writers.read_jsonl(samples.path_of(tmp_path, 0))
    assert found["indicators/reward"] == pytest.approx(np.mean([row["reward"] for row in written]))


def test_a_reward_must_be_a_finite_number_for_each(tmp_path):
    made = hook(tmp_path, reward=lambda completions: np.full(len(completions), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        made(0, state(0), {})


def test_the_streams_are_opened_as_the_seam_says(tmp_path):
    calls = []

    def opened(**given):
        calls.append(tuple(given))
        return Pairs()

    hook(tmp_path, pairs=opened)
    assert calls == [passed(PreferenceIndicators, "pairs")]


def test_of_an_actor_and_critic_the_actor_is_read(tmp_path):
    whole = TrainState(
        step=0, opt_state=(), params={"backbone": parameters(1), "value_head": {}}, ema_params=None
    )
    found = hook(tmp_path / "whole", model=ActorCritic(backbone=MODEL), reference=Reference())
    alone = hook(tmp_path / "alone", reference=Reference())
    assert found(0, whole, {}) == alone(0, state(1), {})
