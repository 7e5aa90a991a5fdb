"""`espalier evaluate language` on rows of answers, and prompts for them."""

import json

import pytest

from espalier.launch.evaluate.judges import answers

CZECH, GREEK = "Příliš žluťoučký kůň úpěl.", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία."


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_counted_by_language_and_failures_are_written(command, tmp_path, capsys):
    rows = [
        {"id": 1, "language": "cs", "text": CZECH},
        {"id": 2, "language": "cs", "text": f"{CZECH}\n{GREEK}"},
        {"id": 3, "language": "ell", "text": GREEK},
        {"id": 4, "language": "el", "text": "12"},
    ]
    inputs = write(tmp_path / "answers.jsonl", rows)
    result, failures = tmp_path / "rates.json", tmp_path / "others.jsonl"
    flags = (f"--inputs={inputs}", "--detector=script")
    assert command("evaluate language", *flags, f"--json={result}", f"--failures={failures}") == 0
    found = json.loads(result.read_text())
    assert found["detector"] == "script" and found["worst"] == "cs"
    czech, greek = found["languages"]["cs"], found["languages"]["el"]
    assert (czech["texts"], czech["texts_passed"], czech["lines_passed"]) == (2, 0.5, 2 / 3)
    assert (greek["texts"], greek["judged"], greek["texts_passed"]) == (2, 1, 1.0)
    assert found["mean"]["texts_passed"] == 0.75
    (failed,) = map(json.loads, failures.read_text().splitlines())
    assert failed == {**rows[1], "others": {"Grek": 1}}
    assert "50.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"text": "a"}], [], 'line 1 has no "language"'),
        ([{"language": "xx", "text": "a"}], [], "line 1: unknown language 'xx'"),
        ([{"language": "cs", "answer": "a"}], [], "line 1 has no text 'text'; present are"),
        ([], [], "has no row"),
        ([{"text": "a"}], ["--language=klingon"], "unknown language 'klingon'"),
    ],
)
def test_rows_that_cannot_be_checked_are_named(command, tmp_path, capsys, rows, flags, message):
    inputs = write(tmp_path / "answers.jsonl", rows)
    assert command("evaluate language", f"--inputs={inputs}", "--detector=script", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "repository"),
    [("m_arena_hard", "m-ArenaHard "), ("m_arena_hard_v2", "m-ArenaHard-v2.0 ")],
)
def test_prompts_of_an_arena_are_written_by_language(command, tmp_path, capsys, name, repository):
    for code in ("cs", "hi"):
        folder = tmp_path / "eval" / name / code
        folder.mkdir(parents=True)
        row = {"cluster": "c", "category": "k", "prompt": f"{code}?"}
        write(folder / "test-0.jsonl", [{"question_id": f"q{i}", **row} for i in range(3)])
    out = tmp_path / "prompts.jsonl"
    flags = (f"--set={name}", f"--data_dir={tmp_path / 'eval'}", f"--output={out}")
    assert command("prepare arena_prompts", *flags, "--languages=hi,cs", "--limit=2") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["language"], row["prompt"]) for row in rows] == [
        *((f"q{i}/hi", "hi", "hi?") for i in range(2)),
        *((f"q{i}/cs", "cs", "cs?") for i in range(2)),
    ]
    assert command("prepare arena_prompts", *flags, "--languages=ja") == 2
    assert f"hf download --repo-type=dataset CohereLabs/{repository}" in capsys.readouterr().err


def test_prompts_of_dolly_are_those_edited_by_people_where_there_are_some(
    command, tmp_path, capsys
):
    rows = {
        "machine_translated": [
            {"id": 1, "inputs": "Hans?", "language": "zho", "script": "Hans"},
            {"id": 1, "inputs": "Hant?", "language": "zho", "script": "Hant"},
            {"id": 1, "inputs": "Zulu?", "language": "zul", "script": "Latn"},
            {"id": 1, "inputs": "Machine ?", "language": "fra", "script": "Latn"},
        ],
        "human_edited": [
            {"id": 1, "inputs": "Humain ?", "language": "fra", "script": "Latn"},
            {"id": 1, "inputs": "Serbian?", "language": "srp", "script": "Cyrl"},
        ],
    }
    for name in rows:
        folder = tmp_path / f"aya_evaluation_suite/dolly_{name}"
        folder.mkdir(parents=True)
        write(folder / "test.jsonl", rows[name])
    out = tmp_path / "prompts.jsonl"

    def prompts(set, languages):
        flags = (f"--set={set}", f"--data_dir={tmp_path}", f"--output={out}")
        status = command("prepare arena_prompts", *flags, f"--languages={languages}")
        return [json.loads(line) for line in out.read_text().splitlines()] if not status else None

    both = prompts("dolly", "zh,fr")
    assert both == [
        {"id": "1/zh", "language": "zh", "set": "dolly_machine_translated", "prompt": "Hans?"},
        {"id": "1/fr", "language": "fr", "set": "dolly_human_edited", "prompt": "Humain ?"},
    ]
    assert [row["prompt"] for row in prompts("dolly_machine_translated", "fr")] == ["Machine ?"]
    assert prompts("dolly", "zh,cs") is None
    assert "dolly has no prompt in Czech: leave cs out" in capsys.readouterr().err
    assert prompts("dolly_human_edited", "fr,zh") is None
    assert "dolly_human_edited has no prompt in Chinese" in capsys.readouterr().err
    # Rows with answers are what a judge compares by language.
    files = {
        name: str(write(tmp_path / f"{name}.jsonl", [{**row, "text": name} for row in both]))
        for name in ("a", "b")
    }
    pairs = answers.pairs(answers.read(files, by_language=True))
    assert [(pair.id, pair.language) for pair in pairs] == [("1/zh", "Chinese"), ("1/fr", "French")]
    (tmp_path / "aya_evaluation_suite/dolly_machine_translated/test.jsonl").unlink()
    assert len(prompts("dolly", "fr")) == 1  # needs no translation by machine
    assert prompts("dolly", "fr,zh") is None
    assert "CohereLabs/aya_evaluation_suite" in capsys.readouterr().err


def test_tokenizers_are_compared_in_a_table_a_file_and_a_picture(command, tmp_path, capsys):
    rows = [
        {"language": "cs", "english": "a cat", "text": "kočka"},
        {"language": "ja", "english": "a cat", "text": "ねこ"},
    ]
    text = write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    flags = (f"--text={text}", f"--out={out}", "--languages=en,cs,ja")
    assert command("prepare compare_tokenizers", "--tokenizer=bytes", *flags) == 0
    found = json.loads((out / "report.json").read_text())["tokenizers"]["bytes"]
    assert found["languages"]["ja"]["parity"] == 6 / 5
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "bytes: 259 ids" in capsys.readouterr().out
    both = ("--tokenizer=bytes", "--tokenizer=bytes")
    assert command("prepare compare_tokenizers", *both, *flags) == 2
    assert "both have the name 'bytes'" in capsys.readouterr().err
