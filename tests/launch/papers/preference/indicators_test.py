"""A preference run that is watched: interrupted, with the checkpoint that stays, and ended by its alarm."""

import json
import os
import shutil

import pytest

from espalier.trainers.telemetry.metric_writers import read_jsonl


@pytest.fixture(scope="module")
def preference_run(train, unrolled_run, tmp_path_factory):
    """Starts a run in a directory with further flags."""
    pairs = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"{a} + {b} = ", "chosen": str(a + b), "rejected": str(a * b + 7)}
        for a in range(6)
        for b in range(6)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(path, *bindings):
        files = ("models/tiny", "runs/preference", "methods/preference/indicators")
        names = [f"t5x_configs/{name}.gin" for name in files]
        names.append(f"{train.programs}/local_pairs.gin")
        given = (
            f"MODEL_DIR={str(path)!r}",
            f"PAIRS={str(pairs)!r}",
            f"INITIAL_CHECKPOINT_PATH={unrolled_run.path!r}",
            "LEARNING_RATE=0.02",
            "schedules.cosine.total_steps=6",
            "INDICATORS_PERIOD=2",
            "EVAL_PERIOD=4",
            "checkpoint.Checkpointer.keep_last=2",
            "hook.PreferenceIndicators.rule=@local_reward.AlarmAt()",
            "local_reward.AlarmAt.step=4",
            *bindings,
        )
        flags = [f"--gin_file={name}" for name in names] + [f"--gin.{x}" for x in given]
        result = train(*flags)
        assert result.status == 0, result.err
        return result

    return run


def indicators(path):
    return {
        row["step"]: {name: x for name, x in row.items() if name.startswith("indicators/")}
        for row in read_jsonl(path / "metrics.jsonl")
        if "indicators/entropy" in row
    }


def test_a_watched_run_is_the_same_after_an_interruption_keeps_its_best_and_heeds_its_alarm(
    preference_run, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    preference_run(whole, "TRAIN_STEPS=6")
    # As if it had been killed between the evaluation of step 6 and its checkpoint.
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "6")
    (parts / "indicators" / "samples" / "6.jsonl").unlink()
    preference_run(parts, "TRAIN_STEPS=6")

    found = indicators(whole)
    assert list(found) == [0, 2, 4, 6] and indicators(parts) == found
    for step in found:
        name = f"indicators/samples/{step}.jsonl"
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert [row["indicators/alarm"] for row in found.values()] == [0, 0, 1, 1]
    assert found[0]["indicators/p_win"] == 0.5 and found[0]["indicators/kl"] == 0
    assert found[6]["indicators/kl"] > 0 and found[6]["indicators/llh_distance"] > 0
    rewards = {step: row["indicators/reward"] for step, row in found.items() if step}
    best = max(rewards, key=lambda step: (rewards[step], step))
    for path in (whole, parts):
        assert sorted(map(int, os.listdir(path / "checkpoints"))) == sorted({best, 4, 6})
    evaluated = {
        row["step"]: row
        for row in read_jsonl(whole / "metrics.jsonl")
        if "eval/pairs/llh/gap" in row
    }
    for step, row in evaluated.items():
        assert found[step]["indicators/llh_gap"] == pytest.approx(
            row["eval/pairs/llh/gap"], abs=1e-5
        )

    # The alarm of step 4 is found again by a run that is to end there.
    rows = (whole / "metrics.jsonl").read_text()
    result = preference_run(whole, "TRAIN_STEPS=8", "INDICATORS_STOP='alarm'")
    assert "ended by INDICATORS_STOP = 'alarm' at step 6" in result.out
    assert (whole / "metrics.jsonl").read_text() == rows
