"""Benchmarks in many languages: a set and a task of lm-evaluation-harness for each language.

XCOPA, XWinograd, XStoryCloze (0-shot) and MGSM (5-shot, reasoning in the language, strict match) are the harness's own
tasks over local files. The others are described here: translation to and from English (FLORES-200, 0-shot) because its
prompts are not published, Global-MMLU and INCLUDE (5-shot) because the harness splits them by subject. A group's score is
the unweighted mean over its languages.
"""

import functools
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from espalier.data.languages import table
from espalier.launch.evaluate.suites import local_data, scores
from espalier.launch.evaluate.suites.local_data import Source, WrongDataError
from espalier.launch.evaluate.suites.scores import Group, Suite, Task

Benchmark = tuple[Source, Task]  # the evaluated set, and the task

PARQUET: dict[str, Any] = {"revision": "refs/convert/parquet"}
MGSM = ("de", "en", "es", "fr", "ja", "ru", "zh")
XCOPA = ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")
XWINOGRAD = ("en", "fr", "jp", "pt", "ru", "zh")
XSTORYCLOZE = ("ar", "es", "eu", "hi", "id", "my", "ru", "sw", "te", "zh")
FLORES = tuple(code for code in table.LANGUAGES if code != "en")
GLOBAL_MMLU = tuple(table.LANGUAGES)
INCLUDE = tuple(code for code in table.LANGUAGES if code not in ("cs", "en", "ro"))
SHOTS = 5  # of questions with four options
_LETTERS = "ABCD"
_OPTIONS = " ".join(f"option_{letter.lower()}" for letter in _LETTERS)
_LABELS = {"sensitive": "CS", "agnostic": "CA"}
_FLORES = (
    "curl -L https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz | tar xz -C DATA_DIR"
)


def load(
    *, splits: Mapping[str, Source], data_dir: str | None = None, **others: Any
) -> dict[str, Any]:
    """Returns the rows of a set by split, as the harness takes them.

    Args:
      splits: split of the harness's task -> its files.
      data_dir: see launch/evaluate/suites/local_data.py, also for the errors raised.
      **others: further arguments of the harness, which concern models.
    """
    del others
    import datasets

    return {
        split: datasets.Dataset.from_list([dict(row) for row in local_data.rows(source, data_dir)])
        for split, source in splits.items()
    }


def harness_task(
    name: str, folder: str, metric: str, splits: Mapping[str, Source], **changes: Any
) -> Benchmark:
    """Returns a benchmark of the harness itself; the last of `splits` is evaluated."""
    *examples, evaluated = splits
    settings = {
        "custom_dataset": functools.partial(load, splits=splits),
        "dataset_kwargs": {},
        "training_split": examples[0] if examples else None,
        "validation_split": None,
        "test_split": evaluated,
        **changes,
    }
    sources = tuple(splits[split] for split in examples)
    task = Task(name=name, settings=settings, folder=folder, metric=metric, sources=sources)
    return splits[evaluated], task


def source_of(
    folder: str, repository: str, split: str, columns: str, configuration: str, **more: Any
) -> Source:
    """Returns a set on the hub, with its columns in one text."""
    return Source(
        folder=folder,
        repository=repository,
        split=split,
        columns=tuple(columns.split()),
        configuration=configuration,
        **more,
    )


def mgsm(code: str) -> Benchmark:
    columns = "question answer answer_number"
    sets = {
        split: source_of("mgsm", "juletxara/mgsm", split, columns, code, **PARQUET)
        for split in ("train", "test")
    }
    changes = {"num_fewshot": 5, "fewshot_config": {"sampler": "first_n"}}
    name, metric = f"mgsm_native_cot_{code}", "exact_match,strict-match"
    return harness_task(name, "mgsm/native_cot", metric, sets, **changes)


def xcopa(code: str) -> Benchmark:
    columns = "premise choice1 choice2 question label"
    source = source_of("xcopa", "cambridgeltl/xcopa", "test", columns, code)
    return harness_task(f"xcopa_{code}", "xcopa", "acc", {"test": source})


def xwinograd(code: str) -> Benchmark:
    columns = "sentence option1 option2 answer"
    source = source_of("xwinograd", "Muennighoff/xwinograd", code, columns, "test")
    return harness_task(f"xwinograd_{code}", "xwinograd", "acc", {"test": source})


