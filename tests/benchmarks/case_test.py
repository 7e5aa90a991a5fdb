"""The benchmark's two sides start from the same numbers: weights, rows and optimiser settings."""

import functools
import json
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.model.adapters import adapter
from espalier.model.adapters.adapter import Adapted
from espalier.model.linear import Dense
from espalier.model.mov.molora import MoLora
from espalier.trainers import partitioning
from tests.benchmarks import adapters, case, compare, moe_case, online_dpo, sft, t5
from tests.benchmarks.jax import decode_jax, llama_jax, t5_jax


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("case")
    case.write_training(str(path), steps=2)
    return path


def test_the_recipe_has_the_shapes_of_the_shared_weights(folder):
    sizes = json.loads((folder / "case.json").read_text())
    recipe = llama_jax.recipe_of(sizes)
    params = llama_jax.peer_params(str(folder))
    abstract = recipe.program(devices=jax.devices()[:1]).abstract_state.params
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, abstract)
    assert (recipe.batch_size, recipe.length) == (sizes["batch_size"], sizes["length"])
    assert float(recipe.learning_rate(0)) == np.float32(sizes["learning_rate"])


def test_lora_begins_with_the_shared_weights_and_trains_alone(folder):
    sizes = {**json.loads((folder / "case.json").read_text()), "lora_rank": 2}
    program = llama_jax.recipe_of(sizes).program(devices=jax.devices()[:1])
    params = llama_jax.peer_params(str(folder))
    with partitioning.use_mesh(program.mesh, program.rules):
        state = llama_jax.initial_state(program, params)
    trained = program.num_params() - sum(x.size for x in jax.tree.leaves(params))
    assert program.num_params(trained_only=True) == trained > 0
    key = state.params["layers"]["block_0"]["attention"]["key"]
    assert not np.any(key["adapter_lora"]["lora_b"])
    np.testing.assert_array_equal(
        key["kernel"], params["layers"]["block_0"]["attention"]["key"]["kernel"]
    )


def test_a_loop_over_experts_is_molora():
    outputs = []
    for make in (MoLora, adapters.LoopedMoLora):
        named = adapter.named(one=functools.partial(make, num_experts=3, layers=(".*",)))
        adapted = Adapted(base=Dense(features=6, axes=("embed", "mlp")), adapters=named)
        x = jax.random.normal(jax.random.key(0), (2, 5, 4))
        variables = nn.meta.unbox(jax.jit(adapted.init)(jax.random.key(1), x))
        params = jax.tree.map(
            lambda p: jax.random.normal(jax.random.key(2), p.shape), variables["params"]
        )
        outputs.append(jax.jit(lambda p, x, m=adapted: m.apply({"params": p}, x))(params, x))
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)


def test_both_sides_of_t5_have_the_shared_weights_and_rows(tmp_path):
    small = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 24}
    small |= {"vocab_size": 64, "inputs": 8, "targets": 4, "batch_size": 2}
    t5.write(str(tmp_path), steps=2, sizes={**t5.CASE, **small})
    sizes = json.loads((tmp_path / "case.json").read_text())
    recipe = t5_jax.recipe_of(sizes)
    program = recipe.program(devices=jax.devices()[:1])
    params = llama_jax.peer_params(str(tmp_path))
    abstract = program.abstract_state.params
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, abstract)
    batch = t5_jax.batches(str(tmp_path))[1]
    wanted = recipe.abstract_batch(program.batch_sharding)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in wanted.items()
    }
    assert batch["encoder_input_tokens"].min() >= 2  # neither padding nor end
    ours = t5_jax.Ours(str(tmp_path), sizes)
    answer = ours.generate(batch=2, length=8, new=3, tokens=True)
    assert [len(row) for row in answer["tokens"]] == [3, 3]


@pytest.mark.parametrize("name", moe_case.MIXTURES)
def test_both_routings_of_a_mixture_are_one_model_and_differ_in_their_shares(name, tmp_path):
    small = {"vocab_size": 512, "num_layers": 1, "embed_dim": 32, "length": 128}
    sizes = {**moe_case.SIZES, **small}
    shares = {}
    for routing in moe_case.ROUTINGS:
        folder = tmp_path / routing
        folder.mkdir()
        moe_case.write(str(folder), name=name, routing=routing, steps=1, sizes=sizes)
        recipe = llama_jax.recipe_of(json.loads((folder / "case.json").read_text()))
        params = llama_jax.peer_params(str(folder))
        abstract = recipe.program(devices=jax.devices()[:1]).abstract_state.params
        assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, abstract)
        tokens = np.load(folder / "tokens.npy")[0]
        apply = jax.jit(functools.partial(recipe.model.apply, mutable=["metrics"]))
        _, seen = apply({"params": params}, tokens)
        shares[routing] = np.asarray(seen["metrics"]["layers"]["block_0"]["mlp"]["router_load"][0])
    experts = moe_case.MIXTURES[name]["num_experts"]
    eighth = experts // 8
    assert shares["balanced"].max() < 3 / experts
    assert shares["skewed"][:eighth].sum() > 3 * shares["balanced"][:eighth].sum()


