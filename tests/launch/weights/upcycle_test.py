"""Dense runs become mixtures: every leaf by what it is made of, limits in which nothing changes, bad input."""

import argparse
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.convert import __main__ as convert
from espalier.launch.convert import exchange
from espalier.launch.upcycle import upcycle, upcycle_flags
from espalier.launch.weights import transformed_run
from espalier.launch.weights.source_models import SourceModel
from espalier.model.bam.moa import AttentionExperts
from espalier.model.hf import load, registry
from espalier.model.hf.files.safetensors_files import SafetensorsWriter
from espalier.model.nexus import extend
from espalier.model.transforms import base, experts
from espalier.model.transforms.base import Source, TransformError
from espalier.model.transforms.experts import Mixture, Upcycle
from espalier.trainers.checkpoints import array_files, state_tree, step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError
from espalier.trainers.telemetry.metric_writers import read_jsonl

TEXT = json.dumps({"text": "import os, sys\n" * 4}) + "\n"
BLOCK = "layers/block_0"
GOLDENS = pathlib.Path(__file__).parents[2] / "model" / "hf" / "goldens" / "parity"


@pytest.fixture
def make(command, tmp_path):
    def run(*flags, experts, method="bam", name="mixture"):
        target = tmp_path / name
        status = command(
            "upcycle", f"--method={method}", "--experts", *experts, f"--to={target}", *flags
        )
        if status:
            assert not target.exists()
        return status or target

    return run


def two_layers(params):
    layers = jax.tree.map(lambda x: jnp.concatenate([x, x]), params["layers"])
    return {**params, "layers": layers}


def stored(run, path):
    return StoredArray(step_dir.resolve(run), f"params/{path}").read()


def parsed(flags):
    parser = argparse.ArgumentParser()
    upcycle.add_flags(parser)
    words = f"--experts a b --to=x --method {flags}".split()
    return upcycle_flags.parsed(parser.parse_args(words), upcycle.UpcycleFlags)


def manifest_of(run):
    return step_dir.read_manifest(step_dir.resolve(run))


def of(params, path):
    for name in path.split("/"):
        params = params[name]
    return np.asarray(params)


def score(command, tmp_path, run):
    (tmp_path / "x.jsonl").write_text(TEXT)
    output = tmp_path / "y.jsonl"
    output.unlink(missing_ok=True)
    flags = (f"--inputs={tmp_path}/x.jsonl", f"--output={output}", f"--checkpoint={run}")
    assert command("score", *flags) == 0
    return np.array(json.loads(output.read_text())["logprobs"])


def test_experts_are_copied_bit_by_bit_the_rest_is_the_mean_and_routers_are_drawn(
    make, branches, capsys
):
    folders, params = branches.folders[:3], branches.params[:3]
    made = make(experts=folders)
    for name in ("gate", "up", "down"):
        kernel = stored(made, f"{BLOCK}/mlp/{name}/kernel")
        for j, p in enumerate(params):
            np.testing.assert_array_equal(kernel[:, j], of(p, f"{BLOCK}/mlp/{name}/kernel"))
    for name, axis in (("query", -1), ("key", -1), ("value", -1), ("out", -2)):
        parts = np.split(stored(made, f"{BLOCK}/attention/{name}/kernel"), 3, axis=axis)
        for part, p in zip(parts, params, strict=True):
            np.testing.assert_array_equal(part, of(p, f"{BLOCK}/attention/{name}/kernel"))
    rest = [
        name
        for name in state_tree.flatten(params[0])
        if "/mlp/" not in name and "/attention/" not in name
    ]
    assert "token_embed/embedding" in rest and len(rest) == 3
    for path in rest:
        want = np.mean([of(p, path).astype(np.float64) for p in params], axis=0)
        np.testing.assert_allclose(stored(made, path), want, atol=1e-7, rtol=2.5e-7)  # float32's
    routers = [stored(made, f"{BLOCK}/{where}/router/kernel") for where in ("mlp", "attention")]
    assert all(r.shape == (2, 16, 3) for r in routers) and not np.array_equal(*routers)
    assert 0.01 < np.std(routers) < 0.03
    again = make(experts=folders, name="again")
    np.testing.assert_array_equal(stored(again, f"{BLOCK}/mlp/router/kernel"), routers[0])
    told = capsys.readouterr().out
    assert (
        f"  {folders[2]}\n" in told
        and "expert 2  " in told
        and "mean of 3\n" in told
        and "drawn\n" in told
    )
    assert f"{BLOCK}/mlp/up/kernel" in told and "copied, one beside the other" in told


