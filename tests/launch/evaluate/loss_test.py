"""Held-out loss of a checkpoint, which the scores of the same documents must add up to."""

import json
import math

import pytest

from espalier.trainers import evaluate as evaluation


def test_loss_is_the_mean_score_of_the_held_out_documents(command, capsys, trained_run, tmp_path):
    report = tmp_path / "eval.json"
    flags = (f"--checkpoint={trained_run.path}", f"--json={report}")
    assert command("evaluate loss", "--trust_config", *flags) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    found = json.loads(report.read_text())["tasks"]["files"]

    with open(f"{trained_run.path}/held_out.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"].encode() for line in file]
    rows = [{"tokens": [*(byte + 3 for byte in text), 1]} for text in texts]
    inputs, output = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    inputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (f"--inputs={inputs}", f"--output={output}")
    assert command("score", f"--checkpoint={trained_run.path}", *files) == 0
    total = sum(json.loads(line)["sum"] for line in output.read_text().splitlines())

    tokens = sum(len(row["tokens"]) for row in rows)
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(-total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)
    bits = -total / math.log(2) / sum(map(len, texts))
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_what_is_not_finite_is_written_as_metrics_are(command, monkeypatch, trained_run, tmp_path):
    found = {"loss": math.nan, "perplexity": math.inf, "bits_per_byte": -math.inf, "tokens": 3.0}
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **options: found)
    report = tmp_path / "eval.json"
    assert (
        command(
            "evaluate loss",
            "--trust_config",
            f"--checkpoint={trained_run.path}",
            f"--json={report}",
        )
        == 0
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads(report.read_text(), parse_constant=refuse)["tasks"]["files"]
    assert list(written.values()) == ["NaN", "Infinity", "-Infinity", 3.0]


def test_data_of_another_vocabulary_is_refused(command, capsys, trained_run, tmp_path):
    flags = (
        "--gin.VOCABULARY=@vocabularies.byte()",
        "--gin.vocabularies.byte.extra_ids=5",
        f"--gin.stream.make_eval_stream.cache_dir={tmp_path}",
        "--tasks=files",
    )
    assert (
        command("evaluate loss", "--trust_config", f"--checkpoint={trained_run.path}", *flags) == 2
    )
    assert "another vocabulary than the checkpoint" in capsys.readouterr().err


def test_an_unknown_task_is_named(command, capsys, trained_run):
    assert (
        command(
            "evaluate loss", "--trust_config", f"--checkpoint={trained_run.path}", "--tasks=fils"
        )
        == 2
    )
    assert "fils" in capsys.readouterr().err
