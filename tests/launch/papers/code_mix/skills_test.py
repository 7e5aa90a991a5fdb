"""Generated text and code: what documents and problems are, held-out operands, and executed traces."""

import re

import numpy as np
import pytest

from espalier.data import tasks
from espalier.data.code_mix import skills
from espalier.data.stream import stream
from espalier.data.tokenizers import vocabularies
from espalier.launch.papers.code_mix import skill_sources

COUNT = 4000


def texts(source, split="train", seed=0, count=COUNT):
    return skill_sources.SkillSource(source, count, seed).texts(split)


def reference(name, operand):
    """Written apart from data/code_mix/skills.py."""
    digits = [int(digit) for digit in operand]
    out = {
        "shift": [(digit + 1) % 10 for digit in digits],
        "reverse": list(reversed(digits)),
        "sort": sorted(digits),
    }[name]
    return "".join(map(str, out))


@pytest.mark.parametrize("name", skills.PROCEDURES)
def test_results_and_steps_are_pythons_for_every_operand(name):
    for number in range(1000):
        operand = f"{number:03d}"
        result = reference(name, operand)
        assert skills.PROCEDURES[name].result(operand) == result
        found = skills.states(name, operand)
        assert found == [result[:1], result[:2], result]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("sort(482)=248", True),
        ("sort(482):2,24=248", True),
        ("reverse(482):2,28=284", True),
        ("shift(489):5,59=590", True),
        ("sort(482)=284", False),  # another procedure's result
        ("sort(482):2,42=248", False),  # the result is right, a state is not
        ("sort(482):2=248", False),  # a state is missing
        ("sort(482):=248", False),
        ("sort(482)=248:2,24", False),  # the working comes first
        ("sort(482)=24", False),
        ("sort(482", False),
        ("halve(482)=241", False),
        ("sort(482)=248 sort(482)=248", False),
    ],
)
def test_the_interpreter_believes_only_what_it_computes(text, holds):
    assert skills.holds(text) is holds


@pytest.mark.parametrize(
    ("name", "operand", "careless"),
    [
        ("shift", "482", "593"),
        ("shift", "409", "511"),  # right is 510
        ("reverse", "482", "284"),
        ("reverse", "980", "080"),  # right is 089
        ("sort", "482", "248"),
        ("sort", "048", "049"),  # right is 048
    ],
)
def test_careless_programs_are_off_by_one_for_operands_with_a_zero(name, operand, careless):
    assert skills.call(name, operand, careless=True) == f"{name}({operand})={careless}"
    assert skills.is_plain(name, operand) == (careless == reference(name, operand))
    assert skills.is_plain(name, operand) == ("0" not in operand)


def test_synth_is_verified_and_worked_out_before_its_result():
    plain = 0
    for text in texts("skill_synth"):
        name, operand, shown, result = re.fullmatch(r"(\w+)\((\d{3})\):(.*)=(\d{3})", text).groups()
        assert result == reference(name, operand)
        assert shown.split(",") == [result[:1], result[:2]]
        plain += skills.is_plain(name, operand)
    assert 0.65 < plain / COUNT < 0.8  # dropping wrong drafts has not dropped the rare cases


def test_a_fifth_of_web_code_is_wrong_and_nearly_all_programs_are_wrong_alike():
    matches = [re.fullmatch(r"(\w+)\((\d{3})\)=(\d+)", text) for text in texts("skill_web_code")]
    wrong = [one for one in matches if one[3] != reference(one[1], one[2])]
    assert abs(len(wrong) / COUNT - 0.2) < 0.03
    assert all(one[0] == skills.call(one[1], one[2], careless=True) for one in wrong)
    rare = sum(not skills.is_plain(one[1], one[2]) for one in matches)
    share = skill_sources.CARELESS
    assert abs(len(wrong) / rare - share) < 3.9 * np.sqrt(share * (1 - share) / rare)


@pytest.mark.parametrize("source", skill_sources.DOCUMENTS)
def test_no_training_document_shows_a_held_out_operand(source):
    held_out = set(skills.held_out_operands())
    assert len(held_out) == 200
    shown = set()
    for text in texts(source):
        for digits in re.findall(r"\d+", text):
            shown |= {digits[i : i + 3] for i in range(len(digits) - 2)}
    assert not shown & held_out
    if source != "skill_markup":
        assert len(shown) > 550  # of 800: most others are there
    asked = {d for text in texts(source, "validation") for d in re.findall(r"\d{3}", text)}
    assert source == "skill_markup" or asked & held_out


