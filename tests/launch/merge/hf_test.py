"""Hugging Face folders are merged as configured, the same in any layout, or refused before anything is written."""

import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest

from espalier.common.bars import Bar
from espalier.data.tokenizers import hf_tokenizer
from espalier.launch.merge import __main__ as merge
from espalier.launch.merge import config_file, models, output, plan, run
from espalier.launch.merge.settings import MergeError
from espalier.model.hf.files.safetensors_files import INDEX, SafetensorsReader
from tests.launch.merge import folders
from tests.launch.merge.folders import BF16

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "files.npz"  # of make_files.py beside it
GOLDEN_CASES = json.loads(np.load(GOLDENS)["cases"].tobytes())
EMBED, LAST = "model.embed_tokens.weight", "model.norm.weight"


def configured(root, **settings):
    """Writes a configuration of models below `root`, whose paths are relative in it."""
    text = json.dumps(settings).replace('"@', f'"{root}/')
    (root / "merge.yml").write_text(text)
    return str(root / "merge.yml")


def linear(root, weights=(1, 3), **settings):
    entries = [
        {"model": f"@{name}", "parameters": {"weight": weight}}
        for name, weight in zip("abcdef", weights, strict=False)
    ]
    return configured(root, merge_method="linear", models=entries, **settings)


def merged(root, config, name="out", **flags):
    run.merge_all(config, str(root / name), **flags)
    return folders.read(root / name)


def jobs(root, config):
    """The merge of each tensor, by name, without reading weights."""
    (document,) = config_file.read(config)
    opened = {path: models.open_model(path) for path in document.models()}
    return {x.name: x for x in plan.Planner(document, opened, seed=0).plan()}


