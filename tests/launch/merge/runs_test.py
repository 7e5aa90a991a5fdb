"""Runs are merged into runs that every command reads: of any family, however their layers are stored."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.convert import __main__ as convert
from espalier.launch.convert import model_card
from espalier.launch.load import load_run
from espalier.launch.merge import __main__ as merge
from espalier.launch.merge import models, output, run
from espalier.launch.papers.aya_expanse import lexicon, small_stage
from espalier.model.hf import registry
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
    family = registry.family_of_config(config)
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
    family = registry.family_of_config(config)
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
    family = registry.family_of_config(config)
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

    # In another order than the pattern's, layers keep their kinds.
    assert merge.main([*flags(1, count)[:1], f"--out={tmp_path}/run_longer"]) == 0
    config = models.NativeModel(f"{tmp_path}/run_longer").model.config
    names = model.config.kind_names
    assert config.kind_names == (*names, *names[1:])
    longer = models.NativeModel(f"{tmp_path}/run_longer")
    there = models.NativeModel(f"{tmp_path}/run_b")
    for layer in range(1, count):
        read = (
            there.read(f"layers/{layer}/mlp/up/kernel"),
            longer.read(f"layers/{count + layer - 1}/mlp/up/kernel"),
        )
        assert np.array_equal(*(one(0, 10) for one in read))
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


def test_the_small_experiment_goes_as_far_as_the_development_set_says(
    tmp_path, branches, monkeypatch
):
    for code in lexicon.LANGUAGES:
        row = {"text": f"{code} a", "targets": "b c"}
        (tmp_path / f"dev_{code}.jsonl").write_text(json.dumps(row) + "\n")
    base, first, second = branches.folders[:3]
    words = [f"--requests={tmp_path}", f"--base={base}", "--runs", first, second]

    def made(name, shares):
        monkeypatch.setattr(small_stage, "STRENGTHS", shares)
        to = tmp_path / name
        assert small_stage.main(["strength", *words, f"--to={to}"]) == 0
        found = small_stage.read(to, small_stage.STRENGTH)
        assert [share for share, _ in found["losses"]] == list(shares)
        assert found["best"] == min(found["losses"], key=lambda pair: pair[1])[0]
        return stored(str(to), "token_embed/embedding"), dict(map(tuple, found["losses"]))

    start, a, b = (stored(str(x), "token_embed/embedding") for x in (base, first, second))
    sums = (a - start) + (b - start)
    losses = {}
    for share in (0.5, 0.8, 1.0):
        out, loss = made(f"at_{share}", (share,))
        np.testing.assert_allclose(out, start + share * sums, atol=1e-6)
        losses |= loss
    out, together = made("best", tuple(losses))
    assert together == pytest.approx(losses)
    np.testing.assert_allclose(out, start + min(losses, key=losses.get) * sums, atol=1e-6)


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


KILLED = """
import os, signal, sys
from espalier.launch.merge import output, run

actual, begun = output.Workers.run, []

def counted(self, x, reads):
    begun.append(x.name)
    if len(begun) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return actual(self, x, reads)

output.Workers.run = counted
run.merge_all(*sys.argv[1:3])
"""


def test_a_merge_of_runs_that_is_killed_twice_goes_on(branches, tmp_path, monkeypatch):
    base, *names = branches.folders[:3]
    entries = [{"model": name, "parameters": {"weight": 1, "density": 0.5}} for name in names]
    config = configured(tmp_path, merge_method="ties", base_model=base, models=entries)
    config, actual, begun = config.removeprefix("--config="), output.Workers.run, []

    def counted(self, x, reads):
        begun.append(x.name)
        return actual(self, x, reads)

    monkeypatch.setattr(output.Workers, "run", counted)
    whole, out, partial = (str(tmp_path / name) for name in ("whole", "out", ".out.partial"))
    run.merge_all(config, whole)
    every = begun[:]
    listed = []
    for tensors in (8, 6):
        words = [sys.executable, "-c", KILLED, config, out, str(tensors)]
        assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
        assert not os.path.exists(out)
        listed.append(len(pathlib.Path(partial, "merge.progress").read_text().splitlines()))
    assert 1 < listed[0] < listed[1]
    begun.clear()
    run.merge_all(config, out)
    assert 0 < len(begun) < len(every) - 4 and begun == every[-len(begun) :]
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))
    steps = [step_dir.resolve(path) for path in (out, whole)]
    one, other = map(step_dir.read_manifest, steps)
    assert one.arrays == other.arrays
    for name in one.arrays:
        ours, theirs = (StoredArray(step, name).read() for step in steps)
        assert ours.tobytes() == theirs.tobytes(), name
    for name in ("config.gin", "model.json", "merge.json", "checkpoints/0/meta.json"):
        ours, theirs = (pathlib.Path(path, name).read_bytes() for path in (out, whole))
        assert ours == theirs, name
    # All checksums are those of the files.
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), branches.params[0])
    restore_params(out, params)


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


def test_the_losses_of_a_search_of_another_method_are_those_of_its_merges(
    tmp_path, branches, command, capsys
):
    base, *runs = branches.folders[:3]
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "import os, sys\n" * 4}) + "\n")
    ties = {"merge_method": "ties", "base_model": base, "parameters": {"density": 0.3}}
    (tmp_path / "ties.yml").write_text(json.dumps(ties))
    models_ = [f"{name}={run}" for name, run in zip("ab", runs, strict=True)]
    flags = ["--models", *models_, f"--held_out=code={tmp_path}/x.jsonl", "--budget=1"]
    more = (f"--merge={tmp_path}/ties.yml", f"--out={tmp_path}/search")
    assert command("merge search", *flags, *more) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "search" / "search.json").read_text())
    entries = [{"model": run, "parameters": {"weight": 0.5}} for run in runs]
    text = json.dumps({**ties, "models": entries})
    assert command("merge", f"--config={text}", f"--out={tmp_path}/equal") == 0
    # A model alone is itself, without the densities and weights of the method.
    for run_, trial in (
        (tmp_path / "equal", found["equal"]),
        *zip(runs, found["alone"].values(), strict=True),
    ):
        output = tmp_path / "y.jsonl"
        output.unlink(missing_ok=True)
        files = (f"--inputs={tmp_path}/x.jsonl", f"--output={output}")
        assert command("score", *files, f"--checkpoint={run_}") == 0
        row = json.loads(output.read_text())
        loss = -row["sum"] / len(row["logprobs"])
        assert trial["losses"]["code"] == pytest.approx(loss, abs=1e-4)


def test_the_example_of_the_docs_runs(branches, command, tmp_path):
    text = pathlib.Path("docs/use/merging.md").read_text()
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
