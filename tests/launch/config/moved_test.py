"""Configurations that were written before a module moved."""

import importlib
import types

import pytest

from launch.config import config_diff, gin_config, moved
from launch.sweeping import check

OLD = """from __gin__ import dynamic_registration

from data.nexus import lag_domains
from data.aya23 import toy_languages as toy
import launch.train

lag_domains.register.vocabulary = None
"""


@pytest.mark.parametrize("module", moved.MOVED.values())
def test_a_moved_module_is_there(module):
    importlib.import_module(module)


def test_imports_of_moved_modules_have_their_names_of_today():
    text = moved.renamed(OLD)
    assert "from launch.papers.nexus import lag_domains\n" in text
    assert "from launch.papers.aya23 import toy_languages as toy\n" in text
    assert text.replace("launch.papers.", "data.") == OLD


def test_a_run_and_a_sweep_from_before_a_move_go_on(tmp_path):
    today = moved.renamed(OLD)
    assert config_diff.first_difference(OLD, today) is None
    run = types.SimpleNamespace(parent=None, seed=1, made_of={})
    digests = {
        check.config_digest({key: "@data.mov.compositions.register", "SEED": "0"}, run, {})
        for key in ("data.nexus.lag_domains.x", "launch.papers.nexus.lag_domains.x")
    }
    assert len(digests) == 1
    path = tmp_path / "data.gin"
    statements = []
    for text in (OLD, today):
        path.write_text(text)
        statements.append(check.gin_statements([f"--gin_file={path}"]))
    assert statements[0] == statements[1]
    assert any("'data.nexus.lag_domains'" in one for one in statements[1])


def test_a_configuration_from_before_a_move_is_read(tmp_path):
    path = tmp_path / "config.gin"
    path.write_text(OLD)
    config = gin_config.load([str(path)], [])
    assert "launch.papers.nexus import lag_domains" in config.text
