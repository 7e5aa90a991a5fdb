"""Mixtures behind embeddings of domains: what they are made of, an expert more and one less, and their limits end to end."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.data.nexus import domain_embeddings
from espalier.launch.config import gin_config, model_file
from espalier.launch.nexus import upcycling
from espalier.launch.weights import transformed_run
from espalier.model.kv_cache import policies
from espalier.model.moe import moe
from espalier.model.moe.routing import Routes
from espalier.model.nexus.domain_router import DomainRouter
from espalier.model.nexus.mlp_router import MlpRouter
from espalier.model.transforms import layer_stack
from espalier.model.transforms.base import TransformError
from espalier.trainers import initialise
from espalier.trainers.checkpoints import state_tree, step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.checkpoints.restore_params import restore_params
from espalier.trainers.decoding import prefill
from espalier.trainers.telemetry.metric_writers import read_jsonl

BLOCK = "layers/block_0"
M = 6
TOKENS = jax.random.randint(jax.random.key(5), (2, 10), 1, 200)
# All that extension must carry over: attention experts with common keys, a scale, redrawn units.
EVERYTHING = ("--attention_experts", "--shared_kv", "--expert_scale=2", "--drop_ratio=0.25")


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """A file of embeddings of five domains."""
    rng = np.random.default_rng(0)
    names = ("code", "law", "math", "art", "news")
    raws = {name: domain_embeddings.Raw(rng.normal(size=M), 1, None) for name in names}
    path = tmp_path_factory.mktemp("domains") / "domains.json"
    domain_embeddings.write(domain_embeddings.create(path, {"kind": "random", "dim": M}, raws))
    return str(path)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Where mixtures are made, and what has been: the directory and what was printed, by what was asked for."""
    return tmp_path_factory.mktemp("mixtures"), {}


@pytest.fixture
def make(command, branches, domains, mixtures, capsys):
    """Makes a mixture of runs that are named, which tests only read; returns its directory, or the status of an error.

    What has been made before is printed again.
    """
    by_name = dict(zip(("seed", "code", "law", "math"), branches.folders, strict=True))
    folder, made = mixtures

    def run(*flags, names=("code", "law"), method="nexus", router=None):
        key = (flags, names, method, router)
        if key not in made:
            target = folder / f"{method}{len(made)}"
            given = [f"{name}={by_name[name]}" for name in names]
            given += [f"--to={target}", f"--method={method}"]
            if method == "nexus":
                given.append(f"--seed_model={by_name['seed']}")
                given += [f"--router={router}"] if router else []
                given += [] if router == "linear" else [f"--domains={domains}"]
            if status := command("upcycle", "--experts", *given, *flags):
                return status
            made[key] = str(target), capsys.readouterr().out
        target, told = made[key]
        print(told)
        return target

    return run


@pytest.fixture
def extend(command, domains, tmp_path):
    def run(moe_run, *flags, to):
        with_domains = "nexus" in moe_run and "--remove" not in flags
        given = (f"--domains={domains}",) if with_domains else ()
        target = tmp_path / to
        status = command("upcycle extend", f"--moe={moe_run}", f"--to={target}", *given, *flags)
        return status or str(target)

    return run


def arrays(run):
    step = step_dir.resolve(run)
    names = step_dir.read_manifest(step).arrays
    return {
        name.removeprefix("params/"): StoredArray(step, name).read()
        for name in names
        if name.startswith("params/")
    }


def loaded(run):
    """Model and parameters of a run, as commands load them; its sublayers are gin's until the next is loaded."""
    files = ["t5x_configs/runs/load_run.gin", f"{run}/{model_file.NAME}"]
    unused = {"VOCABULARY": "None"}
    config = gin_config.load(
        [], entry="espalier.launch.load.load_run:RunConfig", unused=unused, defaults=files
    ).entry()
    abstract = nn.meta.unbox(initialise.abstract_variables(config.model)["params"])
    return config.model, restore_params(run, abstract)


def logits(model, params, tokens=TOKENS):
    return np.asarray(jax.jit(lambda x: model.apply({"params": x}, tokens))(params))


def record(run):
    return step_dir.read_meta(run)["upcycled"]