def test_linear_is_the_mean_in_any_layout(tmp_path, capsys):
    a, b = folders.pair(tmp_path)
    folders.write(tmp_path / "sharded" / "b", b, shard=900)
    shutil.copytree(tmp_path / "a", tmp_path / "sharded" / "a")
    config = linear(tmp_path)
    out = merged(tmp_path, config)
    assert {name: x.shape for name, x in out.items()} == folders.shapes()
    for name in a:
        np.testing.assert_allclose(out[name], (a[name] + 3 * b[name]) / 4, atol=1e-7)
    flags = [f"--config={linear(tmp_path / 'sharded')}", "--shard_size=1KB", "--block_bytes=1"]
    assert merge.main([*flags, f"--out={tmp_path}/again"]) == 0
    again = folders.read(tmp_path / "again")
    assert all(np.array_equal(out[name], again[name]) for name in {*out, *again})
    names = sorted(os.listdir(tmp_path / "again"))
    count = sum(name.endswith(".safetensors") for name in names)
    assert count > 3 and INDEX in names and {"README.md", "config.json", "merge.json"} < {*names}
    total = json.loads((tmp_path / "again" / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(x.nbytes for x in out.values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# out" in card and "- `a`\n- `b`" in card and "merge_method: linear" in card
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["made_of"] == ["a", "b"]
    printed = capsys.readouterr()
    assert "linear of 2 models, 1,904 parameters" in printed.out
    assert "have a correlation of" in printed.err  # they were drawn apart
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_configurations_merge_as_in_mergekit(tmp_path, case):
    golden = np.load(GOLDENS)
    for model in "abc":
        prefix = f"inputs/{model}/"
        tensors = {x.removeprefix(prefix): golden[x] for x in golden.files if x.startswith(prefix)}
        folders.write(tmp_path / model, tensors, json.loads(golden["config"].tobytes()))
    (tmp_path / "merge.yml").write_text(GOLDEN_CASES[case].replace("@", f"{tmp_path}/"))
    out = merged(tmp_path, str(tmp_path / "merge.yml"))
    expected = [x for x in golden.files if x.startswith(f"{case}/")]
    assert {f"{case}/{name}" for name in out} == {*expected}
    for name, values in out.items():
        np.testing.assert_allclose(values, golden[f"{case}/{name}"], atol=2e-6, err_msg=name)


def test_random_methods_depend_on_the_seed_alone(tmp_path):
    folders.pair(tmp_path, count=3)
    entries = [{"model": f"@{name}", "parameters": {"weight": 0.5}} for name in "bc"]
    settings = {"base_model": "@a", "parameters": {"density": 0.5}}
    config = configured(tmp_path, merge_method="dare_ties", models=entries, **settings)
    first = merged(tmp_path, config, seed=3)
    again = merged(tmp_path, config, "again", seed=3, shard_bytes=500, block_bytes=1, threads=3)
    other = merged(tmp_path, config, "other", seed=4)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", ["dare_linear", "della"])
def test_what_is_drawn_does_not_depend_on_where_the_models_are(tmp_path, monkeypatch, method):
    folders.pair(tmp_path / "here", count=3)
    for name in "abc":
        with SafetensorsReader(tmp_path / "here" / name) as reader:
            tensors = {x: reader.read(x) for x in reader.tensors}
        folders.write(tmp_path / "there" / name, tensors, shard=900)

    def drawn(name, *, models="bc", root=f"{tmp_path}/here", base="a", **flags):
        entries = [
            {"model": f"{root}/{x}", "parameters": {"weight": 0.5, "density": 0.5}} for x in models
        ]
        fields = {"merge_method": method, "models": entries, "base_model": f"{root}/{base}"}
        return merged(tmp_path, configured(tmp_path, **fields), name, **flags)

    monkeypatch.chdir(tmp_path / "here")
    first = drawn("first")
    same = {
        "copied and in other files": drawn("copied", root=f"{tmp_path}/there"),
        "relative": drawn("relative", root="."),
        "in another order": drawn("order", models="cb"),
    }
    for name, other in same.items():
        assert all(np.array_equal(first[x], other[x]) for x in first), name
    assert any(not np.array_equal(first[x], y) for x, y in drawn("seed", seed=1).items())


def test_stages_draw_the_same_in_any_folder(tmp_path):
    folders.pair(tmp_path, count=3)
    settings = "parameters: {density: 0.5, weight: 1}"
    text = f"""
name: stage
merge_method: dare_linear
base_model: {tmp_path}/a
models: [{{model: {tmp_path}/b}}]
{settings}
---
merge_method: dare_linear
base_model: {tmp_path}/a
models: [{{model: stage}}, {{model: {tmp_path}/c}}]
{settings}
"""
    (tmp_path / "merge.yml").write_text(text)
    outs = [merged(tmp_path, str(tmp_path / "merge.yml"), name) for name in ("one", "two/deep")]
    assert all(np.array_equal(outs[0][x], outs[1][x]) for x in outs[0])


def test_models_that_differ_in_one_late_value_draw_apart(tmp_path):
    sizes = folders.shapes(
        vocab=600
    )  # of 8 values, so that a digest of the first ones is of a part
    tensors = folders.drawn(0, sizes)
    for name in "abc":
        tensors[EMBED][-1, -1] += 1
        folders.write(tmp_path / name, tensors)
    config = configured(
        tmp_path,
        merge_method="dare_linear",
        base_model="@a",
        models=[{"model": "@b"}, {"model": "@c"}],
        parameters={"weight": 1, "density": 0.5},
    )
    keys = jobs(tmp_path, config)[EMBED].job.models
    assert len(set(keys)) == 2


@pytest.mark.parametrize("other", ["./a", "a/", "../{root}/a", "link", "copy", "sharded"])
def test_a_model_under_two_paths_is_refused(tmp_path, monkeypatch, capsys, other):
    a, _ = folders.pair(tmp_path)
    (tmp_path / "link").symlink_to("a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    folders.write(tmp_path / "sharded", a, shard=900)
    monkeypatch.chdir(tmp_path)
    other = other.format(root=tmp_path.name)
    entries = [{"model": x, "parameters": {"weight": 1}} for x in ("a", "b", other)]
    config = configured(tmp_path, merge_method="linear", models=entries)
    assert merge.main([f"--config={config}", f"--out={tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert f"lists a model twice: {other} has the weights of a." in error


def test_a_base_of_linear_gives_its_configuration_alone(tmp_path, capsys):
    a, b, _ = folders.pair(tmp_path, count=3)
    config = json.dumps({**folders.CONFIG, "bos_token_id": 9})
    (tmp_path / "c" / "config.json").write_text(config)
    assert (
        merge.main([f"--config={linear(tmp_path, base_model='@c')}", f"--out={tmp_path}/out"]) == 0
    )
    assert "linear of 2 models" in capsys.readouterr().out
    out = folders.read(tmp_path / "out")
    np.testing.assert_allclose(out[EMBED], (a[EMBED] + 3 * b[EMBED]) / 4, atol=1e-7)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 9
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["made_of"] == ["a", "b"]


def test_dtypes(tmp_path):
    a, b = folders.pair(tmp_path, dtype=BF16)
    out = merged(tmp_path, linear(tmp_path, (0.5, 0.25)))
    once = (
        a[EMBED].astype(np.float32) * np.float32(0.5)
        + b[EMBED].astype(np.float32) * np.float32(0.25)
    ) / np.float32(0.75)
    assert np.array_equal(out[EMBED], once.astype(BF16))
    wide = merged(tmp_path, linear(tmp_path, dtype="float32", out_dtype="float16"), "half")
    assert wide[EMBED].dtype == np.float16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"


def test_gradients_filters_and_values_outside_of_layers(tmp_path):
    folders.pair(tmp_path)

    def weights(value):
        entries = [
            {"model": "@a", "parameters": {"weight": 1}},
            {"model": "@b", "parameters": {"weight": value}},
        ]
        planned = jobs(tmp_path, configured(tmp_path, merge_method="linear", models=entries))
        return {name: x.job.values["weight"][1] for name, x in planned.items()}

    q = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(5)]
    rising = weights([0, 1])
    assert [rising[name] for name in q] == [0, 0.25, 0.5, 0.75, 1]
    assert (rising[EMBED], rising[LAST]) == (
        0,
        1,
    )  # unlike mergekit, which has the first value twice
    conditions = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"pattern": r"layers\.[34]\.mlp\.(gate|up)", "value": 9},
        {"value": [2, 4], "non_layer": 7},
    ]
    chosen = weights(conditions)
    assert [chosen[name] for name in q] == [0, 0.5, 0.3, 0.7, 1]
    gate = [chosen[f"model.layers.{i}.mlp.gate_proj.weight"] for i in (0, 2, 3, 4)]
    assert gate == [2, 3, 9, 9]
    assert (chosen[EMBED], chosen[LAST]) == (7, 7)


def test_parameters_of_a_source_come_before_those_of_its_slice_and_of_the_merge(tmp_path):
    folders.pair(tmp_path)
    source = {"model": "@b", "layer_range": [0, 1], "parameters": {"density": 0.1}}
    parts = [
        {
            "sources": [{"model": "@a", "layer_range": [0, 1]}, source],
            "parameters": {"density": 0.2},
        },
        {
            "sources": [
                {"model": "@a", "layer_range": [3, 5]},
                {"model": "@b", "layer_range": [2, 4]},
            ],
            "parameters": {"density": 0.3},
        },
    ]
    shared = {"density": 0.4, "weight": [0, 1], "lambda": 0.5}
    settings = {"base_model": "@a", "slices": parts, "parameters": shared}
    planned = jobs(tmp_path, configured(tmp_path, merge_method="ties", **settings))
    values = {
        name: planned[f"model.layers.{i}.mlp.down_proj.weight"].job.values
        for i, name in enumerate("xyz")
    }
    assert [values[name]["density"] for name in "xyz"] == [[0.1], [0.3], [0.3]]
    assert [values[name]["weight"] for name in "xyz"] == [
        [1],
        [0],
        [1],
    ]  # one layer: the last value
    assert values["x"]["lambda"] == 0.5 and values["x"]["normalize"] is True
    assert planned["model.layers.2.mlp.down_proj.weight"].inputs == (
        (str(tmp_path / "a"), "model.layers.4.mlp.down_proj.weight"),
        (str(tmp_path / "b"), "model.layers.3.mlp.down_proj.weight"),
    )


def test_layers_are_stacked(tmp_path):
    a, b = folders.pair(tmp_path)
    scale = [{"filter": "down_proj", "value": 0.5}, {"value": 1}]
    parts = [
        {"sources": [{"model": "@a", "layer_range": [0, 4]}]},
        {"sources": [{"model": "@b", "layer_range": [2, 5], "parameters": {"scale": scale}}]},
    ]
    out = merged(tmp_path, configured(tmp_path, merge_method="passthrough", slices=parts))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 7
    assert {name: x.shape for name, x in out.items()} == folders.shapes(layers=7)
    assert np.array_equal(out[EMBED], a[EMBED]) and np.array_equal(out[LAST], b[LAST])
    for i, (source, layer) in enumerate(
        [*((a, i) for i in range(4)), *((b, i) for i in (2, 3, 4))]
    ):
        for part, factor in (("self_attn.q_proj", 1), ("mlp.down_proj", 1 if i < 4 else 0.5)):
            value = out[f"model.layers.{i}.{part}.weight"]
            assert np.array_equal(value, factor * source[f"model.layers.{layer}.{part}.weight"])


def test_values_of_a_model_are_by_its_own_names_and_those_of_the_whole_by_the_output(tmp_path):
    folders.pair(tmp_path)
    of_layer_4 = [{"filter": "layers.4.", "value": 0.5}, {"value": 1}]

    def values(parameter, method, *parts, **settings):
        config = configured(tmp_path, merge_method=method, slices=parts, **settings)
        planned = jobs(tmp_path, config)
        names = (f"model.layers.{i}.mlp.down_proj.weight" for i in range(10))
        return [planned[name].job.values[parameter] for name in names if name in planned]

    def source(model, first, last, **settings):
        return {"model": f"@{model}", "layer_range": [first, last], **settings}

    scaled = {"parameters": {"scale": of_layer_4}}
    first, second = source("a", 0, 3), source("b", 1, 5, **scaled)
    parts = [{"sources": [first]}, {"sources": [second]}]
    # Layer 4 of b is layer 6 of the output; the slice's and the merge's values are looked up in the same way.
    assert values("scale", "passthrough", *parts) == [[None]] * 3 + [[1]] * 3 + [[0.5]]
    parts = [{"sources": [first]}, {"sources": [source("b", 1, 5)]}]
    assert values("scale", "passthrough", *parts, **scaled) == [[1]] * 6 + [[0.5]]
    both = {"sources": [source("a", 2, 5), source("b", 1, 4)]}
    settings = {"base_model": "@a", "parameters": {"weight": of_layer_4, "density": 1}}
    assert values("weight", "ties", both, **settings) == [[1]] * 3
    both = {"sources": [source("a", 1, 4), source("b", 2, 5)]}
    assert values("weight", "ties", both, **settings) == [[1], [1], [0.5]]
    t = {
        "base_model": "@a",
        "parameters": {"t": [{"filter": "layers.2.", "value": 0.5}, {"value": 1}]},
    }
    assert values("t", "slerp", both, **t) == [1, 1, 0.5]


def test_kinds_of_layers_move_with_them_or_not_at_all(tmp_path):
    folders.pair(tmp_path)
    for name in "ab":
        path = tmp_path / name / "config.json"
        kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
        path.write_text(json.dumps({**folders.CONFIG, "layer_types": kinds}))
    parts = [{"sources": [{"model": f"@{name}", "layer_range": [1, 4]}]} for name in "ab"]
    config = configured(tmp_path, merge_method="passthrough", slices=parts)
    run.merge_all(config, str(tmp_path / "out"))
    kinds = json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]
    assert kinds == ["full_attention", "sliding_attention", "full_attention"] * 2
    for name in "ab":
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**folders.CONFIG, "sliding_window_pattern": 2}))
    with pytest.raises(MergeError, match="another kind of attention"):
        run.merge_all(config, str(tmp_path / "other"))


