"""Scores of files of rows, and the errors of bad ones."""

import json

import jax
import numpy as np
import pytest

from espalier.trainers.decoding import buckets
from espalier.trainers.scoring import scoring


@pytest.fixture
def score(trained_run, command, tmp_path):
    """Scores lines of text; returns the rows, or the exit status if there are none."""

    def run(lines, *flags, checkpoint=trained_run.path):
        inputs, output = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
        inputs.write_text("".join(line + "\n" for line in lines))
        files = (f"--inputs={inputs}", f"--output={output}", f"--checkpoint={checkpoint}")
        status = command("score", *files, *flags)
        if status:
            assert not output.exists()
            return status
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def log_probs(run, context, targets, params="ema"):
    text = [*context, *targets]
    forward = jax.jit(lambda ids: run.model.apply({"params": run.params[params]}, ids))
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(text)] = text
    logits = np.asarray(forward(padded)[0], np.float64)
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return table[np.arange(len(targets)) + len(context) - 1, targets]


BYTES = [byte + 3 for byte in b"os.path"]  # ids of bytes begin at 3


def test_rows_come_back_with_their_scores(score, trained_run):
    given = [
        {"text": "os.path", "id": 7},
        {"tokens": BYTES},
        {"text": "os", "targets": ".path"},
        {"tokens": BYTES[:2], "targets": BYTES[2:]},
        {"text": ""},
    ]
    rows = score(map(json.dumps, given))
    assert [{k: row[k] for k in old} for row, old in zip(rows, given, strict=True)] == given
    # 0 precedes a document, and its first token is predicted too.
    want = log_probs(trained_run, [0], BYTES)
    for row in rows[:2]:
        np.testing.assert_allclose(row["logprobs"], want, atol=2e-5)
        assert row["sum"] == pytest.approx(want.sum(), abs=1e-4)
    for row in rows[2:4]:
        np.testing.assert_allclose(row["logprobs"], want[2:], atol=2e-5)
    assert rows[4]["logprobs"] == [] and rows[4]["sum"] == 0


def test_half_a_surrogate_pair_that_is_passed_through_comes_back(score):
    given = {"tokens": [5], "id": "\ud800", "more": {"\udfff": "naïve \\ud800"}}
    (row,) = score([json.dumps(given)])
    assert {key: row[key] for key in given} == given


def test_what_was_done_stays_when_a_later_batch_fails(score, monkeypatch, tmp_path):
    monkeypatch.setattr(buckets, "BATCHES_SORTED", 1)
    original, batches = scoring.scored_columns, []

    def fail_at_third(rows, batch_size, length):
        batches.append(rows)
        if len(batches) == 3:
            raise RuntimeError("lost")
        return original(rows, batch_size, length)

    lines = [json.dumps({"tokens": [5] * (i * 7 % 17), "id": i}) for i in range(20)]
    whole = score(lines)  # in batches of 8
    monkeypatch.setattr(scoring, "scored_columns", fail_at_third)
    (tmp_path / "y.jsonl").unlink()
    with pytest.raises(RuntimeError, match="lost"):
        score(lines)
    assert not (tmp_path / "y.jsonl").exists()
    done = (tmp_path / "y.jsonl.partial").read_text().splitlines()
    assert list(map(json.loads, done)) == whole[:16]


def test_models_without_a_start_token_and_raw_parameters(score, trained_run):
    (row,) = score([json.dumps({"tokens": BYTES})], "--gin.START_TOKEN=None", "--params=raw")
    want = log_probs(trained_run, BYTES[:1], BYTES[1:], params="raw")
    np.testing.assert_allclose(row["logprobs"], want, atol=2e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "x.jsonl, line 2: malformed JSON"),
        ('["a"]', "x.jsonl, line 2: a JSON list"),
        ('{"txt": "a"}', 'x.jsonl, line 2: expected either "tokens", "text" or "messages"'),
        (
            '{"text": "a", "tokens": [1]}',
            'x.jsonl, line 2: expected either "tokens", "text" or "messages"',
        ),
        ('{"tokens": [1, 264]}', "x.jsonl, line 2: 'tokens' holds the id 264"),
        ('{"tokens": [1.5]}', "x.jsonl, line 2: 'tokens' is neither a text nor a list"),
        ('{"tokens": [1], "targets": 3}', "x.jsonl, line 2: 'targets' is neither"),
        ('{"text": "a\\ud800"}', "x.jsonl, line 2: 'text' is not valid Unicode at character 1"),
        ('{"text": "a", "targets": "\\udc00"}', "x.jsonl, line 2: 'targets' is not valid Unicode"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(score, capsys, line, message):
    assert score(['{"tokens": [5]}', line]) == 2
    assert message in capsys.readouterr().err


def test_texts_need_the_vocabulary_of_the_checkpoint(score, capsys):
    # The flags name another vocabulary; tokens can still be scored.
    flags = ("--gin.VOCABULARY=@vocabularies.byte()", "--gin.vocabularies.byte.extra_ids=5")
    assert score(['{"text": "a"}'], *flags) == 2
    assert "trained with another vocabulary" in capsys.readouterr().err
    assert len(score(['{"tokens": [5]}'], *flags)) == 1


def test_a_checkpoint_without_configuration_is_refused(score, capsys, tmp_path, trained_run):
    (tmp_path / "checkpoints").symlink_to(f"{trained_run.path}/checkpoints")
    assert score(['{"tokens": [5]}'], checkpoint=tmp_path) == 2
    assert "There is no model.json beside" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(score, capsys):
    assert score(['{"tokens": [5]}'], "--gin.config.TransformerConfig.mlp_dim=24") == 2
    assert "mlp/down/kernel: the checkpoint has float32" in capsys.readouterr().err


def test_missing_files_are_named_before_any_work(command, capsys, trained_run, tmp_path):
    files = [f"--inputs={tmp_path}/none.jsonl", f"--output={tmp_path}/y.jsonl"]
    assert command("score", f"--checkpoint={trained_run.path}", *files) == 2
    assert "none.jsonl: there is no such file" in capsys.readouterr().err
    files = [f"--inputs={tmp_path}/none.jsonl", f"--output={tmp_path}/none/y.jsonl"]
    assert command("score", f"--checkpoint={trained_run.path}", *files) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert command("score", f"--checkpoint={tmp_path}/none", *files) == 2
    assert "no such directory" in capsys.readouterr().err
