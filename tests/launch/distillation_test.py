"""Distillation from the command line: teachers of other architectures, wrong ones, and a run that is cut short."""

import pathlib

import numpy as np
import pytest
from etils import epath

from espalier.launch.run import model_record
from espalier.trainers import signals
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.telemetry.metric_writers import read_jsonl

METHOD = "t5x_configs/methods/distillation/distillation.gin"
GPT2 = """
from __gin__ import dynamic_registration
from espalier.model import attention
from espalier.model import config
from espalier.model import embed
from espalier.model import mlp
from espalier.model import transformer
transformer.Transformer.position_embed = @embed.Positions
embed.Positions.num_positions = 64
transformer.Block.layout = 'sequential'
transformer.Block.mlp = @mlp.Mlp
mlp.Mlp.use_bias = True
attention.Attention.rope = None
config.TransformerConfig.num_layers = 2
"""
SMALL = (
    "config.TransformerConfig.embed_dim=16",
    "config.TransformerConfig.num_heads=2",
    "config.TransformerConfig.num_kv_heads=1",
    "config.TransformerConfig.mlp_dim=24",
    "config.TransformerConfig.scan_layers=False",
)
ONE_LAYER = (*SMALL, "config.TransformerConfig.num_layers=1")


@pytest.fixture(scope="module")
def run(train):
    """Trains on the project's own text; returns what `train` does."""

    def start(path, *bindings, files=(), steps=2, status=0):
        given = (
            f"MODEL_DIR={str(path)!r}",
            f"DIRECTORY={train.cache + '/text'!r}",
            f"TRAIN_STEPS={steps}",
            "train.train.log_period=1",
            *bindings,
        )
        result = train(
            f"--gin_file={train.programs}/local_text.gin",
            *(f"--gin_file={file}" for file in files),
            *(f"--gin.{binding}" for binding in given),
        )
        assert result.status == status, result.err
        return result

    return start


@pytest.fixture(scope="module")
def gpt2(run, tmp_path_factory):
    """A teacher of another architecture than the student's."""
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "gpt2.gin").write_text(GPT2)
    run(folder / "run", *SMALL, files=[folder / "gpt2.gin"])
    return folder / "run"


@pytest.fixture(scope="module")
def factored_experts(run, tmp_path_factory):
    """A teacher whose MLPs are mixtures of experts, in factors as all its matrices."""
    path = tmp_path_factory.mktemp("factored_experts")
    methods = ["bam/btx", "low_rank/low_rank"]
    files = [f"t5x_configs/methods/{name}.gin" for name in methods]
    run(path, *ONE_LAYER, "EXPERTS=2", "RANK=0.25", files=files)
    return path


def student(path, teacher, *bindings, run, **how):
    return run(path, *ONE_LAYER, f"TEACHER={str(teacher)!r}", *bindings, files=[METHOD], **how)


def rows(path):
    timed = ("time", "_per_second")
    return [
        {name: value for name, value in row.items() if not any(t in name for t in timed)}
        for row in read_jsonl(f"{path}/metrics.jsonl")
    ]


def digests(path, step):
    return step_dir.read_manifest(epath.Path(path) / "checkpoints" / str(step)).arrays


@pytest.mark.parametrize("name", ["gpt2", "factored_experts"])
def test_a_teacher_of_any_architecture_is_given_by_its_run_alone(run, request, tmp_path, name):
    teacher = request.getfixturevalue(name)
    student(tmp_path, teacher, "DIVERGENCE=@objective.reverse_kl", run=run)
    trained = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    for row in trained:
        expected = 0.9 * row["divergence"] + 0.1 * row["loss"]
        np.testing.assert_allclose(row["distillation_loss"], expected, rtol=1e-5)
    assert "teacher_ids" not in digests(tmp_path, 2)
    assert not any("block_1" in name or "moe" in name for name in digests(tmp_path, 2))
    assert str(teacher / "checkpoints" / "2") in (tmp_path / "teacher.json").read_text()


