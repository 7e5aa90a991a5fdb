"""The evaluation suite of Aya 23 by language: sets, tasks and scores.

Ranking (XCOPA, XWinograd, XStoryCloze, 0-shot), multilingual MMLU (5-shot), MGSM (5-shot, reasoning in the language,
strict match) and TyDi QA (gold passage, word F1; of Aya 101's suite) are lm-evaluation-harness's own tasks over local
files. Translation to and from English (FLORES-200, 0-shot) and XLSum are described here, for their prompts are not
published. A group's score is the unweighted mean over its languages.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from data.languages import table
from launch.evaluation.suites import local_data, text_scores
from launch.evaluation.suites.local_data import Source
from launch.evaluation.suites.scores import Group, Suite, Task

_PARQUET: dict[str, Any] = {"revision": "refs/convert/parquet"}
MMLU = ("ar", "de", "es", "fr", "hi", "id", "it", "nl", "pt", "ro", "ru", "uk", "vi", "zh")
MGSM = ("de", "en", "es", "fr", "ja", "ru", "zh")
XCOPA = ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")
XWINOGRAD = ("en", "fr", "jp", "pt", "ru", "zh")
XSTORYCLOZE = ("ar", "es", "eu", "hi", "id", "my", "ru", "sw", "te", "zh")
TYDIQA = {  # the names that its rows have
    **{"ar": "arabic", "bn": "bengali", "en": "english", "fi": "finnish", "id": "indonesian"},
    **{"ko": "korean", "ru": "russian", "sw": "swahili", "te": "telugu"},
}
FLORES = tuple(code for code in table.LANGUAGES if code != "en")
XLSUM = {
    **{"ar": "arabic", "zh": "chinese_simplified", "en": "english", "fr": "french", "hi": "hindi"},
    **{"id": "indonesian", "ja": "japanese", "ko": "korean", "fa": "persian", "pt": "portuguese"},
    **{"ru": "russian", "es": "spanish", "tr": "turkish", "uk": "ukrainian", "vi": "vietnamese"},
}
_FLORES = (
    "curl -L https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz | tar xz -C DATA_DIR"
)
Documents = dict[str, list[Mapping[str, Any]]]  # split -> rows


def load(
    *, splits: Mapping[str, Source], data_dir: str | None = None, **others: Any
) -> dict[str, Any]:
    """Returns the rows of a set by split, as the harness takes them.

    Args:
      splits: split of the harness's task -> its files.
      data_dir: see launch/evaluation/suites/local_data.py, also for the errors raised.
      **others: further arguments of the harness, which concern models.
    """
    del others
    import datasets

    return {
        split: datasets.Dataset.from_list([dict(row) for row in local_data.rows(source, data_dir)])
        for split, source in splits.items()
    }


def _harness_task(
    name: str, folder: str, metric: str, splits: Mapping[str, Source], **changes: Any
) -> tuple[Source, Task]:
    """Returns the evaluated set and the task of a benchmark of the harness itself; the last of `splits` is evaluated."""
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


def _parquet(folder: str, repository: str, split: str, columns: str, configuration: str) -> Source:
    return Source(
        folder=folder,
        repository=repository,
        split=split,
        columns=tuple(columns.split()),
        configuration=configuration,
        **_PARQUET,
    )


def _mmlu(code: str) -> tuple[Source, Task]:
    columns = "instruction option_a option_b option_c option_d answer"
    sets = {
        split: _parquet("m_mmlu", "alexandrainst/m_mmlu", split, columns, code)
        for split in ("train", "test")
    }
    return _harness_task(f"m_mmlu_{code}", "okapi/mmlu_multilingual", "acc", sets, num_fewshot=5)


def _mgsm(code: str) -> tuple[Source, Task]:
    sets = {
        split: _parquet("mgsm", "juletxara/mgsm", split, "question answer answer_number", code)
        for split in ("train", "test")
    }
    changes = {"num_fewshot": 5, "fewshot_config": {"sampler": "first_n"}}
    name, metric = f"mgsm_native_cot_{code}", "exact_match,strict-match"
    return _harness_task(name, "mgsm/native_cot", metric, sets, **changes)


def _xcopa(code: str) -> tuple[Source, Task]:
    columns = ("premise", "choice1", "choice2", "question", "label")
    source = Source(
        folder="xcopa",
        repository="cambridgeltl/xcopa",
        split="test",
        columns=columns,
        configuration=code,
    )
    return _harness_task(f"xcopa_{code}", "xcopa", "acc", {"test": source})


def _xwinograd(code: str) -> tuple[Source, Task]:
    source = Source(
        folder="xwinograd",
        repository="Muennighoff/xwinograd",
        split=code,
        columns=("sentence", "option1", "option2", "answer"),
        configuration="test",
    )
    return _harness_task(f"xwinograd_{code}", "xwinograd", "acc", {"test": source})


def _xstorycloze(code: str) -> tuple[Source, Task]:
    sentences = " ".join(f"input_sentence_{number}" for number in (1, 2, 3, 4))
    columns = f"{sentences} sentence_quiz1 sentence_quiz2 answer_right_ending"
    source = _parquet("xstory_cloze", "juletxara/xstory_cloze", "eval", columns, code)
    return _harness_task(f"xstorycloze_{code}", "xstorycloze", "acc", {"test": source})


def _tydiqa(code: str) -> tuple[Source, Task]:
    source = Source(
        folder="tydiqa",
        repository="google-research-datasets/tydiqa",
        split="validation",
        columns=("id", "title", "context", "question", "answers"),
        configuration="secondary_task",
    )
    changes = {"fewshot_split": None}
    return _harness_task(f"tydiqa_goldp_{code}", "tydiqa", "f1", {"test": source}, **changes)


def _generated(
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
    """Returns the translation task of two languages by their codes; other arguments as of `load`."""
    del others
    import datasets

    names = [table.LANGUAGES[code].name for code in (source, target)]
    sides = [local_data.rows(flores_source(code), data_dir) for code in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise local_data.WrongDataError(
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


def _flores(source: str, target: str, metric: str) -> tuple[Source, Task]:
    name = f"aya23_flores_{source}_{target}"
    metrics = [
        {"metric": key, "aggregation": function, "higher_is_better": True}
        for key, function in (
            ("chrf", text_scores.chrf_plus_plus),
            ("spbleu", text_scores.spbleu),
        )
    ]
    rows = functools.partial(translations, source=source, target=target)
    settings = _generated(name, rows, 256, metrics, compared)
    task = Task(name=name, settings=settings, metric=metric, sources=(flores_source(target),))
    return flores_source(source), task


def summaries(*, code: str, data_dir: str | None = None, **others: Any) -> dict[str, Any]:
    """Returns the summarisation task of a language; other arguments as of `load`."""
    del others
    import datasets

    name = table.LANGUAGES[code].name
    rows = [
        {
            "query": f"{row['text']}\n\nSummarise the text above in one or two sentences in {name}:",
            "answer": row["summary"],
        }
        for row in local_data.rows(_xlsum_source(code), data_dir)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def overlap(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns ROUGE-L of a summary."""
    return {"score": text_scores.rouge_l(results[0], doc["answer"])}