def test_means_that_are_made_in_blocks_of_rows_are_those_of_whole_arrays(
    make, branches, command, tmp_path, monkeypatch
):
    folders, rows = branches.folders[:3], 50  # of 264: the last block is a smaller one
    whole = make(experts=folders, method="btx", name="whole")
    monkeypatch.setattr(transformed_run, "_BLOCK_BYTES", rows * 16 * 4)
    parts = make(experts=folders, method="btx", name="parts")
    path = "token_embed/embedding"
    store = array_files.open_array(step_dir.resolve(parts), f"params/{path}")
    assert store.shape == (264, 16) and store.chunk_layout.read_chunk.shape == (rows, 16)
    assert manifest_of(parts).arrays == manifest_of(whole).arrays  # digests of their values
    # And of those that are merged, of blocks or not.
    four = {}
    for run, size in ((parts, rows * 16 * 4), (whole, 1 << 20)):
        monkeypatch.setattr(transformed_run, "_BLOCK_BYTES", size)
        four[run] = tmp_path / f"{run.name}4"
        given = ("--add", f"x={folders[0]}", f"--to={four[run]}")
        assert command("upcycle extend", f"--moe={run}", *given) == 0
    assert manifest_of(four[parts]).arrays == manifest_of(four[whole]).arrays


def test_shared_keys_and_values_are_the_mean_and_queries_lie_by_their_key(make, branches):
    folders, params = branches.folders[:3], branches.params[:3]
    made = make("--shared_kv", experts=folders)
    for name in ("key", "value"):
        want = np.mean([of(p, f"{BLOCK}/attention/{name}/kernel") for p in params], axis=0)
        np.testing.assert_allclose(
            stored(made, f"{BLOCK}/attention/{name}/kernel"), want, atol=1e-6
        )
    # One key/value head: all heads of an expert lie together.
    parts = np.split(stored(made, f"{BLOCK}/attention/query/kernel"), 3, axis=-1)
    np.testing.assert_array_equal(parts[2], of(params[2], f"{BLOCK}/attention/query/kernel"))


def test_averaged_attentions_are_one_mean_as_often_and_a_soup_is_a_dense_model_of_means(
    make, branches, command, tmp_path, capsys
):
    folders, params = branches.folders[:3], branches.params[:3]
    averaged = make("--average_attention", experts=folders, name="averaged")
    soup = make(experts=folders, method="soup", name="soup")
    for path, leaf in state_tree.flatten(params[0]).items():
        mean = np.mean([of(p, path).astype(np.float64) for p in params], axis=0)
        found = stored(soup, path)
        assert found.shape == leaf.shape
        np.testing.assert_allclose(found, mean, atol=1e-7, rtol=2.5e-7)  # float32's
        if "/attention/" in path:
            axis = -2 if "/out/" in path else -1
            for part in np.split(stored(averaged, path), 3, axis=axis):
                np.testing.assert_array_equal(part, found)
    assert np.isfinite(score(command, tmp_path, soup)).all()  # its configuration is a dense one
    assert "mean of 3, as often" in capsys.readouterr().out
    removed = (f"--remove={pathlib.Path(folders[2]).name}", f"--to={tmp_path}/fewer")
    assert command("upcycle extend", f"--moe={averaged}", *removed) == 2
    assert "attention expert (--average_attention)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("soup --top_k=1", "--top_k is only for experts, which --method=soup does not make"),
        ("soup --renormalise", "--renormalise is only for experts"),
        ("soup --expert_scale=1", "--expert_scale is only for experts"),
        ("soup --drop_ratio=0", "--drop_ratio is only for experts"),
        ("soup --router_std=1", "--router_std is only for linear routers"),
        ("btx --shared_kv", "--shared_kv is only for attention experts (--method=bam, or nexus"),
        ("nexus --attention_top_k=1", "--attention_top_k is only for attention experts"),
        ("nexus --average_attention", "--average_attention is only for attention experts"),
        ("nexus --router_std=0.02", "--router_std is only for linear routers"),
        ("nexus --router=mlp --router_std=0", "--router_std is only for linear routers"),
        (
            "nexus --router=linear --logit_std=1",
            "--logit_std is only for routers of --method=nexus that",
        ),
        (
            "bam --logit_std=1",
            "--logit_std is only for routers of --method=nexus that are not linear",
        ),
        ("btx --seed_model=x", "--seed_model is only for --method=nexus"),
        ("bam --router=linear", "--router is only for --method=nexus"),
        ("btx --drop_seed=0", "--drop_seed is only for --drop_ratio"),
        ("btx --drop_ratio=0 --drop_seed=1", "--drop_seed is only for --drop_ratio"),
        ("btx --drop_ratio=2", "--drop_ratio=2 must be between 0 and 1"),
        ("btx --expert_scale=0", "--expert_scale=0 must be positive"),
        ("btx --copies=0", "--copies=0 must be at least 1"),
        ("nexus", "needs --seed_model=DIR"),
        ("nexus --seed_model=x", "--router=projection needs --domains=FILE"),
        (
            "nexus --seed_model=x --domains=x --router=linear",
            "--router=linear does not read --domains",
        ),
        ("nexus --seed_model=x --domains=x --copies=2", "have the same embedding"),
        ("soup --granularity=2", "--granularity is only for experts"),
        ("btx --granularity=1", "--granularity=1 must be at least 2"),
        (
            "nexus --seed_model=x --domains=x --granularity=2",
            "the parts of an expert have one embedding",
        ),
    ],
)
def test_flags_that_would_be_ignored_or_go_with_others_are_named(flags, message):
    with pytest.raises(ValueError) as raised:
        parsed(flags)
    assert message in str(raised.value)


