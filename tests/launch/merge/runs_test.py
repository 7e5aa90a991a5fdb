"""Runs are merged into runs that every command reads: of any family, however their layers are stored."""

import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.convert import __main__ as convert
from espalier.launch.convert import model_card
from espalier.launch.load import load_run
from espalier.launch.merge import __main__ as merge
from espalier.launch.merge import models
from espalier.launch.papers.aya_expanse import lexicon, small_stage
from espalier.model.hf import families
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.checkpoints.restore_params import restore_params
from tests.launch.merge import folders
from tests.model.hf import arrays

GOLDENS = pathlib.Path(__file__).parents[2] / "model" / "hf" / "goldens" / "parity"


def golden(name):
    """config.json and tensors of a tiny model of the family."""
    with np.load(GOLDENS / f"{name}.npz") as case:
        config = json.loads(str(case["config"]))
        found = {k.partition("/")[2]: case[k] for k in case.files if k.startswith("tensor/")}
    family = families.family_of_config(config)
    names = family.match(family.model(config), {k: x.shape for k, x in found.items()})
    return config, {k: found[names[k]] for k in family.shapes(family.model(config))}


def make(root, name):
    """Writes two models as folders 'a' and 'b' and as runs 'run_a' and 'run_b'; returns config.json and both's tensors."""
    config, first = golden(name)
    second = folders.drawn(1, {k: x.shape for k, x in first.items()}, around=first)
    for letter, tensors in (("a", first), ("b", second)):
        folders.write(root / letter, tensors, config)
        flags = [f"--from_hf={root}/{letter}", f"--to={root}/run_{letter}"]
        assert convert.main(flags) == 0
    return config, first, second


def configured(root, *, prefix="", **settings):
    path = root / f"{prefix}merge.yml"
    path.write_text(json.dumps(settings).replace('"@', f'"{root}/{prefix}'))
    return f"--config={path}"


EMBED = "model.embed_tokens.weight"
# Of families, and a part of the names of their MLPs in Hugging Face's layout.
FAMILIES = {"cohere_1": "mlp", "t5_0": "DenseReluDense", "mixtral_0": "block_sparse_moe"}


def weighted(name):
    chosen = [{"filter": FAMILIES[name], "value": [0.5, 2]}, {"value": 1}]
    entries = [
        {"model": "@a", "parameters": {"weight": [1, 0.2]}},
        {"model": "@b", "parameters": {"weight": chosen}},
    ]
    return {"merge_method": "linear", "models": entries}


def stored(run, name):
    return StoredArray(step_dir.resolve(run), f"params/{name}").read()


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_are_merged_like_the_folders_that_they_were_made_of(tmp_path, name):
    config, first, second = make(tmp_path, name)
    for prefix in ("", "run_"):
        flags = [
            configured(tmp_path, prefix=prefix, **weighted(name)),
            f"--out={tmp_path}/{prefix}out",
        ]
        assert merge.main(flags) == 0
    family = families.family_of_config(config)
    model = family.model(config)
    expected = arrays.to_native(family, model, folders.read(tmp_path / "out"))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    restored = restore_params(tmp_path / "run_out", abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    meta = step_dir.read_meta(tmp_path / "run_out")
    assert meta["made_of"] == ["run_a, step 0", "run_b, step 0"]
    assert meta["merged"]["configuration"]["merge_method"] == "linear"
    assert "made of run_a, step 0; run_b, step 0" in list(model_card._parents({}, meta))
    if name == "cohere_1":
        _check_logits(tmp_path, model, config, first, second)


def _check_logits(root, model, config, first, second):
    """The output's logits are those of weights that were averaged by hand."""
    family = families.family_of_config(config)
    layers = config["num_hidden_layers"]

    def mean(name):
        layer = int(name.split(".")[2]) if ".layers." in name else layers * (name != EMBED)
        u = min(1.0, layer / max(1, layers - 1))
        a = 1 + u * (0.2 - 1)
        b = 0.5 + u * 1.5 if "mlp" in name else 1.0
        return ((a * first[name].astype(np.float64) + b * second[name]) / (a + b)).astype(
            np.float32
        )

    by_hand = arrays.to_native(family, model, {name: mean(name) for name in first})
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), by_hand)
    restored = restore_params(root / "run_out", abstract)
    tokens = jnp.arange(12).reshape(1, 12) % config["vocab_size"]
    logits = [jax.jit(model.apply)({"params": params}, tokens) for params in (by_hand, restored)]
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_slices_of_t5_are_a_model_that_is_read(tmp_path):
    config, tensors = golden("t5_0")
    assert config.get("num_decoder_layers") is None
    folders.write(tmp_path / "a", tensors, config)

    def slices(*ranges):
        return {"slices": [{"sources": [{"model": "@a", "layer_range": x}]} for x in ranges]}

    modules = {"encoder": slices([1, 2], [0, 2]), "decoder": slices([1, 2])}
    flags = configured(tmp_path, merge_method="passthrough", modules=modules)
    assert merge.main([flags, f"--out={tmp_path}/out"]) == 0
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (made["num_layers"], made["num_decoder_layers"]) == (3, 1)
    out = folders.read(tmp_path / "out")
    origins = {"encoder": (1, 0, 1), "decoder": (1,)}
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    for stack, layers in origins.items():
        np.testing.assert_array_equal(
            out.pop(f"{stack}.block.0.{bias}"), tensors[f"{stack}.block.0.{bias}"]
        )
        for to, layer in enumerate(layers):
            for name in [x for x in out if x.startswith(f"{stack}.block.{to}.")]:
                rest = name.split(".", 3)[3]
                np.testing.assert_array_equal(out[name], tensors[f"{stack}.block.{layer}.{rest}"])
    assert not [name for name in out if "relative_attention_bias" in name]
    assert convert.main([f"--from_hf={tmp_path}/out", f"--to={tmp_path}/run"]) == 0


