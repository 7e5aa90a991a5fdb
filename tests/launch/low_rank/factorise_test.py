"""Trained models decomposed into factors and put together again: values, ranks, errors, every command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.convert import __main__ as convert
from espalier.launch.low_rank.factorise import Decomposition, FactoriseFlags
from espalier.model.hf import load
from espalier.model.low_rank import factors
from espalier.model.low_rank.decompose import Decompose
from espalier.model.transforms import base
from espalier.model.transforms.base import Source, TransformError
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.low_rank.input_moments import input_moments

TEXT = json.dumps({"text": "import os, sys\n" * 8}) + "\n"


@pytest.fixture
def factorise(trained_run, command, tmp_path):
    """Decomposes the tiny run's averaged parameters; returns the directory made, or the status."""

    def run(*flags, checkpoint=trained_run.path, name="made"):
        target = tmp_path / name
        status = command(
            "upcycle factorise", f"--checkpoint={checkpoint}", f"--to={target}", *flags
        )
        if status:
            assert not target.exists()
        return status or target

    return run


@pytest.fixture
def use(command, tmp_path):
    """Rows that a command makes of the test's text."""

    def run(name, checkpoint, *flags):
        inputs, output = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
        inputs.write_text(TEXT)
        output.unlink(missing_ok=True)
        files = (f"--inputs={inputs}", f"--output={output}", f"--checkpoint={checkpoint}")
        assert command(name, *files, *flags) == 0
        return json.loads(output.read_text())

    return run


def stored(run, name):
    return StoredArray(step_dir.resolve(run), f"params/{name}").read()


QUERY = "layers/block_0/attention/query"


def test_at_full_rank_scores_continuations_and_the_exported_model_are_the_same(
    factorise, use, trained_run, tmp_path
):
    made = factorise("--rank=1.0")
    kernel = trained_run.params["ema"]["layers"]["block_0"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(
        stored(made, f"{QUERY}/u") @ stored(made, f"{QUERY}/v"), kernel, atol=1e-5
    )
    want = use("score", trained_run.path)
    np.testing.assert_allclose(use("score", made)["logprobs"], want["logprobs"], atol=1e-4)
    greedy = ("--max_new_tokens=6",)
    texts = [use("generate", run, *greedy)["tokens"] for run in (made, trained_run.path)]
    assert texts[0] == texts[1]
    policy = (
        "--max_new_tokens=6",
        "--cache_policy=snapkv",
        "--cache=capacity=64",
        "--cache=window=8",
    )
    texts = [use("generate", run, *policy)["tokens"] for run in (made, trained_run.path)]
    assert texts[0] == texts[1]
    dense = factorise("--recompose", checkpoint=made, name="dense")
    np.testing.assert_allclose(use("score", dense)["logprobs"], want["logprobs"], atol=1e-4)
    assert convert.main([f"--from={dense}", f"--to_hf={tmp_path}/hf"]) == 0
    _, values = load.load(tmp_path / "hf")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), values, trained_run.params["ema"]
    )


def test_energy_is_kept_and_no_rank_below_keeps_it(factorise, trained_run, capsys):
    made = factorise("--rank=0.8", "--rank_rule=energy", "--layers=.*/(query|up)", "--params=raw")
    for path, u in ((QUERY, "u"), ("layers/block_0/mlp/up", "u")):
        node = trained_run.params["raw"]["layers"]["block_0"]
        for name in path.split("/")[2:]:
            node = node[name]
        values = np.linalg.svd(np.asarray(node["kernel"], np.float64), compute_uv=False)[0]
        kept = np.cumsum(values**2) / np.sum(values**2)
        rank = stored(made, f"{path}/{u}").shape[-1]
        assert kept[rank - 1] >= 0.8 and (rank == 1 or kept[rank - 2] < 0.8)
        assert f"{1 - kept[rank - 1]:.2%}" in capsys.readouterr().out or path != QUERY
    stored(made, "layers/block_0/attention/key/kernel")


def test_a_calibrated_decomposition_changes_outputs_least(factorise, use, trained_run, tmp_path):
    (tmp_path / "text.jsonl").write_text(TEXT)
    calibrate = (f"--calibrate={tmp_path}/text.jsonl", "--calibrate_length=32")
    want = np.array(use("score", trained_run.path)["logprobs"])
    errors = [
        np.abs(
            np.array(use("score", factorise("--rank=0.5", *flags, name=str(i)))["logprobs"]) - want
        )
        for i, flags in enumerate(((), calibrate))
    ]
    assert errors[1].mean() < 0.8 * errors[0].mean()


