"""methods/averaging/: what is evaluated, read, continued and exported, from the command line."""

import json
import os

import jax
import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.launch.convert import __main__ as convert
from espalier.launch.load import load_run
from espalier.model.hf import load
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.optim import recent_mean
from espalier.trainers.telemetry.metric_writers import read_jsonl

FILES = ("models/tiny", "data/files", "runs/pretrain", "methods/averaging/schedule_free")


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """A run of 12 steps, stopped for good and continued after 6."""
    folder = tmp_path_factory.mktemp("averaging")
    lines = [f"def f{i}(x):\n    return x + {i}\n" * 4 for i in range(60)]
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    for steps in (6, 12):
        bindings = (
            f"MODEL_DIR={str(folder / 'run')!r}",
            f"FILES={str(folder / 'x.jsonl')!r}",
            "VALIDATION_FRACTION=0.2",
            "VOCABULARY=@vocabularies.byte()",
            "MIXTURE_OR_TASK_NAME='files'",
            "TASK_FEATURE_LENGTHS={'targets': 32}",
            "BATCH_SIZE=8",
            f"TRAIN_STEPS={steps}",
            "WARMUP_STEPS=2",
            "LEARNING_RATE=1e-2",
            "EVAL_PERIOD=6",
            "CHECKPOINT_PERIOD=6",
        )
        flags = [f"--gin_file=t5x_configs/{file}.gin" for file in FILES]
        result = train(*flags, *(f"--gin.{binding}" for binding in bindings))
        assert result.status == 0, result.err
    return folder / "run"


def stored(run, root):
    step = step_dir.resolve(run)
    names = [name for name in step_dir.read_manifest(step).arrays if name.startswith(root)]
    return {name.removeprefix(root): StoredArray(step, name).read() for name in names}


def test_numbers_of_a_checkpoint_are_read_as_arrays_are(run):
    assert stored(run, "step")[""] == 12


def test_the_average_is_saved_evaluated_and_exported(run, tmp_path, command, capsys):
    y, z, x = (stored(run, root) for root in ("params/", "opt_state/z/", "ema_params/"))
    assert y.keys() == z.keys() == x.keys()
    for name in x:
        np.testing.assert_allclose(x[name], (y[name] - 0.1 * z[name]) / 0.9, atol=1e-5)
    assert max(np.abs(x[name] - y[name]).max() for name in x) > 1e-3

    metric = "eval/files/loss"
    rows = read_jsonl(os.path.join(run, "metrics.jsonl"))
    (during,) = [row[metric] for row in rows if row["step"] == 12 and metric in row]
    losses = {}
    for params in ("auto", "raw", "ema"):
        flags = (f"--checkpoint={run}", f"--params={params}", f"--json={tmp_path}/{params}.json")
        assert command("evaluate loss", "--trust_config", *flags) == 0, capsys.readouterr().err
        losses[params] = json.loads((tmp_path / f"{params}.json").read_text())["tasks"]["files"][
            "loss"
        ]
    assert losses["auto"] == losses["ema"] == pytest.approx(during, abs=1e-5)
    assert abs(losses["raw"] - losses["auto"]) > 1e-3

    assert convert.main([f"--from={run}", f"--to_hf={tmp_path}/hf"]) == 0
    _, values = load.load(tmp_path / "hf")
    leaves = jax.tree_util.tree_leaves_with_path(values)
    exported = {"/".join(key.key for key in path): leaf for path, leaf in leaves}
    assert exported.keys() == x.keys()
    for name, leaf in exported.items():
        np.testing.assert_array_equal(leaf, x[name])
    assert "auto" in load_run.PARAMS


def test_the_mean_of_the_last_checkpoints_follows_their_period():
    names = ("models/tiny", "data/bytes", "runs/pretrain", "methods/averaging/recent_mean")
    bindings = ("MODEL_DIR='x'", "MIXTURE_OR_TASK_NAME='english'", "TRAIN_STEPS=1", "BATCH_SIZE=8")
    config = gin_config.load(
        [f"t5x_configs/{name}.gin" for name in names],
        [*bindings, "CHECKPOINT_PERIOD=7", "MEAN_WINDOW=2", "OPTIMIZER=@optimizers.lion"],
        entry="espalier.launch.train:train",
    )
    recipe = config.arguments()["recipe"]
    state = recipe.program(devices=jax.devices()[:1]).abstract_state.opt_state
    assert isinstance(state, recent_mean.RecentMean) and recipe.averaged is not None
    assert config.value("recent_mean.recent_mean.every") == 7
    assert len(state.states) == config.value("recent_mean.recent_mean.window") == 2
    assert config.value("recent_mean.recent_mean.optimizer").__name__ == "lion"