def xstorycloze(code: str) -> Benchmark:
    sentences = " ".join(f"input_sentence_{number}" for number in (1, 2, 3, 4))
    columns = f"{sentences} sentence_quiz1 sentence_quiz2 answer_right_ending"
    source = source_of("xstory_cloze", "juletxara/xstory_cloze", "eval", columns, code, **PARQUET)
    return harness_task(f"xstorycloze_{code}", "xstorycloze", "acc", {"test": source})


def global_mmlu(code: str, kind: str = "") -> Benchmark:
    """Returns the questions of Global-MMLU in a language.

    Args:
      code: of the language.
      kind: for the labelled questions of a kind alone, sensitive (to culture) or agnostic; most have no label.
    """
    columns = f"question {_OPTIONS} answer subject cultural_sensitivity_label"
    place = ("global_mmlu", "CohereLabs/Global-MMLU")
    only = ("cultural_sensitivity_label", _LABELS[kind]) if kind else None
    return _questions(
        "_".join(filter(None, ("global_mmlu", kind, code))),
        source_of(*place, "test", columns, code, only=only),
        source_of(*place, "dev", columns, code),
        subject="subject",
    )


def include(code: str) -> Benchmark:
    """Returns the questions of INCLUDE in a language, with the harness's instruction in English."""
    columns = f"question {_OPTIONS} answer domain"
    place = ("include", "CohereLabs/include-base-44")
    language = table.LANGUAGES[code].name
    return _questions(
        f"include_{code}",
        source_of(*place, "test", columns, language),
        source_of(*place, "validation", columns, language),
        subject="domain",
        instruction="The following are multiple-choice questions (with answers) about {}.",
    )


