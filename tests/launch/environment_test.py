"""A folder that hides a package is found and named, and so is a variable that has no effect any more."""

import os
import subprocess
import sys

import pytest

from launch import environment

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def test_the_projects_own_packages_pass():
    environment.check_packages()


def test_a_package_from_elsewhere_is_named(tmp_path, monkeypatch):
    (tmp_path / "hidden_pkg").mkdir()
    (tmp_path / "hidden_pkg" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(environment.RootError, match="hidden_pkg") as caught:
        environment.check_packages(("hidden_pkg",))
    assert str(tmp_path) in str(caught.value)


def test_a_plain_data_folder_before_the_project_is_found(tmp_path):
    # As when a project on the path is shadowed by ./data of the working directory. -S: an editable
    # install in compat mode puts the packages on the path, where they win over a plain folder.
    (tmp_path / "data").mkdir()
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('environment', {ROOT!r} + '/launch/environment.py')\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "module.check_packages(('data',))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "Package 'data' comes from" in done.stderr
    assert "hides it" in done.stderr


def test_a_variable_of_before_is_named(monkeypatch, capsys):
    environment.prepare()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ESPALIER_PROGRAMS", "1")
    environment.prepare()
    assert "warning: ESPALIER_PROGRAMS has no effect" in capsys.readouterr().err
