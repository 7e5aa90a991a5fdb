"""Adapters without their base model, and merged into it: what they compute, and what is refused."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.convert import __main__ as convert
from espalier.launch.load import load_run
from espalier.launch.weights import transformed_run
from espalier.model.adapters.adapter import AdapterError, is_adapter
from espalier.trainers.checkpoints import base_step, step_dir
from espalier.trainers.checkpoints.base_step import BaseModelError

TOKENS = jnp.array([[7, 100, 3, 42, 42, 9]])


@pytest.fixture
def adapted(trained_run, changed):
    """Makes a run with adapters on the tiny run's averaged parameters."""

    def make(file, **settings):
        lines = transformed_run.method_lines([f"t5x_configs/methods/{file}.gin"], settings)
        initial = {"path": str(step_dir.resolve(trained_run.path))}
        name = file.replace("/", "_")
        return changed(trained_run.path, name, *lines, params="ema", initial=initial)

    return make


def logits(run, *gin_files):
    config = load_run.config_of(str(run), gin_files)
    with config.load(str(run)) as loaded:
        return np.asarray(jax.jit(loaded.model.apply)({"params": loaded.params}, TOKENS))


def test_adapters_alone_are_the_model_on_their_own_base_with_their_own_settings(
    adapted, trained_run, branches, tmp_path, capsys
):
    """Invariant 13 of arXiv 2309.05444: the record rebuilds the adapters without any gin file."""
    run, alone = adapted("adapters/dora", LORA_RANK=2, LORA_ALPHA=3.0), tmp_path / "alone"
    assert convert.main([f"--from={run}", f"--to_adapter={alone}"]) == 0
    assert "Lora, " in capsys.readouterr().out
    saved = step_dir.read_manifest(step_dir.resolve(alone)).arrays
    assert saved and all(is_adapter(name) for name in saved)
    want = logits(run)
    assert np.abs(want - logits(trained_run.path)).max() > 0.1
    np.testing.assert_array_equal(logits(alone), want)
    # Adapters alone are adapters of the same base again, and the base may move.
    assert convert.main([f"--from={alone}", f"--to_adapter={tmp_path}/b", f"--base={run}"]) == 0
    np.testing.assert_array_equal(logits(tmp_path / "b"), want)

    other = tmp_path / "other.gin"
    other.write_text("LORA_ALPHA = 4.0\n")
    with pytest.raises(AdapterError, match=r"alpha of adapter.named.lora is 3.0 there and 4.0"):
        logits(alone, str(other))
    file = alone / base_step.FILE
    for path, words in ((branches.folders[0], "another base"), ("/no/such/run", "is missing")):
        file.write_text(json.dumps({"path": path}))
        with pytest.raises(BaseModelError, match=f"{words}.*{re.escape(str(file))}"):
            logits(alone)
    deep = '{"path": ' + "[" * 100_000
    for text in ("1", "[]", "{}", "null", '{"path": 1}', '{"path": ""}', "no json", deep):
        file.write_text(text)
        with pytest.raises(BaseModelError, match=f"{re.escape(str(file))} does not say where"):
            logits(alone)
    file.write_text(json.dumps({"path": str(alone)}))
    with pytest.raises(BaseModelError, match=f"another base.*{re.escape(str(file))}"):
        logits(alone)
    file.unlink()
    file.mkdir()
    with pytest.raises(BaseModelError, match="does not say where"):
        logits(alone)
    for flags, words in (
        (
            [f"--from={run}", f"--to_adapter={tmp_path}/c", f"--base={branches.folders[0]}"],
            "those of",
        ),
        ([f"--from={trained_run.path}", f"--to_adapter={tmp_path}/c"], "has no adapters"),
        ([f"--from={run}", f"--to_hf={tmp_path}/c"], "upcycle merge"),
        ([f"--from={run}", f"--to_hf={tmp_path}/c", "--base=x"], "--base is for"),
        ([f"--from={run}", f"--to_adapter={tmp_path}/c", "--dtype=float16"], "--dtype is for"),
    ):
        assert convert.main(flags) == 2
        assert words in capsys.readouterr().err
        assert not pathlib.Path(tmp_path, "c").exists()


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("adapters/lora", {"LORA_RANK": 2}),
        ("adapters/dora", {"LORA_RANK": 2}),
        ("adapters/ia3", {}),
        ("mov/mov", {"ADAPTER_EXPERTS": 1}),
    ],
)
def test_merged_adapters_are_the_same_model(file, settings, adapted, command, tmp_path):
    """Invariant 12 of arXiv 2309.05444, one expert, too."""
    run, merged = adapted(file, **settings), tmp_path / "merged"
    assert command("upcycle merge", f"--checkpoint={run}", f"--to={merged}") == 0
    assert not any(map(is_adapter, step_dir.read_manifest(step_dir.resolve(merged)).arrays))
    step = step_dir.resolve(run).name
    assert step_dir.read_meta(merged)["made_of"] == [f"{pathlib.Path(run).name}, step {step}"]
    want = logits(run)
    np.testing.assert_allclose(logits(merged), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("file", ["mov/mov", "mov/molora"])
def test_mixtures_are_merged_only_as_averages_with_their_error(
    file, adapted, command, tmp_path, capsys
):
    """Invariant 14 of arXiv 2309.05444."""
    settings = {} if file == "mov/mov" else {"MOLORA_RANK": 2}
    run, merged = adapted(file, ADAPTER_EXPERTS=3, **settings), tmp_path / "merged"
    flags = ["upcycle merge", f"--checkpoint={run}", f"--to={merged}"]
    assert command(*flags) == 2
    assert "3 experts depend on the token" in capsys.readouterr().err and not merged.exists()
    for length in (0, -5):
        assert command(*flags, "--average=x", f"--average_length={length}") == 2
        assert f"--average_length={length} must be at least 1" in capsys.readouterr().err
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"tokens": TOKENS[0].tolist()}) + "\n")
    assert command(*flags, f"--average={text}", "--average_length=7") == 0  # with the start token
    error = float(re.search(r"error of a logit there is (\S+)", capsys.readouterr().out)[1])
    row = jnp.concatenate([jnp.zeros((1, 1), jnp.int32), TOKENS], axis=1)
    values = []
    for path in (run, merged):
        with load_run.config_of(str(path)).load(str(path)) as loaded:
            values.append(jax.jit(loaded.model.apply)({"params": loaded.params}, row))
    assert error == pytest.approx(float(jnp.abs(values[0] - values[1]).max()), rel=0.01)
    assert error > 0