def test_rows_predict_their_own_next_token(folder):
    rows = np.load(folder / "tokens.npy")[0]
    batch = llama_jax.batch_of(rows)
    np.testing.assert_array_equal(batch["decoder_target_tokens"][:, :-1], rows[:, 1:])
    assert batch["decoder_loss_weights"][:, :-1].all()
    assert not batch["decoder_loss_weights"][:, -1].any()


def test_ratio_is_of_pairs():
    ratio = compare.ratio([2.0, 30.0, 5.0], [1.0, 10.0, 1.0])
    assert ratio["median"] == 3.0
    assert ratio["interval_95"] == [2.0, 5.0]


def test_ratio_is_the_median_of_pairs_with_an_interval_around_it():
    ratio = compare.ratio([2.0, 3.0, 8.0, 2.0, 2.2], [1.0, 1.5, 2.0, 1.0, 1.0])
    assert ratio["median"] == 2.0
    low, high = ratio["interval_95"]
    assert low + 1e-9 >= 2.0 and low <= 2.0 <= high <= 4.0


def test_rounds_alternate_in_both_orders_and_the_warm_up_is_dropped():
    calls = []

    def call(name):
        calls.append(name)
        return len(calls)

    sides = {name: functools.partial(call, name) for name in ("ours", "peer")}
    assert compare.alternate(sides, 2, warm_up=1) == {"ours": [4, 5], "peer": [3, 6]}
    assert calls == ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_what_takes_long_tells_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(compare.time, "monotonic", lambda: next(clock))
    compare.alternate({"ours": lambda: 1, "peer": lambda: 2}, 3)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "2 of 6 measurements, peer last; about 24 s left" and len(told) == 2


def test_a_side_reports_the_last_line_of_its_output_or_its_error():
    report = compare.measured([sys.executable, "-c", "print('note'); print('{\"x\": 1}')"])
    assert report["x"] == 1 and report["other_load"] >= 0
    with pytest.raises(compare.PeerError, match="ended with status 3:\nbroken"):
        code = "import sys; sys.stderr.write('broken'); sys.exit(3)"
        compare.measured([sys.executable, "-c", code])
    with pytest.raises(
        compare.PeerError, match=r"\.venv-nowhere.* is missing: run `make peers-nowhere`"
    ):
        compare.peer("torch/llama_torch.py", target="peers-nowhere")


def test_parts_of_online_dpo_are_those_of_whole_steps_after_the_first():
    begin, spans = 0.0, {name: [] for name in ("rollout", "sampling", "rewards", "reference")}
    for step in range(online_dpo.WARM_UP + 4):
        slow = 100 if step < online_dpo.WARM_UP else 1
        spans["rollout"].append((begin, begin + 4.0))
        for i, name in enumerate(("sampling", "rewards", "reference")):
            spans[name].append((begin + i, begin + i + 1.0))
        begin += 4.0 + 6.0 * slow
    seconds = online_dpo.seconds(spans)
    assert seconds == {
        **dict.fromkeys(("sampling", "rewards", "reference", "arrangement"), [1.0] * 3),
        "update": [6.0] * 3,
    }
    shares = online_dpo.figures([seconds, seconds])
    assert shares["generation_of_time"]["median"] == pytest.approx(0.4)
    assert shares["sampling_of_time"]["median"] == pytest.approx(0.1)
    assert shares["sampling_of_time"]["pairs"] == 2
    assert shares["parts_of_time"]["update"] == 0.6 and shares["seconds_per_step"] == [10.0, 10.0]


def test_what_online_dpo_times_is_there():
    parts = online_dpo.watched()
    assert set(parts) == {"rollout", "sampling", "rewards", "reference"}
    assert all(callable(getattr(owner, name)) for owner, name in parts.values())


@pytest.mark.parametrize(
    ("module", "setting"),
    [
        (online_dpo, f"MAX_NEW_TOKENS = {online_dpo.CASE['completion']}"),
        (sft, "TRAIN_STEPS = 3"),
    ],
)
def test_the_command_of_a_benchmark_is_one_of_train(tmp_path, module, setting):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.gin").write_text("include 't5x_configs/models/bench_llama.gin'\n")
    argv = module.arguments(str(tmp_path), 3)
    files = [flag.partition("=")[2] for flag in argv if flag.startswith("--gin_file=")]
    bound = [flag.removeprefix("--gin.") for flag in argv if flag.startswith("--gin.")]
    assert len(files) + len(bound) == len(argv)
    config = gin_config.load(files, bound, entry="espalier.launch.train:train")
    assert setting in config.text


def test_the_decode_benchmark_generates_from_the_shared_weights(tmp_path):
    sizes = {
        **case.DECODE,
        "num_layers": 2,
        "embed_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_dim": 32,
        "vocab_size": 64,
    }
    case.write_decoding(str(tmp_path), sizes)
    ours = decode_jax.Ours(str(tmp_path))
    snapkv = {"policy": "snapkv", "settings": {"capacity": 16, "window": 4}}
    answer = ours.generate(batch=1, length=48, new=3, tokens=True, **snapkv)
    assert [len(row) for row in answer["tokens"]] == [3]
    # What is calculated from shapes is what a run holds; the peak has one whole layer.
    calculated = ours.peak_bytes(length=48, new=3, **snapkv)
    assert calculated["decode_bytes"] == answer["cache_bytes"]
    whole_layer = 48 * 2 * 2 * 8 * 4
    assert calculated["bytes"] == whole_layer + calculated["decode_bytes"] // 2