def test_layers_of_runs_are_stacked(tmp_path, capsys):
    make(tmp_path, "cohere2_0")
    model = models.NativeModel(f"{tmp_path}/run_a").model
    period, count = len(model.config.layer_pattern), model.config.num_layers
    assert period > 1

    def flags(first, last):
        source = {"model": "@a", "layer_range": [0, count]}
        more = {"model": "@b", "layer_range": [first, last]}
        parts = [{"sources": [source]}, {"sources": [more]}]
        config = configured(tmp_path, prefix="run_", merge_method="passthrough", slices=parts)
        return [config, f"--out={tmp_path}/run_out"]

    assert merge.main(flags(1, count)) == 2
    assert "another kind of attention" in capsys.readouterr().err
    assert not (tmp_path / "run_out").exists()
    assert merge.main(flags(count - period, count)) == 0
    made = models.NativeModel(f"{tmp_path}/run_out").model
    assert made.config.num_layers == count + period
    name = f"layers/block_{period - 1}/mlp/up/kernel"
    a, b, out = (stored(f"{tmp_path}/run_{x}", name) for x in ("a", "b", "out"))
    assert np.array_equal(out, np.concatenate([a, b[-1:]]))


@pytest.mark.parametrize("method", ["linear", "multislerp"])
def test_a_merge_of_the_small_experiment_counts_a_run_that_is_given_twice(tmp_path, method):
    make(tmp_path, "llama_0")
    a, b = (f"{tmp_path}/run_{x}" for x in "ab")
    made = {}
    for name, runs in (("twice", [b, a, b]), ("once", [b, a])):
        to = tmp_path / "made" / name
        assert small_stage.main(["merge", f"--method={method}", "--runs", *runs, f"--to={to}"]) == 0
        made[name] = stored(str(to), "token_embed/embedding").astype(np.float64)
    one, other = (stored(x, "token_embed/embedding").astype(np.float64) for x in (a, b))
    if method == "linear":
        np.testing.assert_allclose(made["twice"], (one + 2 * other) / 3, atol=1e-6)
    assert np.abs(made["twice"] - other).sum() < 0.8 * np.abs(made["once"] - other).sum()


