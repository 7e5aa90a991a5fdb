"""The command that writes pairs, and the gin file by which a run reads them."""

import json

import pytest

from espalier.data import tasks
from espalier.data.preference import records
from espalier.launch.config import gin_config
from espalier.launch.preference import preference_pairs


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


def test_all_rated_responses_are_read_unless_a_limit_is_given(tmp_path):
    out = tmp_path / "out.jsonl"
    given = write(tmp_path, *([rated(1, 2)] * 10_001))
    assert preference_pairs.main(["--kind=rated", given, f"--output={out}"]) == 0
    assert out.read_text().count("\n") == 10_001


def test_translations(tmp_path):
    pytest.importorskip("django", reason="the catalogues of Django, which the tests install")
    out = tmp_path / "out.jsonl"
    command = ["--kind=translations", f"--output={out}", "--limit=20", "--seed=3"]
    assert preference_pairs.main(command) == 0
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(rows) == 20
    assert all(records.parse(row, "x", "x").prompt.startswith("Translate into ") for row in rows)


def test_arithmetic_in_a_folder_that_is_made_with_it(tmp_path):
    out = tmp_path / "made" / "pairs.jsonl"
    assert preference_pairs.main(["--kind=arithmetic", f"--output={out}", "--limit=20"]) == 0
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(rows) == 20 and all(row["chosen"] != row["rejected"] for row in rows)


def test_errors_are_for_people(tmp_path, capsys):
    out = f"--output={tmp_path / 'out.jsonl'}"
    for arguments, message in (
        (["--kind=rated", out], "--kind=rated needs --input"),
        (["--kind=reasoning", out, "--rejected=next"], "--rejected is for --kind=rated"),
        (["--kind=reasoning", out, "--limit=0"], "--limit=0 must be at least 1"),
    ):
        assert preference_pairs.main(arguments) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "ties.jsonl").write_text("\n".join(map(json.dumps, (rated(1, 1), rated(1, 2)))))
    (tmp_path / "empty.jsonl").write_text("\n")
    ties, empty = (f"--input={tmp_path}/{name}.jsonl" for name in ("ties", "empty"))
    for arguments, message in (
        (["--kind=rated", out, "--input=gone.jsonl"], "--input=gone.jsonl: there is no such file"),
        (["--kind=rated", out, write(tmp_path, rated(1))], "line 1: 1 responses and 1 ratings"),
        (
            ["--kind=rated", out, ties, "--min_margin=2"],
            "there are no pairs. Dropped: 1 tie (first: ",
        ),
        (["--kind=rated", out, empty], "There is no source: give another --input"),
        (["--kind=translations", f"--output={tmp_path}/no/folder/x.jsonl"], "there is no folder"),
    ):
        assert preference_pairs.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


RUN = """
from __gin__ import dynamic_registration
from espalier.data.tokenizers import vocabularies
from espalier.data.preference import stream
from espalier.launch import train
include 't5x_configs/models/tiny.gin'
include 't5x_configs/runs/pretrain.gin'
include 't5x_configs/data/preferences_base.gin'
VOCABULARY = @vocabularies.byte()
train.train.stream = @stream.make_stream
train.train.eval_stream = @stream.make_eval_stream
stream.make_stream.mixture_or_task_name = %MIXTURE_OR_TASK_NAME
stream.make_stream.task_feature_lengths = %TASK_FEATURE_LENGTHS
stream.make_stream.batch_size = %BATCH_SIZE
stream.make_eval_stream.task_feature_lengths = %TASK_FEATURE_LENGTHS
stream.make_eval_stream.batch_size = %BATCH_SIZE
"""


@pytest.fixture
def clean():
    yield
    tasks.clear()


@pytest.mark.parametrize("packing", ["examples", "best_fit"])
def test_the_data_file_makes_streams_of_the_pairs(tmp_path, monkeypatch, clean, packing):
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.gin").write_text(RUN)
    bindings = {
        "MODEL_DIR": "/tmp/x",
        "MIXTURE_OR_TASK_NAME": "preferences",
        "PAIRS": f"{tmp_path}/*.jsonl",
        "PAIRS_VALIDATION_FRACTION": 0.2,
        "PACKING": packing,
        "MAX_LENGTH": 20,
        "BATCH_SIZE": 8,
    }
    given = [f"{name}={value!r}" for name, value in bindings.items()]
    config = gin_config.load(
        [str(tmp_path / "run.gin")], given, entry="espalier.launch.train:train"
    )
    # Only what the run of another kind binds for streams of documents is left over.
    assert all("espalier.data.stream.stream.make_" in str(warning) for warning in config.warnings)
    arguments = config.arguments()
    for register in arguments["tasks"]:
        register()
    stream = arguments["stream"](positions=None)
    held_out = arguments["eval_stream"](task="preferences")
    facts = stream.summary()
    assert (facts["packing"], facts["max_length"]) == (packing, 20)
    assert (stream.slots > 1) == (packing == "best_fit")
    assert len(stream.pairs()) + len(held_out.pairs()) == 40
    assert stream.batch(0, 0, 8)["decoder_target_tokens"].shape == (8, 512)
