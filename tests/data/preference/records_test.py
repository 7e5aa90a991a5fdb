"""Rows as records: all of TRL's formats, implicit prompts, and every bad row named or dropped."""

import json
import pathlib

import pytest

from espalier.data.preference import records
from espalier.data.rows.records import DegenerateError
from espalier.data.text.documents import DataError

GOLDEN = json.loads(
    (pathlib.Path(__file__).parent.parent / "goldens" / "preference_pairs.json").read_bytes()
)


def user(content):
    return {"role": "user", "content": content}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def parse(**row):
    return records.parse(row, "x.jsonl, line 3", "x.jsonl:3")


def test_a_pair_of_texts_goes_through_unchanged():
    texts = {"prompt": "\u200fשלום\u200e \u200b", "chosen": " a\u200db\n", "rejected": "\u202eא"}
    record = parse(**texts, score=3)
    assert (record.prompt, *record.completions) == tuple(texts.values())
    assert record.has_invisible and not record.is_chat and record.label is None
    assert not parse(prompt="é", chosen="a", rejected="b").has_invisible


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Human: hi Bot: good", "Human: hi Bot: great", "Human: hi Bot:"),  # no word is split
        ("Human: hi Bot: good", "Human: hi Bot: bad", "Human: hi Bot:"),  # the space is theirs
        ("Q: 1\nA:\nyes", "Q: 1\nA:\nno", "Q: 1\nA:\n"),
        ("say one two", "say one", "say"),  # something is left of both
        ("A: yes", "A: yes indeed", "A:"),
        ("A: yes \n", "A: yes indeed", "A:"),
        ("say good day", "say goodness", "say"),
        ("a  b", "a  c", "a "),
        (
            "問：空の色は？答：青い",
            "問：空の色は？答：赤い",
            "問：空の色は？答：",
        ),  # no spaces between words
        ("用户：你好\n助手：很好", "用户：你好\n助手：很坏", "用户：你好\n助手：很"),
        ("答：好的", "答：好", "答："),
        ("ถาม ตอบว่าใช่", "ถาม ตอบว่าไม่", "ถาม ตอบว่า"),
        ("ตอบว่ากิน", "ตอบว่ากาน", "ตอบว่า"),  # a vowel sign is its letter's
        ("질문 대답 좋아", "질문 대답 좋지", "질문 대답"),  # Korean has spaces
    ],
)
def test_the_common_beginning_of_two_texts_is_the_prompt(chosen, rejected, prompt):
    record = parse(chosen=chosen, rejected=rejected)
    assert record.prompt == prompt
    assert record.completions == (chosen[len(prompt) :], rejected[len(prompt) :])


def test_the_common_first_messages_are_the_prompt():
    shared = [user("a"), said("b"), user("c")]
    record = parse(chosen=[*shared, said("d")], rejected=[*shared, said("e"), user("f")])
    assert record.prompt == tuple(shared)
    assert record.completions == ((said("d"),), (said("e"), user("f")))
    # A text beside conversations repeats their first message, as UltraFeedback has it.
    again = parse(prompt="a", chosen=[*shared, said("d")], rejected=[*shared, said("e")])
    assert again.prompt == tuple(shared) and again.prompt_text == record.prompt_text


def test_pairs_become_labelled_completions_as_in_trl():
    rows = [parse(**row) for row in GOLDEN["pairs"]]
    found = [
        {"prompt": one.prompt, "completion": one.completions[0], "label": one.label}
        for row in rows
        for one in row.unpaired()
    ]
    assert sorted(found, key=str) == sorted(GOLDEN["unpaired"], key=str)
    (one,) = parse(prompt="p", completion="c", label=False).unpaired()
    assert one.label is False and one.completions == ("c",)


def test_what_the_template_sees():
    tools = [{"type": "function"}]
    chat = {"prompt": [user("a")], "chosen": [said("b")], "rejected": [said("c")]}
    given = {"tools": json.dumps(tools), "chat_template_kwargs": {"thinking": False, "x": None}}
    assert parse(**chat, **given).template == {"tools": tools, "thinking": False}
    assert parse(**chat, tools=None, chat_template_kwargs=None).template == {}
    call = [{"function": {"name": "add", "arguments": {}}}]
    called = parse(**{**chat, "chosen": [said(None, tool_calls=call)]})
    assert called.completions[0] == (said(None, tool_calls=call),)


def test_margins():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert [parse(**pair, margin=m).margin for m in (2, 0.5, None)] == [2.0, 0.5, 0.0]
    for wrong in ("1", True, float("nan")):
        with pytest.raises(DataError, match="line 3: 'margin' is .*finite number"):
            parse(**pair, margin=wrong)


