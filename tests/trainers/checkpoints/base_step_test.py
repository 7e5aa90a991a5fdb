"""Steps of adapters without their base model: in both tiers, on any mesh, and with a base that is damaged."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from espalier.trainers.checkpoints import base_step, step_dir
from espalier.trainers.checkpoints.base_step import BaseModelError
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.local_tier import LocalTier

ADAPTER = "adapter_a"


def state_of(step, devices=8):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("a",))
    rng = np.random.default_rng(0)  # the base is the same in every step

    def array(*shape, split=None):
        return jax.device_put(rng.standard_normal(shape, np.float32), NamedSharding(mesh, P(split)))

    base = {"kernel": array(16, 8, split="a"), "scale": array(8)}
    rng = np.random.default_rng(step)
    return {
        "params": {"mlp": {**base, ADAPTER: {"b": array(8)}}},
        "opt_state": {"mlp": {ADAPTER: {"b": array(8)}}},
    }


@pytest.fixture
def base(tmp_path):
    """The step directory of a base model, whose parameters are a moving average."""
    params = state_of(0)["params"]
    del params["mlp"][ADAPTER]
    other = jax.tree.map(lambda x: 2 * x, params)
    with Checkpointer(tmp_path / "base") as checkpointer:
        checkpointer.save(7, {"params": other, "ema_params": params})
    return step_dir.resolve(tmp_path / "base")


def facts(base):
    params = state_of(0)["params"]
    mask = {"mlp": {"kernel": False, "scale": False, ADAPTER: {"b": True}}}
    return {base_step.META: base_step.frozen(base, params, mask, base_step.added({}), use_ema=True)}


def test_both_tiers_read_the_base_from_its_own_step(base, tmp_path):
    def opened():
        local = LocalTier(directory=str(tmp_path / "host"), period=1)
        return Checkpointer(tmp_path / "run", local=local)

    with opened() as checkpointer:
        for step, occasion in ((1, "period"), (2, "local")):
            checkpointer.save(step, state_of(step), meta=facts(base), occasion=occasion)
    assert set(step_dir.read_manifest(tmp_path / "run" / "1").arrays) == {
        f"params/mlp/{ADAPTER}/b",
        f"opt_state/mlp/{ADAPTER}/b",
    }
    for step in (2, 2, 1):
        with opened() as checkpointer:
            restored = checkpointer.restore_latest(state_of(0, devices=2))
        assert restored.step == step
        jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(step))
        if not (tmp_path / "moved").exists():
            shutil.move(tmp_path / "base", tmp_path / "moved")
            (tmp_path / "run" / base_step.FILE).write_text(
                json.dumps({"path": f"{tmp_path}/moved"})
            )
            continue
        shutil.rmtree(tmp_path / "host", ignore_errors=True)  # next, the shared step is read


def renamed(tree, name):
    """Returns a tree with another name in the place of ADAPTER."""
    if not isinstance(tree, dict):
        return tree
    return {name if k == ADAPTER else k: renamed(child, name) for k, child in tree.items()}


def test_parameters_beside_a_base_have_the_names_that_the_record_says(base, tmp_path):
    """Records of steps without this fact are those of `facts`: their names begin with 'adapter_'."""
    state = renamed(state_of(1), "probe_a")
    group = {base_step.ADDED: "probe_"}
    mask = {"mlp": {"kernel": False, "scale": False, "probe_a": {"b": True}}}
    own = base_step.added(group)
    record = base_step.frozen(base, state["params"], mask, own, use_ema=True)
    assert record == facts(base)[base_step.META]
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, state, meta={base_step.META: record, **group})
        restored = checkpointer.restore_latest(renamed(state_of(0), "probe_a"))
    step = step_dir.resolve(tmp_path / "run")
    manifest = step_dir.read_manifest(step)
    assert set(manifest.arrays) == {"params/mlp/probe_a/b", "opt_state/mlp/probe_a/b"}
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
    whole = base_step.entries(step, manifest, "raw")
    assert set(whole) == {"mlp/probe_a/b", "mlp/kernel", "mlp/scale"}
    part = base_step.base_of(step, "raw")
    assert base_step.digest(part.entries) == record["digest"]
    assert set(base_step.present(state["params"], part.entries, own)["mlp"]) == {"kernel", "scale"}
    for bad in ("", 1, None):
        with pytest.raises(ValueError, match="has meta.added = .* in the place of the beginning"):
            step_dir.check_record({"step": 1, "meta": {base_step.ADDED: bad}, "metrics": {}})


def test_a_damaged_base_is_named_and_the_adapters_stay(base, tmp_path):
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, state_of(1), meta=facts(base))
    file = next(Path(base).glob("state/**/d/*"))
    file.write_bytes(file.read_bytes()[:-1])
    with (
        Checkpointer(tmp_path / "run") as checkpointer,
        pytest.raises(BaseModelError, match=r"run/1 is without its base model: .*base/7"),
    ):
        checkpointer.restore_latest(state_of(0))
    assert step_dir.resolve(tmp_path / "run") == tmp_path / "run" / "1"


def test_a_run_that_changes_its_base_is_refused(base):
    state, everything = (
        state_of(0)["params"],
        {"kernel": True, "scale": False, ADAPTER: {"b": True}},
    )
    with pytest.raises(BaseModelError, match="mlp/kernel is no adapter, but trained"):
        base_step.frozen(base, state, {"mlp": everything}, base_step.added({}), use_ema=True)
    nothing = {"mlp": {"kernel": False, "scale": False, ADAPTER: {"b": False}}}
    with pytest.raises(BaseModelError, match="is an adapter that is not trained"):
        base_step.frozen(base, state, nothing, base_step.added({}), use_ema=True)
    state["mlp"]["scale"] = state["mlp"]["scale"].astype("bfloat16")
    with pytest.raises(BaseModelError, match=r"mlp/scale is float32\[8\] in .*bfloat16\[8\] here"):
        base_step.frozen(
            base, state, {"mlp": {**everything, "kernel": False}}, base_step.added({}), use_ema=True
        )
