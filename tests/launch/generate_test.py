"""Continuations of files of prompts, which `score` must agree with."""

import json

import numpy as np
import pytest

from trainers import buckets
from trainers.decoder import Decoder


@pytest.fixture
def generate(trained_run, command, tmp_path):
    def run(rows, *flags):
        inputs, output = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
        inputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = (f"--inputs={inputs}", f"--output={output}", f"--checkpoint={trained_run.path}")
        status = command("generate", *files, "--max_new_tokens=6", *flags)
        return status or [json.loads(line) for line in output.read_text().splitlines()]

    return run


PROMPTS = [{"text": "import ", "id": 1}, {"tokens": [5, 6, 7]}, {"text": ""}]


def test_continuations_are_scored_as_generated(generate, command, capsys, trained_run, tmp_path):
    rows = generate(PROMPTS, "--temperature=1.0", "--top_p=0.9", "--seed=1")
    said = capsys.readouterr().err
    assert "tokens/s" in said and "cache" in said
    assert rows[0]["id"] == 1
    assert [row["prompt"] for row in rows] == ["import ", [5, 6, 7], ""]
    for row in rows:
        assert 1 <= len(row["tokens"]) == len(row["logprobs"]) <= 6
        # Neither padding of the model's table nor, in the text, EOS.
        assert max(row["tokens"]) < 259
        kept = [id for id in row["tokens"] if id != 1]
        assert row["text"] == bytes(i - 3 for i in kept if i >= 3).decode("utf-8", "ignore")
    scored = [
        {**({k: old[k] for k in ("text", "tokens") if k in old}), "targets": row["tokens"]}
        for old, row in zip(PROMPTS, rows, strict=True)
    ]
    inputs, output = tmp_path / "scored.jsonl", tmp_path / "scores.jsonl"
    inputs.write_text("".join(json.dumps(row) + "\n" for row in scored))
    files = (f"--inputs={inputs}", f"--output={output}")
    assert command("score", f"--checkpoint={trained_run.path}", *files) == 0
    for row, line in zip(rows, output.read_text().splitlines(), strict=True):
        np.testing.assert_allclose(row["logprobs"], json.loads(line)["logprobs"], atol=3e-5)


def test_the_text_is_of_all_tokens_where_eos_does_not_end(generate):
    flags = ("--eos_id=-1", "--temperature=50", "--max_new_tokens=300", "--seed=1")
    rows = generate(PROMPTS, *flags)
    assert any(1 in row["tokens"][:-1] for row in rows)
    for row in rows:
        parts = "".join("\0" if id == 1 else chr(id) for id in row["tokens"]).split("\0")
        texts = [bytes(ord(c) - 3 for c in part if ord(c) >= 3) for part in parts]
        assert row["text"] == "".join(text.decode("utf-8", "ignore") for text in texts)


def test_what_was_done_stays_when_a_later_batch_fails(generate, monkeypatch, tmp_path):
    monkeypatch.setattr(buckets, "BATCHES_SORTED", 1)
    prompts = [{"text": "x" * (i * 5 % 9)} for i in range(17)]  # in batches of 8
    whole = generate(prompts, "--temperature=1")
    original = Decoder._batch

    def fail_at_last(self, prompts, batch, length, seed):
        if 16 in batch:
            raise RuntimeError("lost")
        return original(self, prompts, batch, length, seed)

    monkeypatch.setattr(Decoder, "_batch", fail_at_last)
    (tmp_path / "y.jsonl").unlink()
    with pytest.raises(RuntimeError, match="lost"):
        generate(prompts, "--temperature=1")
    assert not (tmp_path / "y.jsonl").exists()
    done = (tmp_path / "y.jsonl.partial").read_text().splitlines()
    assert list(map(json.loads, done)) == whole[:16]


def test_one_prompt_goes_to_standard_output(command, capsys, trained_run):
    flags = (f"--checkpoint={trained_run.path}", "--prompt=x", "--max_new_tokens=3")
    assert command("generate", *flags) == 0
    said = capsys.readouterr()
    assert said.out.endswith("\n") and "tokens/s" not in said.out


def test_tokens_need_no_vocabulary(generate, capsys):
    rows = [{"tokens": [5, 6, 7]}, {"tokens": [8]}]
    want = generate(rows, "--eos_id=-1")
    assert [len(row["tokens"]) for row in want] == [6, 6]
    none = "--gin.VOCABULARY=None"
    for old, new in zip(want, generate(rows, none), strict=True):
        assert "text" not in new and new["tokens"] == old["tokens"]
    last = want[0]["tokens"][2]
    ended = generate(rows, none, f"--eos_id={last}")[0]["tokens"]
    assert ended == want[0]["tokens"][: want[0]["tokens"].index(last) + 1]
    capsys.readouterr()
    assert generate([{"text": "x"}], none) == 2
    assert "sets no VOCABULARY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_policy=none"], "Unknown cache policy 'none': choose from"),
        (["--temperature=-1"], "temperature"),
        (["--top_p=2"], "top_p"),
        (["--max_new_tokens=0"], "max_new_tokens"),
        (["--batch_size=0"], "--batch_size=0"),
        (["--prompt=x"], "either --prompt"),
        (["--params=ema", "--gin.MESH={'fsdp': 3}"], "MESH = {'fsdp': 3} does not cover"),
    ],
)
def test_bad_flags_are_named(generate, capsys, flags, message):
    assert generate([{"tokens": [5]}], *flags) == 2
    assert message in capsys.readouterr().err
