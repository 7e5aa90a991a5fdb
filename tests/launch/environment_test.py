"""The environment of all commands."""

import subprocess

from espalier.launch import environment


def test_a_variable_of_before_is_named(monkeypatch, capsys):
    environment.prepare()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ESPALIER_PROGRAMS", "1")
    environment.prepare()
    assert "warning: ESPALIER_PROGRAMS has no effect" in capsys.readouterr().err


def test_the_commit_is_that_of_this_repository_not_of_one_around_the_package(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    package = tmp_path / "site-packages" / "espalier"
    package.mkdir(parents=True)
    monkeypatch.setattr(environment, "ROOT", str(tmp_path.resolve()))
    assert environment.commit() == {"commit": None, "dirty": None}
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    made = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert environment.commit() == {"commit": made.stdout.strip(), "dirty": False}
    assert environment.in_history(made.stdout.strip()) and not environment.in_history("0" * 40)
    (package / "__init__.py").touch()
    assert environment.commit() == {"commit": made.stdout.strip(), "dirty": True}
    monkeypatch.setattr(environment, "ROOT", str(package.resolve()))
    assert environment.commit() == {"commit": None, "dirty": None}
    assert environment.in_history("0" * 40)  # nobody can say
