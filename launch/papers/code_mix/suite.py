"""The data sets of the suite, and their rows as prompts.

Each benchmark is a `Source` and a function from a row of its public columns to documents: of ranking
"query", "choices" and "gold"; of WinoGrande, whose options stand before what is scored, "contexts",
"suffix" and "gold"; of questions to be answered "query" and "answers". The paper states no prompts: these
have the form that is customary in lm-evaluation-harness, so that scores compare with others.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.evaluation.suites.local_data import Source, WrongDataError
from launch.evaluation.suites.scores import Group, Suite

Row = Mapping[str, Any]
Document = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A data set and how its rows are asked."""

    source: Source
    documents: Callable[[Row], Sequence[Document]]


def _ranked(query: str, choices: Sequence[str], gold: Any) -> list[Document]:
    # Some sets hide the labels of their test splits, as -1 or an empty text.
    if not 0 <= int(gold) < len(choices):
        raise WrongDataError(
            f"label {gold!r} of {query[:60]!r} is none of its {len(choices)} choices"
        )
    return [{"query": query, "choices": list(choices), "gold": int(gold)}]


def boolq(row: Row) -> list[Document]:
    query = f"{row['passage']}\nQuestion: {_asked(row['question'])}\nAnswer:"
    return _ranked(query, ["no", "yes"], row["label"])


def piqa(row: Row) -> list[Document]:
    return _ranked(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def sciq(row: Row) -> list[Document]:
    query = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    wrong = [row[f"distractor{number}"] for number in (1, 2, 3)]
    return _ranked(query, [*wrong, row["correct_answer"]], 3)


def social_iqa(row: Row) -> list[Document]:
    query = f"Q: {row['context']} {row['question']}\nA:"
    return _ranked(query, [row[f"answer{letter}"] for letter in "ABC"], int(row["label"]) - 1)


def quac(row: Row) -> list[Document]:
    """One document for each question of a dialogue, after the questions and answers before it."""
    head = f"Title: {row['wikipedia_page_title']} - {row['section_title']}\n\n{row['context']}\n"
    said = ""
    found = []
    originals = row["orig_answers"]["texts"]
    for question, answers, original in zip(
        row["questions"], row["answers"]["texts"], originals, strict=True
    ):
        said += f"\nQ: {question}\nA:"
        found.append({"query": head + said, "answers": [_quac_answer(text) for text in answers]})
        said += f" {_quac_answer(original)}"
    return found


def _quac_answer(text: str) -> str:
    return "I don't know" if text == "CANNOTANSWER" else text


def cb(row: Row) -> list[Document]:
    query = f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False, or Neither?\nAnswer:"
    return _ranked(query, ["True", "False", "Neither"], row["label"])


def copa(row: Row) -> list[Document]:
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row[name][:1].lower() + row[name][1:] for name in ("choice1", "choice2")]
    return _ranked(f"{row['premise'].strip().removesuffix('.')} {word}", choices, row["label"])


def story_cloze(row: Row) -> list[Document]:
    query = " ".join(row[f"input_sentence_{number}"] for number in (1, 2, 3, 4))
    endings = [row["sentence_quiz1"], row["sentence_quiz2"]]
    return _ranked(query, endings, int(row["answer_right_ending"]) - 1)


def hellaswag(row: Row) -> list[Document]:
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _ranked(
        _without_marks(query), [_without_marks(end) for end in row["endings"]], row["label"]
    )