def test_a_mixture_generates_from_a_compressed_cache_what_it_scores(adapted, command, tmp_path):
    """Invariant 14 of arXiv 2309.05444: the router runs in generation. SnapKV has room for everything here."""
    run = adapted("mov/mov", ADAPTER_EXPERTS=3)
    source, output = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    files = (f"--checkpoint={run}", f"--inputs={source}", f"--output={output}")
    source.write_text(json.dumps({"tokens": TOKENS[0].tolist()}) + "\n")
    cache = ("--cache_policy=snapkv", "--cache=capacity=32", "--cache=window=4")
    assert command("generate", *files, *cache, "--max_new_tokens=4") == 0
    row = json.loads(output.read_text())
    source.write_text(json.dumps({"tokens": TOKENS[0].tolist(), "targets": row["tokens"]}) + "\n")
    assert command("score", *files) == 0
    scored = json.loads(output.read_text())
    np.testing.assert_allclose(row["logprobs"], scored["logprobs"], atol=1e-4)


def test_a_bottleneck_is_not_merged(adapted, command, tmp_path, capsys):
    run = adapted("adapters/bottleneck", BOTTLENECK_WIDTH=3)
    assert command("upcycle merge", f"--checkpoint={run}", f"--to={tmp_path}/merged") == 2
    assert "is not linear" in capsys.readouterr().err
