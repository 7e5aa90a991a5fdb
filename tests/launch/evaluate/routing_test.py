"""Routing and cosines of runs, against numpy on the same rows and weights."""

import argparse
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.data.tokenizers import vocabularies
from espalier.launch import cli
from espalier.launch.evaluate import routing
from espalier.launch.load import load_run
from espalier.model.layer_groups import Group
from espalier.model.nexus.domain_router import expert_vectors
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.checkpoints.checkpoint import Checkpointer

BLOCK = "params/layers/block_0"


def test_routing_is_that_of_held_out_tokens(trained_run, tmp_path, command, capsys):
    mixture = tmp_path / "bam"
    made = ("--method=bam", "--router_std=0.03", "--trust_config", f"--to={mixture}")
    experts = [f"{name}={trained_run.path}" for name in ("seed", "code")]
    assert command("upcycle", *made, "--experts", *experts) == 0
    files = {name: tmp_path / name for name in ("r.json", "r.png")}
    flags = (f"--json={files['r.json']}", f"--figure={files['r.png']}")
    assert (
        command(
            "evaluate routing",
            f"--checkpoint={mixture}",
            "--trust_config",
            "--tasks",
            "files",
            *flags,
        )
        == 0
    )
    found = json.loads(files["r.json"].read_text())
    shown = capsys.readouterr().out
    # With the data of another configuration, the mixture's own is neither read nor needed.
    data = (
        *("--gin_file=t5x_configs/data/files_base.gin", "--gin.MIXTURE_OR_TASK_NAME='files'"),
        f"--gin.FILES='{trained_run.path}/train.jsonl'",
        f"--gin.VALIDATION_FILES='{trained_run.path}/held_out.jsonl'",
        f"--gin.stream.make_eval_stream.cache_dir='{tmp_path}/cache'",
        *("--gin.TASK_FEATURE_LENGTHS={'targets': 48}", "--gin.BATCH_SIZE=8"),
        f"--json={tmp_path / 'again.json'}",
    )
    assert command("evaluate routing", f"--checkpoint={mixture}", "--tasks", "files", *data) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == found
    assert "warning" not in capsys.readouterr().err
    bare = tmp_path / "bare"  # its config.gin has a model, and no data
    bare_of = (made[0], made[1], f"--to={bare}")
    assert command("upcycle", *bare_of, "--experts", *experts) == 0
    given = (f"--checkpoint={bare}", "--trust_config", "--tasks", "files")
    assert command("evaluate routing", *given) == 2
    assert "--gin_file=t5x_configs/data/files_base.gin with FILES" in capsys.readouterr().err
    assert command("evaluate routing", *given, *data) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == found
    assert "warning" not in capsys.readouterr().err
    other = tmp_path / "other.gin"
    other.write_text(
        "from __gin__ import dynamic_registration\nfrom espalier.data.tokenizers import vocabularies\n"
        "VOCABULARY = @vocabularies.byte()\nvocabularies.byte.extra_ids = 5\n"
    )
    given = (f"--checkpoint={mixture}", f"--gin_file={other}", "--tasks", "files")
    assert command("evaluate routing", *given, *data) == 2
    assert "has another vocabulary than the checkpoint" in capsys.readouterr().err
    assert files["r.png"].read_bytes()[1:4] == b"PNG"
    assert "router of attention, layer 0" in shown and " code\n" in shown and "files" in shown
    assert shown.count("largest load, all tasks in equal parts: ") == 2  # two routers

    # The first layer's attention router reads normed embeddings of what the model is fed.
    step = step_dir.resolve(mixture)

    def stored(path):
        return StoredArray(step, path).read().astype(np.float64)

    lines = pathlib.Path(trained_run.path, "held_out.jsonl").read_text().splitlines()
    texts = [vocabularies.byte().encode(json.loads(line)["text"]) for line in lines]
    one, two, three = (np.array([0, *text]) for text in texts)

    def probabilities(inputs):
        x = stored("params/token_embed/embedding")[inputs]
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * stored(f"{BLOCK}/norm/scale")[0]
        logits = x @ stored(f"{BLOCK}/attention/router/kernel")[0]
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        return probs / probs.sum(-1, keepdims=True)

    inputs = np.concatenate([one, two, three])
    probs = probabilities(inputs)
    assert found["tokens"] == {"files": len(inputs)} and found["experts"] == ["seed", "code"]
    np.testing.assert_allclose(found["domains"]["files"]["attention"][0], probs.mean(0), atol=2e-5)
    chosen = np.bincount(probs.argmax(-1), minlength=2) / len(inputs)
    np.testing.assert_allclose(found["chosen"]["files"]["attention"][0], chosen, atol=2e-5)
    gates = found["gates"]["files"]
    assert gates["attention"][0] == pytest.approx(probs.max(-1).mean(), abs=2e-5)
    assert len(gates["mlp"]) == len(found["chosen"]["files"]["mlp"])
    assert np.sum(found["domains"]["files"]["mlp"]) == pytest.approx(1, abs=1e-4)
    # One row of a batch of 8: the short texts are packed into one, and the long one is another.
    first = routing.routing(str(mixture), tasks=["files"], rows=1, trust_config=True)
    row = {len(row): row for row in (np.concatenate([one, two]), three)}[first["tokens"]["files"]]
    mean = probabilities(row).mean(0)
    np.testing.assert_allclose(first["domains"]["files"]["attention"][0], mean, atol=2e-5)


