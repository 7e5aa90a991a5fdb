"""Configurations that were written before a module moved."""

import importlib
import types

import pytest

from espalier.launch.config import gin_config, gin_source, moved
from espalier.launch.config import text as config_text
from espalier.launch.sweep import check

OLD = """from __gin__ import dynamic_registration

from data.nexus import lag_domains
from data.aya23 import toy_languages as toy
from model import config
from model import my_layers
from launch import train as training

lag_domains.register.vocabulary = None
"""


@pytest.mark.parametrize("module", moved.MOVED.values())
def test_a_moved_module_is_there(module):
    importlib.import_module(module.rstrip("."))


def test_the_name_of_a_folder_is_that_of_its_command_or_of_modules_in_it():
    for module in ("launch.evaluation", "launch.evaluation.held_out", "espalier.launch.evaluation"):
        expected = f"espalier.{module.removeprefix('espalier.')}".replace("evaluation", "evaluate")
        assert moved.name_of_today(module) == expected
    for now, before in {
        "-m espalier.launch.evaluate loss": "-m launch.evaluate loss",  # as before the folder had its name
        "espalier.launch.evaluate.routing:routing": "launch.evaluation.routing:routing",
        "espalier.launch.run.phase.add_bos": "launch.run.beginnings.add_bos",
    }.items():
        assert moved.as_before(now) == before


def test_imports_of_moved_modules_have_their_names_of_today():
    _, *imports, _ = gin_source.parse(OLD, "old.gin")
    assert [(one.module, one.bound_name()) for one in imports] == [
        ("espalier.launch.papers.nexus.lag_domains", "lag_domains"),
        ("espalier.launch.papers.aya23.toy_languages", "toy"),
        ("espalier.model.config", "config"),
        ("model.my_layers", "my_layers"),  # of a user's own model.py or model/
        ("espalier.launch.train", "training"),
    ]


def test_a_run_and_a_sweep_from_before_a_move_go_on(tmp_path):
    own = OLD.replace("from model import my_layers\n", "")
    today = own
    for former, now in {
        **moved.MOVED,
        "model.config": "espalier.model.config",
        "launch.train": "espalier.launch.train",
    }.items():
        (old, module), (new, _) = former.rsplit(".", 1), now.rsplit(".", 1)
        today = today.replace(f"from {old} import {module}", f"from {new} import {module}")
    assert today.count("espalier.") == 4
    assert config_text.first_difference(own, today) is None
    run = types.SimpleNamespace(parent=None, seed=1, made_of={})
    digests = {
        check.config_digest({key: "@data.mov.compositions.register", "SEED": "0"}, run, {})
        for key in ("data.nexus.lag_domains.x", "espalier.launch.papers.nexus.lag_domains.x")
    }
    assert len(digests) == 1
    path = tmp_path / "data.gin"
    digests = set()
    made = types.SimpleNamespace(made=[f"--gin_file={path}"], made_of={})
    for text in (own, today):
        path.write_text(text)
        digests.add(check.made_digest(made, {}))
    assert len(digests) == 1


def test_a_configuration_from_before_a_move_is_read(tmp_path):
    path = tmp_path / "config.gin"
    path.write_text(OLD.replace("from model import my_layers\n", ""))
    config = gin_config.load([str(path)], [])
    assert "espalier.launch.papers.nexus import lag_domains" in config.text