CHAT = {"prompt": [user("a")], "chosen": [said("b")], "rejected": [said("c")]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "chosen": "a"},
            "no key 'rejected'; present are 'prompt', 'chosen'. A row",
        ),
        ({"prompt": "p", "completion": "a"}, "no key 'label'"),
        ({"completion": "a", "label": True}, "no key 'prompt'"),
        ({"text": "a"}, "no key 'chosen'"),
        ({}, "present are none"),
        ({"prompt": 1, "chosen": "a", "rejected": "b"}, "'prompt' is a int; write a text, or a"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "'chosen' is a NoneType"),
        (
            {"prompt": "p", "chosen": "a", "rejected": ["b"]},
            "message 1 of 'rejected' is not of the",
        ),
        ({**CHAT, "prompt": [{"content": "a"}]}, "message 1 of 'prompt' is not of the form"),
        ({**CHAT, "prompt": []}, "'prompt' has no message"),
        ({**CHAT, "rejected": "c"}, "one of 'chosen' and 'rejected' is a text"),
        ({**CHAT, "chosen": "b", "rejected": "c"}, "'prompt' has messages and 'chosen' is a text"),
        (
            {"prompt": "p", "completion": [said("a")], "label": True},
            "'prompt' is a text and 'comple",
        ),
        ({"prompt": None, "completion": "a", "label": True}, "'prompt' is null"),
        ({"prompt": "p", "completion": "a", "label": 1}, "'label' is 1; it must be true or false"),
        (
            {"prompt": "p", "chosen": "a\ud800", "rejected": "b"},
            "'chosen' is not valid Unicode at ch",
        ),
        ({**CHAT, "chosen": [said("x\udfff")]}, "'chosen' is not valid Unicode at character 1"),
        ({**CHAT, "tools": {}}, "'tools' holds a dict; give a list"),
        ({**CHAT, "tools": "[{"}, "'tools' is a text that is not JSON"),
        ({**CHAT, "chat_template_kwargs": [1]}, "'chat_template_kwargs' holds a list"),
        (
            {**CHAT, "chat_template_kwargs": {"tools": []}},
            "sets 'tools', which other keys of the row determine",
        ),
    ],
)
def test_a_malformed_row_is_one_error_with_its_place(row, message):
    with pytest.raises(DataError, match=f"x.jsonl, line 3: .*{message}"):
        parse(**row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical"),
        ({"chosen": "p a", "rejected": "p a"}, "identical"),
        ({**CHAT, "rejected": [said("b")]}, "identical"),
        ({"prompt": "p", "chosen": "a", "rejected": "a\u200b"}, "identical_but_invisible"),
        (
            {"prompt": "p", "chosen": "\u2060a\u00ad", "rejected": "a\ufeff"},
            "identical_but_invisible",
        ),
        ({**CHAT, "rejected": [said("\u2062b")]}, "identical_but_invisible"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty_completion"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n\t\u3000"}, "empty_completion"),
        ({"prompt": "p", "chosen": "a", "rejected": "\u200b\u200f \u2060"}, "empty_completion"),
        ({**CHAT, "chosen": []}, "empty_completion"),
        ({**CHAT, "chosen": [said(None)]}, "empty_completion"),
        ({**CHAT, "chosen": [said("\u200b ")]}, "empty_completion"),
        ({**CHAT, "chosen": [said([{"type": "text", "text": ""}])]}, "empty_completion"),
        ({**CHAT, "chosen": [said([{"type": "text", "text": " "}] * 2)]}, "empty_completion"),
        ({"prompt": "p", "completion": "\u00ad", "label": False}, "empty_completion"),
        ({"chosen": [user("a"), said("b")], "rejected": [user("a")]}, "empty_completion"),
        ({"chosen": "good", "rejected": "great"}, "no_prompt"),
        ({"chosen": "yes", "rejected": "yes indeed"}, "no_prompt"),
        ({"chosen": " ", "rejected": "  a"}, "no_prompt"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, "no_prompt"),
    ],
)
def test_a_pair_that_says_nothing_has_a_reason(row, reason):
    with pytest.raises(DegenerateError) as error:
        parse(**row)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("می\u200cخواهم", "میخواهم"),  # Persian: the letters are not joined
        ("क्\u200dष", "क्ष"),  # Devanagari: a half form in place of the conjunct
        ("👩\u200d🚀", "👩🚀"),
        ("🏴\U000e0067\U000e0062\U000e007f", "🏴"),
        ("\u202eabc\u202c", "abc"),
        ("1\u200f-2", "1-2"),
    ],
)
def test_invisible_characters_that_change_what_is_seen_make_a_difference(one, other):
    record = parse(prompt="p", chosen=one, rejected=other)
    assert record.completions == (one, other) and record.has_invisible


def test_parts_of_a_message_that_say_something_are_no_empty_completion():
    for part in ({"type": "text", "text": "a"}, {"type": "image", "url": "x.png"}):
        assert parse(**{**CHAT, "chosen": [said([{"type": "text", "text": ""}, part])]}).is_chat
