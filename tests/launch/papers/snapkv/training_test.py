"""The phases of the retrieval models' training: what ends them, and what they read."""

import json
import types

import jax
import numpy as np
import pytest

from espalier.launch.papers.snapkv import experiment, retrieval, until_answered
from espalier.launch.sweep import file


class Parrot:
    """A model whose best tokens are its parameters."""

    def apply(self, variables, tokens_EX):
        best_EX = variables["params"]
        assert best_EX.shape == tokens_EX.shape
        return jax.nn.one_hot(best_EX, retrieval.VOCAB_SIZE)


def hook_at(path, step):
    recipe = types.SimpleNamespace(model=Parrot())
    program = types.SimpleNamespace(recipe=recipe)
    run = types.SimpleNamespace(program=program, path=path, step=step)
    return until_answered.UntilAnswered(run=run, kinds=((3, "last"),), share=0.75, prompts=8)


@pytest.fixture
def hook(tmp_path):
    return hook_at(tmp_path, 0)


def test_a_run_ends_when_enough_prompts_are_answered_exactly(hook):
    rng = np.random.default_rng((hook.seed, 3))
    drawn = retrieval.draw_prompts(rng, retrieval.draw_lines(rng, 8, 3))
    whole_EX = np.concatenate([drawn.tokens_ET, drawn.answers_EA], axis=1)
    best_EX = whole_EX[:, 1:].copy()
    best_EX[:, 0] = 0  # what precedes an answer does not count

    def share():
        metrics = hook(100, types.SimpleNamespace(released_params=best_EX), {})
        return metrics["answers/last_3"], hook.ended

    assert share() == (1.0, True)
    best_EX[:2, -1] = 0
    assert share() == (0.75, True)
    best_EX[2, -4] = 0  # one wrong token of four
    assert share() == (0.625, False)


def test_a_finished_run_ends_at_once_when_it_starts_again(tmp_path):
    rows = ({"step": 100, "answers/last_3": 0.7}, {"step": 200, "loss": 1.0})
    rows += ({"step": 200, "answers/last_3": 0.75},)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = {step: hook_at(tmp_path, step).ended for step in (0, 100, 200, 300)}
    assert ended == {0: False, 100: False, 200: True, 300: False}


def test_phases_start_from_each_other_and_read_registered_tasks():
    runs = file.read(f"{experiment.__file__}:2")
    assert [run.seed for run in runs if run.arm == experiment.LAST] == [20, 21]
    parents = [run.parent and run.parent.partition("/")[0] for run in runs if run.seed == 20]
    assert parents == [None, "lines_3", "lines_12"]
    tasks = {
        f"retrieval_{'first_' * first}{lines}" for lines in (3, 6, 12, 24, 48) for first in (0, 1)
    }
    for phase in experiment.PHASES.values():
        assert set(phase.shares) <= tasks
        assert sum(phase.shares.values()) == pytest.approx(1)
    # The last phase ends when the prompts that judge are answered.
    assert {(48, "last"), (12, "last"), (12, "first")} == set(
        experiment.PHASES[experiment.LAST].kinds
    )
