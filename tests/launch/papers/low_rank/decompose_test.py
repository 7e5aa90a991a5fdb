"""A dense run that goes on in factors: what it starts from, its loss, its moments and its clock."""

import jax
import numpy as np
import pytest

from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.telemetry.metric_writers import read_jsonl

METHODS = "t5x_configs/methods/low_rank/"
STEP = 6
QUERY = "layers/block_0/attention/query"
# As in a dense run: what is decayed there is not decayed here.
FULL_RANK = ("RANK=1.0", "FACTOR_DECAY='none'", "optimizers.adamw.weight_decay=0.0")


def run(train, path, *bindings, files=(), status=0):
    given = (
        f"MODEL_DIR={str(path)!r}",
        f"DIRECTORY={train.cache + '/text'!r}",
        "CHECKPOINT_PERIOD=3",
        "train.train.log_period=1",
        "schedules.cosine.total_steps=10",
        "LENGTH=32",
        # Layers in one array, each of which has factors of its own.
        "config.TransformerConfig.num_layers=2",
        "config.TransformerConfig.scan_layers=True",
        *bindings,
    )
    files = (f"{train.programs}/small_text.gin", *(f"{METHODS}{name}.gin" for name in files))
    result = train(*[f"--gin_file={name}" for name in files], *[f"--gin.{x}" for x in given])
    assert result.status == status, result.err
    return result


def decomposed(train, path, parent, *bindings, status=0):
    given = (
        f"INITIAL_CHECKPOINT_PATH={str(parent)!r}",
        "initial.InitialCheckpoint.transform=%INITIAL_TRANSFORM",
        "initial.InitialCheckpoint.scope=%INITIAL_SCOPE",
        "initial.InitialCheckpoint.moments=%INITIAL_MOMENTS",
        "TRAIN_STEPS=9",
        # Rolling back saves the state that a run starts with.
        "anomaly.Anomaly.action='rollback'",
        *bindings,
    )
    return run(train, path, *given, files=("low_rank", "decompose"), status=status)


def array(path, step, name):
    where = step_dir.absolute(path) / "checkpoints" / str(step)
    (found,) = (x for x in step_dir.read_manifest(where).arrays if x.endswith(name))
    return StoredArray(where, found).read()


def rows(path, name):
    return {row["step"]: row[name] for row in read_jsonl(f"{path}/metrics.jsonl") if name in row}


@pytest.fixture(scope="module")
def parent(train, tmp_path_factory):
    path = tmp_path_factory.mktemp("parent")
    run(train, path, "TRAIN_STEPS=9", "optimizers.adamw.weight_decay=0.0")
    return path / "checkpoints" / str(STEP)


def test_at_full_rank_the_loss_goes_on_where_it_was_and_so_do_step_data_and_schedule(
    train, parent, tmp_path
):
    decomposed(train, tmp_path, parent, *FULL_RANK)
    dense, low = rows(parent.parent.parent, "loss"), rows(tmp_path, "loss")
    assert sorted(low) == [7, 8, 9]
    assert low[7] == pytest.approx(dense[7], abs=1e-4)
    rate, before = rows(tmp_path, "learning_rate"), rows(parent.parent.parent, "learning_rate")
    assert [rate[step] / before[step] for step in (7, 8, 9)] == pytest.approx([0.5] * 3)
    u, v = (array(tmp_path, STEP, f"params/{QUERY}/{name}") for name in "uv")
    kernel = array(parent.parent.parent, STEP, f"params/{QUERY}/kernel")
    np.testing.assert_allclose(u @ v, kernel, atol=1e-5)
    np.testing.assert_allclose(np.swapaxes(u, -2, -1) @ u, v @ np.swapaxes(v, -2, -1), atol=1e-5)
    # What is not factorised is as it was, and moments begin anew.
    scale = "params/final_norm/scale"
    np.testing.assert_array_equal(
        array(tmp_path, STEP, scale), array(parent.parent.parent, STEP, scale)
    )
    assert not array(tmp_path, STEP, f"mu/{QUERY}/u").any()


def test_moments_are_carried_by_the_chain_rule(train, parent, tmp_path):
    decomposed(train, tmp_path, parent, "RANK=0.5", "INITIAL_MOMENTS='carry'")
    dense = parent.parent.parent
    u, v = (array(tmp_path, STEP, f"params/{QUERY}/{name}").astype(np.float64) for name in "uv")
    mu, nu = (array(dense, STEP, f"{name}/{QUERY}/kernel") for name in ("mu", "nu"))
    for name, moment, power in (("mu", mu, 1), ("nu", nu, 2)):
        of_u, of_v = (array(tmp_path, STEP, f"{name}/{QUERY}/{factor}") for factor in "uv")
        want_u = np.einsum("lxy,lry->lxr", moment, v**power)
        want_v = np.einsum("lxr,lxy->lry", u**power, moment)
        np.testing.assert_allclose(of_u, want_u, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(of_v, want_v, rtol=1e-4, atol=1e-9)
    norm = "mu/final_norm/scale"
    np.testing.assert_array_equal(array(tmp_path, STEP, norm), array(dense, STEP, norm))
    gradient = jax.grad(lambda pair: (pair[0] @ pair[1] * mu[0]).sum())((u[0], v[0]))
    np.testing.assert_allclose(
        array(tmp_path, STEP, f"mu/{QUERY}/u")[0], gradient[0], rtol=1e-4, atol=1e-8
    )


def test_a_run_of_its_own_schedule_begins_at_step_0(train, parent, tmp_path):
    decomposed(train, tmp_path, parent, "INITIAL_SCOPE='params'", "REWARMUP_STEPS=2")
    assert sorted(rows(tmp_path, "loss")) == list(range(1, 10))
    rate = rows(tmp_path, "learning_rate")
    assert rate[1] == 0.0 and rate[2] > 0


def test_decomposition_that_cannot_be(train, parent, tmp_path):
    def error(*bindings, source=parent):
        result = decomposed(train, tmp_path / "run", source, *bindings, status=2)
        return result.err[result.err.rindex("error: ") :]

    first = tmp_path / "first"
    decomposed(train, first, parent)
    assert "layers/block_0/attention/key of the checkpoint is factorised already" in error(
        "TRAIN_STEPS=20", source=first
    )
    assert "'carry' needs" in error("INITIAL_MOMENTS='carry'", "INITIAL_SCOPE='params'")
    assert "gives a matrix" in error("RANK=1.5")


def test_nan_is_named(tmp_path):
    from espalier.model.low_rank.decompose import Decompose
    from espalier.model.transforms import base
    from espalier.model.transforms.base import Source, TransformError

    kernel = np.ones((3, 4, 4), np.float32)
    kernel[1, 2, 3] = np.nan
    sources = [Source("dense", {"query/kernel": kernel.shape})]
    recipes = base.plan(Decompose(), sources, {"query/u": (3, 4, 2), "query/v": (3, 2, 4)})
    with pytest.raises(TransformError, match=r"query/kernel \(of its stack number 1\) has NaN"):
        base.apply(recipes, lambda name, path: kernel)
    with pytest.raises(TransformError, match="has no factorised layers"):
        base.plan(Decompose(), sources, {"query/kernel": kernel.shape})
