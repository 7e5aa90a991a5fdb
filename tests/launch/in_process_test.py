"""Commands in a notebook's process: what they print is returned, failures are errors, and the process stays as it was."""

import json
import os
import sys

import pytest

from espalier.data import tasks
from espalier.data.text import user_data
from espalier.data.tokenizers import vocabularies
from espalier.launch.in_process import CommandError, command

EMBED = "prepare embed_domains --dim=4 --domain a=abc.jsonl --domain x=xyz.jsonl"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("abc", "xyz"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": " ".join(name)}) + "\n")


def test_what_a_command_prints_is_returned_and_the_process_stays_as_it_was():
    before = list(sys.argv), os.environ.get("ESPALIER_HUGE_PAGES")
    user_data.register_files(name="x", files="abc.jsonl", vocabulary=vocabularies.byte())
    printed = command(f"{EMBED}\n --output='my domains.json'")
    assert os.path.exists("my domains.json") and printed.endswith("\n")
    assert (sys.argv, os.environ.get("ESPALIER_HUGE_PAGES")) == before
    assert "x" not in tasks.names()


def test_a_failure_is_an_error_with_the_commands_message():
    with pytest.raises(CommandError, match=r"(?s)ended with status 2.*nowhere"):
        command("prepare embed_domains --dim=4 --domain a=nowhere.jsonl --output=out.json")
    with pytest.raises(CommandError, match=r"ended with status 0, not 75"):
        command(f"{EMBED} --output=out.json", status=75)
    with pytest.raises(CommandError, match="no command 'trian'.*train"):
        command("trian --gin_file=x.gin")
