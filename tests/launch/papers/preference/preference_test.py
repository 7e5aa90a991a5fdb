"""Preference runs from gin to metrics: references from the store and live, methods, and other kinds of models."""

import functools
import json
import shutil
import types

import jax
import numpy as np
import pytest

from espalier.data import tasks
from espalier.data.stream.predictions import PredictionStore
from espalier.launch import predictions
from espalier.launch.config import gin_config
from espalier.launch.preference import reference
from espalier.launch.run import resolved
from espalier.model.rows import INPUTS_AND_TARGETS, TOKENS
from espalier.trainers import initialise
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.telemetry.metric_writers import read_jsonl

MODEL = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16}
MODEL |= {"scan_layers": False}
RUN = """
from __gin__ import dynamic_registration
from espalier.data.tokenizers import vocabularies
include 't5x_configs/models/tiny.gin'
include 't5x_configs/data/preferences_base.gin'
include 't5x_configs/runs/preference.gin'
VOCABULARY = @vocabularies.byte()
"""
METHODS = ("dpo_nll", "ipo", "slic", "simpo", "cpo", "orpo", "kto", "wpo")


@pytest.fixture(scope="module")
def flags(unrolled_run, tmp_path_factory):
    """Flags of a tiny run over sums, from the run with one checkpoint; more files and bindings win."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"prompt": f"{a} + {b} = ", "chosen": str(a + b), "rejected": str(a + b + 1 + a % 3)}
        for a in range(8)
        for b in range(5)
    ]
    rows[7:7] = [
        {"prompt": "1 + 1 = ", "chosen": "2", "rejected": "2"},
        {"prompt": "1 + 1 =\u200b ", "chosen": "2", "rejected": "3"},
        {"prompt": "1 + 1 = ", "chosen": "2", "rejected": " "},
        {"prompt": "Please add 1 and 1: ", "chosen": "2", "rejected": "3"},
        {"prompt": "8 + 1 = ", "chosen": "9", "rejected": "10 or thereabouts"},
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.gin").write_text(RUN)

    def make(path, *bindings, methods=()):
        given = (
            f"MODEL_DIR={str(path)!r}",
            f"INITIAL_CHECKPOINT_PATH={unrolled_run.path!r}",
            f"PAIRS={str(folder / 'pairs.jsonl')!r}",
            "PAIRS_VALIDATION_FRACTION=0.3",
            "TASK_FEATURE_LENGTHS={'targets': 32}",
            "BATCH_SIZE=8",
            "TRAIN_STEPS=6",
            "WARMUP_STEPS=1",
            "LEARNING_RATE=3e-3",
            "LOG_PERIOD=1",
            "CHECKPOINT_PERIOD=3",
            "config.TransformerConfig.vocab_size=264",
            *(f"config.TransformerConfig.{name}={size}" for name, size in MODEL.items()),
        )
        files = (
            folder / "run.gin",
            *(f"t5x_configs/methods/{name}.gin" for name in methods),
        )
        return [
            *(f"--gin_file={file}" for file in files),
            *(f"--gin.{binding}" for binding in (*given, *bindings)),
        ]

    return make


@pytest.fixture(scope="module")
def stored(train, flags, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored")
    result = train(*flags(path))
    assert result.status == 0, result.err
    return path


def measured(path):
    """Rows of metrics without times."""
    timed = ("time", "_per_second")
    return [
        {name: value for name, value in row.items() if not any(t in name for t in timed)}
        for row in read_jsonl(f"{path}/metrics.jsonl")
    ]


def test_a_run_begins_at_log_two_and_learns_the_pairs(stored):
    rows = measured(stored)
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert trained[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert trained[-1]["loss"] < 0.69 and trained[-1]["log_ratio/margin"] > 0
    (held_out,) = [row for row in rows if "eval/preferences/pairs" in row]
    assert held_out["eval/preferences/pairs"] > 4 and "eval/preferences/perplexity" not in held_out


def test_who_asks_next_computes_nothing_and_trains_the_same(
    train, flags, stored, tmp_path, monkeypatch
):
    def unasked(*_, **__):
        raise AssertionError("log-probabilities are computed again")

    parts = []
    read = PredictionStore._read
    monkeypatch.setattr(PredictionStore, "_read", lambda *a: (parts.append(a[1]), read(*a)))
    monkeypatch.setattr(reference, "Scorer", unasked)
    result = train(*flags(tmp_path))
    assert result.status == 0
    assert len(parts) == len({*parts}) > 1  # once for training and evaluation
    one = "preferences: 1 identical (first: pairs.jsonl:8), 1 empty_completion (first: pairs.jsonl:10), 4.4%"
    assert f"dropped    {one} of all rows\n" in result.out
    assert "noted      preferences: 1 invisible_characters (first: pairs.jsonl:9)\n" in result.out
    for long in (
        "dropped, whose prompts leave no room (first: pairs.jsonl:11)",
        "cut at their ends (first: pairs.jsonl:12)",
    ):
        assert f"%) {long}" in result.out
    assert measured(tmp_path) == measured(stored)


def test_a_live_reference_trains_the_same(train, flags, stored, tmp_path):
    result = train(*flags(tmp_path, methods=["preference/reference_live"]))
    assert result.status == 0, result.err
    for live, kept in zip(measured(tmp_path), measured(stored), strict=True):
        assert live.keys() == kept.keys()
        for name in ("loss", "log_ratio/margin", "eval/preferences/loss", "grad_norm"):
            if name in kept:
                np.testing.assert_allclose(live[name], kept[name], rtol=1e-4, atol=2e-5)


def test_a_run_that_goes_on_is_the_uninterrupted_one(train, flags, stored, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(stored, path)
    shutil.rmtree(path / "checkpoints" / "6")
    assert train(*flags(path)).status == 0
    assert measured(path) == measured(stored)


def test_a_reference_that_follows_the_policy_is_resumed_where_it_was(
    train, flags, stored, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ("REFERENCE_PERIOD=2", "REFERENCE_MIX=0.6")
    methods = ["preference/tr_dpo"]
    assert train(*flags(whole, *given, methods=methods)).status == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "6")
    assert train(*flags(parts, *given, methods=methods)).status == 0
    assert measured(parts) == measured(whole)
    losses, fixed = (
        [row["loss"] for row in measured(path) if "loss" in row] for path in (whole, stored)
    )
    np.testing.assert_allclose(losses[:2], fixed[:2], rtol=1e-5)
    # After two updates the reference has come nearer, so that the margin is smaller.
    margins = [row["log_ratio/margin"] for row in measured(whole) if "loss" in row]
    others = [row["log_ratio/margin"] for row in measured(stored) if "loss" in row]
    assert all(ours < theirs for ours, theirs in zip(margins[2:], others[2:], strict=True))
    # Its moves are no moves of its policy, which is the default of REFERENCE, nor of a third run.
    state = (f"INITIAL_CHECKPOINT_PATH={str(whole)!r}", "INITIAL_SCOPE='state'", "TRAIN_STEPS=8")
    for other, more in ((whole, ()), (stored, (f"REFERENCE={str(stored)!r}",))):
        refused = train(*flags(tmp_path / "state", *given, *state, *more, methods=methods))
        assert refused.status == 2
        assert f"REFERENCE = {other}/checkpoints/6 is not the model from which" in refused.err
    reference = json.loads((whole / "reference.json").read_text())["reference"]
    state += (f"REFERENCE={reference!r}",)
    assert train(*flags(tmp_path / "state", *given, *state, methods=methods)).status == 0


@pytest.mark.parametrize("methods", [(), ("preference/reference_live",)])
def test_the_reference_of_the_first_start_is_that_of_all(
    train, flags, unrolled_run, tmp_path, methods
):
    start = tmp_path / "start"
    shutil.copytree(unrolled_run.path, start)
    given = flags(tmp_path / "run", f"INITIAL_CHECKPOINT_PATH={str(start)!r}", methods=methods)
    assert train(*given).status == 0
    expected = measured(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    # The reference's run goes on meanwhile.
    with Checkpointer(start / "checkpoints") as checkpointer:
        moved = jax.tree.map(lambda x: x + 1.0, unrolled_run.params["raw"])
        checkpointer.save(9, {"params": moved}, meta=step_dir.read_meta(unrolled_run.path))
    assert train(*given).status == 0
    assert measured(tmp_path / "run") == expected
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    result = train(*given, f"--gin.INITIAL_CHECKPOINT_PATH={unrolled_run.path!r}")
    assert result.status == 2 and "this run began with" in result.err


def test_processes_compute_what_any_of_them_lacks(monkeypatch):
    names = [f"{i:032x}" for i in range(20)]

    class Stream:
        batch_size = 4

        def pairs(self):
            return types.SimpleNamespace(digests=names)

        def row_ids(self, step, lo, hi):
            return [[names[(4 * step + i) % 20], ""] for i in range(hi - lo)]

    class Store:
        def __init__(self, known):
            self.known = known

        def missing(self, digests):
            return [d for d in digests if d not in self.known]

    masks = []
    monkeypatch.setattr(predictions.agreement, "gather", lambda mask: masks.append(mask) or [mask])
    assert reference._wanted(Stream(), Store(names[3:]), None) == names[:3]
    assert reference._wanted(Stream(), Store(names[:18]), None) == names[18:]
    monkeypatch.setattr(predictions.agreement, "gather", lambda mask: masks)
    assert reference._wanted(Stream(), Store(names), None) == names[:3] + names[18:]
    monkeypatch.setattr(predictions.agreement, "gather", lambda mask: [mask])
    assert reference._wanted(Stream(), Store([]), 2) == names[:8]  # what two steps read
    assert reference._wanted(Stream(), Store([]), 5) == names


def test_what_pairs_have_in_common_is_scored_once():
    ids = [[1, 2], [3], [4, 5]], [[1, 2], [3], [6]], [[1], [2, 3], [3]], [[1, 2], [6], [4, 5]]
    asked = []

    def scorer(rows):
        asked.extend((tuple(row.context), tuple(row.targets)) for row in rows)
        return [np.float32(row.targets) / sum(row.context) for row in rows]

    found = reference._values(scorer, [7], [tuple(map(np.array, pair)) for pair in ids])
    assert len(asked) == len({*asked}) == 5 and ((7, 1, 2), (4, 5)) in asked
    expected = [[sum(c) / (7 + sum(prompt)) for c in both] for prompt, *both in ids]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("bindings", "said"),
    [
        (["PAIRS_KIND='unpaired'"], "PAIRS_KIND"),
        (["REFERENCE=None"], "REFERENCE is None"),
        (["BETA=0.0"], "beta"),
        (["preference.preference.ld_alpha=0.5"], "methods/preference/ld_dpo.gin"),
        (["LOSSES=[@terms.nll]", "LOSS_WEIGHTS=[1.0, 2.0]"], "LOSS_WEIGHTS"),
        (
            ["LOSSES=[@terms.nll]", "LOSS_WEIGHTS=[-1.0]"],
            "is -1.0, but takes a number that is at least 0",
        ),
        (["TASK_FEATURE_LENGTHS={'targets': 6}"], "max_length"),
    ],
)
def test_what_cannot_be_is_one_error(train, flags, tmp_path, bindings, said):
    result = train(*flags(tmp_path / "run", *bindings))
    assert result.status == 2
    assert said in result.err and "Traceback" not in result.err


def test_prompts_begin_as_the_models_documents_did():
    ours = {"start_token": 0, "add_bos": False}
    run = types.SimpleNamespace(
        loss_per="pairs", of_prompts=False, identity=ours, model=types.SimpleNamespace(row=TOKENS)
    )

    def check(source="initial", **theirs):
        start = types.SimpleNamespace(source=source, meta=theirs, path="there")
        resolved.check_prompts(run, start)

    check()
    check(start_token=0, add_bos=False)
    check(source="run", start_token=None)
    with pytest.raises(ValueError, match="set DOCUMENT_START = None"):
        check(start_token=None)
    with pytest.raises(ValueError, match="set PROMPT_BOS = True"):
        check(add_bos=True)
    run.loss_per = "tokens"  # another stage of a model may bring documents of another form
    check(start_token=None)
    run.of_prompts = True
    with pytest.raises(ValueError, match="set DOCUMENT_START = None"):
        check(start_token=None)
    run.model.row = INPUTS_AND_TARGETS  # whose older imports record none
    check(start_token=None)
    with pytest.raises(ValueError, match="set DOCUMENT_START = 7"):
        check(start_token=7)


@pytest.mark.parametrize("methods", [(), ("preference/reference_live",)])
def test_an_initial_model_and_reference_of_another_vocabulary_are_refused(
    train, flags, tmp_path, methods
):
    other = ["VOCABULARY=@vocabularies.byte()", "vocabularies.byte.extra_ids=3"]
    result = train(*flags(tmp_path / "run", *other, methods=methods))
    assert result.status == 2 and "another vocabulary" in result.err
    assert "INITIAL_CHECKPOINT_PATH: " in result.err  # by default the reference too


@pytest.mark.parametrize("methods", [(), ("preference/reference_live",)])
@pytest.mark.parametrize(
    ("binding", "said"),
    [
        ("REFERENCE='/absent'", "REFERENCE = /absent cannot be read"),
        ("REFERENCE_MODEL=@wide/transformer.Transformer()", "Set REFERENCE_MODEL"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused_before_data_are_read(
    train, flags, tmp_path, binding, said, methods
):
    wide = [
        "wide/transformer.Transformer.config=@wide/config.TransformerConfig()",
        "wide/config.TransformerConfig.mlp_dim=24",
    ]
    (tmp_path / "malformed.jsonl").write_text("{")  # an error, were it read
    pairs = f"PAIRS={str(tmp_path / 'malformed.jsonl')!r}"
    settings = [binding, pairs, *(wide if "wide" in binding else ())]
    result = train(*flags(tmp_path / "run", *settings, methods=methods))
    assert result.status == 2 and said in result.err
    assert "malformed.jsonl" not in result.err
    if methods:  # a live one is checked before the directory is claimed
        assert not (tmp_path / "run").exists()


@pytest.fixture
def batch_of(flags, tmp_path, monkeypatch):
    """(recipe, objective, batch of its stream with made-up reference values) of methods."""
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path))

    def make(*methods, bindings=()):
        given = flags(tmp_path / "run", *bindings, methods=methods)
        files = [flag.partition("=")[2] for flag in given if flag.startswith("--gin_file=")]
        bound = [flag.removeprefix("--gin.") for flag in given if flag.startswith("--gin.")]
        arguments = gin_config.load(files, bound, entry="espalier.launch.train:train").arguments()
        for register in arguments["tasks"]:
            register()
        with monkeypatch.context() as patch:
            patch.setattr(reference.Reference, "read", lambda self, stream, **_: stream)
            stream = arguments["stream"]()
        batch = dict(stream.batch(0, 0, 8))
        recipe = arguments["recipe"]
        if recipe.inputs.stored_reference:
            rng = np.random.default_rng(0)
            batch["reference_log_probs"] = rng.normal(-9, 1, (8, 2)).astype(np.float32)
        return recipe, recipe.objective(model=recipe.model, num_sources=1), batch

    yield make
    tasks.clear()


def gradients(recipe, objective, batch):
    """(loss, its gradients) of new parameters."""
    init = jax.jit(functools.partial(initialise.variables, recipe.model))
    boxed = init(jax.random.key(0))["params"]
    params = jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda x: hasattr(x, "value"))
    key = jax.random.key(1)

    @jax.jit
    def of(params):
        def loss(params):
            out = objective(params, batch, key)
            return out.sum / out.weight, out

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, grads, out.metrics

    return of(params)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reads_its_data_and_gives_gradients(batch_of, method):
    recipe, objective, batch = batch_of(f"preference/{method}")
    said = recipe.inputs.arrays(8)
    assert {name: array.shape for name, array in batch.items() if name in said} == {
        name: array.shape for name, array in said.items()
    }
    value, grads, metrics = gradients(recipe, objective, batch)
    assert np.isfinite(value)
    norms = [np.linalg.norm(g) for g in jax.tree.leaves(grads)]
    assert np.isfinite(norms).all() and max(norms) > 0
    assert ("logps/desirable" in metrics) == (method == "kto")


@pytest.mark.parametrize(
    ("method", "trained"),
    [("low_rank/low_rank", "attention/query/u"), ("bam/btx", "mlp/router/kernel")],
)
def test_factors_and_experts_are_trained_by_preferences(batch_of, method, trained):
    bindings = {"low_rank/low_rank": ["RANK=0.5"], "bam/btx": ["EXPERTS=2", "TOP_K=2"]}[method]
    recipe, objective, batch = batch_of(method, "preference/reference_run", bindings=bindings)
    value, grads, metrics = gradients(recipe, objective, batch)
    assert np.isfinite(value) and ("auxiliary_loss" in metrics) == (method == "bam/btx")
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): g
        for path, g in jax.tree_util.tree_leaves_with_path(grads)
    }
    (of_it,) = [g for path, g in found.items() if path.endswith(trained)]
    assert np.abs(of_it).max() > 0


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """Bindings of a short run whose every batch is the same eight pairs."""
    path = tmp_path_factory.mktemp("fixed") / "pairs.jsonl"
    rows = [
        {"prompt": f"{a} + 1 = ", "chosen": str(a + 1), "rejected": str(a + 3)} for a in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = ("PAIRS_VALIDATION_FRACTION=0.0", "TRAIN_STEPS=4", "WARMUP_STEPS=0")
    return (f"PAIRS={str(path)!r}", *settings)


def check_learned(path):
    """Rows of a run that begins at its reference and makes the loss of one batch smaller with every step."""
    rows = measured(path)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert len(losses) == 4 and (np.diff(losses) < 0).all()
    return rows


def test_a_mixture_learns_the_pairs_beside_its_balance_loss(
    train, flags, fixed, command, unrolled_run, tmp_path
):
    mixture = tmp_path / "mixture"
    experts = [f"{name}={unrolled_run.path}" for name in "ab"]
    assert command("upcycle", "--method=btx", "--experts", *experts, f"--to={mixture}") == 0
    given = (*fixed, f"INITIAL_CHECKPOINT_PATH={str(mixture)!r}", "EXPERTS=2", "TOP_K=2")
    result = train(*flags(tmp_path / "run", *given, methods=["bam/btx"]))
    assert result.status == 0, result.err
    for row in check_learned(tmp_path / "run"):
        # Of two experts that both are chosen: the balance loss is its weight, 0.01, and z-loss comes on top.
        assert row["auxiliary_loss"] > 0.01


def test_factors_learn_the_pairs_against_the_dense_model_that_they_were(
    train, flags, fixed, tmp_path
):
    """At full rank the policy is its reference, though another module."""
    dense = (
        "REFERENCE_MODEL=@dense/transformer.Transformer()",
        "dense/transformer.Transformer.block=@dense/transformer.Block",
        "dense/transformer.Block.attention=@dense/attention.Attention",
        "dense/transformer.Block.mlp=@dense/mlp.GatedMlp",
        "dense/attention.Attention.dense=@linear.Dense",
        "dense/mlp.GatedMlp.dense=@linear.Dense",
    )
    given = (*fixed, *dense, "RANK=1.0", "INITIAL_SCOPE='params'")
    result = train(
        *flags(tmp_path / "full", *given, methods=["low_rank/low_rank", "low_rank/decompose"])
    )
    assert result.status == 0, result.err
    check_learned(tmp_path / "full")
