"""The 16 English LongBench tasks of the paper (LongBench: Bai et al., arXiv 2308.14508): files, prompts and scores.

A task is a JSON Lines file TASK.jsonl of the benchmark's data archive in DATA_DIR/longbench, with the columns context,
input, answers and, for trec, all_classes. Its prompt is LongBench's own; the text of a chat template is not added.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from espalier.launch.evaluate.suites.local_data import Source
from espalier.launch.evaluate.suites.scores import Group, Suite


class Task(NamedTuple):
    """A task.

    Attributes:
      score: name of a function of harness_tasks/scores.py.
      new_tokens: most tokens of an answer.
      prompt: with {context} and {input}.
      first_line: whether only the first line of an answer counts, as for tasks with examples in their prompts.
    """

    score: str
    new_tokens: int
    prompt: str
    first_line: bool = False


_STORY = "Answer the question asconcisely as you can, using a single phrase if possible. Do not provide any explanation."
_ARTICLE = (
    "Answer the question{} as concisely as you can, using a single phrase or sentence if possible. If the question cannot "
    'be answered based on the information in the article, write "unanswerable". If the question is a yes/no question, '
    'answer "yes", "no", or "unanswerable". Do not provide any explanation.'
)
_PASSAGES = "Only give me the answer and do not output any other words."
_OF_PASSAGES = (
    f"Answer the question based on the given passages. {_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n"
    f"Answer the question based on the given passages. {_PASSAGES}\n\nQuestion: {{input}}\nAnswer:"
)

TASKS: Mapping[str, Task] = {
    "narrativeqa": Task(
        "f1",
        128,
        f"You are given a story, which can be either a novel or a movie script, and a question. {_STORY}\n\nStory: "
        "{context}\n\nNow, "
        + _STORY.replace("Answer the question", "answer the question based on the story")
        + "\n\n"
        "Question: {input}\n\nAnswer:",
    ),
    "qasper": Task(
        "f1",
        128,
        "You are given a scientific article and a question. "
        + _ARTICLE.format("")
        + "\n\nArticle: {context}\n\n "
        + _ARTICLE.format(" based on the above article")
        + "\n\nQuestion: {input}\n\nAnswer:",
    ),
    "multifieldqa_en": Task(
        "f1",
        64,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    ),
    "hotpotqa": Task("f1", 32, _OF_PASSAGES),
    "2wikimqa": Task("f1", 32, _OF_PASSAGES),
    "musique": Task("f1", 32, _OF_PASSAGES),
    "gov_report": Task(
        "rouge_l",
        512,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n"
        "Now, write a one-page summary of the report.\n\nSummary:",
    ),
    "qmsum": Task(
        "rouge_l",
        512,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
        "more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one "
        "or more sentences.\n\nQuery: {input}\nAnswer:",
    ),
    "multi_news": Task(
        "rouge_l",
        512,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write a "
        "one-page summary of all the news.\n\nSummary:",
    ),
    "trec": Task(
        "classification",
        64,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        first_line=True,
    ),
    "triviaqa": Task(
        "f1",
        32,
        f"Answer the question based on the given passage. {_PASSAGES} The following are some examples.\n\n"
        "{context}\n\n{input}",
        first_line=True,
    ),
    "samsum": Task(
        "rouge_l",
        128,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        first_line=True,
    ),
    "passage_count": Task(
        "count",
        32,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, "
        "how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique "
        "paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so "
        "on.\n\nThe final answer is: ",
    ),
    "passage_retrieval_en": Task(
        "retrieval",
        32,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is "
        "from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that "
        'the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
    ),
    "lcc": Task(
        "code_similarity",
        64,
        "Please complete the code given below. \n{context}Next line of code:\n",
    ),
    "repobench-p": Task(
        "code_similarity",
        64,
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
    ),
}


def query(task: str, row: Mapping[str, Any]) -> str:
    """Returns the prompt of a row."""
    # Not by `format`, since contexts may have braces.
    parts = TASKS[task].prompt.split("{context}")
    before, after = parts[0], parts[1]
    return before + row["context"] + after.replace("{input}", row["input"])


def source(task: str) -> Source:
    columns = ("context", "input", "answers", *(("all_classes",) if task == "trec" else ()))
    return Source(
        folder="longbench",
        split=f"{task}.jsonl",
        columns=columns,
        how="unpack data.zip of huggingface.co/datasets/THUDM/LongBench, so that its files lie in this folder",
    )


SUITE = Suite(
    name="snapkv",
    groups=[Group(name="longbench", benchmarks=tuple(TASKS))],  # the paper's mean is over tasks
    sources={task: source(task) for task in TASKS},
    programs={},
)