_COMMON = {
    **{key: folders.CONFIG[key] for key in ("vocab_size", "hidden_size", "intermediate_size")},
    **{"num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"rope_theta": 1e4, "hidden_act": "silu", "head_dim": 4, "tie_word_embeddings": True},
}
_SMOLLM3 = {**_COMMON, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}
_QWEN3_MOE = {
    **{**_COMMON, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
    **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "norm_topk_prob": True,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (_SMOLLM3 | {"no_rope_layers": [1, 1, 0, 1, 0]}, {"no_rope_layers": [1, 0, 1] * 2}),
        (_QWEN3_MOE | {"mlp_only_layers": [0, 3]}, {"mlp_only_layers": [2, 5]}),
        (_QWEN3_MOE | {"decoder_sparse_step": 2}, None),
        (_SMOLLM3 | {"no_rope_layer_interval": 2}, None),
    ],
)
def test_positions_and_experts_of_layers_move_with_them_or_not_at_all(tmp_path, config, expected):
    folders.pair(tmp_path)
    for name in "ab":
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    parts = [{"sources": [{"model": f"@{name}", "layer_range": [1, 4]}]} for name in "ab"]
    merge = configured(tmp_path, merge_method="passthrough", slices=parts)
    if expected is None:
        with pytest.raises(
            MergeError, match="layer 1 of .* would become layer 0, which has another"
        ):
            run.merge_all(merge, str(tmp_path / "out"))
        return
    run.merge_all(merge, str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**config, **expected, "num_hidden_layers": 6, "torch_dtype": "float32"}


@pytest.mark.parametrize("norms", [False, True])
def test_tensors_follow_from_the_files(tmp_path, norms):
    a, b = folders.pair(tmp_path, norms=norms)
    entries = [{"model": "@b"}]
    config = configured(
        tmp_path, merge_method="slerp", base_model="@a", models=entries, parameters={"t": 0.5}
    )
    out = merged(tmp_path, config)
    assert list(out) == list(a)
    assert any("q_norm" in name for name in out) is norms


def test_models_with_stacks_of_their_own(tmp_path):
    names = {
        "shared.weight": (12, 8),
        **{
            f"{side}.block.{i}.layer.0.SelfAttention.q.weight": (8, 8)
            for side in ("encoder", "decoder")
            for i in range(3)
        },
        "encoder.final_layer_norm.weight": (8,),
        "decoder.final_layer_norm.weight": (8,),
    }
    config = {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 3, "vocab_size": 12}
    values = [folders.drawn(i, names) for i in range(2)]
    for name, tensors in zip("ab", values, strict=True):
        folders.write(tmp_path / name, tensors, config)
    whole = jobs(tmp_path, linear(tmp_path, (1, [0, 1])))
    assert [
        whole[f"{side}.block.{i}.layer.0.SelfAttention.q.weight"].job.values["weight"][1]
        for side in ("encoder", "decoder")
        for i in range(3)
    ] == [0, 0.5, 1] * 2
    models_ = [{"model": "@a"}, {"model": "@b"}]
    sliced = [
        {"sources": [{"model": f"@{x}", "layer_range": [0, 2]} for x in "ab"]},
    ]
    modules = {
        "encoder": {"models": models_, "parameters": {"weight": 3}},
        "decoder": {"slices": sliced},
        "shared": {"models": models_, "parameters": {"weight": 5}},
    }
    configuration = configured(
        tmp_path, merge_method="linear", modules=modules, parameters={"weight": 1}
    )
    planned = jobs(tmp_path, configuration)
    assert planned["encoder.final_layer_norm.weight"].job.values["weight"] == [3, 3]
    assert planned["decoder.final_layer_norm.weight"].job.values["weight"] == [1, 1]
    assert planned["shared.weight"].job.values["weight"] == [5, 5]
    out = merged(tmp_path, configuration)
    assert sum(name.startswith("decoder.block") for name in out) == 2
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (made["num_layers"], made["num_decoder_layers"]) == (3, 2)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("absent", [(), ("tie_word_embeddings",)])
def test_a_tied_head_that_one_model_stores_is_left_out(tmp_path, absent):
    config = without(folders.CONFIG, *absent)
    sizes = folders.shapes(head=True)
    a = folders.drawn(0, sizes)
    a["lm_head.weight"] = a[EMBED]
    folders.write(tmp_path / "a", a, config)
    folders.write(tmp_path / "b", folders.drawn(1, folders.shapes()))
    assert "lm_head.weight" not in merged(tmp_path, linear(tmp_path))


def test_the_heads_of_a_random_merge_stay_tied(tmp_path):
    for i, name in enumerate("abc"):
        tensors = folders.drawn(i, folders.shapes(head=True))
        folders.write(tmp_path / name, {**tensors, "lm_head.weight": tensors[EMBED]})
    entries = [{"model": f"@{name}", "parameters": {"weight": 0.5}} for name in "bc"]
    settings = {"base_model": "@a", "parameters": {"density": 0.5}}
    config = configured(tmp_path, merge_method="dare_linear", models=entries, **settings)
    assert "lm_head.weight" not in merged(tmp_path, config)


def test_a_filter_of_no_tensor_is_named(tmp_path, capsys):
    folders.pair(tmp_path)
    values = [{"filter": "self_attention", "value": 0}, {"filter": "mlp", "value": 2}, {"value": 1}]
    entries = [{"model": f"@{name}", "parameters": {"weight": values}} for name in "ab"]
    merged(tmp_path, configured(tmp_path, merge_method="linear", models=entries))
    warnings = [x for x in capsys.readouterr().err.splitlines() if "has no effect" in x]
    assert len(warnings) == 2 and "weight: no tensor's name has 'self_attention'" in warnings[0]


def test_fields_that_one_model_lacks(tmp_path, capsys):
    folders.pair(tmp_path)
    config = without(folders.CONFIG, "tie_word_embeddings", "layer_norm_eps")
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "unheard_of": 1}))
    merged(tmp_path, linear(tmp_path))
    warnings = [x for x in capsys.readouterr().err.splitlines() if "not compared" in x]
    assert len(warnings) == 1 and f"unheard_of ({tmp_path}/a)" in warnings[0]