def assert_equal(found, want, *, atol=0.0):
    assert set(found) == set(want)
    for name in found:
        np.testing.assert_allclose(found[name], want[name], rtol=0, atol=atol, err_msg=name)


def test_routed_ffns_are_the_experts_the_shared_one_the_seeds_and_the_rest_the_mean_without_it(
    make, branches, domains, capsys
):
    found = arrays(make("--attention_experts"))
    seed, *two = [state_tree.flatten(x) for x in branches.params[:3]]
    seed, two = jax.tree.map(np.asarray, (seed, two))
    for name in ("gate", "up", "down"):
        path = f"{BLOCK}/mlp/{name}/kernel"
        np.testing.assert_array_equal(found[path], np.stack([x[path] for x in two], axis=1))
        np.testing.assert_array_equal(found[f"{BLOCK}/mlp/shared/{name}/kernel"], seed[path])
    for path in ("token_embed/embedding", "final_norm/scale", f"{BLOCK}/norm/scale"):
        want = np.mean([x[path].astype(np.float64) for x in two], axis=0)
        np.testing.assert_allclose(found[path], want, atol=1e-7, rtol=2.5e-7)  # float32's
    vectors = domain_embeddings.read(domains).vectors(["code", "law"])
    for owner in ("mlp", "attention"):
        router = {
            path.removeprefix(f"{BLOCK}/{owner}/router/"): x
            for path, x in found.items()
            if path.startswith(f"{BLOCK}/{owner}/router/")
        }
        assert set(router) == {"domains", "gate/kernel", "up/kernel", "down/kernel"}
        np.testing.assert_array_equal(router["domains"], np.stack([vectors] * 2))
        for name in ("gate", "up"):
            assert router[f"{name}/kernel"].std() == pytest.approx(M**-0.5, rel=0.2)
    told = capsys.readouterr().out
    assert f"expert 1  law   {branches.folders[2]}" in told and "embeddings\n" in told
    assert f"of {branches.folders[0]}\n" in told and "mean of 2\n" in told


@pytest.mark.parametrize(
    ("router", "flags", "file"),
    [
        ("projection", (), "nexus"),
        ("linear", (), "nexus_linear"),
        ("mlp", (), "nexus_mlp"),
        ("projection", ("--attention_experts", "--shared_kv"), "nexus_bam"),
        ("mlp", ("--attention_experts", "--shared_kv"), "nexus_mlp_bam"),
    ],
)
def test_each_mixture_is_the_model_that_its_file_of_methods_trains(make, router, flags, file):
    found = {path: x.shape for path, x in arrays(make(*flags, router=router)).items()}
    sizes = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16}
    given = ["EXPERTS=2", "MODEL_DIR='/x'", "MIXTURE_OR_TASK_NAME='x'", "TASKS=()"]
    given += [f"config.TransformerConfig.{name}={size}" for name, size in sizes.items()]
    given += ["config.TransformerConfig.vocab_size=264"]
    given += [f"DOMAIN_DIM={M}"] if router != "linear" else []
    given += ["SHARED_KV=True"] if flags else []
    files = [
        f"t5x_configs/{x}.gin" for x in ("models/tiny", "runs/pretrain", f"methods/nexus/{file}")
    ]
    config = gin_config.load(files, given, entry="espalier.launch.train:train")
    variables = initialise.abstract_variables(config.arguments()["recipe"].model)
    params = state_tree.flatten(nn.meta.unbox(variables["params"]))
    assert found == {path: x.shape for path, x in params.items()}


def test_an_mlp_router_has_the_parameters_of_the_projection_and_its_first_logits():
    given = {"features": 32, "axes": ("embed", "unmodeled"), "domain_dim": 40}
    x = jax.random.normal(jax.random.key(0), (256, 64))
    init = jax.jit(lambda key: MlpRouter(**given).init_with_output(key, x))
    found, variables = init(jax.random.key(1))
    kernels = {k: v["kernel"] for k, v in nn.meta.unbox(variables["params"]).items()}
    other = jax.eval_shape(lambda: DomainRouter(**given).init(jax.random.key(1), x))["params"]
    others = [
        leaf.size
        for path, leaf in state_tree.flatten(nn.meta.unbox(other)).items()
        if "domains" not in path
    ]
    assert kernels["gate"].size + kernels["up"].size == sum(others) and len(others) == 3
    x, gate, up, down = (
        np.asarray(k, np.float64) for k in (x, *(kernels[k] for k in ("gate", "up", "down")))
    )
    inner = x @ gate
    want = (inner / (1 + np.exp(-inner)) * (x @ up)) @ down
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert 0.08 < want.std() < 0.12


