"""The command that writes pairs, and that what it writes can be registered."""

import json

import pytest

from data.preferences import records
from launch import preference_pairs


def write(tmp_path, *rows):
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"--input={tmp_path / 'in.jsonl'}"


def rated(*ratings):
    return {"prompt": "p", "responses": [f"{i}" for i in range(len(ratings))], "ratings": ratings}


def test_rated_responses(tmp_path, capsys):
    given = write(tmp_path, rated(1, 3, 2), rated(2, 2), rated(5, 0))
    out = tmp_path / "out.jsonl"
    arguments = ["--kind=rated", given, f"--output={out}", "--rejected=next", "--min_margin=1"]
    assert preference_pairs.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("1", "2"), ("0", "1")]
    said = capsys.readouterr().out
    assert f"{out}: 2 pairs; dropped: 1 tie (first: {tmp_path}/in.jsonl, line 2)" in said
    assert preference_pairs.main([*arguments, "--limit=1"]) == 0
    assert len(out.read_text().splitlines()) == 1


def test_translations(tmp_path):
    pytest.importorskip("django", reason="the catalogues of Django, which the tests install")
    out = tmp_path / "out.jsonl"
    command = ["--kind=translations", f"--output={out}", "--limit=20", "--seed=3"]
    assert preference_pairs.main(command) == 0
    first = out.read_bytes()
    for line in first.splitlines():
        assert records.parse(json.loads(line), "x", "x").prompt.startswith("Translate into ")
    assert preference_pairs.main(command) == 0 and out.read_bytes() == first


def test_errors_are_for_people(tmp_path, capsys):
    out = f"--output={tmp_path / 'out.jsonl'}"
    for arguments, message in (
        (["--kind=rated", out], "--kind=rated needs --input"),
        (["--kind=reasoning", out, "--rejected=next"], "--rejected is for --kind=rated"),
        (["--kind=reasoning", out, "--limit=0"], "--limit must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            preference_pairs.main(arguments)
        assert message in capsys.readouterr().err
    for arguments, message in (
        (["--kind=rated", out, "--input=gone.jsonl"], "--input=gone.jsonl: there is no such file"),
        (["--kind=rated", out, write(tmp_path, rated(1))], "line 1: 1 responses and 1 ratings"),
        (["--kind=translations", f"--output={tmp_path}/no/x.jsonl"], "there is no folder"),
    ):
        assert preference_pairs.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
