"""Weights of other projects become runs and come back, bit by bit, in bounded memory, or not at all."""

import dataclasses
import errno
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from espalier.launch.config import gin_config, gin_writer
from espalier.launch.convert import __main__ as convert
from espalier.launch.convert import exchange
from espalier.launch.weights import target_folder
from espalier.model.attention import Attention
from espalier.model.config import TransformerConfig
from espalier.model.embed import Positions
from espalier.model.hf import load, registry
from espalier.model.hf.description import describe
from espalier.model.hf.files.safetensors_files import SafetensorsReader, SafetensorsWriter
from espalier.model.hf.plan import Plan
from espalier.model.mlp import GatedMlp, Mlp
from espalier.model.norm import LayerNorm, RMSNorm
from espalier.model.rope import Rope
from espalier.model.transformer import Block, Transformer
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.restore_params import restore_params
from tests.model.hf import arrays

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "model" / "hf" / "goldens" / "parity"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write_checkpoint(folder, config, tensors, **layout):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    described = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    with SafetensorsWriter(folder, described, shard_bytes=layout.get("shard", 10**9)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def read_checkpoint(folder):
    with SafetensorsReader(folder) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def golden(name):
    """config.json and tensors of a tiny model of the family, in bfloat16 but for the last norm."""
    with np.load(GOLDENS / f"{name}.npz") as case:
        config = json.loads(str(case["config"]))
        found = {k.partition("/")[2]: case[k] for k in case.files if k.startswith("tensor/")}
    config |= {"bos_token_id": 7, "eos_token_id": [3, 5], "max_position_embeddings": 77}
    family = registry.family_of_config(config)
    names = family.match(family.model(config), {k: x.shape for k, x in found.items()})
    found = {k: found[names[k]] for k in family.shapes(family.model(config))}
    last_norms = ("model.norm.weight", "transformer.ln_f.weight", "decoder.final_layer_norm.weight")
    last_norms += ("gpt_neox.final_layer_norm.weight",)
    last = next(name for name in last_norms if name in found)
    config["torch_dtype"] = config["dtype"] = "bfloat16"
    return config, {k: x.astype(np.float32 if k == last else BFLOAT16) for k, x in found.items()}


def same_bits(found, tensors):
    assert {n: (x.dtype, x.shape) for n, x in found.items()} == {
        n: (x.dtype, x.shape) for n, x in tensors.items()
    }
    assert [n for n in tensors if found[n].tobytes() != tensors[n].tobytes()] == []


CASES = sorted(path.stem for path in GOLDENS.glob("*_0.npz"))


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_becomes_a_run_and_comes_back(tmp_path, name):
    config, tensors = golden(name)
    write_checkpoint(tmp_path / "hf", config, tensors, shard=20_000)
    assert convert.main([f"--from_hf={tmp_path}/hf", f"--to={tmp_path}/run"]) == 0

    # The run holds what is made of the tensors in memory, and its configuration makes the same model.
    family = registry.family_of_config(config)
    model = family.model(config)
    expected = arrays.to_native(family, model, tensors)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    restored = restore_params(tmp_path / "run", abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    files = ["t5x_configs/runs/load_run.gin", str(tmp_path / "run" / "model.json")]
    loaded = gin_config.load(
        entry="espalier.launch.load.load_run:RunConfig",
        unused={"VOCABULARY": "None"},
        defaults=files,
    )
    run = loaded.entry()
    assert run.start_token == "auto"
    start = 0 if run.model.row.encodes else None
    assert step_dir.read_meta(tmp_path / "run")["start_token"] == start
    assert describe(run.model) == describe(model)
    assert run.model.config == model.config  # dtypes too

    flags = [f"--from={tmp_path}/run", f"--to_hf={tmp_path}/back", "--shard_size=20KB"]
    assert convert.main(flags) == 0
    same_bits(read_checkpoint(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    start = {"decoder_start_token_id": 0} if run.model.row.encodes else {}
    assert generation == {"bos_token_id": 7, "eos_token_id": [3, 5]} | start


def test_loading_into_memory_is_the_same(tmp_path):
    config, tensors = golden("gpt2_0")  # query, key and value are parts of one tensor
    write_checkpoint(tmp_path / "hf", config, tensors)
    family = registry.family_of_config(config)
    expected = arrays.to_native(family, family.model(config), tensors)
    model, params = load.load(tmp_path / "hf")
    assert describe(model) == describe(family.model(config))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16", "float32"}
    _, wide = load.load(tmp_path / "hf", dtype="float32")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), wide, expected
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint of a tiny Llama: its directory, config and tensors."""
    folder = tmp_path_factory.mktemp("llama") / "hf"
    config, tensors = golden("llama_0")
    write_checkpoint(folder, config, tensors)
    return folder, config, tensors


def test_an_adapter_beside_a_model_is_said_not_to_be_read(llama, tmp_path, capsys):
    folder, *_ = llama
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    assert convert.main([f"--from_hf={tmp_path}/hf", f"--to={tmp_path}/run"]) == 0
    assert "adapter_config.json, of an adapter that is not part" in capsys.readouterr().err


def test_dtype(llama, tmp_path):
    folder, _, tensors = llama
    assert convert.main([f"--from_hf={folder}", f"--to={tmp_path}/run", "--dtype=float32"]) == 0
    manifest = step_dir.read_manifest(step_dir.resolve(tmp_path / "run"))
    assert {entry.dtype for entry in manifest.arrays.values()} == {"float32"}
    assert "param_dtype" not in (tmp_path / "run" / "config.gin").read_text()  # float32 is default
    flags = [f"--from={tmp_path}/run", f"--to_hf={tmp_path}/back", "--dtype=bfloat16"]
    assert convert.main(flags) == 0
    same_bits(
        read_checkpoint(tmp_path / "back"), {k: x.astype(BFLOAT16) for k, x in tensors.items()}
    )
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_values_that_float16_cannot_hold(llama, tmp_path, capsys):
    _, config, tensors = llama
    tensors = dict(tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.where(np.eye(*tensors[name].shape) > 0, 1e6, 0).astype(BFLOAT16)
    write_checkpoint(tmp_path / "hf", config, tensors)
    flags = [f"--from_hf={tmp_path}/hf", f"--to={tmp_path}/run", "--dtype=float16"]
    assert convert.main(flags) == 2
    assert f"{name} has values beyond 65504" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert convert.main(flags[:2]) == 0
    flags = [f"--from={tmp_path}/run", f"--to_hf={tmp_path}/back", "--dtype=float16"]
    assert convert.main(flags) == 2
    assert f"{name} has values beyond 65504" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_values_that_are_not_finite_are_refused_by_name(llama, tmp_path, capsys, name, bad):
    _, config, tensors = llama
    values = tensors[name].copy()
    values[1, 2] = values[3, 0] = bad
    write_checkpoint(tmp_path / "hf", config, {**tensors, name: values})
    assert convert.main([f"--from_hf={tmp_path}/hf", f"--to={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/hf/" in error and f"safetensors: {name} has 2 values of" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), "extra"),
        (lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}), "model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(int)}), "int64"),
        (
            lambda t: t.update({"lm_head.weight": -t["model.embed_tokens.weight"]}),
            "lm_head.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_any_work(
    llama, tmp_path, capsys, monkeypatch, change, words
):
    _, config, tensors = llama
    tensors = dict(tensors)
    change(tensors)
    write_checkpoint(tmp_path / "hf", {**config, "tie_word_embeddings": True}, tensors)
    monkeypatch.setattr(Plan, "blocks", None)  # what reads weights
    assert convert.main([f"--from_hf={tmp_path}/hf", f"--to={tmp_path}/run"]) == 2
    assert words in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if path.name != "hf"]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "cohere2_moe_0",
            {"router_noise": 0.1},
            ("router_noise = 0.1", "Remove what says nothing"),
        ),
        (
            "llama_0",
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}, "rope_parameters": None},
            ("rope_scaling = ", "'longrope' is not supported, and default, linear", "use a model"),
        ),
        ("qwen3_moe_0", {"norm_topk_prob": "yes"}, ("norm_topk_prob = 'yes'", "true or false")),
        (
            "cohere2_moe_0",
            {"expert_selection_fn": "sparsemax"},
            ("expert_selection_fn = 'sparsemax'", "supported are softmax and sigmoid"),
        ),
    ],
)
def test_a_bad_config_is_one_error_with_file_key_and_remedy(tmp_path, capsys, name, change, words):
    config, tensors = golden(name)
    write_checkpoint(tmp_path / "hf", config | change, tensors)
    assert convert.main([f"--from_hf={tmp_path}/hf", f"--to={tmp_path}/run"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and f"{tmp_path}/hf/config.json (" in error
    assert all(word in error for word in words)
    assert not (tmp_path / "run").exists()


def test_a_shard_that_is_cut_short_is_named(llama, tmp_path, capsys):
    _, config, tensors = llama
    write_checkpoint(tmp_path / "hf", config, tensors, shard=1000)
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    assert convert.main([f"--from_hf={tmp_path}/hf", f"--to={tmp_path}/run"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and f"{shard} is damaged" in error and "Copy or download" in error


def test_a_router_that_no_family_has_is_one_error_on_the_nearest(tmp_path, capsys):
    config, tensors = golden("qwen3_moe_0")
    write_checkpoint(tmp_path / "hf", config, tensors)
    assert convert.main([f"--from_hf={tmp_path}/hf", f"--to={tmp_path}/run"]) == 0
    record = tmp_path / "run" / "model.json"
    model = json.loads(record.read_text())
    model["settings"]["moe.MoeMlp.score"] = "sigmoid"
    record.write_text(json.dumps(model))
    capsys.readouterr()
    for more in ([], ["--family=qwen3_moe"]):
        assert convert.main([f"--from={tmp_path}/run", f"--to_hf={tmp_path}/back", *more]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(error) == 1
        assert (
            "'qwen3_moe' model cannot have these settings: block.mlp.score is sigmoid" in error[0]
        )
    assert not (tmp_path / "back").exists()


def test_code_that_comes_with_a_checkpoint_is_not_run(llama, tmp_path, capsys):
    _, config, tensors = llama
    config = {**config, "model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    write_checkpoint(tmp_path / "hf", config, tensors)
    (tmp_path / "hf" / "own.py").write_text("raise SystemExit(99)")
    assert convert.main([f"--from_hf={tmp_path}/hf", f"--to={tmp_path}/run"]) == 2
    assert "auto_map" in capsys.readouterr().err


def test_a_target_that_exists_is_left_alone(llama, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    assert convert.main([f"--from_hf={llama[0]}", f"--to={tmp_path}/run"]) == 2
    assert "exists: give another directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_conversion_that_is_killed_leaves_nothing_that_counts(llama, tmp_path):
    code = (
        "import os, sys\n"
        "from espalier.launch.convert import __main__ as convert\n"
        "from espalier.model.hf.plan import Plan\n"
        "blocks, seen = Plan.blocks, []\n"
        "def die(self, path):\n"
        "    seen.append(path)\n"
        "    if len(seen) == 5: os.kill(os.getpid(), 9)\n"
        "    return blocks(self, path)\n"
        "Plan.blocks = die\n"
        "convert.main(sys.argv[1:])\n"
    )
    flags = [f"--from_hf={llama[0]}", f"--to={tmp_path}/run"]
    killed = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, timeout=300)
    assert killed.returncode == -9
    left = [path.name for path in tmp_path.iterdir()]
    assert ".run.partial" in left and "run" not in left
    with pytest.raises(FileNotFoundError):
        step_dir.resolve(tmp_path / ".run.partial")
    assert convert.main(flags) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_two_conversions_to_one_target(llama, tmp_path):
    with (
        target_folder.new_directory(str(tmp_path / "run")),
        pytest.raises(target_folder.ConvertError, match="Another process"),
    ):
        exchange.import_hf(llama[0], str(tmp_path / "run"))


def test_a_disk_without_room(llama, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert convert.main([f"--from_hf={llama[0]}", f"--to={tmp_path}/new/deep/run"]) == 2
    assert "free some space" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(step_dir, "write_file", full)
    assert convert.main([f"--from_hf={llama[0]}", f"--to={tmp_path}/run"]) == 2
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.undo()
    assert convert.main([f"--from_hf={llama[0]}", f"--to={tmp_path}/run"]) == 0
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert convert.main([f"--from={tmp_path}/run", f"--to_hf={tmp_path}/hf"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_damage_is_found_on_the_way_out(llama, tmp_path, capsys, monkeypatch):
    assert convert.main([f"--from_hf={llama[0]}", f"--to={tmp_path}/run"]) == 0
    files = [f for f in (tmp_path / "run" / "checkpoints").rglob("d/*") if f.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    flags = [f"--from={tmp_path}/run", f"--to_hf={tmp_path}/hf"]
    assert convert.main(flags) == 2
    assert "is damaged" in capsys.readouterr().err
    # Digests see it, too, where the files' checksums are not read.
    monkeypatch.setattr(exchange.manifest, "check_files", lambda *_: {})
    assert convert.main(flags) == 2
    assert "is damaged: array" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("params", ["raw", "ema", "auto"])
def test_a_trained_run_goes_out_and_comes_in_again(trained_run, tmp_path, params, capsys):
    flags = [f"--from={trained_run.path}", f"--to_hf={tmp_path}/hf", f"--params={params}"]
    assert convert.main(flags) == 0
    assert "config.json has no max_position_embeddings" in capsys.readouterr().err
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["model_type"], written["eos_token_id"], written["pad_token_id"]) == (
        "cohere",
        1,
        0,
    )
    ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert ends == {"eos_token_id": 1, "pad_token_id": 0}
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| objective | language modelling |" in card and "`CohereForCausalLM`" in card
    assert ("(an average of the trained parameters)" in card) == (params != "raw")
    model, values = load.load(tmp_path / "hf")
    expected = trained_run.params["raw" if params == "raw" else "ema"]
    jax.tree.map(np.testing.assert_array_equal, values, expected)
    if params == "raw":
        tokens = jnp.arange(6)[None]
        found = model.apply({"params": values}, tokens)
        np.testing.assert_array_equal(found, trained_run.model.apply({"params": expected}, tokens))


def test_a_family_that_cannot_express_the_model(trained_run, tmp_path, capsys):
    flags = [f"--from={trained_run.path}", f"--to_hf={tmp_path}/hf", "--family=llama"]
    assert convert.main(flags) == 2
    assert "'llama'" in capsys.readouterr().err
    assert convert.main([*flags[:2], "--family=lama"]) == 2
    assert "choose from" in capsys.readouterr().err


def test_an_imported_run_is_scored(llama, tmp_path, command):
    folder, config, tensors = llama
    assert convert.main([f"--from_hf={folder}", f"--to={tmp_path}/run", "--dtype=float32"]) == 0
    (tmp_path / "x.jsonl").write_text('{"tokens": [5, 9, 2, 11]}\n')
    files = [f"--inputs={tmp_path}/x.jsonl", f"--output={tmp_path}/y.jsonl"]
    flags = ["--gin.config.TransformerConfig.dtype='float32'", f"--checkpoint={tmp_path}/run"]
    assert command("score", *flags, *files) == 0
    found = json.loads((tmp_path / "y.jsonl").read_text())["logprobs"]
    family = registry.family_of_config(config)
    model = family.model({**config, "torch_dtype": "float32", "dtype": "float32"})
    params = arrays.to_native(family, model, {k: x.astype(np.float32) for k, x in tensors.items()})
    logits = model.apply({"params": params}, jnp.array([[5, 9, 2]]))
    expected = jax.nn.log_softmax(logits[0])[np.arange(3), np.array([9, 2, 11])]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--from_hf=a", "--to_hf=b"],
        ["--from=a", "--to=b"],
        ["--from_hf=a", "--from_gguf=b", "--to=c"],
        ["--from_hf=a"],
        ["--from_hf=a", "--to=b", "--params=raw"],
        ["--from=a", "--to_hf=b", "--shard_size=much"],
    ],
)
def test_flags_that_do_not_go_together(flags, capsys):
    try:
        status = convert.main(flags)
    except SystemExit as ended:  # of argparse
        status = ended.code
    assert status == 2
    assert "error:" in capsys.readouterr().err


MEMORY = """
import sys
import jax
from espalier.launch.convert import exchange
from espalier.launch.load.load_run import RunConfig

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

jax.device_put(0.0).block_until_ready()
exchange.import_hf(sys.argv[1], sys.argv[3])  # a tiny one: what is loaded on first use
before = status("VmHWM")
exchange.import_hf(sys.argv[2], sys.argv[4])
print(status("VmHWM") - before)
"""


def test_memory_is_bounded_by_the_largest_array(llama, tmp_path):
    config = {
        **llama[1],
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    family = registry.family_of_config(config)
    shapes = family.shapes(family.model(config))
    tensors = {
        name: np.broadcast_to(np.ones((), BFLOAT16), shape) for name, shape in shapes.items()
    }
    write_checkpoint(tmp_path / "hf", config, tensors)
    total = sum(x.size * 2 for x in tensors.values())
    largest = 12 * 1024 * 4096 * 2
    assert total > 400e6 and largest < 0.25 * total
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MEMORY,
            str(llama[0]),
            f"{tmp_path}/hf",
            f"{tmp_path}/1",
            f"{tmp_path}/2",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    growth = int(done.stdout.splitlines()[-1])
    # One array at a time, and what does not grow with it (buffers of readers and writers, the allocator's slack, which
    # is some 30 MiB); two of the largest at once would be 192 MiB.
    slack = 64 * 2**20
    assert slack < largest and growth < largest + slack, (growth / largest, total)


SIZES = {"vocab_size": 32, "num_layers": 2, "embed_dim": 16, "num_heads": 2, "mlp_dim": 8}
P = functools.partial
MODELS = {
    "plain": Transformer(config=TransformerConfig(**SIZES)),
    "two norms": Transformer(
        config=TransformerConfig(**SIZES, layer_pattern=("sliding", "full"), sliding_window=4),
        block=P(
            Block,
            attention=P(
                Attention,
                rope=Rope(base=5e5, scaling="llama3", factor=8.0),
                qk_norm=P(RMSNorm, eps=1e-3, scale_dims=2),
                softcap=30.0,
            ),
            mlp=P(GatedMlp, activation="gelu"),
            norm=P(RMSNorm, eps=1e-5),
        ),
        norm=RMSNorm,
        tie_embeddings=False,
        logit_softcap=30.0,
    ),
    "gpt2": Transformer(
        config=TransformerConfig(**SIZES, dtype="bfloat16", scan_layers=False),
        block=P(
            Block,
            attention=P(Attention, rope=None, qkv_bias=True),
            mlp=P(Mlp, use_bias=True),
            norm=P(LayerNorm, use_bias=True),
        ),
        norm=P(LayerNorm, use_bias=True, eps=1e-6),
        position_embed=P(Positions, num_positions=9),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_gin_makes_the_model_that_was_written(tmp_path, name):
    model = MODELS[name]
    text = gin_writer.write(model, {"START_TOKEN": None, "ADD_BOS": True})
    (tmp_path / "config.gin").write_text(text)
    files = ["t5x_configs/runs/load_run.gin", str(tmp_path / "config.gin")]
    config = gin_config.load(
        entry="espalier.launch.load.load_run:RunConfig",
        unused={"VOCABULARY": "None"},
        defaults=files,
    )
    run = config.entry()
    assert (run.start_token, run.add_bos) == (None, True)
    assert run.model.config == model.config
    assert describe(run.model) == describe(model)
    # And of the parameters, by which settings that change shapes alone are seen.
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    there, here = (jax.eval_shape(m.init, jax.random.key(0), tokens) for m in (run.model, model))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), there, here)
    )


def test_settings_that_gin_cannot_say():
    config = TransformerConfig(**SIZES)
    with pytest.raises(gin_writer.UnwritableModelError, match=r"model\.norm .* cannot be imported"):
        gin_writer.write(Transformer(config=config, norm=lambda name: RMSNorm(name=name)))
    with pytest.raises(gin_writer.UnwritableModelError, match=r"model\.embed_scale .* no form"):
        gin_writer.write(Transformer(config=config, embed_scale=np.float32(2)))
    assert "remat = 'dots'" in gin_writer.write(
        Transformer(config=dataclasses.replace(config, remat="dots"))
    )