def test_attention_experts_and_a_projection_train_and_decode_as_the_whole_forward_does(
    train, make, extend, branches, trained_run, tmp_path
):
    made = make("--attention_experts")
    model, params = loaded(made)
    whole, changed = logits(
        model, params, jnp.concatenate([TOKENS, TOKENS.at[:, 6:].set(5)])
    ).reshape(2, 2, 10, -1)
    np.testing.assert_allclose(changed[:, :6], whole[:, :6], atol=1e-6)
    model, params = layer_stack.unrolled(model), layer_stack.unroll(params, model.config)
    policy = policies.policy_named("full")

    @jax.jit
    def begin(tokens):
        return prefill.prefill(model, params, policy, tokens, jnp.full(2, 6), room=10)

    @jax.jit
    def step(token, at, caches):
        out = prefill.read(model, params, policy, token, jnp.full((2, 1), at), caches)
        return model.apply({"params": params}, out.hidden_BTD, method="logits")[:, 0], out.caches

    found, caches = begin(TOKENS[:, :6])
    np.testing.assert_allclose(found, whole[:, 5], atol=1e-4)
    for t in range(6, 10):
        found, caches = step(TOKENS[:, t : t + 1], t, caches)
        np.testing.assert_allclose(found, whole[:, t], atol=1e-4)

    sizes = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16}
    names = ("models/tiny", "data/files", "runs/pretrain", "methods/nexus/nexus_bam")
    given = [
        f"MODEL_DIR={str(tmp_path / 'nexus_run')!r}",
        f"INITIAL_CHECKPOINT_PATH={made!r}",
        f"FILES={trained_run.path + '/train.jsonl'!r}",
        f"VALIDATION_FILES={trained_run.path + '/held_out.jsonl'!r}",
        "MIXTURE_OR_TASK_NAME='files'",
        "VOCABULARY=@vocabularies.byte()",
        "TASK_FEATURE_LENGTHS={'targets': 48}",
        "BATCH_SIZE=8",
        "TRAIN_STEPS=6",
        "LEARNING_RATE=0.01",
        "LOG_PERIOD=1",
        "WARMUP_STEPS=0",
        "EXPERTS=2",
        f"DOMAIN_DIM={M}",
        "config.TransformerConfig.vocab_size=264",
        *(f"config.TransformerConfig.{name}={size}" for name, size in sizes.items()),
    ]
    flags = [f"--gin_file=t5x_configs/{name}.gin" for name in names]
    result = train(*flags, *[f"--gin.{x}" for x in given])
    assert result.status == 0, result.err
    rows = [x for x in read_jsonl(tmp_path / "nexus_run" / "metrics.jsonl") if "loss" in x]
    assert rows[-1]["loss"] < rows[0]["loss"] and "attention/router_entropy" in rows[0]
    before, after = arrays(made), arrays(tmp_path / "nexus_run")
    for owner in ("mlp", "attention"):
        router = f"{BLOCK}/{owner}/router"
        np.testing.assert_array_equal(after[f"{router}/domains"], before[f"{router}/domains"])
        assert not np.array_equal(after[f"{router}/down/kernel"], before[f"{router}/down/kernel"])
    # What has been trained knows its experts and their embeddings, and is extended with what it learned.
    math = f"math={branches.folders[3]}"
    three = extend(str(tmp_path / "nexus_run"), "--add", math, "--merge=0", to="nexus3")
    assert record(three)["experts"] == ["code", "law", "math"]
    found, path = arrays(three), f"{BLOCK}/mlp/router/down/kernel"
    np.testing.assert_array_equal(found[path], after[path])
    assert found[f"{BLOCK}/attention/out/kernel"].shape == (2, 3 * 16, 16)