def test_input_moments_are_those_of_what_layers_read(trained_run):
    params = trained_run.params["ema"]
    tokens = jax.random.randint(jax.random.key(0), (2, 3, 8), 3, 250)
    found = input_moments(trained_run.model, params, tokens)
    assert {path.rpartition("/")[2] for path in found} == set(
        ["query", "key", "value", "out", "gate", "up", "down"]
    )
    _, seen = trained_run.model.apply(
        {"params": params}, tokens[1], capture_intermediates=lambda m, _: "norm" in (m.name or "")
    )
    ((normed,),) = jax.tree.leaves(
        seen["intermediates"]["layers"], is_leaf=lambda x: isinstance(x, tuple)
    )
    alone = input_moments(trained_run.model, params, tokens[1:])
    rows = np.asarray(normed, np.float64).reshape(-1, normed.shape[-1])
    for path in (QUERY, "layers/block_0/mlp/gate"):  # a parallel block: both read one norm
        np.testing.assert_allclose(alone[path][0], rows.T @ rows, rtol=1e-4, atol=1e-4)
    first = input_moments(trained_run.model, params, tokens[:1])
    np.testing.assert_allclose(found[QUERY], first[QUERY] + alone[QUERY], rtol=1e-5, atol=1e-5)


def test_weighted_factors_lose_what_the_outputs_tail_holds_and_are_balanced():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)) @ np.diag(np.geomspace(1, 0.05, 12)) @ rng.normal(size=(12, 12))
    w = rng.normal(size=(12, 9))
    tail = np.linalg.svd(x @ w, compute_uv=False)
    gram = jnp.asarray(x.T @ x, jnp.float32)
    parts = factors.decomposition(jnp.asarray(w), gram)
    np.testing.assert_allclose(parts[1], tail, rtol=1e-3)
    for rank in (2, 6):
        u, v = factors.truncated(*parts, rank)
        error = np.square(x @ (w - np.asarray(u, np.float64) @ np.asarray(v, np.float64))).sum()
        assert error == pytest.approx(np.square(tail[rank:]).sum(), rel=1e-3)
        np.testing.assert_allclose(u.T @ u, v @ v.T, atol=1e-4 * np.abs(u.T @ u).max())


@pytest.mark.parametrize("tokens", [0, 3])
def test_inputs_that_span_little_leave_factors_finite_and_exact_at_full_rank(tokens):
    x = np.random.default_rng(0).normal(size=(tokens, 12)) + 50.0
    w = jax.random.normal(jax.random.key(0), (12, 9))
    parts = factors.decomposition(w, jnp.asarray(x.T @ x, jnp.float32))
    u, v = factors.truncated(*parts, 9)
    np.testing.assert_allclose(u @ v, w, atol=2e-3)
    if tokens:  # what the inputs span is kept at the rank of their span
        u, v = factors.truncated(*parts, tokens)
        np.testing.assert_allclose(x @ np.asarray(u @ v), x @ np.asarray(w), rtol=0.02, atol=0.5)


def test_balanced_factors_have_the_same_product():
    u, v = (
        jax.random.normal(jax.random.key(0), (3, 8, 4)),
        jax.random.normal(jax.random.key(1), (3, 4, 6)),
    )
    a, b = factors.balanced(u * 10, v)
    np.testing.assert_allclose(a @ b, 10 * u @ v, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        np.swapaxes(a, -2, -1) @ a, b @ np.swapaxes(b, -2, -1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("energy", "rank"), [(1e-9, 1), (0.64, 1), (0.65, 2), (0.97, 2), (0.98, 3), (1.0, 3)]
)
def test_the_rank_of_an_energy(energy, rank):
    values = np.sqrt([[0.64, 0.33, 0.03, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert factors.rank_for_energy(values, energy) == rank
    assert factors.rank_for_energy(np.zeros((2, 4)), energy) == 1


def test_what_cannot_be_factorised(factorise, trained_run, tmp_path, capsys):
    def error(*flags, **options):
        assert factorise(*flags, **options) == 2
        return capsys.readouterr().err

    assert "Give --rank, such as" in error()
    assert "--recompose does not use --rank" in error("--recompose", "--rank=0.5")
    assert "--calibrate_length=0 must be at least 1" in error(
        "--rank=0.5", "--calibrate=x", "--calibrate_length=0"
    )
    assert "--calibrate_length is only for --calibrate" in error(
        "--rank=0.5", "--calibrate_length=8"
    )
    assert "has no factors" in error("--recompose")
    assert "attention/key: rank=17.0" in error("--rank=17", "--rank_rule=absolute")
    assert "must lie in (0, 1]" in error("--rank=1.5", "--rank_rule=energy")
    assert "No projection matches --layers" in error("--rank=0.5", "--layers=nothing")
    typo = error("--rank=0.5", "--layers=.*/query", "--layers=.*/quary")
    assert (
        "--layers=.*/quary matches no projection: give a pattern of layers/block_0/attention/query"
        in typo
    )
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    assert "fewer than one row of 512" in error("--rank=0.5", f"--calibrate={tmp_path}/short.jsonl")
    made = factorise("--rank=0.5")
    assert "already factorised" in error("--rank=0.5", checkpoint=made, name="twice")
    kernel = jnp.ones((2, 4, 4)).at[1, 0, 0].set(jnp.inf)
    target = {"mlp/up/u": (2, 4, 2), "mlp/up/v": (2, 2, 4)}
    transform = Decompose(Decomposition(FactoriseFlags(checkpoint="", to=""), {}).split)
    recipes = base.plan(transform, [Source("dense", {"mlp/up/kernel": kernel.shape})], target)
    with pytest.raises(
        TransformError, match=r"mlp/up/kernel \(of its stack number 1\) has NaN or inf"
    ):
        base.apply(recipes, lambda name, path: kernel)
