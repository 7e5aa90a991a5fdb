"""The quickstart on the standard library's text alone, with a tiny model: table, plot, samples, resume."""

import json
import types

import pytest

from espalier.launch import cli, quickstart
from espalier.launch.config import gin_config

SMALL = """
from __gin__ import dynamic_registration

from espalier.data.tokenizers import vocabularies
from espalier.data.stream import stream
from espalier.launch import train
from espalier.model import config

SOURCES = ['docstrings', 'python']
BYTES_PER_SOURCE = 200000
VOCABULARY = @vocabularies.byte()
TRAIN_STEPS = 4
WARMUP_STEPS = 1
EVAL_PERIOD = 2
EVAL_STEPS = 1
BATCH_SIZE = 8
TASK_FEATURE_LENGTHS = {'targets': 32}
config.TransformerConfig.vocab_size = 384
config.TransformerConfig.num_layers = 1
config.TransformerConfig.scan_layers = False
config.TransformerConfig.embed_dim = 16
config.TransformerConfig.num_heads = 2
config.TransformerConfig.num_kv_heads = 2
config.TransformerConfig.mlp_dim = 16
stream.make_stream.phases = ((0, {'docstrings': 0.5, 'python': 0.5}), (2, {'docstrings': 1.0}))
train.train.eval_tasks = ('docstrings', 'python')
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "small.gin"
    file.write_text(SMALL)
    return file


def test_ends_with_table_plot_samples_and_directories(small, tmp_path, capsys):
    out = tmp_path / "runs"
    arguments = [f"--out={out}", f"--gin_file={small}"]
    assert quickstart.main(arguments) == 0
    printed = capsys.readouterr().out
    for arm in quickstart.ARMS:
        assert (out / arm / "config.gin").exists()
        assert str(out / arm) in printed
        assert f"sample of {arm.replace('_', ' ')}" in printed
    assert "docstrings" in printed and "bits per byte" in printed
    found = json.loads((out / "report.json").read_text())
    assert set(found) == set(quickstart.ARMS)
    assert all(set(result["domains"]) == {"docstrings", "python"} for result in found.values())
    assert (out / "report.png").exists()

    # Started again there is nothing left to train, and the comparison is the same.
    assert quickstart.main(arguments) == 0
    assert json.loads((out / "report.json").read_text()) == found


def test_errors_and_interruptions_end_as_those_of_other_commands(tmp_path, capsys, monkeypatch):
    arguments = [f"--out={tmp_path}", "--gin_file=nope.gin"]
    assert quickstart.main(arguments) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "no file 'nope.gin'" in error and "Traceback" not in error
    interrupted = types.SimpleNamespace(entry=lambda started: {"interrupted": 1.0})
    monkeypatch.setattr(gin_config, "load", lambda *_, **__: interrupted)
    assert quickstart.main(arguments) == cli.INTERRUPTED == 75
