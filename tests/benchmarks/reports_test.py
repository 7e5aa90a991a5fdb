"""Benchmarks of two sides report what their recorded runs report, from stand-ins for the sides."""

import contextlib
import importlib
import json
import os
import pathlib

import pytest

from tests.benchmarks import (
    adapters,
    case,
    compare,
    dpo,
    first_token,
    hf_import,
    lm_eval,
    moe_case,
    online_dpo,
    t5,
)

RECORDED = pathlib.Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
PARTS = ("sampling", "rewards", "reference", "arrangement", "update")
REPORT = {
    "other_load": 0.1,
    "process_cpu_s": 1.0,
    "losses": [3.0, 2.0],
    "seconds": [1.0] * 40,
    "cpu_seconds": [2.0] * 40,
    **dict.fromkeys(
        ("first_loss_s", "first_step_s", "first_token_s", "first_tokens_s")
        + ("set_up_s", "load_s", "ended"),
        1.0,
    ),
    **dict.fromkeys(("load_and_touch_s", "peak_mb", "peak_memory_mb"), 3.0),
    "tunables": "",
    "tokens": [1],
    "versions": {"torch": "2"},
    "step_ends": list(range(40)),
    "multiple_choice": {"seconds": 1.0, "again": 0.5, "answers": [[-1.0, True], [-2.0, False]]},
    "generate_until": {"seconds": 1.0, "again": 0.5, "answers": ["a", "b"]},
}


class Side:
    def ask(self, op, *, new=0, length=1, **_):
        times = {"seconds": 1 + new / 100, "decode_seconds": 0.5, "copy_seconds": 0.2}
        return {**times, "tokens": [[1]], "cache_bytes": 3, "bytes": length, "decode_bytes": 4}


def measured(command, env=None):
    online = "online_dpo" in command
    return {**REPORT, **({"seconds": dict.fromkeys(PARTS, [1.0, 2.0])} if online else {})}


@pytest.mark.parametrize(
    "name",
    ["train_step", "moe_step", "cold_start", "dpo", "online_dpo", "lm_eval"]
    + ["decode", "cache_policies", "hf_import"],
)
def test_figures_have_the_names_of_the_recorded_ones(name, monkeypatch):
    monkeypatch.setattr(compare, "peer", lambda *arguments, **_: [*map(str, arguments)])
    monkeypatch.setattr(compare, "measured", measured)
    monkeypatch.setattr(compare, "side", lambda command: contextlib.nullcontext(Side()))
    writers = [(case, "write_training"), (case, "write_decoding")]
    writers += [(lm_eval, "_write"), (lm_eval, "_write_many")]
    for owner, writer in (*writers, *((module, "write") for module in (dpo, online_dpo, moe_case))):
        monkeypatch.setattr(owner, writer, lambda *_, **__: None)
    monkeypatch.setattr(hf_import, "write_checkpoint", lambda folder, tiny: os.mkdir(folder) or 1)
    figures = importlib.import_module(f"tests.benchmarks.{name}").run()
    recorded = json.loads((RECORDED / f"{name}.json").read_bytes())["figures"]
    # Recorded runs also measured programs that were stored whole, which there are no more.
    compared = {key for key in recorded if "_stored" not in key}
    assert json.loads(json.dumps(figures)).keys() == compared
    for key, figure in figures.items():
        if key in recorded and isinstance(figure, dict) and "median" in figure:
            assert figure.keys() == recorded[key].keys()


def test_figures_of_the_first_token_are_ratios_of_stand_ins(monkeypatch):
    monkeypatch.setattr(compare, "peer", lambda *arguments, **_: [*map(str, arguments)])
    monkeypatch.setattr(compare, "measured", measured)
    monkeypatch.setattr(hf_import, "write_checkpoint", lambda folder, tiny: os.mkdir(folder) or 1)
    figures = first_token.run(rounds=2)
    assert figures["transformers_over_ours_seconds_cold"] == figures["transformers_over_ours_peak"]
    assert figures["seconds"].keys() == {f"{side}_{cache}" for side in ("ours", "transformers") for cache in ("cold", "warm")}  # fmt: skip


def test_figures_of_t5_and_of_peft_are_ratios_of_stand_ins(monkeypatch):
    monkeypatch.setattr(compare, "peer", lambda *arguments, **_: [*map(str, arguments)])
    monkeypatch.setattr(compare, "measured", measured)
    monkeypatch.setattr(compare, "side", lambda command: contextlib.nullcontext(Side()))
    monkeypatch.setattr(case, "write_training", lambda *_, **__: None)
    monkeypatch.setattr(t5, "write", lambda *_, **__: None)
    figures = t5.run(rounds=2, repeats=2)
    assert figures["speed_over_best_peer"]["median"] == 1
    assert figures["decoding"]["batch_8"]["speed_over_best_peer"]["median"] == 1
    assert figures["decoding"]["batch_1"]["same_tokens"] is True
    figures = adapters._peft(2, 3)
    assert figures["speed_over_peft"]["pairs"] == 2 and figures["peak_memory_of_pefts"]