def test_flags_of_draws_that_sweeps_give_to_all_methods_are_taken():
    for flags in ("soup --router_seed=1", "btx --router_std=0 --drop_ratio=0.5 --drop_seed=0"):
        parsed(flags)


def test_a_mixtures_configuration_is_the_methods_file_with_the_flags_as_its_macros(make, branches):
    flags = ("--shared_kv", "--attention_top_k=2", "--top_k=2", "--renormalise")
    made = make(*flags, experts=branches.folders[:3])
    lines = (made / "config.gin").read_text().splitlines()
    want = {
        "EXPERTS = 3",
        "TOP_K = 2",
        "RENORMALISE = True",
        "SHARED_KV = True",
        "ATTENTION_TOP_K = 2",
        "moe.MoeMlp.num_experts = %EXPERTS",
        "moa.MixtureOfAttention.shared_kv = %SHARED_KV",
        "transformer.Block.attention = @moa.experts_of()",
    }
    assert want <= set(lines)
    with pytest.raises(ValueError, match="bam.gin do not define DOMAIN_DIM"):
        transformed_run.method_lines(["t5x_configs/methods/bam/bam.gin"], {"DOMAIN_DIM": 4})


@pytest.mark.parametrize("flags", [(), ("--shared_kv",)])
def test_copies_that_are_all_used_compute_what_the_dense_model_does(
    make, branches, command, tmp_path, flags
):
    seed = branches.folders[0]
    made = make("--copies=3", "--top_k=3", *flags, experts=[seed])
    want = score(command, tmp_path, seed)
    np.testing.assert_allclose(score(command, tmp_path, made), want, atol=1e-4)
    # By their probability alone, one of them is a third of what it should be.
    part = make("--copies=3", *flags, experts=[seed], name="one")
    assert np.abs(score(command, tmp_path, part) - want).max() > 0.01
    whole = make("--copies=3", "--renormalise", *flags, experts=[seed], name="whole")
    np.testing.assert_allclose(score(command, tmp_path, whole), want, atol=1e-4)


def test_heads_of_shared_keys_are_in_the_order_of_the_mixture():
    mixture = Mixture(experts=2, attention=AttentionExperts(kv_heads=2, shared_kv=True))
    query, out = (
        experts.expert_axis(f"attention/{x}/kernel", (), mixture) for x in ("query", "out")
    )
    heads = [np.array([[f"{e}{k}{g}" for k in range(2) for g in range(3)]]) for e in "ab"]
    want = [f"{e}{k}{g}" for k in range(2) for e in "ab" for g in range(3)]
    assert experts.joined(heads, query)[0].tolist() == want
    turned = [x.T for x in heads]
    assert experts.joined(turned, out)[:, 0].tolist() == want
    # One more comes last, and one less leaves the others as they were.
    heads.append(np.array([[f"c{k}{g}" for k in range(2) for g in range(3)]]))
    three = experts.joined(heads, query)
    np.testing.assert_array_equal(
        experts.joined([experts.joined(heads[:2], query), heads[2]], query), three
    )
    np.testing.assert_array_equal(
        experts.without(three, query, 1, 3), experts.joined([heads[0], heads[2]], query)
    )