def test_experts_in_another_order_with_their_domains_are_the_same_model(make):
    here, there = (make(names=names) for names in (("code", "law"), ("law", "code")))
    model, params = loaded(here)
    apply = jax.jit(lambda x: model.apply({"params": x}, TOKENS))
    want, other = apply(params), restore_params(there, params)
    assert not np.array_equal(
        other["layers"]["block_0"]["mlp"]["up"]["kernel"],
        params["layers"]["block_0"]["mlp"]["up"]["kernel"],
    )
    np.testing.assert_allclose(apply(other), want, atol=1e-5)


def test_with_the_gate_at_0_and_a_backbone_of_the_seed_logits_are_the_seeds(
    make, branches, monkeypatch
):
    want = logits(*loaded(branches.folders[0]))
    model, params = loaded(make())
    seed, layers = branches.params[0], params["layers"]
    block = {**seed["layers"]["block_0"], "mlp": layers["block_0"]["mlp"]}
    params = {**seed, "layers": {"block_0": block}}

    def no_weight(probs, **given):
        chosen = jnp.zeros((*probs.shape[:-1], 1), jnp.int32)
        return Routes(experts_MK=chosen, weights_MK=jnp.zeros(chosen.shape))

    monkeypatch.setattr(moe, "route", no_weight)
    np.testing.assert_allclose(logits(model, params), want, atol=1e-5)


@pytest.mark.parametrize("flags", [EVERYTHING, ("--attention_experts",)])
def test_an_untrained_mean_of_two_extended_is_that_of_three(make, extend, branches, flags):
    """The projection's draw does not depend on the number of experts, so everything must agree."""
    three = extend(make(*flags), "--add", f"math={branches.folders[3]}", to="nexus3")
    want = make(*flags, names=("code", "law", "math"))
    assert_equal(arrays(three), arrays(want), atol=1e-6)
    assert record(three) == record(want)
    paths = [f"{BLOCK}/mlp/{name}/kernel" for name in ("gate", "up", "down")]
    paths += [f"{BLOCK}/attention/{name}/kernel" for name in ("query", "out")]
    for path in (*paths, f"{BLOCK}/mlp/router/domains"):
        np.testing.assert_array_equal(arrays(three)[path], arrays(want)[path])


def test_a_levelled_expert_has_the_same_parameters_and_another_logit(
    make, extend, branches, capsys
):
    three, art = make(names=("code", "law", "math")), f"art={branches.folders[0]}"
    plain = extend(three, "--add", art, to="plain")
    levelled = extend(three, "--add", art, "--level", to="levelled")
    assert_equal(arrays(levelled), arrays(plain))
    want = logits(*loaded(plain))
    assert np.abs(logits(*loaded(levelled)) - want).max() > 1e-4
    # Where no levelled expert is left, others are added as to any mixture.
    again = extend(levelled, "--remove", "art", to="nexus3")
    model, _ = loaded(extend(again, "--add", art, to="nexus4"))
    assert model.layer_settings()[0].mlp.router.levelled is None
    math = f"math={branches.folders[3]}"
    assert extend(make(), "--add", math, "--level", to="of_two") == 2
    assert "LEVELLED would be 2, and an expert that is levelled to fewer" in capsys.readouterr().err
    linear = make(router="linear")
    assert extend(linear, "--add", math, "--level", to="linear3") == 2
    assert "is no projection: remove --level" in capsys.readouterr().err
    assert extend(plain, "--remove", "art", "--level", to="without") == 2


def expert_vectors(run):
    """The vectors [E, D] of the first layer's experts, levelled as the run says."""
    model, params = loaded(run)
    own = jax.tree.map(lambda x: x[0], params["layers"]["block_0"]["mlp"]["router"])
    router = model.layer_settings()[0].mlp.router
    return np.asarray(router.apply({"params": own}, jnp.eye(16))).T


