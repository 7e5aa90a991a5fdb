"""A run that samples, from gin to checkpoint: what it logs, and that it goes on as if it had not been cut short."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from espalier.launch.load.load import load
from espalier.trainers import initialise
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.restore_params import restore_params
from espalier.trainers.telemetry.metric_writers import read_jsonl


def flags_of(method, unrolled_run, tmp_path, **settings):
    """The flags of a run that samples from `unrolled_run`, in tmp_path / "run"."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i} x", "answer": "ab"} for i in range(9)]
    rows.insert(4, {"prompt": "much too long", "answer": "ab"})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("models/tiny", "data/prompts_base", "runs/online", f"methods/preference/{method}")
    bindings = {
        "VOCABULARY": "@vocabularies.byte()",
        "PROMPT_FILES": f"'{prompts}'",
        "INITIAL_CHECKPOINT_PATH": f"'{unrolled_run.path}'",
        "MODEL_DIR": f"'{tmp_path / 'run'}'",
        "MAX_PROMPT_LENGTH": 8,
        "MAX_NEW_TOKENS": 4,
        "PROMPTS": 8,
        "SAMPLES": 2,
        "BATCH_SIZE": 16,
        "UPDATES": 2,
        "TRAIN_STEPS": 4,
        "CHECKPOINT_PERIOD": 3,
        "LOG_PERIOD": 1,
        "LEARNING_RATE": 1e-3,
        # Any text is better the longer it is.
        "VERIFIERS": "[@verifiers.matches, @verifiers.too_long]",
        "VERIFIER_WEIGHTS": "[1.0, -1.0]",
        "verifiers.matches.pattern": "'.*e.*'",
        "verifiers.too_long.free": 0,
        "verifiers.too_long.span": 4,
    }
    sizes = unrolled_run.model.config
    names = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size")
    for name in (*names, "scan_layers"):
        bindings[f"config.TransformerConfig.{name}"] = getattr(sizes, name)
    imports = tmp_path / "vocabulary.gin"
    imports.write_text(
        "from __gin__ import dynamic_registration\nfrom espalier.data.tokenizers import vocabularies\nfrom espalier.model import config\n"
    )
    bindings |= settings
    return [
        f"--gin_file={imports}",
        *(f"--gin_file=t5x_configs/{name}.gin" for name in files),
        *(f"--gin.{name}={value}" for name, value in bindings.items()),
    ]


def test_a_run_goes_on_from_the_middle_of_a_rollout(train, unrolled_run, tmp_path):
    path, flags = tmp_path / "run", flags_of("grpo", unrolled_run, tmp_path)
    result = train(*flags)
    assert result.status == 0, result.err
    assert (
        "\nWARNING    prompts: of 10 prompts, at MAX_PROMPT_LENGTH 8, 1 (10.0%) dropped (first: prompts.jsonl:5)"
        in result.out
    )
    whole = {row["step"]: row for row in read_jsonl(path / "metrics.jsonl")}
    assert set(whole) == {1, 2, 3, 4}
    # Sampled once, used twice: the second update is off the policy that sampled.
    for first in (1, 3):
        assert whole[first]["reward"] == whole[first + 1]["reward"]
        assert abs(whole[first]["ratio"] - 1) < 1e-4
    assert whole[2]["reward"] != whole[3]["reward"] and whole[4]["ratio"] != 1
    assert whole[4]["time/generation"] > 0 and 0 <= whole[4]["reward"] <= 2
    assert {file.name for file in (path / "rollouts").iterdir()} == {"0.npz", "1.npz"}

    steps = epath.Path(path) / "checkpoints"
    ended = step_dir.read_manifest(steps / "4").arrays
    shutil.rmtree(steps / "4")
    result = train(*flags)
    assert result.status == 0, result.err
    assert step_dir.read_manifest(steps / "4").arrays == ended
    again = {row["step"]: row for row in read_jsonl(path / "metrics.jsonl")}
    for name in ("reward", "loss", "ratio", "grad_norm"):
        np.testing.assert_array_equal(again[4][name], whole[4][name])


@pytest.mark.parametrize(("macro", "beta"), [("INITIAL_CHECKPOINT_PATH", 0.0), ("REFERENCE", 0.1)])
def test_prompts_begin_as_the_models_documents_did(train, unrolled_run, tmp_path, macro, beta):
    meta = {**step_dir.read_meta(unrolled_run.path), "start_token": 0}
    with Checkpointer(tmp_path / "sft" / "checkpoints") as checkpointer:
        checkpointer.save(3, {"params": unrolled_run.params["raw"]}, meta=meta)
    settings = {"DOCUMENT_START": 7, "WITH_REFERENCE": beta > 0, "BETA": beta}
    settings["INITIAL_CHECKPOINT_PATH"] = f"'{tmp_path / 'sft'}'"
    result = train(*flags_of("grpo", unrolled_run, tmp_path, **settings))
    assert result.status == 2 and f"{macro}: documents of" in result.err, result.err
    assert "set DOCUMENT_START = 0" in result.err


def test_a_run_of_ppo_is_its_policy_for_what_comes_after(train, unrolled_run, tmp_path):
    """Its checkpoints say which part of the model is used for inference."""
    settings = {"TRAIN_STEPS": 1, "UPDATES": 1}
    result = train(*flags_of("ppo", unrolled_run, tmp_path, **settings))
    assert result.status == 0, result.err
    run = load(tmp_path / "run")
    boxed = initialise.abstract_variables(run.model)["params"]
    policy = restore_params(tmp_path / "run", initialise.shapes_of(boxed))
    jax.tree.map(np.testing.assert_array_equal, policy, run.params)