def test_absent_fields_have_the_defaults_of_their_family(tmp_path, capsys):
    folders.pair(tmp_path)
    rotated = _SMOLLM3 | {"no_rope_layers": [1, 1, 1, 0, 1], "rms_norm_eps": 1e-6}
    _rewrite(tmp_path, _SMOLLM3, rotated)
    merged(tmp_path, linear(tmp_path))
    assert "not compared" not in capsys.readouterr().err
    _rewrite(tmp_path, _SMOLLM3, rotated | {"no_rope_layers": [1] * 5})
    text = r"no_rope_layers is \[1, 1, 1, 0, 1\] \(by default\) in .*a/config.json, and \[1, 1, 1, 1, 1\] in"
    with pytest.raises(MergeError, match=text):
        run.merge_all(linear(tmp_path), str(tmp_path / "other"))


@pytest.mark.parametrize("tensors_before", [0, 7, 20])
def test_a_killed_merge_leaves_nothing_and_goes_on(tmp_path, monkeypatch, tensors_before):
    folders.pair(tmp_path)
    config = linear(tmp_path)
    whole = merged(tmp_path, config, "whole")
    monkeypatch.setattr("espalier.launch.merge.hf_output._FLUSH_BYTES", 600)
    actual, done = output.Workers.run, []

    def killed(self, x, reads):
        if len(done) == tensors_before:
            raise KeyboardInterrupt
        done.append(x.name)
        return actual(self, x, reads)

    monkeypatch.setattr(output.Workers, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run.merge_all(config, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    again = []

    def counted(self, x, reads):
        again.append(x.name)
        return actual(self, x, reads)

    monkeypatch.setattr(output.Workers, "run", counted)
    out = merged(tmp_path, config)
    assert all(np.array_equal(out[name], whole[name]) for name in whole)
    assert len(again) <= len(whole) and (tensors_before < 10 or len(again) < len(whole) - 10)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def test_what_is_left_of_another_merge_is_not_used(tmp_path, monkeypatch):
    folders.pair(tmp_path)
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "merge.progress").write_text('"0000"\n"model.norm.weight"\n')
    (partial / "model.safetensors").write_bytes(b"?" * 10_000)
    out = merged(tmp_path, linear(tmp_path))
    assert np.array_equal(out[LAST], merged(tmp_path, linear(tmp_path), "other")[LAST])


def test_several_documents(tmp_path):
    a, b = folders.pair(tmp_path)
    (tmp_path / "merge.yml").write_text(
        f"""
merge_method: linear
models: [{{model: half, parameters: {{weight: 1}}}}, {{model: {tmp_path}/a, parameters: {{weight: 1}}}}]
---
name: half
merge_method: linear
models: [{{model: {tmp_path}/a, parameters: {{weight: 1}}}}, {{model: {tmp_path}/b, parameters: {{weight: 1}}}}]
"""
    )
    config = str(tmp_path / "merge.yml")
    out = merged(tmp_path, config)
    np.testing.assert_allclose(out[EMBED], 0.75 * a[EMBED] + 0.25 * b[EMBED], atol=1e-7)
    stage = tmp_path / "out.stages" / "half"
    before = (stage / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out")
    merged(tmp_path, config)
    assert (stage / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(MergeError, match="--seed=5 has no effect: .* no method that draws"):
        run.merge_all(config, str(tmp_path / "out"), seed=5)
    text = pathlib.Path(config).read_text()
    pathlib.Path(config).write_text(text.replace("weight: 1", "weight: 2"))
    with pytest.raises(MergeError, match="another configuration or seed"):
        run.merge_all(config, str(tmp_path / "out"))


def test_a_stage_of_other_weights_is_refused(tmp_path):
    a, b = folders.pair(tmp_path)

    def documents(weight):
        made = {"half": ("a", "b"), "quarter": ("half", "a"), None: ("quarter", "b")}
        documents = []
        for name, (first, second) in made.items():
            places = [x if x in made else f"{tmp_path}/{x}" for x in (first, second)]
            weights = (weight if name == "half" else 1, 1)
            entries = [
                {"model": place, "parameters": {"weight": x}}
                for place, x in zip(places, weights, strict=True)
            ]
            named = {} if name is None else {"name": name}
            documents.append({"merge_method": "linear", "models": entries, **named})
        (tmp_path / "merge.yml").write_text("\n---\n".join(map(json.dumps, documents)))
        return str(tmp_path / "merge.yml")

    def expected(half):
        return ((half + a[EMBED]) / 2 + b[EMBED]) / 2

    def stages():
        return {x.name: x for x in (tmp_path / "out.stages").iterdir()}

    out, config = tmp_path / "out", documents(1)
    merged(tmp_path, config)
    shutil.rmtree(stages()["half"])
    config = documents(3)
    quarter = f"{out}.stages/quarter: planned once its stages are there"
    assert quarter in run.merge_all(config, str(out), dry_run=True)
    refused = r"quarter is there, and its merge.json .* weights that .*/out\.stages/half has now"
    with pytest.raises(MergeError, match=refused):
        run.merge_all(config, str(out))
    for folder in (stages()["quarter"], out):
        shutil.rmtree(folder)
    changed = merged(tmp_path, config)[EMBED]
    np.testing.assert_allclose(changed, expected((3 * a[EMBED] + b[EMBED]) / 4), atol=1e-7)
    # A source of the same names and sizes in the place of another.
    shutil.rmtree(out)
    a, b = b, a
    (tmp_path / "a").rename(tmp_path / "c")
    folders.write(tmp_path / "a", a)
    with pytest.raises(MergeError, match=r"half is there, .* weights that .*/a has now"):
        run.merge_all(config, str(out))
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "c").rename(tmp_path / "a")
    lines = run.merge_all(config, str(out))
    assert [line.endswith("there already") for line in lines] == [True, True, False]
    record = stages()["half"] / "merge.json"  # of a version without the weights
    record.write_text(json.dumps(without(json.loads(record.read_text()), "inputs")))
    with pytest.raises(MergeError, match="half is there, and its merge.json does not have"):
        run.merge_all(config, str(out))


def change(key, value):
    def changed(root):
        path = root / "b" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return changed


def _rewrite(root, *configs):
    for name, config in zip("ab", configs, strict=True):
        (root / name / "config.json").write_text(json.dumps(config))


def _with(**more):
    def changed(root):
        tensors = folders.drawn(1, folders.shapes())
        shutil.rmtree(root / "b")
        config = {**folders.CONFIG, **more.pop("config", {})}
        folders.write(root / "b", {**tensors, **more}, config)

    return changed


def _vocabulary(root):
    shutil.rmtree(root / "b")
    folders.write(
        root / "b", folders.drawn(1, folders.shapes(vocab=13)), {**folders.CONFIG, "vocab_size": 13}
    )


def _shards(root, then):
    shutil.rmtree(root / "b")
    folders.write(root / "b", folders.drawn(1, folders.shapes()), shard=900)
    then(root / "b")


def _bad_index(folder):
    path = folder / INDEX
    path.write_text(path.read_text().replace("model-00002", "../model-00002"))


def _tokenizers(root):
    for name, words in (("a", ["x", "y"]), ("b", ["y", "x"])):
        write_tokenizer(root / name, words)


def write_tokenizer(folder, words, added=()):
    import tokenizers

    ids = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))