def test_layers_that_are_not_stacked_are_extended_too():
    """Two experts and a third are three at once, but for the linear router's new column."""
    rng = np.random.default_rng(0)
    sizes = {"norm/scale": (4,), "mlp/gate/kernel": (4, 6), "mlp/up/kernel": (4, 6)}
    sizes |= {"mlp/down/kernel": (6, 4)}
    dense = {f"layers/block_{i}/{name}": x for i in range(2) for name, x in sizes.items()}
    models = {
        name: {k: rng.normal(size=x).astype(np.float32) for k, x in dense.items()} for name in "abc"
    }

    def target(count):
        wide = {k: (count, *x) if "/mlp/" in k else x for k, x in dense.items()}
        return wide | {f"layers/block_{i}/mlp/router/kernel": (4, count) for i in range(2)}

    def made(recipes, values):
        return base.apply(recipes, lambda name, path: values[name][path])

    def mixture(count):
        return Mixture(experts=count, drop_ratio=0.5, expert_scale=2.0)

    def upcycled(names):
        sources = [Source(name, dense) for name in names]
        return made(base.plan(Upcycle(mixture(len(names))), sources, target(len(names))), models)

    def balanced(count):
        return target(count) | {"layers/block_0/mlp/choice_bias": (count,)}

    two, want = upcycled("ab"), upcycled("abc")
    two["layers/block_0/mlp/choice_bias"] = np.float32([0.25, -0.5])
    addition = extend.Addition(mixture(3), merge=1 / 3)
    sources = [Source("two", balanced(2)), Source("c", dense)]
    larger = made(base.plan(addition, sources, balanced(3)), {**models, "two": two})
    for path, x in larger.items():
        if "choice_bias" in path:  # of the new expert, the mean of the others'
            np.testing.assert_array_equal(x, np.float32([0.25, -0.5, -0.125]))
        elif "router" in path:
            np.testing.assert_array_equal(x[:, :2], two[path])
        else:
            np.testing.assert_allclose(x, want[path], atol=1e-6)
    removal = extend.Removal(mixture(3), 2)
    three = [Source("three", balanced(3))]
    back = made(base.plan(removal, three, balanced(2)), {"three": larger})
    for path, x in back.items():
        if "norm" not in path:
            np.testing.assert_array_equal(x, two[path])
    with pytest.raises(TransformError, match="does not have the seed of two"):
        other = {**dense, "layers/block_1/mlp/up/kernel": (4, 8)}
        sources = [Source("two", target(2)), Source("c", other)]
        base.plan(extend.Addition(mixture(3), merge=0.0), sources, target(3))


@pytest.fixture(scope="module")
def losses(train, trained_run, tmp_path_factory):
    """Trains on from a run, two steps, and returns the rows of its metrics."""
    files = [f"t5x_configs/{name}.gin" for name in ("models/tiny", "data/files", "runs/pretrain")]
    sizes = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16}
    given = [
        f"FILES={trained_run.path + '/train.jsonl'!r}",
        f"VALIDATION_FILES={trained_run.path + '/held_out.jsonl'!r}",
        "MIXTURE_OR_TASK_NAME='files'",
        "VOCABULARY=@vocabularies.byte()",
        "TASK_FEATURE_LENGTHS={'targets': 48}",
        "BATCH_SIZE=8",
        "TRAIN_STEPS=2",
        "LOG_PERIOD=1",
        "WARMUP_STEPS=0",
        "config.TransformerConfig.vocab_size=264",
        *(f"config.TransformerConfig.{name}={size}" for name, size in sizes.items()),
    ]

    def run(start, *bindings, methods=()):
        path = tmp_path_factory.mktemp("trained")
        every = [*given, f"MODEL_DIR={str(path)!r}", f"INITIAL_CHECKPOINT_PATH={str(start)!r}"]
        flags = [f"--gin_file={name}" for name in (*files, *methods)]
        result = train(*flags, *[f"--gin.{x}" for x in (*every, *bindings)])
        assert result.status == 0, result.err
        return read_jsonl(path / "metrics.jsonl")

    return run


@pytest.fixture(scope="module")
def dense_losses(losses, branches):
    return losses(branches.folders[0])


