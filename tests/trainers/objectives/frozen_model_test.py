"""What is checked of a reference or teacher before data are read, and which of its steps a run uses."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.rows import INPUTS_AND_TARGETS, TOKENS
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.objectives.frozen_model import FrozenCheckpoint, FrozenModel
from espalier.trainers.train_state import TrainState

PARAMS = {"block": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Small(FrozenModel):
    """A model that is no more than its parameters and its rows."""

    def abstract(self, mesh, rules):
        del mesh, rules
        return jax.eval_shape(lambda: self.model.params)


def save(run, step, params=PARAMS):
    state = TrainState(step=jnp.asarray(step), params=params, opt_state={})
    with Checkpointer(run / "checkpoints") as checkpointer:
        checkpointer.save(
            step, state, meta={"vocabulary": "our words", "start_token": None, "seed": 0}
        )


@pytest.fixture
def teacher(tmp_path):
    save(tmp_path / "teacher", 5)
    return tmp_path / "teacher"


def model(path, tmp_path, params=PARAMS, row=TOKENS, **settings):
    checkpoint = FrozenCheckpoint(
        macro="TEACHER", path=str(path), model_dir=str(tmp_path), **settings
    )
    return Small(model=types.SimpleNamespace(params=params, row=row), checkpoint=checkpoint)


def test_what_fits_is_checked_without_a_trace_and_read(teacher, tmp_path):
    fits = model(teacher, tmp_path)
    fits.check(None, None, {})
    fits.check(None, None, {"vocabulary": "our words", "start_token": None, "add_bos": True})
    assert not (tmp_path / "teacher.json").exists()
    jax.tree.map(np.testing.assert_array_equal, fits.read(None, None), PARAMS)
    recorded = json.loads((tmp_path / "teacher.json").read_text())
    assert recorded["teacher"] == str(teacher) and recorded["step"].endswith("checkpoints/5")


def test_a_run_goes_on_with_the_step_of_its_first_start(teacher, tmp_path):
    first = model(teacher, tmp_path).checkpoint.resolve()
    save(teacher, 9, jax.tree.map(lambda x: x + 1, PARAMS))
    assert model(teacher, tmp_path).checkpoint.resolve() == first
    (tmp_path / "other").mkdir()
    assert model(teacher, tmp_path / "other").checkpoint.resolve().step.endswith("checkpoints/9")
    with pytest.raises(ValueError, match="TEACHER = .*elsewhere .* but this run began with"):
        model(tmp_path / "elsewhere", tmp_path).check(None, None, {})


def test_other_parameters_in_the_recorded_step_are_refused(teacher, tmp_path):
    model(teacher, tmp_path).checkpoint.resolve()
    shutil.rmtree(teacher)
    save(teacher, 5, jax.tree.map(lambda x: x + 1, PARAMS))
    with pytest.raises(ValueError, match="TEACHER: .*/5 has other parameters than when this run"):
        model(teacher, tmp_path).check(None, None, {})


def test_absent_directories_and_those_of_no_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="TEACHER = .*absent cannot be read: .*no such directory"):
        model(tmp_path / "absent", tmp_path).check(None, None, {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="TEACHER = .*empty cannot be read: .*holds no checkpoint"):
        model(tmp_path / "empty", tmp_path).check(None, None, {})
    with pytest.raises(ValueError, match="TEACHER is None"):
        FrozenCheckpoint(macro="TEACHER", path=None, model_dir=str(tmp_path))


@pytest.mark.parametrize(
    "params, difference",
    [
        (
            {"block": {"kernel": jnp.ones((2, 4)), "bias": jnp.zeros(3)}},
            r"block/kernel: the checkpoint has float32\[2, 3\], the model float32\[2, 4\]",
        ),
        (
            {"block": {"kernel": jnp.ones((2, 3))}},
            r"block/bias: the checkpoint has float32\[3\], the model none",
        ),
        (
            {**PARAMS, "head": jnp.ones(())},
            r"head: the checkpoint has none, the model float32\[\]",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(teacher, tmp_path, params, difference):
    with pytest.raises(ValueError, match=f"TEACHER: .*another model: {difference}.*TEACHER_MODEL"):
        model(teacher, tmp_path, params).check(None, None, {})


def test_another_vocabulary_of_the_same_size_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="TEACHER: .*another vocabulary .*use the vocabulary"):
        model(teacher, tmp_path).check(None, None, {"vocabulary": "other words"})


def test_other_beginnings_of_documents_are_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="begin with start_token = None, .*DOCUMENT_START = None"):
        model(teacher, tmp_path).check(None, None, {"vocabulary": "our words", "start_token": 0})
    # Older imports of encoder-decoders record no start token.
    model(teacher, tmp_path, row=INPUTS_AND_TARGETS).check(None, None, {"start_token": 0})


def test_a_missing_moving_average_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="TEACHER: .*holds no moving average"):
        model(teacher, tmp_path, use_ema=True).check(None, None, {})
