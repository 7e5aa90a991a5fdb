"""Best-of-n over files of samples, and the pairs that it makes."""

import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from espalier.data.tokenizers import vocabularies
from espalier.launch.config import gin_config
from espalier.launch.prepare import best_of_n
from espalier.launch.run import model_record, run_vocabulary
from espalier.model.heads.reward_model import RewardModel
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.rewards.base import Completion
from espalier.trainers.rewards.model_reward import ModelReward


def rows(texts, prompt="1 + 1 = ", answer="2", **more):
    return [
        {"prompt": prompt, "answer": answer, "sample": i, "text": text, "ended": "eos", **more}
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def command(tmp_path):
    """Runs the command on rows; returns its status and what it wrote."""

    def run(given, *more, reward="exact_answer"):
        inputs = tmp_path / "samples.jsonl"
        inputs.write_text("".join(json.dumps(row) + "\n" for row in given))
        files = {name: tmp_path / f"{name}.jsonl" for name in ("output", "pairs")}
        outputs = [f"--{name}={path}" for name, path in files.items()]
        status = best_of_n.main([f"--inputs={inputs}", f"--reward={reward}", *outputs, *more])
        found = [
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None
            for path in files.values()
        ]
        return status, *found

    return run


def test_the_best_samples_are_kept_and_paired_with_the_worst(command, capfd):
    chat = [{"role": "user", "content": "one and one?"}]
    status, best, pairs = command(
        [
            *rows(["3", "2", "2", "4"]),
            *rows(["5", "5"], prompt="2 + 3 = ", answer="5"),
            *rows(["no", "2"], prompt=chat),
        ]
    )
    assert status == 0
    assert [row["text"] for row in best] == ["2", "5", "2"]
    assert [row["sample"] for row in best] == [1, 0, 1]
    assert best[0]["rewards"] == [0, 1, 1, 0] and best[0]["best_of"] == 4
    told = {"answer": "2", "chosen_reward": 1.0, "rejected_reward": 0.0}
    turns = [[{"role": "assistant", "content": text}] for text in ("2", "no")]
    assert pairs == [
        {"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3", **told},
        {"prompt": chat, "chosen": turns[0], "rejected": turns[1], **told},
    ]
    said = capfd.readouterr().err
    assert "3 prompts: mean reward 0.6667, of the best 1; 1 prompts with equal rewards" in said
    assert f"best of 4 {math.log(4) - 0.75:.3f} nats at most" in said


def test_texts_that_were_cut_are_penalised(command):
    given = rows(["2", "2"])
    given[0]["ended"] = "length"
    _, best, _ = command(given, "--missing_end_penalty=0.5")
    assert best[0]["rewards"] == [0.5, 1.0] and best[0]["sample"] == 1


HEADED = """
from __gin__ import dynamic_registration
from espalier.model.heads import {module}
from espalier.model import transformer
MODEL = @{module}.{kind}()
{module}.{kind}.backbone = @transformer.Transformer()
"""


def headed_run(trained_run, folder, module, kind, head):
    """A run directory with a checkpoint of the tiny model with a head of one number."""
    snippet = folder / "head.gin"
    snippet.write_text(HEADED.format(module=module, kind=kind))
    files = [f"{trained_run.path}/config.gin", str(snippet)]
    config = gin_config.load(files, [], entry="espalier.launch.train:train")
    run = folder / "run"
    run.mkdir()
    (run / "config.gin").write_text(config.text)
    model_record.write(run)
    run_vocabulary.copy(trained_run.path, run)
    kernel = jnp.linspace(-1, 1, trained_run.model.config.embed_dim)[:, None]
    params = {"backbone": trained_run.params["raw"], head: {"kernel": kernel}}
    with Checkpointer(run / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params}, meta=step_dir.read_meta(trained_run.path))
    return run, params