def questions(
    *,
    source: Source,
    examples: Source,
    subject: str,
    instruction: str = "",
    data_dir: str | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Returns the task of questions with four options, each after five answered ones.

    Args:
      source: the questions.
      examples: the answered ones. Those of the question's subject come first, in the order of the file.
      subject: column of the subject.
      instruction: before the examples, with {} for the subject.
      data_dir: folder of the files; None for $ESPALIER_EVAL_DATA.
      **others: further arguments of the harness, which concern models.

    Raises:
      WrongDataError: an answer that is no option, or fewer than five examples.
      MissingDataError: see `local_data.rows`.
    """
    del others
    import datasets

    rows, pool = local_data.rows(source, data_dir), local_data.rows(examples, data_dir)
    if len(pool) < SHOTS:
        raise WrongDataError(
            f"{_name(examples)} has {len(pool)} examples, but {SHOTS} are needed: copy it again."
        )
    solved = [(row, f"{_question(row)} {_LETTERS[_answer(row, examples)]}") for row in pool]

    @functools.cache
    def before(name: str) -> str:
        nearest = sorted(solved, key=lambda one: one[0][subject] != name)[:SHOTS]
        return "\n\n".join(
            [*filter(None, [instruction.format(name)]), *(text for _, text in nearest)]
        )

    documents = [
        {"query": f"{before(row[subject])}\n\n{_question(row)}", "answer": _answer(row, source)}
        for row in rows
    ]
    return {"test": datasets.Dataset.from_list(documents)}


def _questions(name: str, source: Source, examples: Source, **settings: Any) -> Benchmark:
    described = {
        "task": name,
        "output_type": "multiple_choice",
        "custom_dataset": functools.partial(
            questions, source=source, examples=examples, **settings
        ),
        "test_split": "test",
        "num_fewshot": 0,  # the examples are in the query
        "doc_to_text": "query",
        "doc_to_choice": list(_LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    return source, Task(name=name, settings=described, metric="acc", sources=(examples,))


def _question(row: Mapping[str, Any]) -> str:
    options = "\n".join(f"{letter}. {row[f'option_{letter.lower()}']}" for letter in _LETTERS)
    return f"{row['question'].strip()}\n{options}\nAnswer:"


def _answer(row: Mapping[str, Any], source: Source) -> int:
    """Returns the number of the right option, which Global-MMLU gives as a letter and INCLUDE as a number.

    The harness would count another answer as an error of the model.
    """
    numbers: dict[Any, int] = {0: 0, 1: 1, 2: 2, 3: 3, **{x: i for i, x in enumerate(_LETTERS)}}
    answer = row["answer"]
    if not isinstance(answer, str | int) or isinstance(answer, bool) or answer not in numbers:
        raise WrongDataError(
            f"{_name(source)}: the answer {reprlib.repr(answer)} of {reprlib.repr(row['question'])} is neither one of "
            f"{', '.join(_LETTERS)} nor a number from 0 to 3. Use the set's public files."
        )
    return numbers[answer]


def _name(source: Source) -> str:
    return f"{source.folder}/{source.configuration}, split {source.split}"


def generated(
    name: str, load_rows: Any, new_tokens: int, metrics: Sequence[Mapping[str, Any]], score: Any
) -> dict[str, Any]:
    """Returns the configuration of a task of one-line greedy answers, scored by `score`."""
    return {
        "task": name,
        "output_type": "generate_until",
        "custom_dataset": load_rows,
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "query",
        "doc_to_target": "answer",
        "process_results": score,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": new_tokens, "do_sample": False},
        "metric_list": list(metrics),
        "metadata": {"version": 1.0},
    }


def flores_source(code: str) -> Source:
    """Returns the devtest sentences of a language, in its usual writing."""
    return Source(
        folder="flores200_dataset",
        configuration="devtest",
        split=table.LANGUAGES[code].flores[0],
        columns=("text",),
        how=_FLORES,
    )


def translations(
    *, source: str, target: str, data_dir: str | None = None, **others: Any
) -> dict[str, Any]:
    """Returns the harness's translation task from one language to another, both by their codes, on files in `data_dir`."""
    del others
    import datasets

    names = [table.LANGUAGES[code].name for code in (source, target)]
    sides = [local_data.rows(flores_source(code), data_dir) for code in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise WrongDataError(
            f"FLORES has {len(sides[0])} sentences in {names[0]} and {len(sides[1])} in {names[1]}: copy it again."
        )
    rows = [
        {
            "query": f"Translate this sentence from {names[0]} into {names[1]}.\n{names[0]}: {one['text']}\n{names[1]}:",
            "answer": other["text"],
        }
        for one, other in zip(*sides, strict=True)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def compared(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Returns the pair of texts that metrics over a corpus take."""
    pair = (doc["answer"], results[0].strip())
    return {"chrf": pair, "spbleu": pair}


def flores(source: str, target: str, metric: str) -> Benchmark:
    """Returns a translation benchmark; `metric` is chrf or spbleu, both of which the task measures."""
    name = f"flores_{source}_{target}"
    metrics = [
        {"metric": key, "aggregation": function, "higher_is_better": True}
        for key, function in (
            ("chrf", scores.chrf_plus_plus),
            ("spbleu", scores.spbleu),
        )
    ]
    rows = functools.partial(translations, source=source, target=target)
    settings = generated(name, rows, 256, metrics, compared)
    task = Task(name=name, settings=settings, metric=metric, sources=(flores_source(target),))
    return flores_source(source), task


def by_language(
    name: str, make: Callable[[str], Benchmark], codes: Iterable[str]
) -> dict[str, Benchmark]:
    """Returns {NAME_CODE: benchmark}."""
    return {f"{name}_{code}": make(code) for code in codes}


def flores_groups(metric: str) -> dict[str, dict[str, Benchmark]]:
    """Returns the groups of translation into and from English, by a metric."""
    return {
        f"flores_into_english_{metric}": {
            f"{metric}_{code}_en": flores(code, "en", metric) for code in FLORES
        },
        f"flores_from_english_{metric}": {
            f"{metric}_en_{code}": flores("en", code, metric) for code in FLORES
        },
    }


def ranking_groups() -> dict[str, dict[str, Benchmark]]:
    """Returns the groups of XCOPA, XWinograd and XStoryCloze, also in languages that the models do not cover."""
    return {
        "xcopa": by_language("xcopa", xcopa, XCOPA),
        "xwinograd": by_language("xwinograd", xwinograd, XWINOGRAD),
        "xstorycloze": by_language("xstorycloze", xstorycloze, XSTORYCLOZE),
    }


class MultilingualSuite(Suite):
    """A suite of benchmarks by language. BLEU over the tokens of FLORES also needs their model."""

    def missing(self, benchmark: str, data_dir: str | None) -> str:
        reason = super().missing(benchmark, data_dir)
        if not reason and self.task(benchmark).metric == "spbleu":
            return scores.spbleu_missing()
        return reason


def suite(name: str, groups: Mapping[str, Mapping[str, Benchmark]]) -> MultilingualSuite:
    """Returns the suite of a paper, from {group: {benchmark: (its set, its task)}}."""
    benchmarks = {key: one for group in groups.values() for key, one in group.items()}
    return MultilingualSuite(
        name=name,
        groups=[
            Group(name=key, benchmarks=tuple(group), of_languages=True)
            for key, group in groups.items()
        ],
        sources={key: source for key, (source, _) in benchmarks.items()},
        described={key: task for key, (_, task) in benchmarks.items()},
        has_total=False,
    )
