"""Configurations that were written before a module moved."""

import importlib

import pytest

from espalier.launch.config import gin_config, gin_source, moved

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
    importlib.import_module(module)


def test_imports_of_moved_modules_have_their_names_of_today():
    _, *imports, _ = gin_source.parse(OLD, "old.gin")
    assert [(one.module, one.bound_name()) for one in imports] == [
        ("espalier.launch.papers.nexus.lag_domains", "lag_domains"),
        ("espalier.launch.papers.aya23.toy_languages", "toy"),
        ("espalier.model.config", "config"),
        ("model.my_layers", "my_layers"),  # of a user's own model.py or model/
        ("espalier.launch.train", "training"),
    ]


def test_a_configuration_from_before_a_move_is_read(tmp_path):
    path = tmp_path / "config.gin"
    path.write_text(OLD.replace("from model import my_layers\n", ""))
    config = gin_config.load([str(path)], [])
    assert "espalier.launch.papers.nexus import lag_domains" in config.text