def test_one_process_of_several_prints_and_writes(tmp_path, monkeypatch, capsys):
    shares = {"mlp": [[0.25, 0.75]]}
    measured = {"domains": {"a": shares}, "chosen": {"a": shares}, "experts": []}
    monkeypatch.setattr(routing, "_measured", lambda *_, **__: measured)
    parser = argparse.ArgumentParser()
    routing._add_flags(parser)
    words = ["--checkpoint=x", f"--json={tmp_path}/r.json", f"--figure={tmp_path}/r.png"]
    start = cli.Start(parser.parse_args(words), types.SimpleNamespace(arguments=dict), words)
    for process, files in ((1, 0), (0, 2)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        routing._run(start)
        assert len([*tmp_path.iterdir()]) == files
        assert ("router of mlp" in capsys.readouterr().out) == bool(files)


def test_a_dense_run_is_refused(trained_run):
    with pytest.raises(load_run.LoadError, match="has no router"):
        routing.routing(str(trained_run.path), rows=1, trust_config=True)
    with pytest.raises(load_run.LoadError, match="no projection router"):
        routing.structure(str(trained_run.path))
    with pytest.raises(load_run.LoadError, match="--rows=0 must be at least 1"):
        routing.routing(str(trained_run.path), rows=0)


def test_structure_is_of_domains_and_of_what_each_layer_projects(tmp_path):
    rng = np.random.default_rng(0)
    layers, experts, dim, width = 2, 3, 5, 4
    domains = rng.normal(size=(experts, dim))
    domains[2] = -2 * domains[1]
    shapes = {"gate": (dim, width), "up": (dim, width), "down": (width, width)}
    router = {name: {"kernel": rng.normal(size=(layers, *s))} for name, s in shapes.items()}
    tree = {"domains": np.broadcast_to(domains, (layers, experts, dim)), **router}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    params = {"layers": {"block_0": {"mlp": {"router": params}}}}
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params}, meta={"upcycled": {"experts": ["x", "y", "z"]}})
    found = routing.structure(str(tmp_path), names=["a", "b", "c"])
    assert found["domains"] == ["a", "b", "c"]
    assert routing.structure(str(tmp_path))["domains"] == ["x", "y", "z"]
    assert found["vectors"][1][2] == pytest.approx(-1, abs=1e-5)
    assert np.diag(found["vectors"]) == pytest.approx(np.ones(3), abs=1e-5)
    for layer in range(layers):
        e = expert_vectors({k: {"kernel": v["kernel"][layer]} for k, v in router.items()}, domains)
        e /= np.linalg.norm(e, axis=-1, keepdims=True)
        np.testing.assert_allclose(found["projected"][str(layer)], e @ e.T, atol=2e-5)
    with pytest.raises(load_run.LoadError, match="has 3 experts; `names` has 2 names"):
        routing.structure(str(tmp_path), names=["a", "b"])


def test_routers_of_alternating_layers_stand_in_the_models_order():
    """Two blocks a period, stacked: layers 0 and 2 lie in one array, 1 and 3 in the other."""

    class Config:
        scan_layers = True
        layer_groups = (Group(0, 2, 2),)

    stacks = {
        f"block_{b}": {"mlp": {"router_probs": (np.array([[b, 10.0], [b + 2.0, 10.0]]),)}}
        for b in (0, 1)
    }
    sums = [routing._sown(Config, {"layers": stacks}, layer, "mlp") for layer in range(4)]
    shares = routing._shares({"mlp": sums}, 10.0)
    assert [layer[0] for layer in shares["mlp"]] == [0.0, 0.1, 0.2, 0.3]


def test_the_table_has_the_loads_of_each_layer():
    layers = [[0.5, 0.5], [0.03, 0.97]]
    tables = {task: {"mlp": layers} for task in ("a", "b")}
    shown = routing.table({"domains": tables, "chosen": tables, "experts": ["seed", "code"]})
    loads = [line for line in shown.splitlines() if line.startswith("largest load")]
    assert [line[-5:] for line in loads] == ["0.500", "0.970"]


def test_the_figure_has_a_matrix_for_each_router_and_layer():
    two = [[0.5, 0.5], [0.2, 0.8]]
    domains = {task: {"mlp": two, "attention": two} for task in ("a", "b")}
    drawn = routing.figure(domains, ["seed", "code"])
    titles = [axes.get_title() for axes in drawn.axes]
    assert titles[:2] == ["router of mlp, layer 0", "router of mlp, layer 1"]
    assert len(titles) == 4 and titles[2].startswith("router of attention")  # as in the table
    assert drawn.axes[0].get_xlabel() == "expert" and "task" in drawn.axes[0].get_ylabel()
    assert drawn.get_suptitle() == "share of first choices"
    labels = [text.get_text() for text in drawn.axes[0].get_xticklabels()]
    assert labels == ["seed", "code"]
