"""Prompts: tasks over files, and the stream of them."""

import json

import numpy as np
import pytest

from espalier.data import tasks
from espalier.data.cache import in_place
from espalier.data.preference import records
from espalier.data.prompts import stream
from espalier.data.prompts import tasks as prompt_tasks
from espalier.data.tasks import in_seqio
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import vocabularies

ROWS = [{"prompt": f"{i} + 1 = ", "answer": str(i + 1), "ü": "ß"} for i in range(7)]
LONG = {"prompt": "9" * 40, "answer": "9"}


@pytest.fixture(scope="module")
def byte():
    return vocabularies.byte()


@pytest.fixture
def register(tmp_path, byte):
    def call(rows, name="prompts", **settings):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prompt_tasks.register_prompts(
            name=name, files=str(file), vocabulary=byte, cache_dir=tmp_path / "cache", **settings
        )

    return call


def opened(tmp_path, **settings):
    settings = {"max_prompt_length": 16, "batch_size": 4, "seed": 3, **settings}
    return stream.make_stream(
        mixture_or_task_name="prompts", cache_dir=tmp_path / "cache", **settings
    )


@pytest.mark.parametrize("start_token", [0, None])
def test_every_prompt_comes_once_an_epoch_with_its_row(tmp_path, register, byte, start_token):
    register([*ROWS, LONG])
    found = opened(tmp_path, start_token=start_token)
    told = found.summary()["sources"]["prompts"]
    assert (told["prompts"], told["prompt_too_long"]) == (7, 1)
    assert told["first"] == {"prompt_too_long": "prompts.jsonl:8"}
    assert tasks.vocabulary("prompts") == byte
    seen = []
    for step in range(7):
        batch, info = found.batch(step, 0, 4), found.info(step, 0, 4)
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "prompt_tokens": ((4, 16), np.int32),
            "prompt_lengths": ((4,), np.int32),
            "source_ids": ((4,), np.int32),
        }
        for b, row in enumerate(info):
            assert row in ROWS
            before = [] if start_token is None else [start_token]
            ids = [*before, *byte.encode(row["prompt"])]
            assert batch["prompt_lengths"][b] == len(ids)
            np.testing.assert_array_equal(batch["prompt_tokens"][b], ids + [0] * (16 - len(ids)))
            seen.append(row["answer"])
        part = found.batch(step, 1, 3)
        np.testing.assert_array_equal(part["prompt_tokens"], batch["prompt_tokens"][1:3])
    for epoch in range(4):
        assert len(set(seen[7 * epoch : 7 * epoch + 7])) == 7
    assert found.epochs(7) == {"prompts": 4.0}


def test_a_prompt_of_messages_has_the_ids_that_it_has_in_a_pair(tmp_path, register, byte):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ tools | tojson }}{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    user = {"role": "user", "content": "hi"}
    chosen, rejected = ([user, {"role": "assistant", "content": text}] for text in "ab")
    more = {"tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "glad"}}
    register([{"prompt": [user], **more}], chat_template=str(template))
    (read,) = tasks.find("prompts").records("train")
    assert byte.decode(read["prompt"].tolist()) == '[{"name": "f"}]gladhi'
    record = records.parse({"chosen": chosen, "rejected": rejected, **more}, "row", "row")
    tokeniser = tasks.find("prompts").source.tokeniser
    assert read["prompt"].tolist() == tokeniser(record)[0]
    for tools, message in (("{", "a text that is not JSON"), (["\ud800"], "not valid Unicode")):
        register([{"prompt": [user], "tools": tools}], name="bad", chat_template=str(template))
        with pytest.raises(DataError, match=f"'tools' is {message}"):
            list(tasks.find("bad").records("train"))


def test_a_text_may_have_columns_with_the_names_of_a_templates_variables(register, byte):
    row = {"prompt": "2+2=", "answer": "4", "tools": "calculator", "chat_template_kwargs": 1}
    register([row])
    (read,) = tasks.find("prompts").records("train")
    assert byte.decode(read["prompt"].tolist()) == row["prompt"]
    assert json.loads(bytes(read["info"].astype(np.uint8))) == row


def test_several_updates_read_the_same_prompts(tmp_path, register):
    register(ROWS)
    once, thrice = opened(tmp_path), opened(tmp_path, updates=3)
    for step in range(9):
        assert thrice.info(step, 0, 4) == once.info(step // 3, 0, 4)
    assert thrice.epochs(3) == once.epochs(1) and thrice.epochs(4) == once.epochs(2)
    assert thrice.positions(6) == once.positions(2)
    assert thrice.steps_for_tokens(500) == 3 * once.steps_for_tokens(500)
    # Tokens of prompts have no loss: the model card of a run would tell them as tokens with one.
    assert "tokens_per_step" not in once.summary()["phases"][0]
    capped = opened(tmp_path, updates=3, max_epochs=2, on_cap="redistribute")
    with pytest.raises(ValueError, match="From step 9 on, .* The run has 15 steps"):
        capped.check_repeats(15)
    with pytest.raises(ValueError, match="no further batch. From step 9 on"):
        capped.info(15, 0, 4)
    with pytest.raises(ValueError, match="updates is 0"):
        opened(tmp_path, updates=0)


def test_held_out_prompts_are_others(register):
    seqio = in_seqio()

    register(ROWS, validation_fraction=0.5)
    task = seqio.TaskRegistry.get("prompts")
    prompts = {
        split: {bytes(x["info"]) for x in _read(task, split)} for split in ("train", "validation")
    }
    assert len(prompts["train"]) + len(prompts["validation"]) == 7
    assert not prompts["train"] & prompts["validation"]


def _read(task, split):
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    for example in dataset.as_numpy_iterator():
        yield {**example, "info": example["info"].astype(np.uint8).tobytes()}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "x"}], "line 1: no key 'prompt'; present are 'text'"),
        ([{"prompt": ""}], "line 1: 'prompt' is empty"),
        ([{"prompt": 3}], "line 1: 'prompt' is a int"),
        ([{"prompt": "\ud800"}], "line 1: 'prompt' is not valid Unicode at character 0"),
    ],
)
def test_rows_that_are_none_are_named(register, rows, words):
    register(rows)
    with pytest.raises(DataError, match=words):
        tasks.summary()


def test_a_prompt_without_tokens_needs_something_before_it(tmp_path, register, monkeypatch, byte):
    nothing = {"prompt": "\x00", "answer": "9"}
    monkeypatch.setattr(type(byte), "encode", lambda self, text: [] if text == "\x00" else [5, 6])
    register([*ROWS, nothing])
    with pytest.raises(ValueError, match=r"prompts.jsonl:8 is empty, and start_token=None"):
        opened(tmp_path, start_token=None)
    assert opened(tmp_path).summary()["sources"]["prompts"]["prompts"] == 8


def test_prompts_that_do_not_fit_are_said(tmp_path, register):
    register([LONG])
    with pytest.raises(ValueError, match="all 1 prompts have more than 16 tokens"):
        opened(tmp_path)


def test_rows_of_a_cache_that_is_read_in_place_are_the_same(tmp_path, register, monkeypatch):
    register(ROWS)
    local = opened(tmp_path)
    monkeypatch.setattr(
        stream.stream.StreamSettings,
        "open_cache",
        lambda settings, task, local=local: in_place.open_cache(local._sources[0].cache.directory),
    )
    there = opened(tmp_path)
    for step in range(4):
        assert there.info(step, 0, 4) == local.info(step, 0, 4)
        batch = there.batch(step, 0, 4)
        for name, array in local.batch(step, 0, 4).items():
            np.testing.assert_array_equal(batch[name], array)
