"""The model of another run is the one in its own model.json, whatever this process's configuration is."""

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.config import gin_config, gin_reader
from espalier.launch.config.build import Configuration
from espalier.launch.config.gin_config import ConfigError
from espalier.launch.load import run_model
from espalier.launch.run import model_record
from espalier.trainers import initialise
from espalier.trainers.telemetry.metric_writers import read_jsonl

ENTRY = "espalier.launch.load.load_run:RunConfig"
LOAD_RUN = "t5x_configs/runs/load_run.gin"
SCOPES = """
from __gin__ import dynamic_registration
from espalier.model import attention
from espalier.model import config
from espalier.model import mlp
from espalier.model import transformer
include 't5x_configs/models/base.gin'
MODEL = @small/transformer.Transformer()
config.TransformerConfig.num_layers = 2
config.TransformerConfig.embed_dim = 16
config.TransformerConfig.num_heads = 2
config.TransformerConfig.mlp_dim = 24
config.TransformerConfig.vocab_size = 40
small/config.TransformerConfig.num_layers = 1
small/transformer.Transformer.block = @wide/transformer.Block
wide/transformer.Block.mlp = @mlp.Mlp
wide/transformer.Block.attention = @wide/attention.Attention
wide/attention.Attention.qkv_bias = %BIAS
BIAS = True
"""


def process(*files, bindings=("VOCABULARY=None",)):
    """Loads a configuration; returns it and its model."""
    names = [name if name.endswith(".gin") else f"t5x_configs/{name}.gin" for name in files]
    config = gin_config.load([*names, LOAD_RUN], bindings, entry=ENTRY)
    return config, config.entry().model


def isolated(path):
    reader = gin_reader.Reader()
    reader.read_file(str(path))
    assert not reader.refused and not reader.checked.problems
    return Configuration(reader.checked, shows_bindings=True)


def shapes(model):
    return jax.tree.map(lambda x: (x.shape, x.dtype), initialise.abstract_variables(model))


@pytest.mark.parametrize(
    "files",
    [
        ("models/tiny",),
        ("models/gpt2",),
        ("models/gemma2_2b",),
        ("models/tiny", "methods/bam/bam"),
        ("models/tiny", "methods/low_rank/low_rank", "methods/bam/btx"),
        ("scopes.gin",),
    ],
)
def test_it_is_the_model_that_gin_would_make(files, tmp_path):
    if files == ("scopes.gin",):
        (tmp_path / "scopes.gin").write_text(SCOPES)
        files = (str(tmp_path / "scopes.gin"),)
    config, model = process(*files)
    expected = shapes(model)
    (tmp_path / "config.gin").write_text(config.text)
    model_record.write(tmp_path)
    process("models/tiny", "methods/low_rank/low_rank", bindings=["VOCABULARY=None", "RANK=0.1"])
    configuration = isolated(tmp_path / "model.json")
    assert shapes(configuration.macro("MODEL")) == expected
    again = isolated(tmp_path / "model.json").macro("MODEL")
    assert repr(again) == repr(configuration.macro("MODEL"))  # names stored values of the model


def test_bindings_and_scopes_of_this_process_do_not_reach_it(trained_run):
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    expected = trained_run.model.apply({"params": trained_run.params["raw"]}, tokens)
    process("models/gpt2", "methods/low_rank/low_rank", bindings=["VOCABULARY=None", "RANK=0.1"])
    model = run_model.model(run=trained_run.path, macro="TEACHER")
    found = model.apply({"params": trained_run.params["raw"]}, tokens)
    np.testing.assert_array_equal(found, expected)