def _without_marks(text: str) -> str:
    """WikiHow's marks, [title] among them, are no text."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def winogrande(row: Row) -> list[Document]:
    before, _, after = row["sentence"].partition("_")
    contexts = [before + row[name] for name in ("option1", "option2")]
    gold = int(row["answer"] or 0) - 1
    if gold not in (0, 1):
        raise WrongDataError(f"{row['sentence']!r} has no answer: use the validation split")
    return [{"contexts": contexts, "suffix": after.strip(), "gold": gold}]


def arc_easy(row: Row) -> list[Document]:
    choices = row["choices"]
    gold = list(choices["label"]).index(row["answerKey"])
    return _ranked(f"Question: {row['question']}\nAnswer:", choices["text"], gold)


def trivia_qa(row: Row) -> list[Document]:
    answer = row["answer"]
    query = f"Question: {_asked(row['question'])}\nAnswer:"
    return [{"query": query, "answers": [answer["value"], *answer["aliases"]]}]


def nq_open(row: Row) -> list[Document]:
    return [{"query": f"Q: {_asked(row['question'])}\nA:", "answers": list(row["answer"])}]


def _asked(question: str) -> str:
    """With a question mark, which some sets leave out."""
    return question if question.rstrip().endswith("?") else f"{question}?"


def _superglue(name: str, *columns: str) -> Source:
    return Source(
        folder="super_glue",
        configuration=name,
        split="validation",
        columns=(*columns, "label"),
        repository="aps/super_glue",
    )


_STORIES = tuple(f"input_sentence_{number}" for number in (1, 2, 3, 4))
BENCHMARKS = {
    "boolq": Benchmark(_superglue("boolq", "passage", "question"), boolq),
    "piqa": Benchmark(
        Source(
            folder="piqa",
            split="validation",
            columns=("goal", "sol1", "sol2", "label"),
            repository="baber/piqa",
        ),
        piqa,
    ),
    "sciq": Benchmark(
        Source(
            folder="sciq",
            split="test",
            columns=(
                *("support", "question", "correct_answer"),
                *("distractor1", "distractor2", "distractor3"),
            ),
            repository="allenai/sciq",
        ),
        sciq,
    ),
    "social_iqa": Benchmark(
        Source(
            folder="siqa",
            split="validation",
            columns=("context", "question", "answerA", "answerB", "answerC", "label"),
            repository="lighteval/siqa",
        ),
        social_iqa,
    ),
    "quac": Benchmark(
        Source(
            folder="quac",
            split="validation",
            columns=(
                *("wikipedia_page_title", "section_title", "context"),
                *("questions", "answers", "orig_answers"),
            ),
            repository="allenai/quac",
            revision="refs/convert/parquet",
        ),
        quac,
    ),
    "cb": Benchmark(_superglue("cb", "premise", "hypothesis"), cb),
    "copa": Benchmark(_superglue("copa", "premise", "choice1", "choice2", "question"), copa),
    "story_cloze": Benchmark(
        Source(
            folder="story_cloze",
            split="test",
            columns=(*_STORIES, "sentence_quiz1", "sentence_quiz2", "answer_right_ending"),
            how="its authors send the 2016 test set to those who fill in the form at "
            "cs.rochester.edu/nlp/rocstories; save it as test.jsonl with its columns in lower case",
        ),
        story_cloze,
    ),
    "hellaswag": Benchmark(
        Source(
            folder="hellaswag",
            split="validation",
            columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
            repository="Rowan/hellaswag",
        ),
        hellaswag,
    ),
    "winogrande": Benchmark(
        Source(
            folder="winogrande",
            configuration="winogrande_xl",
            split="validation",
            columns=("sentence", "option1", "option2", "answer"),
            repository="allenai/winogrande",
        ),
        winogrande,
    ),
    "arc_easy": Benchmark(
        Source(
            folder="ai2_arc",
            configuration="ARC-Easy",
            split="test",
            columns=("question", "choices", "answerKey"),
            repository="allenai/ai2_arc",
        ),
        arc_easy,
    ),
    "trivia_qa": Benchmark(
        Source(
            folder="trivia_qa",
            configuration="rc.nocontext",
            split="validation",
            columns=("question", "answer"),
            repository="mandarjoshi/trivia_qa",
        ),
        trivia_qa,
    ),
    "nq_open": Benchmark(
        Source(
            folder="nq_open",
            split="validation",
            columns=("question", "answer"),
            repository="google-research-datasets/nq_open",
        ),
        nq_open,
    ),
}

# Benchmarks whose answers are programs, and how to run them.
_RUN = "python -m launch.evaluate code --problems={} --json=FILE, then --code_results=FILE here"
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
