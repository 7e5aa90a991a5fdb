"""The evaluation suite of Aya 23 by language: sets, tasks and scores.

Besides the benchmarks of launch/evaluate/suites/multilingual.py, multilingual MMLU (5-shot) and TyDi QA (gold passage,
word F1; of Aya 101's suite) are lm-evaluation-harness's own tasks over local files. XLSum is described here, for its
prompts are not published.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.data.languages import table
from espalier.launch.evaluate.suites import local_data, multilingual, scores
from espalier.launch.evaluate.suites.local_data import Source
from espalier.launch.evaluate.suites.multilingual import Benchmark
from espalier.launch.evaluate.suites.scores import Task

MMLU = ("ar", "de", "es", "fr", "hi", "id", "it", "nl", "pt", "ro", "ru", "uk", "vi", "zh")
TYDIQA = {  # the names that its rows have
    **{"ar": "arabic", "bn": "bengali", "en": "english", "fi": "finnish", "id": "indonesian"},
    **{"ko": "korean", "ru": "russian", "sw": "swahili", "te": "telugu"},
}
XLSUM = {
    **{"ar": "arabic", "zh": "chinese_simplified", "en": "english", "fr": "french", "hi": "hindi"},
    **{"id": "indonesian", "ja": "japanese", "ko": "korean", "fa": "persian", "pt": "portuguese"},
    **{"ru": "russian", "es": "spanish", "tr": "turkish", "uk": "ukrainian", "vi": "vietnamese"},
}


def _mmlu(code: str) -> Benchmark:
    columns = "instruction option_a option_b option_c option_d answer"
    repository = "alexandrainst/m_mmlu"
    sets = {
        split: multilingual.source_of(
            "m_mmlu", repository, split, columns, code, **multilingual.PARQUET
        )
        for split in ("train", "test")
    }
    return multilingual.harness_task(
        f"m_mmlu_{code}", "okapi/mmlu_multilingual", "acc", sets, num_fewshot=5
    )


def _tydiqa(code: str) -> Benchmark:
    source = multilingual.source_of(
        "tydiqa",
        "google-research-datasets/tydiqa",
        "validation",
        "id title context question answers",
        "secondary_task",
        only=("id", f"{TYDIQA[code]}-"),  # all languages are in one file
    )
    changes = {"fewshot_split": None}
    return multilingual.harness_task(
        f"tydiqa_goldp_{code}", "tydiqa", "f1", {"test": source}, **changes
    )


def summaries(*, code: str, data_dir: str | None = None, **others: Any) -> dict[str, Any]:
    """Returns the harness's summarisation task of a language by its code, on files in `data_dir`."""
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
    return {"score": scores.rouge_l(results[0], doc["answer"])}


def _xlsum_source(code: str) -> Source:
    return multilingual.source_of(
        *("xlsum", "csebuetnlp/xlsum", "test", "text summary", XLSUM[code]), **multilingual.PARQUET
    )


def _xlsum(code: str) -> Benchmark:
    name = f"aya23_xlsum_{code}"
    metrics = [{"metric": "score", "aggregation": "mean", "higher_is_better": True}]
    rows = functools.partial(summaries, code=code)
    settings = multilingual.generated(name, rows, 128, metrics, overlap)
    return _xlsum_source(code), Task(name=name, settings=settings)


SUITE = multilingual.suite(
    "aya23",
    {
        **multilingual.ranking_groups(),
        "mmlu": multilingual.by_language("mmlu", _mmlu, MMLU),
        "mgsm": multilingual.by_language("mgsm", multilingual.mgsm, multilingual.MGSM),
        "tydiqa": multilingual.by_language("tydiqa", _tydiqa, TYDIQA),
        "xlsum": multilingual.by_language("xlsum", _xlsum, XLSUM),
        **multilingual.flores_groups("chrf"),
        **multilingual.flores_groups("spbleu"),
    },
)
