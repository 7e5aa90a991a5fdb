"""What pages say is what the code says: sizes, messages, measured intervals, errors as they are printed."""

import ast
import errno
import json
import os
import pathlib
import re
import shlex

import jax
import pytest

from espalier.launch.config import gin_config
from espalier.launch.run import run_dir

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
TRAIN = "espalier.launch.train:train"


def test_bytes_of_the_state_are_those_of_the_page():
    text = (DOCS / "scale" / "out_of_memory.md").read_text("utf-8")
    rows = re.findall(r"^\| ((?:none|`)[^|]*)\| ([\d.]+) GB \|", text, re.MULTILINE)
    rows = [(cell, float(gb)) for cell, gb in rows if ".gin" not in cell]
    assert len(rows) == 7
    files = [f"t5x_configs/{name}.gin" for name in ("models/llama2_7b", "runs/pretrain")]
    data = ("MODEL_DIR=''", "MIXTURE_OR_TASK_NAME=''", "TASKS=()", "BATCH_SIZE=16")
    for cell, gigabytes in rows:
        config = gin_config.load(
            files,
            [*data, *re.findall("`(.*?)`", cell)],
            entry=TRAIN,
            arguments=("recipe",),
        )
        state = config.arguments()["recipe"].program(devices=16).abstract_state
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert size / 1e9 == pytest.approx(gigabytes, abs=0.05), cell


def constant_texts():
    """The strings of the code, with NUL in the place of values; pieces that are written one after the other are joined."""
    for package in ("data", "espalier/common", "launch", "model", "trainers"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(getattr(part, "value", "") if isinstance(part, ast.Constant) else "\0" for part in node.values)  # fmt: skip
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_messages_of_the_page_are_those_of_the_code():
    text = (DOCS / "reference" / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    assert len(messages) > 50
    texts = "\n".join(constant_texts())
    for message in messages:
        if message == os.strerror(errno.ENOSPC):
            continue
        # What a message quotes stands between these pieces, some of which are made elsewhere.
        pieces = [piece.strip(" :;,.()") for piece in message.removeprefix("error: ").split("...")]
        assert all(piece in texts for piece in pieces), message


def measured(value):
    """Yields (median, lower, upper) of all figures below a value of a benchmark's JSON."""
    if isinstance(value, dict) and {"median", "interval_95"} <= value.keys():
        yield (value["median"], *value["interval_95"])
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from measured(one)


def test_intervals_of_the_benchmarks_are_those_of_their_files():
    files = (DOCS / "benchmarks").glob("*.json")
    recorded = [figure for file in files for figure in measured(json.loads(file.read_bytes()))]
    text = (DOCS / "evidence" / "benchmarks.md").read_text("utf-8")
    shown = re.findall(r"([\d.]+)\*{0,2} \[([\d.]+), ([\d.]+)\]", text)
    assert len(shown) > 50
    for figure in shown:
        units = [10.0 ** -len(number.partition(".")[2]) for number in figure]
        assert any(
            all(abs(float(a) - b) <= 0.51 * u for a, b, u in zip(figure, one, units, strict=True))
            for one in recorded
        ), figure


def test_errors_of_a_mesh_are_those_of_the_page():
    text = (DOCS / "scale" / "mesh_and_rules.md").read_text("utf-8")
    shown = re.findall(r"^```\nerror: (.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    files = [f"t5x_configs/{name}.gin" for name in ("models/tiny", "runs/pretrain")]
    data = ("MODEL_DIR=''", "MIXTURE_OR_TASK_NAME=''", "TASKS=()")
    cases = (
        ("fsdp_tp", "{'fsdp': 4, 'tensor': 4}", 8),
        ("tp", "{'tensor': -1}", 8),
        ("fsdp", "{'fsdp': 4, 'expert': 2}", 8),
        ("fsdp", "{'fsdp': -1}", 12),
    )
    for (rules, mesh, devices), message in zip(cases, shown, strict=True):
        config = gin_config.load(
            [*files, f"t5x_configs/partitioning/{rules}.gin"],
            [*data, f"MESH={mesh}"],
            entry=TRAIN,
            arguments=("recipe",),
        )
        with pytest.raises(ValueError) as error:  # noqa: PT011
            config.arguments()["recipe"].program(devices=devices)
        assert str(error.value) == message


MINE = """\
from __gin__ import dynamic_registration

from espalier.model import mlp
from espalier.trainers.optim import schedule

include 't5x_configs/models/tiny.gin'

DROPOUT = 0.1
transformer.Block.mlp = @mlp.GatedMLP
mlp.GatedMlp.activation = gelu
"""


def test_errors_of_the_configuration_are_those_of_the_page(tmp_path, monkeypatch):
    text = (DOCS / "reference" / "configuration_errors.md").read_text("utf-8")
    blocks = re.findall(r"^```\n\$ (.*?)\n\nerror: (.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "mine.gin").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    models, data, run = (
        f"t5x_configs/{x}.gin" for x in ("models/tiny", "data/bytes", "runs/pretrain")
    )
    for command, message in blocks:
        words = shlex.split(command.replace("\\\n", " "))
        files = [w.partition("=")[2] for w in words if w.startswith("--gin_file=")]
        bindings = [w.removeprefix("--gin.") for w in words if w.startswith("--gin.")]
        if words[0] == "..." or words[-1] == "...":  # the rest of a command that works
            files = [*(files or [models]), *([data] if not files else [data]), run]
            bindings = ["MODEL_DIR=/tmp/run", "MIXTURE_OR_TASK_NAME=python", *bindings]
        with pytest.raises(gin_config.ConfigError) as error:
            gin_config.load(list(dict.fromkeys(files)), bindings, entry=TRAIN)
        assert str(error.value).strip() == message.strip()
    names = ", ".join(name for name in run_dir.MAY_CHANGE if name.isupper())
    assert f"(A continued run may change {names}.)" in text
