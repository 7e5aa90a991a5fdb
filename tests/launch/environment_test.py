"""The environment of all commands."""

from espalier.launch import environment


def test_a_variable_of_before_is_named(monkeypatch, capsys):
    environment.prepare()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ESPALIER_PROGRAMS", "1")
    environment.prepare()
    assert "warning: ESPALIER_PROGRAMS has no effect" in capsys.readouterr().err
