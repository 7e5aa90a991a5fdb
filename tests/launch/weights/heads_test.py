"""Runs of models with a further head: what leaves them is the part for inference, as if it were a run of its own."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.config import model_file
from espalier.launch.convert import __main__ as convert
from espalier.launch.load import load_run
from espalier.launch.merge import __main__ as merge
from espalier.model import axes
from espalier.model.hf import registry
from espalier.model.transforms import layer_stack
from espalier.trainers import initialise
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.restore_params import CheckpointMismatchError, restore_params
from tests.launch.merge import folders

GOLDEN = pathlib.Path(__file__).parents[2] / "model" / "hf" / "goldens" / "parity" / "cohere_1.npz"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A language model 'lm', an actor-critic 'ppo' around equal parameters, and a reward model 'rm'."""
    root = tmp_path_factory.mktemp("runs")
    with np.load(GOLDEN) as case:
        config = json.loads(str(case["config"]))
        tensors = {k.partition("/")[2]: case[k] for k in case.files if k.startswith("tensor/")}
    family = registry.family_of_config(config)
    names = family.match(family.model(config), {k: x.shape for k, x in tensors.items()})
    folders.write(
        root / "hf", {k: tensors[names[k]] for k in family.shapes(family.model(config))}, config
    )
    assert convert.main([f"--from_hf={root}/hf", f"--to={root}/lm"]) == 0
    model = load_run.config_of(str(root / "lm")).model
    params = restore_params(root / "lm", abstract(model))
    head = jnp.ones((model.config.embed_dim, 1))
    with_head(
        root,
        "ppo",
        "actor_critic.ActorCritic",
        {"backbone": params, "value_head": {"kernel": head}},
    )
    with_head(
        root,
        "rm",
        "reward_model.RewardModel",
        {"backbone": params, "reward_head": {"kernel": head}},
    )
    return root


def abstract(model):
    boxed = initialise.abstract_variables(model)["params"]
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=axes.is_boxed)


def with_head(root, name, made, params):
    """Writes a run whose model, a `made`, has the model of the run 'lm' as its backbone."""
    folder = root / name
    shutil.copytree(root / "lm", folder, ignore=shutil.ignore_patterns("checkpoints"))
    record = json.loads((folder / model_file.NAME).read_text())
    record["settings"][f"{made}.backbone"] = record["macros"]["MODEL"]
    record["macros"]["MODEL"] = {"call": made}
    (folder / model_file.NAME).write_text(json.dumps(record))
    (folder / "config.gin").write_text(model_file.read(folder / model_file.NAME).gin())
    meta = dict(step_dir.read_meta(root / "lm"))
    part = {"inference_part": "backbone"} if "value_head" in params else {}
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(0, {"params": params}, meta={**meta, **part})


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_export_is_that_of_the_language_model(runs, tmp_path):
    for name in ("lm", "ppo"):
        assert convert.main([f"--from={runs}/{name}", f"--to_hf={tmp_path}/{name}"]) == 0
    same(folders.read(tmp_path / "ppo"), folders.read(tmp_path / "lm"))
    ours, theirs = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("ppo", "lm"))
    assert ours == theirs


def test_a_reward_model_is_not_exported_and_says_what_it_is(runs, tmp_path, capsys):
    assert convert.main([f"--from={runs}/rm", f"--to_hf={tmp_path}/rm"]) == 2
    assert "language models, and this is a RewardModel" in capsys.readouterr().err
    assert not (tmp_path / "rm").exists()


def test_merges_are_those_of_the_language_model(runs, tmp_path):
    """Its own model twice would be refused, so one is multiplied."""
    config = tmp_path / "merge.yml"
    lm, model = runs / "lm", load_run.config_of(str(runs / "lm")).model
    entries = [
        {"model": f"{runs}/{x}", "parameters": {"weight": w}} for x, w in (("ppo", 3), ("lm", 1))
    ]
    config.write_text(json.dumps({"merge_method": "linear", "models": entries}))
    assert merge.main([f"--config={config}", f"--out={tmp_path}/out"]) == 0
    assert load_run.config_of(str(tmp_path / "out")).model.config == model.config
    merged = restore_params(tmp_path / "out", abstract(model))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        merged,
        restore_params(lm, abstract(model)),
    )


def test_a_mixture_has_experts_of_the_language_model(runs, tmp_path, command):
    for name in ("ppo", "lm"):
        flags = [
            "--method=btx",
            "--experts",
            f"{runs}/{name}",
            "--copies=2",
            f"--to={tmp_path}/{name}",
        ]
        assert command("upcycle", *flags) == 0
    found, expected = (load_run.config_of(str(tmp_path / name)).model for name in ("ppo", "lm"))
    assert found.layer_settings() == expected.layer_settings()
    same(
        restore_params(tmp_path / "ppo", abstract(found)),
        restore_params(tmp_path / "lm", abstract(expected)),
    )


def test_a_run_starts_from_the_part_for_inference(runs, tmp_path):
    model = load_run.config_of(str(runs / "lm")).model
    expected = restore_params(runs / "lm", abstract(model))
    same(restore_params(runs / "ppo", abstract(model)), expected)
    # As ppo.gin reads a language model or another actor-critic, with a new critic.
    whole = abstract(load_run.config_of(str(runs / "ppo")).model)
    whole["value_head"]["kernel"] = jnp.zeros(whole["value_head"]["kernel"].shape)
    assignment = [("value_head/.*", None), ("backbone/(.*)", r"\1")]
    for name in ("lm", "ppo"):
        found = restore_params(runs / name, whole, assignment=assignment)
        same(found["backbone"], expected)
        assert not found["value_head"]["kernel"].any()
    # And the whole of it, with its critic, in another layout.
    unrolled = layer_stack.unrolled(load_run.config_of(str(runs / "ppo")).model.backbone)
    found = restore_params(runs / "ppo", {**whole, "backbone": abstract(unrolled)})
    assert found["value_head"]["kernel"].all()
    same(found["backbone"], layer_stack.unroll(expected, model.config))
    # Without the fact, as in checkpoints from before it was recorded, the error names the right parameter.
    copy = tmp_path / "older"
    with_head_without_fact(runs, copy)
    with pytest.raises(CheckpointMismatchError, match="did you mean backbone/final_norm/scale"):
        restore_params(copy, {"final_norm": abstract(model)["final_norm"]})


def with_head_without_fact(runs, folder):
    whole = abstract(load_run.config_of(str(runs / "ppo")).model)
    params = restore_params(runs / "ppo", whole)
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(0, {"params": params}, meta={})