def test_a_reward_model_ranks(command, trained_run, tmp_path, capfd):
    run, params = headed_run(trained_run, tmp_path, "reward_model", "RewardModel", "reward_head")
    given = [*rows(["2", "two"]), *rows(["", "5"], prompt="2 + 3 = ", answer="5")]
    given[0]["ended"] = "length"
    status, best, _ = command(given, reward=f"checkpoint:{run}")
    assert status == 0, capfd.readouterr().err
    byte = vocabularies.byte()
    reward = ModelReward(RewardModel(backbone=trained_run.model), params)
    expected = reward(
        [
            Completion(byte.encode(row["prompt"]), byte.encode(row["text"]), row["ended"] == "eos")
            for row in given
        ]
    )
    found = np.ravel([row["rewards"] for row in best])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert len(set(found.tolist())) == 4


def test_commands_say_what_kind_of_model_they_read(trained_run, tmp_path, command, capfd):
    run, _ = headed_run(trained_run, tmp_path, "actor_critic", "ActorCritic", "value_head")
    config = gin_config.load(
        ["t5x_configs/runs/load_run.gin", str(run / "model.json")],
        [],
        entry="espalier.launch.load.load_run:RunConfig",
        unused={"VOCABULARY": "None"},
    ).entry()
    with config.load(str(run)) as loaded:  # the actor is a language model
        assert type(loaded.model).__name__ == "Transformer"
        assert set(loaded.params) == set(trained_run.params["raw"])
    status, *_ = command(rows(["1"]), reward=f"checkpoint:{run}")
    assert status == 2 and "of a ActorCritic: train a reward model" in capfd.readouterr().err


def test_the_bound_holds_and_is_met_by_many_outcomes():
    """Best of n of m equally probable outcomes: outcome k has (k^n - (k - 1)^n) / m^n of it."""
    for n in (1, 2, 8):
        for m, slack in ((2, 1.0), (20_000, 1e-3)):
            k = np.arange(1, m + 1, dtype=np.float64)
            p = (k / m) ** n - ((k - 1) / m) ** n
            p = p[p > 0]
            divergence = float((p * np.log(p * m)).sum())
            assert divergence <= best_of_n.divergence_bound(n) + 1e-9
            assert divergence >= best_of_n.divergence_bound(n) - slack


@pytest.mark.parametrize(
    ("given", "more", "reward", "words"),
    [
        (rows(["1"])[:0], (), "exact_answer", "no samples"),
        ([{**rows(["1"])[0], "sample": 1}], (), "exact_answer", "line 1: expected the samples"),
        ([{"sample": 0, "text": "x"}], (), "exact_answer", "line 1: expected the samples"),
        (rows(["1"]), ("--answer_key=solution",), "exact_answer", "line 1: .*no 'solution'"),
        ([{"sample": 0, "prompt": [1], "tokens": [2]}], (), "exact_answer", "line 1: no 'text'"),
        (rows(["1"]), (), "exact", "--reward=exact must be "),
        (
            rows(["1"]),
            ("--answer_key=k",),
            "reasoning_gym",
            "--answer_key is not read by --reward=",
        ),
        (
            rows(["1"]),
            ("--reward_batch_size=2",),
            "exact_answer",
            "--reward_batch_size is not read",
        ),
    ],
)
def test_what_cannot_be_ranked_is_said(command, capfd, given, more, reward, words):
    assert command(given, *more, reward=reward) == (2, None, None)
    assert re.search(words, capfd.readouterr().err)


def test_pairs_need_texts():
    group = [{"prompt": [1], "sample": i, "tokens": [i + 2]} for i in range(2)]
    for i, row in enumerate(group):
        row["text"] = str(i)
    assert best_of_n.pair(group, [0.0, 0.0]) is None
    without = [{"prompt": [1], "sample": i} for i in range(2)]
    for rows_ in ([group[0], without[1]], without):
        with pytest.raises(best_of_n.RewardError, match="'text'"):
            best_of_n.pair(rows_, [0.0, 1.0])