def test_the_small_experiment_merges_with_the_weights_that_it_searched(
    tmp_path, branches, monkeypatch
):
    monkeypatch.setattr(small_stage, "BUDGET", 3)
    for code in lexicon.LANGUAGES:
        row = {"text": f"{code} a", "targets": "b c"}
        (tmp_path / f"dev_{code}.jsonl").write_text(json.dumps(row) + "\n")
    first, second = branches.folders[1:3]
    search, to = tmp_path / "search", tmp_path / "searched"
    runs = ("--runs", first, second, first)
    assert small_stage.main(["search", f"--requests={tmp_path}", *runs, f"--to={search}"]) == 0
    best = small_stage.read(search, "search.json")["best"]
    assert {*best["losses"]} == {*lexicon.LANGUAGES}
    assert small_stage.main(["searched", f"--search={search}", f"--to={to}"]) == 0
    a, b, out = (stored(str(x), "token_embed/embedding") for x in (first, second, to))
    one, other, again = best["weights"]
    mean = ((one + again) * a + other * b) / (one + other + again)
    np.testing.assert_allclose(out, mean, atol=1e-6)


def test_low_rank_runs(tmp_path, command, capsys):
    make(tmp_path, "llama_0")
    for letter in "ab":
        flags = (f"--checkpoint={tmp_path}/run_{letter}", f"--to={tmp_path}/low_{letter}")
        assert command("upcycle factorise", *flags, "--rank=0.5") == 0
    settings = {"merge_method": "task_arithmetic", "base_model": "@a", "out_dtype": "bfloat16"}
    entries = [{"model": "@b", "parameters": {"weight": 0.5}}]
    config = configured(tmp_path, prefix="low_", models=entries, **settings)
    assert merge.main([config, f"--out={tmp_path}/low_out"]) == 0
    assert "are stored as factors U and V" in capsys.readouterr().err
    made = models.NativeModel(f"{tmp_path}/low_out")
    factors = [path for path in made.arrays if path.endswith("up/down/kernel") or "factor" in path]
    for path in factors or list(made.arrays):
        a, b, out = (
            stored(f"{tmp_path}/low_{x}", path).astype(np.float64) for x in ("a", "b", "out")
        )
        np.testing.assert_allclose(out, a + 0.5 * (b - a), rtol=2**-8, atol=1e-6)
    assert made.model.config.param_dtype == "bfloat16"


def test_the_order_of_runs_of_two_dtypes_does_not_matter(tmp_path):
    config, first = golden("llama_0")
    folders.write(tmp_path / "a", first, config)
    for letter, dtype in (("a", "bfloat16"), ("b", "float32")):
        flags = [f"--from_hf={tmp_path}/a", f"--to={tmp_path}/run_{letter}", f"--dtype={dtype}"]
        assert convert.main(flags) == 0
    loaded = []
    for order in ("ab", "ba"):
        entries = [{"model": f"@{x}", "parameters": {"weight": 0.5}} for x in order]
        flags = configured(tmp_path, prefix="run_", merge_method="linear", models=entries)
        assert merge.main([flags, f"--out={tmp_path}/out_{order}"]) == 0
        with load_run.config_of(f"{tmp_path}/out_{order}").load(f"{tmp_path}/out_{order}") as run:
            loaded.append((run.model.config, jax.device_get(run.params)))
    (config, params), (other_config, other_params) = loaded
    assert config == other_config and config.param_dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, params, other_params)
    a, b = (stored(f"{tmp_path}/run_{x}", "token_embed/embedding") for x in "ab")
    mean = (a.astype(np.float32) + b) / 2
    np.testing.assert_allclose(params["token_embed"]["embedding"], mean, rtol=1e-6)


