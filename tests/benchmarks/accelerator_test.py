"""The accelerator tier with tiny sizes in this process, its errors, and its arithmetic."""

import json

import numpy as np
import pytest

from tests.benchmarks import __main__ as bench
from tests.benchmarks import accelerator, accelerator_case, compare
from tests.benchmarks.jax import accelerator_jax

DEVICE = {"memory_bytes": None, "device": "one", "peak_flops": 1e12, "layers": {"train_1b": 1}}


def here(command, env=None):
    """Runs this project's side of a command in this process."""
    *_, what, argument = command
    return {
        **getattr(accelerator_jax, what)(json.loads(argument)),
        **{"other_load": 0.0, "process_cpu_s": 1.0},
    }


def no_peer(*_, **__):
    raise compare.PeerError("/python is missing: run `make peers` first.")


def test_tiny_workloads_run_on_a_cpu(monkeypatch):
    monkeypatch.setattr(compare, "measured", here)
    monkeypatch.setattr(compare, "peer", no_peer)
    figures = json.loads(json.dumps(accelerator.run(tiny=True)))
    assert figures["platform"] == "cpu" and "make peers" in figures["peer"]["missing"]
    results = figures["workloads"]
    assert results.keys() == accelerator_case.WORKLOADS.keys()
    assert not [result["error"] for result in results.values() if "error" in result]
    for name in ("train_1b", "train_8b", "moe", "dpo"):
        assert results[name]["mfu"] == [None]  # no peak of a CPU is known
        assert results[name]["tokens_per_second"]["ours"][0] > 0
        assert results[name]["case"]["model"]["num_layers"] == 2
    # One has a head of its own, the other's is the table of tokens.
    head = 128 * 32
    assert results["train_8b"]["parameters"] - results["train_1b"]["parameters"] == head
    caches = results["decode"]["cache_bytes"]
    assert caches["snapkv"] < caches["full"]
    assert set(results["attention"]) == {"case", "causal", "window", "packed"}
    assert set(results["experts_64"]) == {"case", "balanced", "skewed"}


def test_without_an_accelerator_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(compare, "measured", lambda *_, **__: {**DEVICE, "platform": "cpu"})
    assert bench.main(["accelerator"]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "GPU or a TPU" in line and "--tiny" in line


@pytest.fixture
def stand_ins(monkeypatch):
    """A GPU whose sides answer with fixed times: 2 s here, and 3 s and 5 s of the peer's modes."""
    asked = []

    def measured(command, env=None):
        asked.append(command)
        if command[-2] == "describe":
            return {**DEVICE, "platform": "gpu", "cuda": True}
        work = json.loads(command[-1])
        seconds = {None: 2.0, "eager": 3.0, "dynamic": 3.0, "sdpa": 3.0}.get(work.get("mode"), 5.0)
        one = {"seconds": seconds, "flops": 4e11, "tokens": 100, "parameters": 7}
        if work["kind"] == "decode" and "mode" not in work:
            cache = {"prefill_seconds": 1.0, "cache_bytes": 9}
            return {"full": {**one, **cache}, "snapkv": {**one, **cache, "seconds": 0.5}}
        if work["kind"] in ("attention", "experts"):
            return {"causal": one, "other_load": 0.0, "process_cpu_s": 1.0}
        if work["kind"] == "dpo":
            raise compare.PeerError("out of memory")
        return {**one, "peak_memory_mb": 1.0}

    monkeypatch.setattr(compare, "measured", measured)
    monkeypatch.setattr(compare, "peer", lambda *words, **_: [*map(str, words)])
    return asked


def test_figures_are_ratios_to_the_better_mode_of_the_peer(stand_ins):
    results = accelerator.run(rounds=2)["workloads"]
    train = results["train_1b"]
    assert train["mfu"] == [0.2, 0.2]  # 4e11 FLOPs in 2 s of 1e12 a second
    assert train["speed_over_best_peer"]["median"] == 1.5
    assert train["speed_over_best_peer"]["pairs"] == 2
    assert train["case"]["model"]["num_layers"] == 1 and train["layers_of_the_whole_model"] == 16
    assert results["dpo"]["error"] == "out of memory"  # the others are measured all the same
    assert results["decode"]["snapkv_speed_over_full"]["median"] == 4
    assert results["decode"]["speed_over_best_peer"]["median"] == 1.5
    assert results["attention"]["causal"]["of_peak"] == [0.2, 0.2]
    assert "speed_over_best_peer" not in results["experts_8"]["causal"]
    configs = [json.loads(command[-1]).get("config") for command in stand_ins]
    mixtral = next(c for c in configs if c and c["model_type"] == "mixtral")
    assert (mixtral["num_local_experts"], mixtral["hidden_size"]) == (8, 4096)


def test_layers_that_fit_the_memory():
    work = {"model": {"num_layers": 32}}
    layer, rest = 3, 10
    parameters = (rest + layer, rest + 2 * layer)
    for layers in (1, 5, 31):
        exact = (rest + layers * layer) * accelerator_case.STATE_BYTES
        memory = int(exact / accelerator_case.STATE_SHARE) + 1
        fits = accelerator_case.fitting_layers(work, parameters, memory)
        assert fits == layers
    assert accelerator_case.fitting_layers(work, parameters, 10**9) == 32
    assert accelerator_case.fitting_layers(work, parameters, None) == 32
    assert accelerator_case.fitting_layers(work, parameters, 1) == 1


def test_rows_of_experts_add_up_and_are_skewed():
    work = accelerator_case.WORKLOADS["experts_8"]
    sizes = accelerator_case.expert_sizes(work)
    assert [sum(of_one) for of_one in sizes.values()] == [work["rows"]] * 2
    assert set(sizes["balanced"]) == {work["rows"] // 8}
    assert sizes["skewed"] == sorted(sizes["skewed"], reverse=True)
    assert sizes["skewed"][0] / sizes["skewed"][-1] == pytest.approx(8, rel=0.01)


def test_a_row_of_pairs_holds_two_completions():
    rows = accelerator_jax.PairRows(2, 64, 100)
    batch = rows.batch(3, 0, 2)
    work = {**accelerator_case.workloads(tiny=True)["dpo"], "steps": 1}
    wanted = accelerator_jax.recipe_of(work).inputs_spec.arrays(2)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in wanted.items()
    }
    segments = np.repeat([[1, 2]] * 2, 32, axis=1)
    np.testing.assert_array_equal(batch["decoder_segment_ids"], segments)
    np.testing.assert_array_equal(batch["decoder_loss_weights"].sum(1), 2 * 25)
    np.testing.assert_array_equal(batch["chosen_tokens_per_pair"], 25)
