"""Adapters of peft: its log-probabilities, and its files again; the goldens are made by tests/model/hf/goldens/make_peft.py."""

import errno
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from espalier.launch.convert import __main__ as convert
from espalier.launch.load import load_run

GOLDENS = pathlib.Path(__file__).parents[2] / "model" / "hf" / "goldens" / "peft"
FILES = {
    "base": ("config.json", "model.safetensors"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
}


def unpack(name, folder):
    """Writes the directories `base` and `adapter` of a golden; returns its tokens, an encoder's inputs, and log-probabilities."""
    with np.load(GOLDENS / f"{name}.npz") as case:
        for part, (settings, weights) in FILES.items():
            (folder / part).mkdir()
            (folder / part / settings).write_text(str(case[f"{part}.json"]))
            tensors = {x.partition("/")[2]: case[x] for x in case if x.startswith(f"{part}/")}
            safetensors.numpy.save_file(tensors, folder / part / weights)
        inputs = case.get("inputs")
        return case["tokens"], inputs, case["log_probs"]


def log_probs(run, tokens, inputs=None):
    read = {} if inputs is None else {"encoder_tokens_BS": jnp.asarray(inputs)[None]}
    with load_run.config_of(str(run)).load(str(run), encoder_decoders=True) as loaded:
        apply = jax.jit(loaded.model.apply)
        logits = apply({"params": loaded.params}, jnp.asarray(tokens)[None], **read)
    return np.asarray(jax.nn.log_softmax(logits[0, :-1]))[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.fixture
def unpacked(tmp_path):
    def run(name):
        golden = unpack(name, tmp_path)
        base = f"{tmp_path}/run"
        assert convert.main([f"--from_hf={tmp_path}/base", f"--to={base}"]) == 0
        return *golden, f"--base={base}"

    return run


@pytest.mark.parametrize(
    "name",
    [
        *("lora", "rslora", "dora", "ia3", "gpt2_lora", "neox_lora", "t5_lora", "t5_ia3"),
        *("experts", "experts_down", "qwen3_moe", "cohere2_moe"),
    ],
)
def test_adapters_have_pefts_log_probabilities_and_become_its_files_again(
    name, unpacked, tmp_path, capsys
):
    tokens, inputs, expected, base = unpacked(name)
    run, back = tmp_path / "adapted", tmp_path / "back"
    flags = [f"--from_peft={tmp_path}/adapter", base, f"--to={run}"]
    assert convert.main(flags) == 0, capsys.readouterr().err
    close = (
        1e-4 if inputs is None else 1e-3
    )  # a random T5's attention is sharp, and logits are large
    np.testing.assert_allclose(log_probs(run, tokens, inputs), expected, atol=close)
    status = convert.main([f"--from={run}", f"--to_peft={back}"])
    joined = {"gpt2_lora": "c_attn.weight", "neox_lora": "query_key_value.weight"}
    if name in joined:  # one A for three projections, which have one each here
        assert status == 2 and joined[name] in capsys.readouterr().err
        return
    assert status == 0
    settings, weights = FILES["adapter"]
    ours, theirs = (
        safetensors.numpy.load_file(tmp_path / folder / weights) for folder in ("back", "adapter")
    )
    assert set(ours) == set(theirs)
    config = json.loads((back / settings).read_text())
    original = json.loads((tmp_path / "adapter" / settings).read_text())
    of_lora = [] if name.endswith("ia3") else ["use_rslora", "use_dora", "lora_alpha"]
    assert all(config[key] == original[key] for key in ["peft_type", *of_lora])
    assert config["task_type"] == ("CAUSAL_LM" if inputs is None else "SEQ_2_SEQ_LM")
    if name == "lora":  # its own alphas are in B, and a low rank in a stack is filled up
        assert convert.main([f"--from_peft={back}", base, f"--to={tmp_path}/again"]) == 0
        np.testing.assert_allclose(log_probs(tmp_path / "again", tokens), expected, atol=close)
        return
    for path, value in theirs.items():
        np.testing.assert_allclose(ours[path], value, atol=1e-6 if "magnitude" in path else 0)
    targets = {"ia3": ["down_proj", "k_proj", "v_proj"], "rslora": ["gate_proj", "up_proj"]}
    if name in targets:
        assert config["target_modules"] == targets[name]


@pytest.mark.parametrize("name", ["experts_ranks", "experts_apart"])
def test_experts_of_other_ranks_or_apart_are_the_same_adapters_and_then_stay(
    name, unpacked, tmp_path, capsys
):
    """Ranks of layers are filled up, and single experts become stacked, of both ranks where gate and up have two.

    What is written then is written again bit for bit, up to a factor of 2 for two ranks, which have one alpha here.
    """
    tokens, _, expected, base = unpacked(name)
    for source, run, back in (("adapter", "one", "two"), ("two", "three", "four")):
        flags = [f"--from_peft={tmp_path / source}", base, f"--to={tmp_path / run}"]
        assert convert.main(flags) == 0, capsys.readouterr().err
        assert convert.main([f"--from={tmp_path / run}", f"--to_peft={tmp_path / back}"]) == 0
        np.testing.assert_allclose(log_probs(tmp_path / run, tokens), expected, atol=1e-4)
    settings, weights = FILES["adapter"]
    first, again = (safetensors.numpy.load_file(tmp_path / x / weights) for x in ("two", "four"))
    factors = {np.unique(again[x][first[x] != 0] / first[x][first[x] != 0]).item() for x in first}
    assert set(first) == set(again) and factors == (
        {1.0} if name == "experts_ranks" else {1.0, 2.0}
    )
    config = json.loads((tmp_path / "two" / settings).read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def rslora(tmp_path_factory):
    """The folder with the directories of a golden, whose base is imported to `run`; tests only read it."""
    folder = tmp_path_factory.mktemp("rslora")
    unpack("rslora", folder)
    assert convert.main([f"--from_hf={folder}/base", f"--to={folder}/run"]) == 0
    return folder


def test_a_full_disk_is_one_error(rslora, tmp_path, capsys, monkeypatch):
    run, back = tmp_path / "adapted", tmp_path / "back"
    flags = [f"--from_peft={rslora}/adapter", f"--base={rslora}/run", f"--to={run}"]
    assert convert.main(flags) == 0

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert convert.main([f"--from={run}", f"--to_peft={back}"]) == 2
    printed = capsys.readouterr().err
    assert "No space left" in printed and "Traceback" not in printed and not back.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "VERA"}, "peft_type 'VERA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (None, "no projection of the base model"),
    ],
)
def test_what_has_no_counterpart_is_refused(change, words, rslora, tmp_path, capsys):
    shutil.copytree(rslora / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(change or {})}))
    if change is None:
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(weights)
        renamed = {name.replace("up_proj", "upper"): value for name, value in tensors.items()}
        safetensors.numpy.save_file(renamed, weights)
    base = f"--base={rslora}/run"
    flags = [f"--from_peft={tmp_path}/adapter", base, f"--to={tmp_path}/adapted"]
    assert convert.main(flags) == 2
    assert words in capsys.readouterr().err
    assert convert.main(flags[:1] + flags[2:]) == 2
    assert "--base=RUN" in capsys.readouterr().err