def test_a_merged_run_is_scored_and_unlike_runs_are_refused(tmp_path, branches, command, capsys):
    names = branches.folders[:2]
    entries = [{"model": str(name), "parameters": {"weight": 1}} for name in names]
    config = configured(tmp_path, merge_method="linear", models=entries)
    assert command("merge", config, f"--out={tmp_path}/out", "--shard_size=1MB") == 2
    assert "--shard_size is of files of safetensors" in capsys.readouterr().err
    assert command("merge", config, f"--out={tmp_path}/out") == 0
    a, b, out = (stored(x, "token_embed/embedding") for x in (*names, tmp_path / "out"))
    np.testing.assert_allclose(out, (a + b) / 2, atol=1e-7)
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "import os, sys\n" * 4}) + "\n")
    files = (f"--inputs={tmp_path}/x.jsonl", f"--output={tmp_path}/y.jsonl")
    assert command("score", *files, f"--checkpoint={tmp_path}/out") == 0
    assert np.isfinite(json.loads((tmp_path / "y.jsonl").read_text())["sum"])
    _search(tmp_path, names, command, capsys)
    make(tmp_path, "llama_0")
    entries = [{"model": "@run_a", "parameters": {"weight": 1}}, *entries]
    for unlike, message in (
        (entries[:2], "are not of one model"),
        ([*entries[1:], {"model": "@a", "parameters": {"weight": 1}}], "convert one of them first"),
    ):
        config = configured(tmp_path, merge_method="linear", models=unlike)
        capsys.readouterr()
        assert command("merge", config, f"--out={tmp_path}/other") == 2
        assert message in capsys.readouterr().err
    for key, value in (("tokenizer_source", "union"), ("chat_template", "chatml")):
        config = configured(tmp_path, merge_method="linear", models=entries[1:], **{key: value})
        capsys.readouterr()
        assert command("merge", config, f"--out={tmp_path}/other") == 2
        assert "of runs are not changed" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def _search(root, runs, command, capsys):
    """The losses of a search are those of the merge that it writes, scored by itself; it goes on where it was."""
    models_ = [f"{name}={run}" for name, run in zip("ab", runs, strict=True)]
    files = [f"code={root}/x.jsonl", f"again={root}/x.jsonl"]
    flags = ["--models", *models_, "--held_out", *files, f"--out={root}/search"]
    capsys.readouterr()
    assert command("merge search", *flags, "--budget=4", "--delta=0") == 0
    printed = capsys.readouterr()
    assert "reading" in printed.err and "trial 1, weights 0.5 0.5: code" in printed.err
    assert "equal weights" in printed.out and "b alone" in printed.out
    found = json.loads((root / "search" / "search.json").read_text())
    rows = (root / "search" / "trials.jsonl").read_text().splitlines()
    tried = [json.loads(row)["weights"] for row in rows[1:]]
    assert tried[:3] == [[0.5, 0.5], [1, 0], [0, 1]] and set(found["without"]) <= {"a", "b"}
    assert command("merge", f"--config={root}/search/merge.yml", f"--out={root}/best") == 0
    output = root / "best.jsonl"
    assert (
        command(
            "score", f"--inputs={root}/x.jsonl", f"--output={output}", f"--checkpoint={root}/best"
        )
        == 0
    )
    row = json.loads(output.read_text())
    loss = -row["sum"] / len(row["logprobs"])
    assert found["best"]["losses"] == pytest.approx({"code": loss, "again": loss}, abs=1e-4)
    assert command("merge search", *flags, "--budget=4", "--delta=0") == 0
    assert (root / "search" / "trials.jsonl").read_text().splitlines() == rows


def test_the_example_of_the_docs_runs(branches, command, tmp_path):
    text = pathlib.Path("docs/merging.md").read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    config, commands = blocks[0], blocks[1]
    assert config[0] == "yaml" and commands[0] == ""
    seed, python, markup = branches.folders[:3]
    places = {"/tmp/merge.yml": str(tmp_path / "merge.yml"), "/tmp/espalier_seed": seed}
    places |= {"/tmp/espalier_python": python, "/tmp/espalier_markup": markup}
    places |= {"/tmp/espalier_merged": str(tmp_path / "merged")}

    def here(text):
        for place, path in places.items():
            text = text.replace(place, path)
        assert "/tmp/espalier" not in text
        return text

    (tmp_path / "merge.yml").write_text(here(config[1]))
    lines = here(commands[1]).strip().splitlines()
    assert len(lines) == 3
    for line in lines:
        name, *words = shlex.split(line.removeprefix("espalier "))
        more = ["--max_new_tokens=2"] if name == "generate" else []
        assert command(name, *words, *more) == 0, line
    base, first, second = branches.params[:3]
    expected = jax.tree.map(lambda b, x, y: b + 0.6 * ((x - b) + (y - b)), base, first, second)
    for name in ("token_embed/embedding",):
        leaf = expected
        for key in name.split("/"):
            leaf = leaf[key]
        np.testing.assert_allclose(stored(places["/tmp/espalier_merged"], name), leaf, atol=1e-6)
