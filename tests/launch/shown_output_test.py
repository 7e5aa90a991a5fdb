"""Errors of the configuration are printed as docs/reference/configuration_errors.md shows them."""

import shlex

from tests import transcripts

MINE = """from __gin__ import dynamic_registration

from espalier.model import mlp
from espalier.trainers.optim import schedule

include 't5x_configs/models/tiny.gin'

DROPOUT = 0.1
transformer.Block.mlp = @mlp.GatedMLP
mlp.GatedMlp.activation = gelu
"""
USUAL = (
    "--gin_file=t5x_configs/data/bytes.gin --gin.MODEL_DIR=/tmp/run --gin.MIXTURE_OR_TASK_NAME=text"
)
BEGUN = (
    "espalier train --gin_file=t5x_configs/models/tiny.gin --gin_file=t5x_configs/runs/pretrain.gin"
)


def test_errors_of_the_configuration_are_those_that_are_shown(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.gin").write_text(MINE)
    *shown, _ = transcripts.transcripts(
        "docs/reference/configuration_errors.md"
    )  # the last: train_test
    for block in shown:
        command, error = block.text.replace("\\\n", " ").removeprefix("$ ").split("\n\n", 1)
        command = f"{BEGUN} {USUAL} {command[3:]}" if command.startswith("...") else command
        program, name, *words = shlex.split(command.replace(" ...", f" {USUAL}"))
        assert (program, name) == ("espalier", "train")
        result = train(*words)
        assert (result.status, result.err.strip()) == (2, error), command
    assert len(shown) == 4