def test_levelled_experts_stay_levelled_where_others_come_and_go(make, extend, branches, capsys):
    seed, *_, math = branches.folders
    three = make(names=("code", "law", "math"))
    four = extend(three, "--add", f"art={seed}", "--level", to="nexus4")
    five = extend(four, "--add", f"news={math}", "--level", to="nexus5")
    want = expert_vectors(five)
    np.testing.assert_allclose(want[:4], expert_vectors(four), rtol=0, atol=1e-6)
    later = expert_vectors(extend(five, "--remove", "news", to="later"))
    np.testing.assert_allclose(later, want[:4], rtol=0, atol=1e-6)
    # A vector that is as far from the mean of two others as they are, and on their line, is one of them.
    assert extend(five, "--remove", "code", to="early") == 2
    assert "LEVELLED would be 2" in capsys.readouterr().err
    assert extend(four, "--add", f"news={math}", to="raw") == 2
    assert "the new one would be too: give --level" in capsys.readouterr().err


def test_an_expert_that_no_token_chooses_changes_nothing_and_taken_away_leaves_what_was(
    make, extend, branches, capsys
):
    two = make(*EVERYTHING)
    three = extend(two, "--add", f"math={branches.folders[3]}", "--merge=0", to="nexus3")
    model, params = loaded(three)

    def never(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, DomainRouter) and context.method_name == "__call__":
            out = out.at[..., -1].set(-jnp.inf)
        return out

    with nn.intercept_methods(never):
        found = logits(model, params)
    np.testing.assert_allclose(found, logits(*loaded(two)), atol=1e-6)
    again = extend(three, "--remove", "math", to="nexus2")
    assert_equal(arrays(again), arrays(two))
    assert record(again) == record(two)
    # One in the middle: the others keep their order.
    without = extend(three, "--remove", "law", to="without")
    assert record(without)["experts"] == ["code", "math"]
    path = f"{BLOCK}/mlp/up/kernel"
    np.testing.assert_array_equal(arrays(without)[path], arrays(three)[path][:, [0, 2]])
    assert "written to" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "router"), [("btx", None), ("nexus", "mlp")])
def test_routers_without_embeddings_get_a_column_or_are_drawn_anew(
    command, make, branches, tmp_path, method, router
):
    two = make(method=method, router=router)
    last = f"{BLOCK}/mlp/router/" + ("kernel" if router is None else "down/kernel")
    old = arrays(two)[last]

    def extended(run, name, to, *flags):
        source = branches.folders[{"math": 3, "seed": 0}[name]]
        target = tmp_path / to
        given = ("--add", f"{name}={source}", f"--to={target}", *flags)
        assert command("upcycle extend", f"--moe={run}", *given) == 0
        return str(target)

    three = extended(two, "math", "three")
    found = arrays(three)[last]
    np.testing.assert_array_equal(found[..., :2], old)
    column = found[..., 2]
    assert 0.5 * old.std() < column.std() < 2 * old.std() and not np.array_equal(*column)
    four = extended(three, "seed", "four")
    assert record(four)["experts"] == ["code", "law", "math", "seed"]
    np.testing.assert_array_equal(arrays(four)[last][..., :3], found)
    back = tmp_path / "back"
    assert command("upcycle extend", f"--moe={three}", "--remove=math", f"--to={back}") == 0
    np.testing.assert_array_equal(arrays(back)[last], old)
    reset = arrays(extended(two, "math", "reset", "--router=reset"))[last]
    assert reset.shape == found.shape and not (reset == found).any()


def test_experts_are_known_after_adapters_and_factors(
    make, extend, branches, changed, command, tmp_path
):
    two, math = make(), f"math={branches.folders[3]}"
    layers = {"LORA_RANK": 2, "LORA_LAYERS": [".*attention/query"]}
    file = "t5x_configs/methods/adapters/lora.gin"
    tuned = changed(two, "tuned", *transformed_run.method_lines([file], layers))
    path, low = f"{BLOCK}/attention/query/kernel", ("--rank=1.0", "--layers=.*/attention/query")
    last = tuned
    for i, (name, *flags) in enumerate(
        (("merge",), ("factorise", *low), ("factorise", "--recompose"))
    ):
        before, last = last, str(tmp_path / f"nexus{i}")
        assert command(f"upcycle {name}", f"--checkpoint={before}", f"--to={last}", *flags) == 0
        assert record(last) == record(two)
    assert not np.allclose(arrays(last)[path], arrays(two)[path])
    three = extend(last, "--add", math, to="nexus3")
    assert record(three) == record(make(names=("code", "law", "math")))