REFUSALS = {
    "logit_scale": (change("logit_scale", 0.125), r"logit_scale is 0\.0625 in .*a/config.json, and 0\.125 in .*b/config"),
    "absent": (lambda root: _rewrite(root, folders.CONFIG, {**without(folders.CONFIG, "rope_theta"), "rope_parameters": {"rope_theta": 5e5}}), "rope_theta is 10000.0"),
    "default": (lambda root: _rewrite(root, without(folders.CONFIG, "tie_word_embeddings"), {**folders.CONFIG, "tie_word_embeddings": False}), r"tie_word_embeddings is True \(by default\) in .*a/config.json, and False in .*b/config"),
    "unclear default": (lambda root: _rewrite(root, folders.CONFIG, without(folders.CONFIG, "rope_theta")), r"b/config.json \(cohere\): neither rope_theta nor .* default differs"),
    "rope": (change("rope_theta", 4e6), "rope_theta"),
    "eps": (change("layer_norm_eps", 1e-6), "layer_norm_eps"),
    "heads": (change("num_attention_heads", 4), "num_attention_heads"),
    "tied": (change("tie_word_embeddings", False), "tie_word_embeddings"),
    "quantised": (lambda root: _rewrite(root, *[{**folders.CONFIG, "quantization_config": {"quant_method": "fp8"}}] * 2), "a/config.json has quantization_config"),
    "head of its own": (_with(**{"lm_head.weight": np.zeros((12, 8), np.float32)}), "lm_head.weight of .*b differs from model.embed_tokens.weight"),
    "depth": (change("num_hidden_layers", 6), "num_hidden_layers"),
    "vocabulary": (_vocabulary, "vocab_size is 12 .*tokenizer_source"),
    "tokenizer": (_tokenizers, "'x' has the id 0 in the first and 1 in the second.*tokenizer_source"),
    "shape": (_with(**{LAST: np.zeros(9, np.float32)}), r"model.norm.weight is \[9\] in .*b, and \[8\]"),
    "missing": (_with(**{"model.extra.weight": np.zeros(3, np.float32)}), "a has no model.extra.weight"),
    "integers": (_with(**{LAST: np.zeros(8, np.int64)}), "floats in some models only"),
    "missing shard": (lambda root: _shards(root, lambda b: next(b.glob("model-00002-*")).unlink()), "model-00002-of-.* is missing"),
    "unsafe index": (lambda root: _shards(root, _bad_index), "not a plain name"),
    "corrupt header": (lambda root: (root / "b" / "model.safetensors").write_bytes(b"\xff" * 100), "damaged or not a safetensors file"),
    "no model": (lambda root: shutil.rmtree(root / "b"), "is not a folder here"),
    "an adapter": (lambda root: (root / "b" / "adapter_config.json").write_text("{}"), "adapter of peft"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_before_anything_is_written(tmp_path, capsys, name):
    spoil, message = REFUSALS[name]
    folders.pair(tmp_path)
    spoil(tmp_path)
    assert merge.main([f"--config={linear(tmp_path)}", f"--out={tmp_path}/new/out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("\nerror: ") and error.count("\n") == 2
    assert re.search(message, error), error
    assert not (tmp_path / "new").exists()


def test_buffers_must_be_equal(tmp_path):
    mask = np.arange(6).reshape(2, 3)
    tensors = folders.drawn(0, folders.shapes()) | {"model.mask": mask}
    folders.write(tmp_path / "a", tensors)
    folders.write(tmp_path / "b", tensors | {EMBED: tensors[EMBED] + 1})
    assert np.array_equal(merged(tmp_path, linear(tmp_path))["model.mask"], mask)
    shutil.rmtree(tmp_path / "b")
    folders.write(tmp_path / "b", {**tensors, "model.mask": mask + 1})
    with pytest.raises(MergeError, match="model.mask holds int64"):
        run.merge_all(linear(tmp_path), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_dry_run_shows_every_tensor_and_writes_nothing(tmp_path, capsys):
    folders.pair(tmp_path)
    flags = [f"--config={linear(tmp_path, (1, 0.5))}", f"--out={tmp_path}/out", "--dry_run"]
    assert merge.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"m0 = {tmp_path}/a" in lines
    assert sum(line.startswith("model.") for line in lines) == len(folders.shapes())
    assert "linear weight=1,0.5" in lines[-1]
    assert not (tmp_path / "out").exists()


def test_progress_without_a_terminal(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Bar, "close", lambda bar: told.append(bar._text()))
    folders.pair(tmp_path)
    run.merge_all(linear(tmp_path), str(tmp_path / "out"))
    assert re.fullmatch(r"merge: ([\d.]+k)/\1 B \(about 0 s left\)", told[0])


def test_vocabularies_are_united(tmp_path):
    words = {"a": ["<unk>", "x", "y"], "b": ["<unk>", "y", "z"], "c": ["<unk>", "z", "w"]}
    tables = {}
    for i, (name, own) in enumerate(words.items()):
        sizes = folders.shapes(vocab=3 + (name == "b"))
        tensors = folders.drawn(i, sizes)
        folders.write(tmp_path / name, tensors, {**folders.CONFIG, "vocab_size": sizes[EMBED][0]})
        write_tokenizer(tmp_path / name, own, added=["<end>"] if name == "b" else [])
        tables[name] = dict(zip(own, tensors[EMBED], strict=False))
        if name == "b":
            tables[name]["<end>"] = tensors[EMBED][3]
    tokens = {"source": "union", "pad_to_multiple_of": 4}
    config = linear(tmp_path, (1, 1, 2), base_model="@a", tokenizer=tokens)
    out = merged(tmp_path, config)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["vocab_size"] == out[EMBED].shape[0] == 8
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = made.get_vocab()
    assert ids == {"<unk>": 0, "x": 1, "y": 2, "z": 3, "<end>": 4, "w": 5}
    assert made.encode("x z<end>").ids == [1, 3, 4]
    a, b, c = (tables[name] for name in "abc")
    expected = {
        "<unk>": (a["<unk>"] + b["<unk>"] + 2 * c["<unk>"]) / 4,
        "x": a["x"],  # c and b have no x: the base's row
        "y": (a["y"] + b["y"] + 2 * a["y"]) / 4,
        "z": ((b["z"] + c["z"]) / 2 + b["z"] + 2 * c["z"]) / 4,
        "<end>": b["<end>"],
        "w": c["w"],
    }
    for token, row in expected.items():
        np.testing.assert_allclose(out[EMBED][ids[token]], row, atol=1e-6)
    np.testing.assert_allclose(out[EMBED][6:], np.tile(out[EMBED][:6].mean(0), (2, 1)), atol=1e-6)
    based = linear(tmp_path, (1, 1, 2), base_model="@a", tokenizer_source="base")
    assert merged(tmp_path, based, "based")[EMBED].shape[0] == 3


@pytest.mark.parametrize(
    "tables",
    [
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("model.tok_embeddings.weight", "output.weight"),
    ],
)
def test_tables_of_any_name_follow_the_vocabulary(tmp_path, tables):
    sizes = {**dict.fromkeys(tables, (3, 8)), "model.layers.0.mlp.weight": (3, 8)}
    a, b = (folders.drawn(i, sizes) for i in range(2))
    for name, tensors, words in (("a", a, ["<unk>", "x", "y"]), ("b", b, ["<unk>", "y", "x"])):
        folders.write(tmp_path / name, tensors, {"model_type": "other", "vocab_size": 3})
        write_tokenizer(tmp_path / name, words)
    out = merged(tmp_path, linear(tmp_path, (1, 1), tokenizer_source="union"))
    for name in sizes:
        rows = [0, 2, 1] if name in tables else [0, 1, 2]
        np.testing.assert_allclose(out[name], (a[name] + b[name][rows]) / 2, atol=1e-7)


def test_what_is_not_known_of_tokens_is_said(tmp_path, capsys):
    folders.pair(tmp_path, vocab=12)
    words = [f"t{i}" for i in range(12)]
    write_tokenizer(tmp_path / "a", words)
    merged(tmp_path, linear(tmp_path))
    assert "b has no tokenizer.json" in capsys.readouterr().err
    write_tokenizer(tmp_path / "b", words)
    (tmp_path / "c").mkdir()
    write_tokenizer(tmp_path / "c", [*words, "more"])
    out = merged(tmp_path, linear(tmp_path, tokenizer_source="@c"), "other")
    assert "1 tokens of the output, such as 'more'" in capsys.readouterr().err
    assert not out[EMBED][12].any()


@pytest.mark.parametrize("own", [{}, {"eos_token_id": [2, 0], "forced_eos_token_id": 1}])
def test_ids_of_special_tokens_are_of_the_output_vocabulary(tmp_path, capsys, own):
    words = {"a": ["<s>", "x", "</s>", "<pad>"], "b": ["</s>", "x", "<s>", "y"]}
    of_a = {"bos_token_id": 0, "eos_token_id": [2, 1, 3], "pad_token_id": 3, "mask_token_id": 4}
    for i, name in enumerate("ab"):
        config = {**folders.CONFIG, "vocab_size": 4, **(of_a if name == "a" else own)}
        folders.write(tmp_path / name, folders.drawn(i, folders.shapes(vocab=4)), config)
        write_tokenizer(tmp_path / name, words[name])

    def ids(name, source):
        run.merge_all(linear(tmp_path, tokenizer_source=source), str(tmp_path / name))
        config = json.loads((tmp_path / name / "config.json").read_text())
        return {key: x for key, x in config.items() if key.endswith("_token_id")}

    # b's config.json goes first; else ids have the texts of a's: b has no <pad>, and a has no fifth row.
    of_b = {"bos_token_id": 2, "eos_token_id": [0, 1], **own}
    assert ids("out", "@b") == of_b
    assert hf_tokenizer.read(tmp_path / "out").eos_ids == tuple(of_b["eos_token_id"])
    changed = ["pad_token_id", "mask_token_id"] if own else [*of_a][1:]
    warned = f"config.json: {', '.join(changed)}: ids of tokens that the output lacks are removed"
    assert warned in capsys.readouterr().err
    assert ids("first", "@a") == ids("united", "union") == of_a


def test_rows_of_tokens_can_be_chosen(tmp_path):
    a, b = folders.pair(tmp_path, vocab=12)
    for name in "ab":
        write_tokenizer(tmp_path / name, [f"t{i}" for i in range(12)])
    token = {"kind": "model_token", "model": "@b", "token": "t3"}
    tokens = {
        "source": "base",
        "tokens": {
            "t1": {"source": "@b", "force": True},
            "t2": {"source": {"kind": "zero"}, "force": True},
            "new": {"source": token},
        },
    }
    out = merged(tmp_path, linear(tmp_path, base_model="@a", tokenizer=tokens))
    assert out[EMBED].shape[0] == 13
    np.testing.assert_allclose(out[EMBED][1], b[EMBED][1], atol=1e-6)
    assert not out[EMBED][2].any()
    np.testing.assert_allclose(out[EMBED][12], b[EMBED][3], atol=1e-6)
    np.testing.assert_allclose(out[EMBED][3], (a[EMBED][3] + 3 * b[EMBED][3]) / 4, atol=1e-6)
    token["token"] = "absent"
    with pytest.raises(MergeError, match="b has no token 'absent'"):
        run.merge_all(linear(tmp_path, base_model="@a", tokenizer=tokens), str(tmp_path / "x"))


def test_chat_templates(tmp_path):
    folders.pair(tmp_path, count=3)
    for name, template in (("a", "{{ 1 }}"), ("b", "{{ 2 }}"), ("c", "{{ 2 }}")):
        write_tokenizer(tmp_path / name, [f"t{i}" for i in range(12)])
        settings = {"chat_template": template, "eos_token": "t1"}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    run.merge_all(linear(tmp_path, (1, 1, 1), chat_template="auto"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 2 }}"
    kept = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert kept == {"eos_token": "t1"}
