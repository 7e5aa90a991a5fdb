"""The sweeps of arXiv 2410.11677, small and at full size, as gin has their arms."""

import functools
import pathlib

import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.launch.papers.preference import experiment
from espalier.launch.sweep import file

SMALL, FULL = (
    "launch/papers/preference/experiment.py",
    "launch/papers/preference/experiment.py:full,/data",
)


@functools.cache
def runs(path):
    return {run.arm: run for run in reversed(file.read(path))}


def load(run):
    given = [*run.bindings, "MODEL_DIR='/run'"]
    given += ["INITIAL_CHECKPOINT_PATH='/before'"] if run.parent else []
    config = gin_config.load(run.gin_files, given, entry="espalier.launch.train:train")
    # Online runs include the files of pairs, whose stream of training they do not use.
    assert run.arm in experiment.ONLINE or [str(warning) for warning in config.warnings] == []
    return config


def eval_weights(macros):
    """The weights of the losses; a macro among them by its value."""
    names = {"NLL_WEIGHT", "ALPHA"} & set(macros)
    weights = macros["LOSS_WEIGHTS"]
    if weights is None:
        return None
    return [w if isinstance(w, float) else macros[next(iter(names))] for w in weights]


def test_the_full_sweep_has_the_papers_arms_of_both_models_at_both_rates():
    arms = set(runs(FULL))
    names = set(experiment.full_methods())
    assert len(names) == 3 * 6 + 2 * 3 * 3 + 2
    assert arms == {f"{m}_reward" for m in ("7b", "35b")} | {
        f"{m}_{name}_{rate}" for m in ("7b", "35b") for name in names for rate in ("low", "high")
    }
    assert {
        run.made_of["7b_reward"] for arm, run in runs(FULL).items() if arm.startswith("7b_d")
    } == {"7b_reward/seed0"}
    # All strengths of the small sweep's NLL study and more.
    assert {experiment.arm("dpo", 0.1, weight) for weight in experiment.DPO[0.1]} <= names


@pytest.mark.parametrize(
    ("arm", "losses", "weights"),
    [
        ("7b_dpo_0p03_low", ["dpo"], None),
        ("35b_ipo_0p1_nll0p3_high", ["ipo", "nll"], [1.0, 0.3]),
        ("7b_hinge_3_high", ["slic_hinge", "slic_regulariser"], [1.0, 3.0]),
        ("35b_dpo_1_nll0p1_low", ["dpo", "nll"], [1.0, 0.1]),
        ("7b_simpo_low", ["simpo"], None),
        ("7b_sft_better_low", ["nll"], None),
    ],
)
def test_a_full_arm_has_the_papers_settings(arm, losses, weights):
    config = load(runs(FULL)[arm])
    arguments, macros = config.arguments(), config.macros
    recipe = arguments["recipe"]
    assert arguments["total_steps"] == 1956 == 62_600 // 32
    assert (recipe.batch_size, macros["MAX_LENGTH"]) == (32, 8192)
    assert macros["TASK_FEATURE_LENGTHS"]["targets"] == 2 * macros["MAX_LENGTH"]
    peak = 5e-6 if arm.endswith("low") else 1e-5
    rates = [float(recipe.learning_rate(step)) for step in (64, 128, 1956)]
    np.testing.assert_allclose(rates, [peak / 2, peak, peak / 10], rtol=1e-4)
    assert macros["WEIGHT_DECAY"] == 0.1
    named = [str(loss).rpartition(".")[2] for loss in macros["LOSSES"]]
    assert named == losses
    assert eval_weights(macros) == weights
    size = recipe.model.config.embed_dim
    assert size == (4096 if arm.startswith("7b") else 8192)


def test_the_judge_of_a_full_run_is_a_reward_model_of_its_own_size():
    config = load(runs(FULL)["7b_reward"])
    assert type(config.arguments()["recipe"].model).__name__ == "RewardModel"


def test_every_full_file_is_in_an_arm():
    folder = pathlib.Path(experiment.FULL)
    used = {name for run in runs(FULL).values() for name in run.gin_files}
    assert {str(path) for path in folder.glob("*.gin")} <= used
    for run in runs(FULL).values():
        assert all(pathlib.Path(name).is_file() for name in run.gin_files)


@pytest.mark.parametrize("arm", ["dpo_0p01", "dpo_0p1_nll1", "simpo", "sft_better", "grpo"])
def test_small_arms_resolve_and_measure_a_diversity(arm):
    config = load(runs(SMALL)[arm])
    assert config.macros["INDICATORS_EAD_ALPHABET"] == "ngrams"
    assert float(config.macros["LEARNING_RATE"]) == (1e-3 if arm == "grpo" else 3e-4)


def test_the_second_size_is_twice_as_wide_and_has_fewer_arms():
    large = runs(f"{SMALL}:large,2")
    assert set(large) == {"sft", "pairs", "dpo_0p01", "dpo_0p1", "dpo_1"} < set(runs(SMALL))
    widths = [
        load(some["dpo_1"]).arguments()["recipe"].model.config.embed_dim
        for some in (runs(SMALL), large)
    ]
    assert widths == [64, 128]
