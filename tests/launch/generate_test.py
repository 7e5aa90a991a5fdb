"""Continuations of files of prompts, which `score` must agree with."""

import io
import json

import numpy as np
import pytest

from espalier.trainers.decoding import buckets
from espalier.trainers.decoding.decoder import Decoder


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


def test_a_cache_policy_is_compared_with_the_full_cache(generate, command, capsys, trained_run):
    rows = [{"text": "import os, sys, json\n\n\ndef main(arguments):\n"}, {"text": "x"}]
    alone = generate(rows)
    capsys.readouterr()
    small = ("--cache_policy=streaming_llm", "--cache=capacity=4", "--cache=sinks=1")
    policy = generate(rows, *small)
    both = generate(rows, *small, "--compare")
    said = capsys.readouterr().err
    equal = 0
    for row, one, full in zip(both, policy, alone, strict=True):
        assert row["tokens"] == one["tokens"] and row["full"]["tokens"] == full["tokens"]
        assert row["full"]["text"] == full["text"]
        same = row["same_tokens"]
        assert row["tokens"][:same] == full["tokens"][:same]
        assert row["tokens"][same : same + 1] != full["tokens"][same : same + 1] or same == 6
        equal += row["tokens"] == full["tokens"]
    assert both[1]["same_tokens"] == 6  # one token and the new ones fit in the cache's capacity
    assert f"{equal} of 2 continuations equal the full cache's" in said
    assert "cache (streaming_llm capacity=4 sinks=1)" in said and "cache (full)" in said
    flags = (f"--checkpoint={trained_run.path}", "--prompt=x", "--max_new_tokens=3", "--compare")
    assert command("generate", *flags, *small) == 0
    assert capsys.readouterr().out.endswith("--- full cache: the same\n")
    assert generate(rows, "--compare") == 2
    assert "give --cache_policy=NAME" in capsys.readouterr().err


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


def test_a_file_of_prompts_or_pairs_is_continued(generate):
    said = {"chosen": "a", "rejected": "b"}
    plain = generate([{"text": "import ", **said}])
    assert plain[0]["prompt"] == "import "
    assert generate([{"prompt": "import ", **said}]) == plain
    assert generate([{"prompt": 3}]) == 2


def test_samples_of_a_prompt_stand_side_by_side(generate):
    flags = ("--temperature=1", "--min_p=0.02", "--num_samples=2", "--seed=4")
    rows = generate(PROMPTS, *flags)
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (prompt, sample) for prompt in ("import ", [5, 6, 7], "") for sample in (0, 1)
    ]
    assert rows[0]["tokens"] != rows[1]["tokens"] and rows[1]["id"] == 1
    assert [row["tokens"] for row in generate(PROMPTS, *flags)] == [row["tokens"] for row in rows]


