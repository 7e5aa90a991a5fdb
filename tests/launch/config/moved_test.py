"""Configurations that were written before a module moved."""

import importlib

import pytest

from espalier.launch.config import gin_config, moved

OLD = """from __gin__ import dynamic_registration

from espalier.data.nexus import lag_domains
from espalier.data.aya23 import toy_languages as toy
import espalier.launch.train

lag_domains.register.vocabulary = None
"""


@pytest.mark.parametrize("module", moved.MOVED.values())
def test_a_moved_module_is_there(module):
    importlib.import_module(module)


def test_imports_of_moved_modules_have_their_names_of_today():
    text = moved.renamed(OLD)
    assert "from launch.papers.nexus import lag_domains\n" in text
    assert "from launch.papers.aya23 import toy_languages as toy\n" in text
    assert text.replace("espalier.launch.papers.", "data.") == OLD


def test_a_configuration_from_before_a_move_is_read(tmp_path):
    path = tmp_path / "config.gin"
    path.write_text(OLD)
    config = gin_config.load([str(path)], [])
    assert "launch.papers.nexus import lag_domains" in config.text