@pytest.mark.parametrize("method", ["btx", "bam"])
def test_training_goes_on_from_a_mixture_where_the_dense_model_was(
    losses, dense_losses, make, branches, method
):
    made = make("--copies=2", "--top_k=2", experts=branches.folders[:1], method=method)
    mixed = losses(made, "EXPERTS=2", "TOP_K=2", methods=(f"t5x_configs/methods/bam/{method}.gin",))
    assert mixed[0]["loss"] == pytest.approx(dense_losses[0]["loss"], abs=1e-4)
    assert mixed[0]["auxiliary_loss"] >= 0.01  # balance: 1 where the load is even
    assert (
        0.5 <= mixed[0]["mlp/router_load_max"] <= mixed[0]["mlp/router_load_max_worst_layer"] <= 1
    )
    assert (method == "bam") == ("attention/router_entropy" in mixed[0])


def test_a_scale_of_n_makes_n_copies_behind_even_probabilities_the_dense_model(
    make, branches, command, tmp_path, capsys
):
    seed = branches.folders[0]
    made = make("--copies=3", "--router_std=0", "--expert_scale=3", experts=[seed], method="btx")
    want = score(command, tmp_path, seed)
    np.testing.assert_allclose(score(command, tmp_path, made), want, atol=1e-4)
    told = [x for x in capsys.readouterr().out.splitlines() if x.endswith(", times 3")]
    assert len(told) == 1 and f"{BLOCK}/mlp/down/kernel" in told[0]


def test_experts_in_parts_score_as_whole_ones_and_are_not_extended(
    make, branches, command, tmp_path, capsys
):
    whole = make(experts=branches.folders[:2], method="btx", name="whole")
    finer = make("--granularity=4", experts=branches.folders[:2], method="btx", name="finer")
    assert stored(finer, f"{BLOCK}/mlp/up/kernel").shape == (2, 8, 16, 4)
    assert "copied, one beside the other, each in 4 parts, times 4" in capsys.readouterr().out
    want = score(command, tmp_path, whole)
    np.testing.assert_allclose(score(command, tmp_path, finer), want, atol=1e-4)
    added = ("--add", f"x={branches.folders[2]}", f"--to={tmp_path}/more")
    assert command("upcycle extend", f"--moe={finer}", *added) == 2
    assert "has its experts in 4 parts each (--granularity)" in capsys.readouterr().err


def test_dropped_units_are_drawn_as_they_were_spread_and_all_others_stay():
    """Shapes of one of several stacked layers: gate [1, D, F], down [1, F, D]."""
    mixture = Mixture(experts=3, drop_ratio=0.3)
    rng, hidden = np.random.default_rng(0), 60
    kernels = {
        "gate": 0.5 + 2 * rng.normal(size=(1, 500, hidden)).astype(np.float32),
        "up": rng.normal(size=(1, 500, hidden)).astype(np.float32),
        "down": rng.normal(size=(1, hidden, 500)).astype(np.float32),
    }

    def changed(name, expert, layer=0):
        path = f"{BLOCK}/mlp/{name}/kernel"
        made = experts.dropped(kernels[name], path, mixture, expert, layer)
        old, new = (x[0] if name == "down" else x[0].T for x in (kernels[name], made))
        units = [i for i in range(hidden) if not np.array_equal(old[i], new[i])]
        assert not (old[units] == new[units]).any()
        return units, old[units], new[units]

    first = changed("gate", 0)[0]
    assert len(first) == 18  # floor(0.3 * 60)
    assert changed("up", 0)[0] == changed("down", 0)[0] == first
    assert first not in (changed("gate", 1)[0], changed("gate", 0, layer=1)[0])
    for name in kernels:
        _, old, new = changed(name, 0)
        deviation = float(old.std())
        assert new.mean() == pytest.approx(float(old.mean()), abs=6 * deviation / 9000**0.5)
        assert new.std() == pytest.approx(deviation, rel=0.05)