def test_a_run_that_is_cut_short_ends_as_one_that_is_not(
    run, gpt2, factored_experts, tmp_path, monkeypatch
):
    student(tmp_path / "whole", gpt2, run=run, steps=4)
    monkeypatch.setattr(signals.StopRequest, "reached", lambda self, step: step == 2)
    student(tmp_path / "cut", gpt2, run=run, steps=4, status=75)
    monkeypatch.undo()
    student(tmp_path / "cut", gpt2, run=run, steps=4)
    assert digests(tmp_path / "cut", 4) == digests(tmp_path / "whole", 4)
    assert rows(tmp_path / "cut")[-1] == rows(tmp_path / "whole")[-1]
    result = student(tmp_path / "cut", factored_experts, run=run, steps=4, status=2)
    assert "TEACHER = " in result.err and "but this run began with" in result.err


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("/no/such/run", "TEACHER = /no/such/run is not a run with checkpoints"),
        ("t5x_configs", "TEACHER = t5x_configs is not a run with checkpoints"),
        (None, "'TEACHER' is required"),
    ],
)
def test_what_is_no_run_is_refused_before_data(run, train, tmp_path, teacher, message):
    folder = tmp_path / "text"
    bindings = () if teacher is None else (f"TEACHER={teacher!r}",)
    result = run(
        tmp_path / "run", f"DIRECTORY={str(folder)!r}", *bindings, files=[METHOD], status=2
    )
    assert message in result.err
    assert not folder.exists()


def test_a_teacher_of_another_vocabulary_is_refused_before_the_first_step(
    run, trained_run, tmp_path
):
    """Of the same size: its ids mean other texts."""
    result = student(tmp_path, trained_run.path, run=run, status=2)
    assert f"TEACHER: {trained_run.path}/checkpoints/3 was trained with another vocabulary" in (
        result.err
    )
    assert not pathlib.Path(tmp_path, "teacher.json").exists()
    assert not pathlib.Path(tmp_path, "metrics.jsonl").exists()


def test_a_teacher_whose_configuration_is_of_another_model_is_refused_before_data(
    run, gpt2, tmp_path
):
    other = tmp_path / "other"
    other.mkdir()
    (other / "checkpoints").symlink_to(gpt2 / "checkpoints")
    text = (gpt2 / "config.gin").read_text()
    (other / "config.gin").write_text(text + "\nconfig.TransformerConfig.mlp_dim = 32\n")
    model_record.write(other)
    folder = tmp_path / "text"
    result = student(tmp_path / "run", other, f"DIRECTORY={str(folder)!r}", run=run, status=2)
    assert "is of another model: layers/block_0/mlp/" in result.err
    assert f"TEACHER: {other}/checkpoints/2" in result.err
    assert not folder.exists()


def test_stored_predictions_train_as_the_live_teacher_and_are_computed_once(
    run, gpt2, tmp_path, monkeypatch
):
    """All 384 tokens of the table are stored."""

    def stored(name):
        return run(
            tmp_path / name,
            *ONE_LAYER,
            f"TEACHER={str(gpt2)!r}",
            f"TEACHER_STORE={str(tmp_path / 'store')!r}",
            "TEACHER_TOP_K=384",
            "TEMPERATURE=2.0",
            "TASK_FEATURE_LENGTHS={'targets': 64}",
            "MESH=None",
            "EVAL_STEPS=2",
            "EVAL_PERIOD=2",
            "train.train.eval_tasks=['licence']",
            "teacher.make_stream.stream=@local_text.open_stream",
            "teacher.make_eval_stream.stream=@local_text.open_split",
            files=[METHOD.replace("distillation.gin", "distillation_stored.gin")],
        )

    stored("first")
    live = ("TEMPERATURE=2.0", "EVAL_PERIOD=2", "train.train.eval_tasks=['licence']")
    student(tmp_path / "live", gpt2, *live, run=run)
    for ours, theirs in zip(rows(tmp_path / "first"), rows(tmp_path / "live"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "divergence", "grad_norm", "eval/licence/divergence"):
            if name in ours:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4)

    def computes(*_):
        raise AssertionError("predictions are computed again")

    monkeypatch.setattr("espalier.launch.distillation.teacher.frozen_forward", computes)
    stored("second")
    assert rows(tmp_path / "second") == rows(tmp_path / "first")