def test_a_merge_is_of_the_same_experts(make, extend, branches, changed, command, tmp_path, capsys):
    two, math = make(), f"math={branches.folders[3]}"
    own = record(two)

    def merged(other, name="x", method="linear"):
        file = tmp_path / f"{name}.yml"
        models = [{"model": x, "parameters": {"weight": 1}} for x in (two, other)]
        file.write_text(json.dumps({"merge_method": method, "models": models}))
        status = command("merge", f"--config={file}", f"--out={tmp_path / name}")
        return status or str(tmp_path / name)

    assert merged(make(names=("law", "code"))) == 2
    told = capsys.readouterr().err
    assert f"the experts of {two} are code, law (" in told and "are law, code (" in told
    moved = changed(two, "moved", upcycled={**own, "domains": {**own["domains"], "digest": "0"}})
    assert merged(moved) == 2
    assert (
        f"and those of {moved} are code, law (domains 0), so that different experts"
        in capsys.readouterr().err
    )
    again = merged(make("--router_seed=1"), "nexus_merged")
    assert record(again) == own
    assert record(extend(again, "--add", math, to="nexus3"))["experts"] == ["code", "law", "math"]
    others = changed(again, "others", upcycled={**own, "sources": ["elsewhere", "there"]})
    of_others = merged(others, "nexus_of_others")
    assert record(of_others) == {key: x for key, x in own.items() if key != "sources"}
    assert extend(of_others, "--add", math, to="none") == 2
    assert "has no record of the names and sources of its experts" in capsys.readouterr().err


def test_what_makes_no_mixture_or_extension_is_named(make, extend, branches, domains, capsys):
    math = branches.folders[3]

    def error(status):
        assert status == 2
        return capsys.readouterr().err

    two = make()
    text = error(make(names=("code", "seed")))
    assert f"{domains}: no domain 'seed'" in text and "--extend" in text
    assert "2 experts are named code" in error(make(names=("code", "code")))
    wide = jax.tree.map(lambda x: x, branches.params[0])
    wide["layers"]["block_0"]["mlp"]["up"]["kernel"] = jnp.ones((2, 16, 24))
    wider = branches.add("wider_seed", wide)
    text = error(make(f"--seed_model={wider}"))
    assert f"{wider} does not have the seed" in text and "[2, 16, 24]" in text

    assert "already has an expert law" in error(extend(two, "--add", f"law={math}", to="x"))
    assert "has no expert lax: give one of code, law" in error(
        extend(two, "--remove", "lax", to="x")
    )
    assert "does not apply to the projection router" in error(
        extend(two, "--add", f"math={math}", "--router=reset", to="x")
    )
    dense = error(extend(math, "--remove", "code", to="x"))
    assert "has no record of the names and sources" in dense
    used = ("--remove", "law", "--gin.moe.MoeMlp.top_k=2")
    assert "fewer than MoeMlp.top_k = 2" in error(extend(two, *used, to="x"))


def test_embeddings_that_are_not_those_of_the_mixture_are_named(domains, tmp_path):
    content = json.loads(pathlib.Path(domains).read_text())
    embeddings = domain_embeddings.read(domains)
    names, vectors_EM = ["code", "law"], embeddings.vectors(["code", "law"])
    recorded = upcycling.domains_record(embeddings, vectors_EM)

    def check(**change):
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**content, **change}))
        found = domain_embeddings.read(other)
        upcycling.check_same_encoder(found, recorded)
        upcycling.check_same_vectors(found, names, vectors_EM)

    check()
    with pytest.raises(TransformError, match="was made with the encoder one_hot"):
        check(encoder={"kind": "one_hot", "dim": M})
    with pytest.raises(TransformError, match="has another mean"):
        check(mean=[0.0] * M)
    longer = {
        n: {**d, "vector": [24 * x for x in d["vector"]]} for n, d in content["domains"].items()
    }
    with pytest.raises(TransformError, match="vectors of length 24, but the mixture's have 1"):
        check(length=24.0, domains=longer)
    with pytest.raises(TransformError, match="has another vector of law"):
        check(domains={**content["domains"], "law": content["domains"]["math"]})
