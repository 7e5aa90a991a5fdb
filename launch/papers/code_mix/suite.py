"""The data sets of the suite, and their rows as prompts.

Each benchmark is a `Source` and a function from a row of its public columns to documents. They have "query", "choices"
and "gold" for ranking; "contexts", "suffix" and "gold" for WinoGrande, which scores the text after the options; "query"
and "answers" for questions with free answers. The paper states no prompts: these are customary in
lm-evaluation-harness, so that scores are comparable.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from espalier.launch.evaluate.suites.local_data import Source, WrongDataError
from espalier.launch.evaluate.suites.scores import Group, Suite

Row = Mapping[str, Any]
Document = dict[str, Any]


class Benchmark(NamedTuple):
    """A data set and the documents of one of its rows."""

    source: Source
    documents: Callable[[Row], Sequence[Document]]


BENCHMARKS: dict[str, Benchmark] = {}


def _benchmark(
    repository: str | None, columns: str, split: str = "validation", **source: Any
) -> Callable[[Callable[[Row], list[Document]]], Callable[[Row], list[Document]]]:
    """Registers a function from a row to documents under its name; its set is in the folder of that name by default."""

    def register(documents: Callable[[Row], list[Document]]) -> Callable[[Row], list[Document]]:
        settings = {"folder": documents.__name__, "repository": repository, **source}
        place = Source(split=split, columns=tuple(columns.split()), **settings)
        BENCHMARKS[documents.__name__] = Benchmark(place, documents)
        return documents

    return register


_SUPERGLUE: dict[str, Any] = {"repository": "aps/super_glue", "folder": "super_glue"}


def _ranked(query: str, choices: Sequence[str], gold: Any) -> list[Document]:
    # Some sets hide the labels of their test splits, as -1 or an empty text.
    if not 0 <= int(gold) < len(choices):
        raise WrongDataError(
            f"label {gold!r} of {query[:60]!r} is not one of its {len(choices)} choices"
        )
    return [{"query": query, "choices": list(choices), "gold": int(gold)}]


@_benchmark(columns="passage question label", configuration="boolq", **_SUPERGLUE)
def boolq(row: Row) -> list[Document]:
    query = f"{row['passage']}\nQuestion: {_question(row['question'])}\nAnswer:"
    return _ranked(query, ["no", "yes"], row["label"])


@_benchmark("baber/piqa", "goal sol1 sol2 label")
def piqa(row: Row) -> list[Document]:
    return _ranked(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


@_benchmark(
    "allenai/sciq",
    "support question correct_answer distractor1 distractor2 distractor3",
    split="test",
)
def sciq(row: Row) -> list[Document]:
    query = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    wrong = [row[f"distractor{number}"] for number in (1, 2, 3)]
    return _ranked(query, [*wrong, row["correct_answer"]], 3)


@_benchmark("lighteval/siqa", "context question answerA answerB answerC label", folder="siqa")
def social_iqa(row: Row) -> list[Document]:
    query = f"Q: {row['context']} {row['question']}\nA:"
    return _ranked(query, [row[f"answer{letter}"] for letter in "ABC"], int(row["label"]) - 1)


@_benchmark(
    "allenai/quac",
    "wikipedia_page_title section_title context questions answers orig_answers",
    revision="refs/convert/parquet",
)
def quac(row: Row) -> list[Document]:
    """Returns a document for each question of a dialogue, with the questions and answers before it."""
    head = f"Title: {row['wikipedia_page_title']} - {row['section_title']}\n\n{row['context']}\n"
    documents = []
    columns = row["questions"], row["answers"]["texts"], row["orig_answers"]["texts"]
    for question, answers, original in zip(*columns, strict=True):
        head += f"\nQ: {question}\nA:"
        documents.append({"query": head, "answers": [_quac_answer(text) for text in answers]})
        head += f" {_quac_answer(original)}"
    return documents


def _quac_answer(text: str) -> str:
    return "I don't know" if text == "CANNOTANSWER" else text


@_benchmark(columns="premise hypothesis label", configuration="cb", **_SUPERGLUE)
def cb(row: Row) -> list[Document]:
    query = f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False, or Neither?\nAnswer:"
    return _ranked(query, ["True", "False", "Neither"], row["label"])


@_benchmark(columns="premise choice1 choice2 question label", configuration="copa", **_SUPERGLUE)
def copa(row: Row) -> list[Document]:
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row[name][:1].lower() + row[name][1:] for name in ("choice1", "choice2")]
    return _ranked(f"{row['premise'].strip().removesuffix('.')} {word}", choices, row["label"])


@_benchmark(
    None,
    "input_sentence_1 input_sentence_2 input_sentence_3 input_sentence_4 "
    "sentence_quiz1 sentence_quiz2 answer_right_ending",
    split="test",
    how="its authors send the 2016 test set to those who fill in the form at "
    "cs.rochester.edu/nlp/rocstories; save it as test.jsonl with its columns in lower case",
)
def story_cloze(row: Row) -> list[Document]:
    query = " ".join(row[f"input_sentence_{number}"] for number in (1, 2, 3, 4))
    endings = [row["sentence_quiz1"], row["sentence_quiz2"]]
    return _ranked(query, endings, int(row["answer_right_ending"]) - 1)


@_benchmark("Rowan/hellaswag", "activity_label ctx_a ctx_b endings label")
def hellaswag(row: Row) -> list[Document]:
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _ranked(
        _without_marks(query), [_without_marks(end) for end in row["endings"]], row["label"]
    )


def _without_marks(text: str) -> str:
    """Removes WikiHow's marks, such as [title]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@_benchmark("allenai/winogrande", "sentence option1 option2 answer", configuration="winogrande_xl")
