"""Rows of the public sets as prompts, and how answers to them are scored."""

import pathlib
import re

import pytest

from espalier.launch.evaluate.suites.local_data import WrongDataError
from espalier.launch.papers.code_mix.harness_tasks import tasks
from espalier.launch.papers.code_mix.suite import BENCHMARKS, OF_CODE, SUITE

# (query, choices, gold) of the first document of each set.
RANKED = {
    "boolq": ("Vines climb.\nQuestion: do vines climb?\nAnswer:", ["no", "yes"], 1),
    "piqa": ("Question: Tie a shoot.\nAnswer:", ["Use soft twine.", "Use a hot nail."], 0),
    "sciq": (
        "Leaves turn light into sugar.\nQuestion: What do leaves make?\nAnswer:",
        ["salt", "iron", "glass", "sugar"],
        3,
    ),
    "social_iqa": (
        "Q: Ada lent Ben her ladder. What will Ben want to do next?\nA:",
        ["burn it", "thank Ada", "sleep"],
        1,
    ),
    "cb": (
        "It rained all day.\nQuestion: it was wet. True, False, or Neither?\nAnswer:",
        ["True", "False", "Neither"],
        0,
    ),
    "copa": ("The vine fell because", ["the wire broke.", "it was Monday."], 0),
    "story_cloze": (
        "Sentence 1. Sentence 2. Sentence 3. Sentence 4.",
        ["It rained frogs.", "She went home."],
        1,
    ),
    "hellaswag": (
        "Pruning: A man holds shears. How to cut He",
        ["cuts a shoot.", "sings.", "flies.", "is a shoot."],
        0,
    ),
    "arc_easy": ("Question: Which is a plant?\nAnswer:", ["vine", "nail", "rain"], 0),
}


@pytest.mark.parametrize("name", RANKED)
def test_rows_become_ranked_choices(data_dir, name):
    query, choices, gold = RANKED[name]
    first = tasks.documents(name, data_dir)[0]
    assert first == {"query": query, "choices": choices, "gold": gold}


def test_other_rows_of_the_same_sets(data_dir):
    assert tasks.documents("copa", data_dir)[1]["query"] == "It froze therefore"
    assert tasks.documents("boolq", data_dir)[1]["query"].endswith("do stones climb?\nAnswer:")
    assert tasks.documents("arc_easy", data_dir)[1]["gold"] == 1


def test_winogrande_scores_what_both_options_precede(data_dir):
    assert tasks.documents("winogrande", data_dir) == [
        {
            "contexts": [
                "The vine outgrew the wall because the vine",
                "The vine outgrew the wall because the wall",
            ],
            "suffix": "was low.",
            "gold": 1,
        }
    ]


def test_questions_have_all_their_answers(data_dir):
    assert tasks.documents("trivia_qa", data_dir) == [
        {"query": "Question: What holds a vine?\nAnswer:", "answers": ["Trellis", "Lattice"]}
    ]
    assert tasks.documents("nq_open", data_dir) == [
        {"query": "Q: who ties the shoots?\nA:", "answers": ["the gardener", "gardeners"]}
    ]
    head = "Title: Trellis - Use\n\nA trellis holds vines. It is made of wood.\n\nQ: What does it hold?\nA:"
    assert tasks.documents("quac", data_dir) == [
        {"query": head, "answers": ["holds vines", "vines"]},
        {"query": f"{head} vines\nQ: Who made it?\nA:", "answers": ["I don't know"]},
    ]


def test_a_hidden_label_is_refused():
    row = {"premise": "", "hypothesis": "", "label": -1}
    with pytest.raises(WrongDataError, match="label -1 of .* is not one of its 3 choices"):
        BENCHMARKS["cb"].documents(row)


def test_choices_are_ranked_by_sum_or_per_byte():
    # Per byte: -3 / 1, -5 / 2 (one character of two bytes), -6 / 6.
    doc = {"choices": ["a", "é", "longer"], "gold": 2}
    results = [(-3.0, False), (-5.0, False), (-6.0, True)]
    assert tasks.by_sum(doc, results) == {"score": 0}
    assert tasks.by_sum({**doc, "gold": 0}, results) == {"score": 1}
    assert tasks.by_bytes(doc, results) == {"score": 1}
    # Per character the second would be the worst of two.
    assert tasks.by_bytes({"choices": ["a", "é"], "gold": 1}, results[:2]) == {"score": 1}
    assert tasks.by_match({"answers": ["Trellis"]}, ["the trellis."]) == {"score": 1, "f1": 1}


def test_every_benchmark_but_code_has_a_data_set_and_a_task_file():
    assert set(SUITE.benchmarks) == {*BENCHMARKS, *OF_CODE}
    assert set(SUITE.groups[-1].benchmarks) == set(OF_CODE)
    folder = pathlib.Path(tasks.__file__).parent
    files = {path.stem for path in folder.glob("[!_]*.yaml")}
    assert files == set(BENCHMARKS)
    for group in SUITE.groups[:-1]:
        listed = (folder / f"_group_{group.name}.yaml").read_text()
        assert re.findall(r"- code_mix_(\w+)", listed) == list(group.benchmarks)
