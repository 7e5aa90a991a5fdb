"""The command of benchmarks: what it lists, and errors that are one line."""

import importlib
import importlib.util
import inspect
import sys

import pytest

from espalier.launch import cli
from tests.benchmarks import __main__ as bench
from tests.benchmarks import compare, start_up


def test_every_benchmark_has_a_module_with_run():
    assert {"train_step", "start_up", "accelerator"} <= set(bench.BENCHMARKS)
    for name in bench.BENCHMARKS:
        assert importlib.util.find_spec(f"tests.benchmarks.{name}"), name


def test_benchmarks_without_their_peers_end_with_one_error(capsys, monkeypatch):
    def run():
        raise compare.PeerError("python is missing: run `make peers` first.")

    monkeypatch.setattr(start_up, "run", run)
    assert bench.main(["start_up"]) == cli.USAGE_ERROR
    assert "run `make peers` first" in capsys.readouterr().err


def test_tiny_asks_for_the_fewest_measurements_or_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(start_up, "run", lambda *, repeats=7: {"repeats": repeats})
    assert bench.main(["start_up", "--tiny"]) == 0
    assert '"repeats": 2' in capsys.readouterr().out
    monkeypatch.setattr(start_up, "run", lambda: {})
    assert bench.main(["start_up", "--tiny"]) == 2
    assert "'start_up' has no tiny sizes" in capsys.readouterr().err


def test_each_benchmark_has_a_tiny_form():
    for name in bench.BENCHMARKS:
        run = importlib.import_module(f"tests.benchmarks.{name}").run
        assert {*bench.FEWEST} & {*inspect.signature(run).parameters}, name


def test_a_peer_without_a_package_is_an_error_of_one_line(monkeypatch):
    command = [sys.executable, "-c", "import no_such_package"]
    with pytest.raises(compare.PeerError) as error:
        compare.timed(command)
    assert str(error.value).endswith("No module named 'no_such_package'") and "\n" not in str(
        error.value
    )


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "x", tmp_path):
        assert bench.main([bench.BENCHMARKS[0], f"--out={out}"]) == 2
        assert f"--out={out}" in capsys.readouterr().err