def _xlsum_source(code: str) -> Source:
    return _parquet("xlsum", "csebuetnlp/xlsum", "test", "text summary", XLSUM[code])


def _xlsum(code: str) -> tuple[Source, Task]:
    name = f"aya23_xlsum_{code}"
    metrics = [{"metric": "score", "aggregation": "mean", "higher_is_better": True}]
    rows = functools.partial(summaries, code=code)
    task = Task(name=name, settings=_generated(name, rows, 128, metrics, overlap))
    return _xlsum_source(code), task


def _benchmarks() -> dict[str, dict[str, tuple[Source, Task]]]:
    """Returns {group: {benchmark: (its set, its task)}}."""
    groups = {
        "xcopa": {f"xcopa_{code}": _xcopa(code) for code in XCOPA},
        "xwinograd": {f"xwinograd_{code}": _xwinograd(code) for code in XWINOGRAD},
        "xstorycloze": {f"xstorycloze_{code}": _xstorycloze(code) for code in XSTORYCLOZE},
        "mmlu": {f"mmlu_{code}": _mmlu(code) for code in MMLU},
        "mgsm": {f"mgsm_{code}": _mgsm(code) for code in MGSM},
        "tydiqa": {f"tydiqa_{code}": _tydiqa(code) for code in TYDIQA},
        "xlsum": {f"xlsum_{code}": _xlsum(code) for code in XLSUM},
    }
    for metric in ("chrf", "spbleu"):
        groups[f"flores_into_english_{metric}"] = {
            f"{metric}_{code}_en": _flores(code, "en", metric) for code in FLORES
        }
        groups[f"flores_from_english_{metric}"] = {
            f"{metric}_en_{code}": _flores("en", code, metric) for code in FLORES
        }
    return groups


_GROUPS = _benchmarks()
_ALL = {name: one for group in _GROUPS.values() for name, one in group.items()}


class MultilingualSuite(Suite):
    """The suite. BLEU over the tokens of FLORES also needs their model, and TyDi QA has all languages in one file."""

    def missing(self, benchmark: str, data_dir: str | None) -> str:
        reason = super().missing(benchmark, data_dir)
        kind, _, code = benchmark.partition("_")
        if not reason and kind == "spbleu":
            return text_scores.spbleu_missing()
        if not reason and kind == "tydiqa":
            rows = local_data.rows(self.sources[benchmark], data_dir)
            if not any(row["id"].startswith(f"{TYDIQA[code]}-") for row in rows):
                return f"the set has no row in {TYDIQA[code]}"
        return reason


SUITE = MultilingualSuite(
    name="aya23",
    groups=[
        Group(name=name, benchmarks=tuple(group), of_languages=True)
        for name, group in _GROUPS.items()
    ],
    sources={name: source for name, (source, _) in _ALL.items()},
    described={name: task for name, (_, task) in _ALL.items()},
    has_total=False,
)
