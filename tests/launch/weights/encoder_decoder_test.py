"""Encoder-decoders with adapters and factors: merged and recomposed, they are the same model, also when they generate."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.data.tokenizers import vocabularies
from espalier.launch.load import load_run
from espalier.launch.run import model_record, run_vocabulary
from espalier.launch.weights import source_models, transformed_run
from espalier.model.adapters.adapter import is_adapter
from espalier.trainers.checkpoints import state_tree, step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer

SIZES = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "head_dim": 4, "mlp_dim": 16}
INPUTS = jnp.array([[7, 100, 3, 42, 9, 1]])
TARGETS = jnp.array([[0, 12, 5, 77]])


@pytest.fixture
def made(tmp_path):
    """Makes a run of a tiny T5 with a file of a method, and random parameters."""

    def make(file=None, **settings):
        folder = tmp_path / (file or "dense").replace("/", "_")
        folder.mkdir()
        files = ["t5x_configs/models/t5_tiny.gin"]
        lines = transformed_run.method_lines(files, {"VOCAB_SIZE": 264})
        lines += [f"config.TransformerConfig.{name} = {size}" for name, size in SIZES.items()]
        if file:
            lines += transformed_run.method_lines([f"t5x_configs/methods/{file}.gin"], settings)
        header = "from __gin__ import dynamic_registration"
        (folder / "config.gin").write_text("\n".join([header, *lines, ""]))
        model_record.write(folder)
        run_vocabulary.save(folder, vocabularies.byte())
        shapes = transformed_run.abstract_params(source_models.model_of(str(folder)))
        params = {name: random(name, leaf) for name, leaf in shapes.items()}
        with Checkpointer(folder / "checkpoints") as checkpointer:
            checkpointer.save(1, {"params": state_tree.nest(params)}, meta={})
        return folder

    return make


def random(name, leaf):
    rng = np.random.default_rng(sum(map(ord, name)))
    scale = 0.3 if is_adapter(name) or len(leaf.shape) < 2 else leaf.shape[-2] ** -0.5
    return jnp.asarray(rng.normal(0.1, scale, leaf.shape), leaf.dtype)


def logits(run):
    with load_run.config_of(str(run)).load(str(run), encoder_decoders=True) as loaded:
        apply = jax.jit(lambda params: loaded.model.apply({"params": params}, TARGETS, encoder_tokens_BS=INPUTS))  # fmt: skip
        return np.asarray(apply(loaded.params))


def paths(run):
    return step_dir.read_manifest(step_dir.resolve(run)).arrays


@pytest.mark.parametrize(
    ("file", "settings"), [("adapters/lora", {"LORA_RANK": 2}), ("adapters/ia3", {})]
)
def test_merged_adapters_are_the_same_model(file, settings, made, command, tmp_path):
    run, merged = made(file, **settings), tmp_path / "merged"
    assert any("/cross_attention/key/adapter_" in name for name in paths(run))
    assert command("upcycle merge", f"--checkpoint={run}", f"--to={merged}") == 0
    assert not any(map(is_adapter, paths(merged)))
    want = logits(run)
    np.testing.assert_allclose(logits(merged), want, atol=1e-5 * np.abs(want).max())


def test_factors_of_full_rank_are_the_same_model(made, command, tmp_path, capsys):
    run, factors, dense = made(), tmp_path / "factors", tmp_path / "recomposed"
    flags = ["upcycle factorise", f"--checkpoint={run}", f"--to={factors}", "--rank=1.0"]
    text = tmp_path / "x.jsonl"
    text.write_text('{"text": "a"}\n')
    assert command(*flags, f"--calibrate={text}") == 2
    assert "an EncoderDecoder, and this command reads decoders" in capsys.readouterr().err
    assert command(*flags) == 0
    assert {name.rpartition("/")[2] for name in paths(factors) if "cross_attention" in name} == {
        "u",
        "v",
    }
    want = logits(run)
    np.testing.assert_allclose(logits(factors), want, atol=1e-4 * np.abs(want).max())
    flags = [f"--checkpoint={factors}", f"--to={dense}", "--recompose"]
    assert command("upcycle factorise", *flags) == 0
    np.testing.assert_allclose(logits(dense), want, atol=1e-4 * np.abs(want).max())


def test_a_mixture_generates_what_it_scores(made, command, tmp_path, capsys):
    """Invariant 14 of arXiv 2309.05444: the router runs in generation, and at cached keys of the encoder."""
    run, merged = made("mov/mov", ADAPTER_EXPERTS=3), tmp_path / "merged"
    source, output = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    files = (f"--checkpoint={run}", f"--inputs={source}", f"--output={output}")
    source.write_text('{"inputs": "os.path"}\n')
    assert command("generate", *files, "--max_new_tokens=5") == 0
    row = json.loads(output.read_text())
    source.write_text(json.dumps({"inputs": "os.path", "targets": row["tokens"]}) + "\n")
    assert command("score", *files) == 0
    scored = json.loads(output.read_text())
    np.testing.assert_allclose(row["logprobs"], scored["logprobs"], atol=1e-4)

    capsys.readouterr()
    flags = [f"--checkpoint={run}", f"--to={merged}"]
    assert command("upcycle merge", *flags) == 2
    assert re.search("3 experts depend on the token", capsys.readouterr().err)


def test_attention_experts_refuse_a_bias_of_positions(made, command, tmp_path, capsys):
    flags = ["--method=bam", f"--experts={made()}", "--copies=2", f"--to={tmp_path / 'bam'}"]
    assert command("upcycle", *flags) == 2
    error = capsys.readouterr().err
    assert "attention experts support no bias of positions" in error and "Traceback" not in error
