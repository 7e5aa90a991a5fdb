"""Runs that go on from a local checkpoint equal the one that nothing happened to, and their time is accounted for."""

import json
import re

import pytest
from etils import epath

from espalier.launch.report import __main__ as report
from espalier.trainers import signals
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.telemetry import lifetime
from tests.launch.resume_test import rows


def flags(train, path, *bindings):
    given = [f"MODEL_DIR={str(path)!r}", f"DIRECTORY={train.cache + '/text'!r}", "LENGTH=32"]
    given += ["CHECKPOINT_PERIOD=12", *bindings]
    return [f"--gin_file={train.programs}/small_text.gin", *[f"--gin.{x}" for x in given]]


def local(train, path, *bindings):
    given = [f"LOCAL_CHECKPOINT_DIR={path.parent / 'disk'}", "LOCAL_CHECKPOINT_PERIOD=3", *bindings]
    files = ["--gin_file=t5x_configs/runs/local_checkpoints.gin"]
    return [*flags(train, path), *files, *[f"--gin.{binding}" for binding in given]]


def arrays(path):
    """Name of each array of the last step -> shape, dtype and digest."""
    return step_dir.read_manifest(epath.Path(path) / "checkpoints" / "24").arrays


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The run that nothing happens to, without a local tier."""
    path = tmp_path_factory.mktemp("whole")
    result = train(*flags(train, path))
    assert result.status == 0, result.err
    assert re.search(r"^life: \d+% of .* in steps that count, 1 start; ", result.out, re.M)
    assert {p.name for p in (path / "checkpoints").iterdir()} == {"12", "24"}
    return path


def test_a_run_that_died_goes_on_from_its_local_step_bit_for_bit(
    train, whole, tmp_path, monkeypatch, command, capsys
):
    path = tmp_path / "run"

    def power_cut(self, step):
        if step == 8:
            raise RuntimeError("power")
        return False

    monkeypatch.setattr(signals.StopRequest, "reached", power_cut)
    with pytest.raises(RuntimeError, match="power"):
        train(*local(train, path))
    monkeypatch.undo()
    assert [p.name for p in sorted((path / "checkpoints").glob("?"))] == [
        "3"
    ]  # the first is shared
    result = train(*local(train, path))
    assert result.status == 0, result.err
    assert re.search(rf"^start +step 6 from {tmp_path}/disk/run-", result.out, re.M)
    assert re.search(r"^life +\d+% of .* in steps that count, 2 starts; ", result.out, re.M)
    assert arrays(path) == arrays(whole)
    assert rows(path) == rows(whole)

    first, second = lifetime.read(path / lifetime.FILE)
    assert (first.from_step, first.step, first.ended, first.lost_steps) == (0, 7, "failed", 1)
    assert 0 < first.lost_seconds < first.seconds["step"]
    assert (second.from_step, second.step, second.ended) == (6, 24, "done")
    assert second.first_step_at > first.alive > first.first_step_at
    assert all(second.seconds[part] > 0 for part in ("init", "data", "restore", "step"))
    assert report.main(["--time", str(path)]) == 0
    line, head, *table = capsys.readouterr().out.splitlines()
    assert line == report.time_table(path).splitlines()[0] and ", 2 starts; " in line
    assert [re.split(" {2,}", row)[1] for row in (head, *table)] == ["steps", "0 to 7", "6 to 24"]
    assert report.main(["--time", str(tmp_path)]) == 2
    assert f"{tmp_path}/lifetime.json is missing" in capsys.readouterr().err


def test_a_signal_without_time_for_a_shared_save_loses_nothing(
    train, whole, tmp_path, monkeypatch, caplog
):
    path = tmp_path / "run"
    monkeypatch.setattr(signals.StopRequest, "reached", lambda self, step: step == 8)
    grace = "GRACE_SECONDS=1e-6"
    assert train(*local(train, path, grace)).status == 75
    monkeypatch.undo()
    assert "step 8 is saved in the local tier alone: a shared save takes about " in caplog.text
    result = train(*local(train, path, grace))
    assert re.search(rf"^start +step 8 from {tmp_path}/disk/run-", result.out, re.M)
    assert arrays(path) == arrays(whole)
    assert rows(path) == rows(whole)
    assert lifetime.read(path / lifetime.FILE)[0].ended == "interrupted"


def test_a_last_step_that_is_only_local_is_shared_by_the_next_start(
    train, whole, tmp_path, monkeypatch
):
    """A process that dies while it writes its last shared step."""
    path = tmp_path / "run"
    assert train(*local(train, path)).status == 0
    (path / "checkpoints" / "24" / "manifest.json").unlink()
    (path / "checkpoints" / "24" / "incomplete").touch()
    result = train(*local(train, path))
    assert re.search(rf"^start +step 24 from {tmp_path}/disk/run-", result.out, re.M)
    assert arrays(path) == arrays(whole)
    record = json.loads((path / "checkpoints" / "24" / "meta.json").read_text())
    assert record["meta"]["data_step"] == 24