def test_what_is_bound_beneath_a_factory_is_part_of_its_description(tmp_path):
    text = process("models/tiny")[0].text
    (tmp_path / "one.gin").write_text(text)
    (tmp_path / "two.gin").write_text(text.replace("'interleaved'", "'halves'"))
    one, two = (repr(isolated(tmp_path / f"{n}.gin").macro("MODEL")) for n in ("one", "two"))
    assert one != two and "0x" not in one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: None, "TEACHER is None"),
        (lambda run: f"{run}/absent", "is not a run with checkpoints: .*no such directory"),
        (lambda run: (run / "model.json").unlink() or run, "has no model.json beside its check"),
        (
            lambda run: (
                (run / "model.json").write_text(
                    '{"format": "espalier model 1", "macros": {}, "settings": {}}'
                )
                * 0
                or run
            ),
            "does not describe a model: macro 'MODEL' has no value",
        ),
    ],
)
def test_what_is_no_run_is_refused_by_the_name_of_the_setting(
    trained_run, tmp_path, change, message
):
    run = tmp_path / "run"
    shutil.copytree(trained_run.path, run)
    path = change(run)
    with pytest.raises(ValueError, match="^TEACHER") as caught:
        run_model.model(run=None if path is None else str(path), macro="TEACHER")
    assert caught.match(message)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "config.TransformerConfig.num_layers",
            10**7,
            "num_layers' is 10000000, but takes a number",
        ),
        ("config.TransformerConfig.vocab_size", "384", "takes int, not '384'"),
    ],
)
def test_numbers_of_its_model_are_checked(trained_run, tmp_path, setting, value, message):
    run = tmp_path / "run"
    shutil.copytree(trained_run.path, run)
    record = json.loads((run / "model.json").read_text())
    record["settings"][setting] = value
    (run / "model.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError) as caught:
        run_model.model(run=str(run), macro="TEACHER")
    assert message in str(caught.value)


@pytest.fixture
def evil(trained_run, tmp_path, monkeypatch):
    """A run whose model is of a module that leaves a trace when it is imported; the run and the trace."""
    trace, run = tmp_path / "trace", tmp_path / "evil"
    (tmp_path / "evil_module.py").write_text(f"open({str(trace)!r}, 'w')\ndef model(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(trained_run.path, run)
    record = json.loads((run / "model.json").read_text())
    record["macros"]["MODEL"] = {"call": "evil_module:model"}
    (run / "model.json").write_text(json.dumps(record))
    yield run, trace
    sys.modules.pop("evil_module", None)


def test_its_configuration_runs_nothing_of_someone_else(evil):
    run, trace = evil
    config, _ = process("models/tiny")
    with (
        config.in_use(),
        pytest.raises(ConfigError, match="uses 'evil_module.model', which is not of this project"),
    ):
        run_model.model(run=str(run), macro="TEACHER")
    assert not trace.exists()


def test_what_this_process_imports_it_may_name(evil, tmp_path):
    run, trace = evil
    own = tmp_path / "own.gin"
    own.write_text("from __gin__ import dynamic_registration\nimport evil_module\n")
    config, _ = process("models/tiny", str(own))
    with config.in_use():
        assert run_model.model(run=str(run), macro="TEACHER") is None
    assert trace.exists()


DPO = """
from __gin__ import dynamic_registration
from espalier.data.tokenizers import vocabularies
include 't5x_configs/models/tiny.gin'
include 't5x_configs/data/preferences_base.gin'
include 't5x_configs/runs/preference.gin'
include 't5x_configs/methods/low_rank/low_rank.gin'
include 't5x_configs/methods/low_rank/decompose.gin'
VOCABULARY = @vocabularies.byte()
"""


@pytest.fixture(scope="module")
def factors(train, trained_run, tmp_path_factory):
    """Runs DPO of the tiny run's model in factors of full rank, with more flags; returns result and directory."""
    folder = tmp_path_factory.mktemp("dpo")
    rows = [
        {"prompt": f"{a} + 1 = ", "chosen": str(a + 1), "rejected": str(a + 3)} for a in range(8)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.gin").write_text(DPO)

    def run(name, *more):
        given = {
            "MODEL_DIR": repr(str(folder / name)),
            "INITIAL_CHECKPOINT_PATH": repr(trained_run.path),
            "INITIAL_SCOPE": "'params'",
            "PAIRS": repr(str(folder / "pairs.jsonl")),
            "PAIRS_VALIDATION_FRACTION": 0.0,
            "TASK_FEATURE_LENGTHS": {"targets": 32},
            "BATCH_SIZE": 8,
            "TRAIN_STEPS": 1,
            "LOG_PERIOD": 1,
            "RANK": 1.0,
            "config.TransformerConfig.num_layers": 1,
            "config.TransformerConfig.embed_dim": 16,
            "config.TransformerConfig.num_heads": 2,
            "config.TransformerConfig.num_kv_heads": 1,
            "config.TransformerConfig.mlp_dim": 16,
            "config.TransformerConfig.vocab_size": 264,
        }
        flags = [f"--gin.{key}={value}" for key, value in given.items()]
        files = [f"--gin_file=t5x_configs/methods/preference/{x}.gin" for x in more]
        return train(f"--gin_file={folder / 'run.gin'}", *files, *flags), folder / name

    return run


@pytest.mark.parametrize("more", [("reference_run",), ("reference_live", "reference_run")])
def test_a_reference_brings_its_own_architecture(factors, more):
    """At full rank the policy is its dense reference, so that its loss begins at log 2."""
    result, path = factors("_".join(more), *more)
    assert result.status == 0, result.err
    (row,) = [row for row in read_jsonl(f"{path}/metrics.jsonl") if "loss" in row]
    assert row["loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize("more", [(), ("reference_live",)])
def test_a_reference_of_another_model_is_refused_before_data(factors, more):
    result, path = factors("_".join(("wrong", *more)), *more)
    assert result.status == 2
    assert "REFERENCE: " in result.err and "is of another model: " in result.err
    assert "run_model.model reads it from the run's model.json" in result.err
    assert not pathlib.Path(path, "reference.json").exists()
