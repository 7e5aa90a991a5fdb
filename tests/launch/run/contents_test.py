"""What commands read of messages and answers of others: texts, whose spellings of control tokens are text."""

import dataclasses

import pytest

from espalier.launch.aya_expanse import teachers
from espalier.launch.evaluate.judges import checkpoint
from espalier.launch.evaluate.judges.asking import Question
from espalier.launch.evaluate.judges.pairwise import Template
from espalier.launch.inference import generate, score
from espalier.launch.inference.generate import as_message, prompt_of
from espalier.launch.load import load_run
from espalier.launch.load.loaded_run import LoadedRun
from espalier.launch.prepare import best_of_n
from espalier.trainers.rewards import model_reward


def user(text):
    return {"messages": [{"role": "user", "content": text}]}


def test_a_conversation_of_the_command(hostile):
    run = hostile.loaded()
    prompt = prompt_of(run, as_message({"text": hostile.text}), "--chat")
    assert hostile.turns(prompt) == 2 and prompt.count(hostile.end) == 1
    assert hostile.text in hostile.vocabulary.decode_all(prompt)
    # What the model has answered, which it may write piece by piece, is not read as turns either.
    answers = [*user("x")["messages"], {"role": "assistant", "content": hostile.text}]
    again = prompt_of(run, {"messages": [*answers, *user("y")["messages"]]}, "--chat")
    assert hostile.turns(again) == 4 and again.count(hostile.end) == 3
    # Texts to continue are written by their user, with the tokens of turns.
    assert hostile.turns(prompt_of(run, {"text": hostile.text}, "--prompt")) == 1
    everywhere = hostile.loaded(special_tokens="everywhere")
    assert hostile.turns(prompt_of(everywhere, user(hostile.text), "--chat")) == 3
    nowhere = hostile.loaded(special_tokens="nowhere")
    assert hostile.turns(prompt_of(nowhere, {"text": hostile.text}, "--prompt")) == 0


def test_an_answer_is_scored_up_to_the_end_of_its_turn(hostile):
    messages = [*user("x")["messages"], {"role": "assistant", "content": hostile.text}]
    context, targets = hostile.loaded().scored({"messages": messages}, "row")
    assert targets[-1] == hostile.end and targets.count(hostile.end) == 1
    assert hostile.vocabulary.decode_all(targets) == hostile.text + "<|im_end|>"
    assert hostile.turns(context) == 2


@pytest.fixture
def read(monkeypatch, hostile):
    """The prompts that a judge or a teacher has read."""
    prompts = []

    def continued(config, rows, **_):
        options = {"params": {}, "meta": {}, "row_sharding": None, "row_shards": 1}
        run = LoadedRun(config=config, **options)
        for where, row in rows:
            prompts.append(prompt_of(run, row, where))
            yield {"text": ""}

    monkeypatch.setattr(generate, "generate", continued)
    monkeypatch.setattr(checkpoint, "resolved", lambda *_, **__: "step")
    monkeypatch.setattr(checkpoint, "weights_identity", lambda *_, **__: {})
    return prompts


@pytest.mark.parametrize("converses", [True, False])
def test_an_answer_cannot_end_the_turn_of_its_judge(hostile, read, converses, monkeypatch):
    if not converses:
        monkeypatch.setattr(type(hostile.vocabulary), "chat_template", None)
    judge = checkpoint.CheckpointWriter(hostile.config(), settings="", checkpoint="x")
    prompt = Template().render(hostile.text, "honest", hostile.text + "<|im_end|>")
    assert list(judge.write([prompt], temperature=0.0, seed=0)) == [(0, "")]
    (tokens,) = read
    assert hostile.turns(tokens) == 2 * converses and tokens.count(hostile.end) == converses
    assert prompt in hostile.vocabulary.decode_all(tokens)


@pytest.mark.parametrize("prompt", ["x", user("x")["messages"]])
def test_an_answer_cannot_end_its_turn_before_a_judge_of_log_probabilities(hostile, prompt):
    question = Question(prompt=prompt, answers=(hostile.text,), about={"id": "1"})
    row = score.scored_row(hostile.loaded(), checkpoint._row(hostile.loaded(), question), "1")
    ends = int(not isinstance(prompt, str))
    assert row.targets.count(hostile.end) == ends and hostile.turns(row.targets) == 0


def test_an_answer_cannot_end_its_turn_before_a_reward_model(hostile, monkeypatch):
    seen = []

    class Reward:
        def __init__(self, *_, **__):
            pass

        def __call__(self, completions):
            seen.extend(completions)
            import numpy as np

            return np.zeros(len(completions))

    monkeypatch.setattr(model_reward, "ModelReward", Reward)
    row = {"prompt": user(hostile.text)["messages"], "text": hostile.text, "ended": "eos"}
    best_of_n._by_model([("row", row)], hostile.loaded(), 1)
    (completion,) = seen
    assert hostile.turns(completion.prompt) == 2
    assert hostile.end not in completion.tokens and hostile.turns(completion.tokens) == 0


def test_a_prompt_cannot_write_turns_of_a_local_teacher(hostile, monkeypatch):
    """Neither with a chat template nor without one, where it is the text that the teacher continues."""
    from espalier.data.aya_expanse.prompts import Prompt

    config = hostile.config()
    teacher = object.__new__(teachers.CheckpointTeacher)
    teacher._step, teacher.sampling = "step", teachers.SamplingFlags()
    teacher.teacher = type("T", (), {"chat_template": None, "batch_size": 1})
    monkeypatch.setattr(load_run, "config_of", lambda _: config)
    used = []

    class EndedError(Exception):
        pass

    def load(self, *_, **__):
        used.append(self)
        raise EndedError

    monkeypatch.setattr(load_run.RunConfig, "load", load)
    with pytest.raises(EndedError):
        list(teacher.answers([]))
    names = {field.name for field in dataclasses.fields(Prompt)}
    values = {name: "" for name in names} | {"prompt": hostile.text, "where": "1"}
    prompt = Prompt(**values)
    run = hostile.loaded(special_tokens=used[0].special_tokens)
    assert hostile.turns(prompt_of(run, teachers.row_of(run, prompt), "1")) == 2
    monkeypatch.setattr(type(hostile.vocabulary), "chat_template", None)
    run = hostile.loaded(special_tokens=used[0].special_tokens)
    row = teachers.row_of(run, prompt)
    assert "text" in row and hostile.turns(prompt_of(run, row, "1")) == 0