def test_each_layer_of_an_encoder_drops_units_of_its_own():
    path, kernel = "encoder/layers/block_0/mlp/up/kernel", np.zeros((3, 4, 8), np.float32)
    kernel += np.arange(4, dtype=np.float32)[:, None]  # what is redrawn differs
    mixture = Mixture(experts=2, scanned=True, drop_ratio=0.5)
    sources = [Source(name, {path: kernel.shape}) for name in "ab"]
    (recipe,) = base.plan(Upcycle(mixture), sources, {path: (3, 2, 4, 8)})
    assert recipe.slices == "layers"
    made = base.apply([recipe], lambda name, path: kernel)[path]
    dropped_LEF = (made != kernel[:, None]).any(-2)
    assert (dropped_LEF.sum(-1) == 4).all()
    assert len({tuple(dropped_F) for dropped_F in dropped_LEF.reshape(6, 8)}) > 3
    assert experts.expert_axis(path, kernel.shape, mixture) is None  # of a dense model


def test_experts_of_a_sequential_model_go_to_mixtrals_layout(make, tmp_path):
    with np.load(GOLDENS / "mistral_0.npz") as case:
        config = json.loads(str(case["config"]))
        tensors = {k.partition("/")[2]: case[k] for k in case.files if k.startswith("tensor/")}
    family = registry.family_of_config(config)
    names = family.match(family.model(config), {k: x.shape for k, x in tensors.items()})
    tensors = {k: tensors[names[k]] for k in family.shapes(family.model(config))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = {k: (x.dtype, x.shape) for k, x in tensors.items()}
    with SafetensorsWriter(tmp_path, sizes, shard_bytes=10**9) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    exchange.import_hf(str(tmp_path), str(tmp_path / "run"), dtype="float32")
    flags = ("--copies=4", "--top_k=2", "--renormalise")
    made = make(*flags, experts=[str(tmp_path / "run")], method="btx")
    assert convert.main([f"--from={made}", f"--to_hf={tmp_path}/hf"]) == 0
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["model_type"], written["num_local_experts"]) == ("mixtral", 4)
    ids = jnp.arange(1, 13)[None]
    found, want = (
        jax.jit(model.apply)({"params": params}, ids)
        for model, params in (load.load(tmp_path / "hf"), load.load(tmp_path, dtype="float32"))
    )
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_models_that_make_no_mixture_are_named(make, branches, trained_run, tmp_path, capsys):
    folders, params = branches.folders[:3], branches.params[:3]

    def error(*flags, **options):
        assert make(*flags, **options) == 2
        return capsys.readouterr().err

    other = branches.add
    assert "At least two experts are needed" in error(experts=folders[:1])
    assert "--copies=0 must be" in error("--copies=0", experts=folders)
    other_words = other("words", params[1], vocabulary="other")
    assert f"{other_words} was trained with another vocabulary" in error(
        experts=[folders[0], other_words]
    )
    unrelated = other("unrelated", two_layers(trained_run.params["raw"]))
    text = error(experts=[folders[0], unrelated])
    assert f"{unrelated} and {folders[0]} did not start from the same seed model" in text
    wide = jax.tree.map(lambda x: x, params[1])
    wide["layers"]["block_0"]["mlp"]["up"]["kernel"] = jnp.ones((2, 16, 24))
    wider = other("wider", wide)
    text = error(experts=[folders[0], wider])
    assert (
        f"{wider} does not have the seed" in text
        and f"{BLOCK}/mlp/up/kernel is [2, 16, 24]" in text
    )
    with pytest.raises(FileNotFoundError):
        step_dir.resolve(tmp_path / "nothing")
    transform = Upcycle(Mixture(experts=2))
    with pytest.raises(TransformError, match="new/scale .* has no source"):
        base.plan(transform, [Source("a", {}), Source("b", {})], {"new/scale": (3,)})
    with pytest.raises(TransformError, match="has old/scale, which the new model lacks"):
        base.plan(transform, [Source(name, {"old/scale": (3,)}) for name in "ab"], {})