def winogrande(row: Row) -> list[Document]:
    before, _, after = row["sentence"].partition("_")
    contexts = [before + row[name] for name in ("option1", "option2")]
    gold = int(row["answer"] or 0) - 1
    if gold not in (0, 1):
        raise WrongDataError(f"{row['sentence']!r} has no answer: use the validation split")
    return [{"contexts": contexts, "suffix": after.strip(), "gold": gold}]


@_benchmark(
    "allenai/ai2_arc",
    "question choices answerKey",
    split="test",
    folder="ai2_arc",
    configuration="ARC-Easy",
)
def arc_easy(row: Row) -> list[Document]:
    choices = row["choices"]
    gold = list(choices["label"]).index(row["answerKey"])
    return _ranked(f"Question: {row['question']}\nAnswer:", choices["text"], gold)


@_benchmark("mandarjoshi/trivia_qa", "question answer", configuration="rc.nocontext")
def trivia_qa(row: Row) -> list[Document]:
    answer = row["answer"]
    query = f"Question: {_question(row['question'])}\nAnswer:"
    return [{"query": query, "answers": [answer["value"], *answer["aliases"]]}]


@_benchmark("google-research-datasets/nq_open", "question answer")
def nq_open(row: Row) -> list[Document]:
    return [{"query": f"Q: {_question(row['question'])}\nA:", "answers": list(row["answer"])}]


def _question(question: str) -> str:
    """Adds the question mark, which some sets omit."""
    return question if question.rstrip().endswith("?") else f"{question}?"


# Benchmarks whose answers are programs, and how to run them.
_RUN = "espalier evaluate code --problems={} --json=FILE, then --code_results=FILE here"
OF_CODE = {
    "humaneval": _RUN.format("humaneval"),
    "mbpp": _RUN.format("MBPP.jsonl") + "; the set is google-research-datasets/mbpp, split test",
}

# "To Code, or Not To Code?" (arXiv 2408.10914), section 2.3.
SUITE = Suite(
    name="code_mix",
    groups=(
        Group(
            name="reasoning",
            benchmarks=(
                *("boolq", "piqa", "sciq", "social_iqa", "quac", "cb", "copa", "story_cloze"),
                *("hellaswag", "winogrande", "arc_easy"),
            ),
        ),
        Group(name="knowledge", benchmarks=("trivia_qa", "nq_open")),
        Group(name="code", benchmarks=("humaneval", "mbpp")),
    ),
    sources={name: benchmark.source for name, benchmark in BENCHMARKS.items()},
    programs=OF_CODE,
)
