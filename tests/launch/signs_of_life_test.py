"""Every command says at once that it starts, and what it is doing while it is silent."""

import argparse
import importlib
import re
import sys
import threading
import warnings

import pytest

from espalier.common import stages
from espalier.launch import cli, environment
from espalier.launch.submit import launch_config

GROUPS = ("evaluate", "influence", "merge", "precompile", "prepare", "upcycle")
ALONE = ("merge", "precompile", "upcycle")  # groups that are commands too


def commands():
    for name in cli.command_names():
        if name not in GROUPS or name in ALONE:
            yield name
    for group in GROUPS:
        module = importlib.import_module(cli.module_of(group))
        for name in getattr(module, "COMMANDS", {"search": None}):
            yield f"{group} {name}"


class Slow(BaseException):
    """The end of the work that stands for a command's own."""


@pytest.fixture
def slow(monkeypatch, capsys):
    """Runs a command without its flags, whose first work is slow; returns standard error."""

    def work(*_args, **_kwargs):
        heard = threading.Event()
        with stages.stage(lambda: heard.set() or "the first work"):
            assert heard.wait(60)
        raise Slow

    monkeypatch.setattr(stages, "PERIOD", 0.01)
    monkeypatch.setattr(environment, "restart_with_huge_pages", lambda: None)
    monkeypatch.setattr(environment, "prepare", work)
    monkeypatch.setattr(launch_config, "read", work)  # of submit, which prepares nothing
    monkeypatch.setattr(argparse.ArgumentParser, "error", lambda parser, message: None)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["espalier", *words])
        with warnings.catch_warnings(), pytest.raises(Slow):
            warnings.simplefilter("ignore", RuntimeWarning)
            cli.console()
        return capsys.readouterr().err

    monkeypatch.setattr(sys, "path", list(sys.path))
    return run


@pytest.mark.parametrize("name", commands())
def test_every_command_has_a_header_and_names_a_slow_stage(name, slow):
    flags = {"upcycle": ["--method=bam"], "precompile": ["--json=x"], "reproduce": ["mov"]}
    lines = slow(*name.split(), *flags.get(name, [])).splitlines()
    assert lines[0] == f"espalier {name}: starting", lines
    assert any(re.fullmatch(r"the first work, \d+ s", line) for line in lines[1:]), lines