def test_adapters_and_factors_are_not_averaged(make, branches, changed, command, tmp_path, capsys):
    """The mean of products is not the product of means."""
    *dense, more = branches.folders[1:]
    file, query = "t5x_configs/methods/adapters/lora.gin", ".*/attention/query"
    lines = transformed_run.method_lines([file], {"LORA_RANK": 2, "LORA_LAYERS": [query]})

    def adapted(run):
        return changed(run, f"{pathlib.Path(run).name}_lora", *lines)

    def factored(run):
        to = f"{tmp_path}/{pathlib.Path(run).name}_low"
        flags = (f"--checkpoint={run}", f"--to={to}", "--rank=0.5", f"--layers={query}")
        assert command("upcycle factorise", *flags) == 0
        return to

    mixture = make(experts=dense, method="btx")
    for change, added, words in (
        (adapted, more, "has adapters: merge them into its weights first, espalier upcycle merge"),
        (factored, factored(more), f"stores {BLOCK}/attention/query as factors"),
    ):
        runs, changed_mixture = [change(run) for run in dense], change(mixture)
        for method in ("soup", "btx", "bam"):
            capsys.readouterr()
            assert make(experts=runs, method=method, name="none") == 2
            assert f"{runs[0]} {words}" in capsys.readouterr().err
        # Nothing is averaged where all that is shared stays the mixture's.
        to = f"{changed_mixture}3"
        flags = (f"--moe={changed_mixture}", "--add", f"x={added}", f"--to={to}")
        assert command("upcycle extend", *flags) == 2
        assert f"{changed_mixture} {words}" in capsys.readouterr().err
        assert command("upcycle extend", *flags, "--merge=0") == 0
        shared = [x for x in SourceModel(to, "auto").abstract.shapes if "/mlp/" not in x]
        for path in shared:
            np.testing.assert_array_equal(stored(to, path), stored(changed_mixture, path))
        assert len(shared) > 7
    # The mean of copies is what they are.
    copies = make("--copies=2", experts=runs[:1], method="soup", name="copies")
    for path in (f"{BLOCK}/attention/query/{x}" for x in "uv"):
        np.testing.assert_array_equal(stored(copies, path), stored(runs[0], path))


def test_models_that_compute_differently_are_not_upcycled(
    make, branches, changed, command, tmp_path, capsys
):
    seed, code, law, _ = branches.folders
    settings = {
        "block.attention.rope.base is 10000.0, not 1000000.0": ("rope", "Rope.base = 1e6"),
        "block.mlp.activation is silu, not gelu": ("mlp", "GatedMlp.activation = 'gelu'"),
    }
    mixture = make(experts=[seed, code])
    for i, (message, (module, line)) in enumerate(settings.items()):
        imported = f"from espalier.model import {module}"
        other = changed(law, f"other{i}", imported, f"{module}.{line}")
        for run in (
            lambda x: make(experts=[seed, code, x], name="more"),
            lambda x: make(
                f"--seed_model={x}",
                "--router=linear",
                experts=[seed, code],
                method="nexus",
                name="more",
            ),
            lambda x: command(
                "upcycle extend", f"--moe={mixture}", "--add", x, f"--to={tmp_path}/more"
            ),
        ):
            capsys.readouterr()
            assert run(other) == 2
            assert f"{other} are not of one model: {message}" in capsys.readouterr().err
    begun = changed(law, "begun", add_bos=True)
    make(experts=[seed, begun], method="soup", name="soup")
    assert f"add_bos is False in {seed}, whose setting the result has" in capsys.readouterr().err


def test_a_model_of_someone_elses_code_is_refused_before_it_is_imported(
    trained_run, tmp_path, monkeypatch, command, capsys
):
    """Wherever its checkpoint lies: the model beside it is read, and no other."""
    monkeypatch.syspath_prepend(str(tmp_path))
    trace = tmp_path / "trace"
    (tmp_path / "payload.py").write_text(f"open({str(trace)!r}, 'w')\nclass Block: pass\n")
    outer, run = tmp_path / "evil", tmp_path / "evil" / "sub"
    shutil.copytree(f"{trained_run.path}/checkpoints/3", run / "0")
    record = json.loads(pathlib.Path(trained_run.path, "model.json").read_text())
    (outer / "model.json").write_text(json.dumps(record))
    record["settings"]["transformer.Transformer.block"] = {"factory": "payload:Block"}
    (run / "model.json").write_text(json.dumps(record))
    flags = (f"--checkpoint={run}", f"--to={tmp_path}/out", "--rank=0.5")
    assert command("upcycle factorise", *flags) == 2
    assert "uses 'payload.Block', which is not of this project" in capsys.readouterr().err
    assert not trace.exists()


@pytest.mark.parametrize("extra", ["link", "file"])
def test_a_file_that_the_manifest_does_not_list_takes_no_part(trained_run, tmp_path, extra):
    run = tmp_path / "run"
    shutil.copytree(trained_run.path, run)
    added = run / "checkpoints/3/state/added"
    added.symlink_to("/etc/passwd") if extra == "link" else added.write_text("x")
    with pytest.raises(DamagedCheckpointError, match="added is (a link|not in the manifest)"):
        SourceModel(str(run), "raw")