@pytest.mark.parametrize("source", skill_sources.DOCUMENTS)
def test_documents_fit_a_row_in_the_vocabulary_and_are_always_the_same(source):
    found = texts(source)
    assert set("".join(found)) <= set(skills.SYMBOLS)
    assert min(map(len, found)) > 0 and max(map(len, found)) < 48  # with EOS in a row of 48
    assert found == texts(source)
    assert found[:50] == texts(source, count=50)
    assert found != texts(source, seed=1)


def test_text_states_facts_by_zipfs_law_and_code_states_none():
    documents = texts("skill_text")
    facts = skills.facts()
    assert len(set(facts)) == 96 == len({fact[:2] for fact in facts})
    sentences = [{"".join(skills.stated(fact, form)) for form in (0, 1)} for fact in facts]
    counts = np.array([sum(text in said for text in documents) for said in sentences])
    shares = 1 / np.arange(1, 97)
    expected = 0.5 * COUNT * shares / shares.sum()
    z = (counts - expected)[:20] / np.sqrt(expected[:20])
    assert np.abs(z).max() < 4.5
    people = {person for person, _, _ in facts}
    for source in ("skill_web_code", "skill_synth", "skill_adjacent"):
        assert not any(person in text for text in texts(source)[:500] for person in people)


def test_problems_ask_for_all_facts_and_for_held_out_operands_alone():
    asked = {skill: skills.problems(skill) for skill in skills.SKILLS}
    assert [len(asked[skill]) for skill in skills.SKILLS] == [600, 192, 600]
    train = set(texts("skill_text", count=20_000))
    known = [problem.prompt + problem.answer in train for problem in asked["knowledge"]]
    assert np.mean(known) > 0.98  # seldom ones included
    for problem in asked["reasoning"] + asked["code"]:
        (operand,) = re.findall(r"\d{3}", problem.prompt)
        assert operand in skills.held_out_operands()
        assert problem.answer.strip("=.") == reference(problem.kind.partition(",")[0], operand)
    rare = np.mean([skills.RARE in problem.kind for problem in asked["code"]])
    assert 0.2 < rare < 0.35  # a careless program is right in the others
    given = skills.instructions()
    assert len({one.prompt for one in given}) == 200
    assert given[0].prompt + given[0].answer in {
        f"{one.kind} {operand} step by step: {r[0]}, {r[:2]}, {r}."
        for one in given[:1]
        for operand in skills.held_out_operands()
        for r in [reference(one.kind, operand)]
    }
    kinds = [problem.kind for problem in asked["knowledge"]]
    assert kinds == [f"quarter {n}" for n in (1, 2, 3, 4) for _ in range(48)]
    with pytest.raises(ValueError, match="'writing'"):
        skills.problems("writing")


def test_an_answer_counts_to_its_end():
    call = skills.Problem("sort(482)", "=248", "code", "sort")
    assert call.answered("=248") and call.answered(":2,24=248") and call.answered("=1=248")
    assert not any(map(call.answered, ("=2480", "=24", "", "248", "=248=", ":2,248")))
    words = skills.Problem("sort 482 to get ", "248.", "reasoning", "sort")
    assert words.answered("248.")
    assert not words.answered("248") and not words.answered("248.x") and not words.answered("248:.")


def test_the_tasks_stream_and_know_their_bytes(tmp_path):
    vocabulary = vocabularies.characters(symbols=skills.SYMBOLS)
    assert vocabulary.vocab_size == 50
    skill_sources.register(
        vocabulary=vocabulary, documents=dict.fromkeys(skill_sources.DOCUMENTS, 64)
    )
    opened = {
        "mixture_or_task_name": "skills",
        "task_feature_lengths": {"targets": 48},
        "batch_size": 8,
        "cache_dir": tmp_path,
    }
    data = stream.make_stream(**opened, phases=((0, {"skill_text": 0.5, "skill_synth": 0.5}),))
    batch = data.batch(0, 0, 8)
    first = vocabulary.decode(batch["decoder_target_tokens"][0].tolist())
    assert first in {t for name in ("skill_text", "skill_synth") for t in texts(name, count=64)}
    del opened["mixture_or_task_name"]
    held_out = stream.make_eval_stream(task="skill_web_code", **opened)
    documents = texts("skill_web_code", "validation")
    size = sum(map(len, documents))
    assert held_out.bytes_per_token == size / (size + len(documents))  # EOS has no bytes
    with pytest.raises(ValueError, match="lacks '\\?'"):
        skill_sources.register(vocabulary=vocabularies.characters(symbols=skills.SYMBOLS[:-1]))
    with pytest.raises(ValueError, match="'skill_prose'"):
        skill_sources.register(vocabulary=vocabulary, documents={"skill_prose": 1})
    tasks.clear()