def test_beams_come_best_first_with_their_scores(generate):
    rows = generate(PROMPTS, "--num_beams=3", "--num_samples=2", "--length_penalty=0.5")
    assert [row["sample"] for row in rows] == [0, 1] * 3
    for row in rows:
        want = sum(row["logprobs"]) / len(row["tokens"]) ** 0.5
        np.testing.assert_allclose(row["score"], want, rtol=1e-4)
    assert all(a["score"] >= b["score"] for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_a_text_ends_before_a_stop_string(generate):
    free = generate(PROMPTS, "--temperature=1", "--seed=2", "--max_new_tokens=40", "--eos_id=-1")
    text = free[0]["text"]
    stop = text[8:10]
    assert len(stop) == 2
    flags = ("--temperature=1", "--seed=2", "--max_new_tokens=40", "--eos_id=-1", f"--stop={stop}")
    rows = generate(PROMPTS, *flags, "--stop=not there")
    assert rows[0]["ended"] == "stop"
    assert rows[0]["text"] == text[: text.index(stop)]
    kept = rows[0]["tokens"]
    assert kept == free[0]["tokens"][: len(kept)] and len(kept) == len(rows[0]["logprobs"]) < 40
    # The last token is the one that completes it.
    decode = lambda ids: bytes(i - 3 for i in ids if i >= 3).decode("utf-8", "ignore")  # noqa: E731
    assert stop in decode(kept) and stop not in decode(kept[:-1])
    for new, old in zip(rows[1:], free[1:], strict=True):
        if stop not in old["text"]:
            assert (new["tokens"], new["ended"]) == (old["tokens"], "length")


def test_several_eos_ids_end_rows(generate):
    free = generate([{"tokens": [5, 6, 7]}], "--eos_id=-1")[0]["tokens"]
    rows = generate([{"tokens": [5, 6, 7]}], "--eos_id=300", f"--eos_id={free[2]}")
    assert rows[0]["tokens"] == free[: free.index(free[2]) + 1]
    assert rows[0]["ended"] == "eos"


def test_streamed_text_is_the_whole_text(command, capsys, trained_run, monkeypatch):
    flags = (f"--checkpoint={trained_run.path}", "--prompt=x", "--max_new_tokens=60", "--eos_id=-1")
    sampling = ("--temperature=1.5", "--seed=3")
    assert command("generate", *flags, *sampling, "--no-stream") == 0
    whole = capsys.readouterr().out
    pieces = []
    monkeypatch.setattr("espalier.launch.inference.generate.to_terminal", pieces.append)
    assert command("generate", *flags, *sampling, "--stream") == 0
    assert "".join(pieces) == whole
    assert len(pieces) > 10


@pytest.mark.parametrize(
    "flags",
    [
        ["--cache_policy=snapkv", "--cache=capacity=64"],
        ["--cache_policy=sliding", "--cache=window=64"],
        ["--prefill_chunk=8"],
        ["--cache_policy=1*snapkv capacity=64"],
    ],
)
def test_a_cache_with_room_for_all_changes_nothing(generate, capsys, flags):
    want = generate(PROMPTS)
    capsys.readouterr()
    assert [row["tokens"] for row in generate(PROMPTS, *flags)] == [row["tokens"] for row in want]
    assert (
        flags[0].partition("=")[2] if "policy" in flags[0] else "full"
    ) in capsys.readouterr().err


def test_an_int8_cache_takes_fewer_bytes(generate, capsys):
    def cache_bytes(*flags):
        generate(PROMPTS, *flags)
        said = capsys.readouterr().err
        return int(said.rpartition(") ")[2].partition(" bytes")[0].replace(",", ""))

    assert cache_bytes("--cache_dtype=int8") < cache_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_samples=2"], "would all be the same"),
        (["--num_beams=2", "--temperature=1"], "searched, not drawn"),
        (["--num_beams=2", "--num_samples=3"], "exceeds num_beams"),
        (["--num_beams=2", "--stop=x"], "remove --num_beams"),
        (["--length_penalty=2"], "--num_beams"),
        (["--stream"], "--stream shows one continuation"),
        (["--stop="], "--stop=''"),
        (["--eos_id=-1", "--eos_id=3"], "--eos_id=-1 means no token"),
        (["--cache=capacity"], "expected NAME=VALUE"),
        (["--cache=capacity=3"], "has no"),
        (["--cache_policy=oracle"], "reads the answer"),
        (["--prefill_chunk=0"], "--prefill_chunk=0"),
        (["--min_p=2"], "min_p"),
        (["--top_p=0.5"], "top_p = 0.5 has no effect with temperature = 0"),
        (["--top_k=5"], "top_k = 5 has no effect with temperature = 0"),
        (["--chat", "--token_healing"], "--token_healing is of texts that are continued"),
        (
            ["--token_healing"],
            "token_healing draws the last token of a text anew, and no prompt is",
        ),
        (["--cache_policy=none"], "Unknown cache policy 'none': choose from"),
        (["--cache_policy=full; tova", "--cache=capacity=3"], "write capacity after the names"),
        (["--cache_policy=98*full; tova"], "99 cache policies, which are repeated"),
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


def test_a_single_prompt_has_no_batches(command, capsys, trained_run):
    flags = [f"--checkpoint={trained_run.path}", "--prompt=x", "--batch_size=4"]
    assert command("generate", *flags) == 2
    assert "--batch_size is of rows of --inputs" in capsys.readouterr().err


TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{{ 'a:' if add_generation_prompt }}"


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(TEMPLATE)
    return f"--gin.CHAT_TEMPLATE={str(path)!r}"


def test_a_conversation_is_answered_line_by_line(
    generate, command, capsys, monkeypatch, trained_run, template
):
    checkpoint = (f"--checkpoint={trained_run.path}", "--max_new_tokens=6", template)

    def chat(text, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert command("generate", *checkpoint, "--chat", *flags) == 0
        return capsys.readouterr().out

    user = [{"role": "user", "content": text} for text in ("one", "two")]
    (first,) = generate([{"messages": user[:1]}], template)
    answer = {"role": "assistant", "content": first["text"]}
    (second,) = generate([{"messages": [user[0], answer, user[1]]}], template)
    capsys.readouterr()
    assert chat("one\n\ntwo\n") == f"{first['text']}\n{second['text']}\n"
    assert chat("one\n/new\none\n") == 2 * f"{first['text']}\n"
    # A text is the user's message.
    assert chat("", "--prompt=one") == f"{first['text']}\n"
    (again,) = generate([{"text": "one"}], template, "--chat")
    assert again["tokens"] == first["tokens"]
    # A cache of few tokens does not shorten what is read: each turn reads all turns before it.
    prompts, stream = [], Decoder.stream
    monkeypatch.setattr(
        Decoder,
        "stream",
        lambda self, rows, **how: prompts.extend(rows) or stream(self, rows, **how),
    )
    chat("one\ntwo\n", "--cache_policy=snapkv", "--cache=capacity=6", "--cache=window=3")
    before, after = prompts
    assert len(before) > 6 and after[: len(before)] == before
    assert len(after) >= 2 * len(before)
    assert command("generate", *checkpoint, "--chat", "--num_samples=2") == 2
    assert "--chat has one answer to each line" in capsys.readouterr().err


def test_a_text_without_its_models_template_is_noted(generate, capsys, monkeypatch, template):
    from espalier.data.tokenizers import chat_template
    from espalier.launch.load.loaded_run import LoadedRun

    own = chat_template.ChatTemplate({"default": TEMPLATE})
    vocabulary = LoadedRun.vocabulary_or_none.func
    monkeypatch.setattr(
        LoadedRun,
        "vocabulary_or_none",
        property(lambda run: _with_template(vocabulary(run), own)),
    )
    generate([{"text": "one"}])
    assert capsys.readouterr().err.count("The model has a chat template") == 1
    generate([{"text": "one"}], "--chat")
    assert "The model has a chat template" not in capsys.readouterr().err


def _with_template(vocabulary, template):
    vocabulary.chat_template = template
    return vocabulary


def test_help_begins_with_what_is_needed(capsys):
    from espalier.launch import generate

    with pytest.raises(SystemExit) as ended:
        generate.main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: espalier generate --checkpoint=DIR [")
