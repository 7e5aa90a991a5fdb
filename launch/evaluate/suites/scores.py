"""Scores of a suite of benchmarks: means by group, and their mean; and of generated texts in any script.

A group's score is the unweighted mean of its benchmarks, and the total the unweighted mean of the groups. If a benchmark
is missing, so are the means that contain it, because they would not be comparable. Texts have scores between 0 and 1: chrF++ and
spBLEU of translations, ROUGE-L of summaries.
"""

import dataclasses
import functools
import importlib
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.common import spelling
from espalier.data.languages import identify
from espalier.launch import cli, environment
from espalier.launch.evaluate.suites import local_data
from espalier.launch.evaluate.suites.local_data import Source

_ALONE = frozenset({"Hani", "Hira", "Kana", "Thai"})  # scripts without spaces between words
_WORD = "LMN"  # categories of letters, marks and numbers

Items = Sequence[tuple[str, str]]  # (reference, translation), as lm-evaluation-harness passes them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Benchmarks of one kind, under the names of their tasks.

    A group `of_languages` takes one line in the table where the sets of all its benchmarks are missing.
    """

    name: str
    benchmarks: Sequence[str]
    of_languages: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task of lm-evaluation-harness that measures a benchmark.

    Attributes:
      name: of the task; several benchmarks may be different metrics of one task.
      settings: its configuration; None for a task that files describe.
      folder: of lm_eval/tasks, if it is a task of the harness itself: its files are read, and `settings` are changes.
      metric: the number that is the benchmark's score, with the name of its filter unless that is 'none'.
      sources: further sets that it reads, such as examples of prompts.
    """

    name: str
    settings: Mapping[str, Any] | None = None
    folder: str = ""
    metric: str = "score"
    sources: Sequence[Source] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Groups of benchmarks.

    Attributes:
      name: a folder of launch/papers; lm-evaluation-harness runs a benchmark by the task NAME_BENCHMARK in its folder
        harness_tasks.
      groups: the groups, in the order of the table.
      sources: data sets of the benchmarks that lm-evaluation-harness runs.
      programs: instructions for measuring the benchmarks of code.
      described: tasks of benchmarks that are not described by a file in harness_tasks.
      has_total: whether the mean of the groups means something.
    """

    name: str
    groups: Sequence[Group]
    sources: Mapping[str, Source]
    programs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    described: Mapping[str, Task] = dataclasses.field(default_factory=dict)
    has_total: bool = True

    @property
    def tasks(self) -> str:
        """Returns the folder of the task files."""
        return os.path.join(environment.ROOT, "launch", "papers", self.name, "harness_tasks")

    def task(self, benchmark: str) -> Task:
        """Returns the task of a benchmark."""
        return self.described.get(benchmark) or Task(name=f"{self.name}_{benchmark}")

    def missing(self, benchmark: str, data_dir: str | None) -> str:
        """Returns why a benchmark cannot be evaluated and what to do; empty if its sets are there."""
        if benchmark in self.programs:
            return self.programs[benchmark]
        try:
            for source in (self.sources[benchmark], *self.task(benchmark).sources):
                # Only the rows show whether files of several languages or kinds have the right ones.
                (local_data.rows if source.only else local_data.find)(source, data_dir)
        except local_data.MissingDataError as error:
            return str(error)
        return ""

    def only(self, groups: Sequence[str] | None) -> "Suite":
        """Returns the suite of some of the groups, or of all for None; raises ValueError for an unknown one."""
        if groups is None:
            return self
        known = [group.name for group in self.groups]
        for name in groups:
            if name not in known:
                raise ValueError(
                    f"the suite {self.name} has no group {name!r}; {spelling.nearest(name, known)}"
                )
        return dataclasses.replace(self, groups=[g for g in self.groups if g.name in groups])

    @property
    def benchmarks(self) -> list[str]:
        """Returns all benchmarks, group by group."""
        return [benchmark for group in self.groups for benchmark in group.benchmarks]


def names() -> list[str]:
    """Returns the names of the papers that have a suite."""
    return [paper for paper, _ in cli.papers_with(r"^SUITE\b")]


def find(name: str) -> Suite:
    """Returns the suite of a paper: SUITE in launch/papers/NAME/suite.py."""
    return importlib.import_module(f"espalier.launch.papers.{name}.suite").SUITE


def means(
    suite: Suite, scores: Mapping[str, float]
) -> tuple[dict[str, float | None], float | None]:
    """Returns (score by group, total) from scores by benchmark; None for a mean with a missing benchmark."""
    groups = {
        group.name: mean([scores.get(benchmark) for benchmark in group.benchmarks])
        for group in suite.groups
    }
    return groups, mean(list(groups.values())) if suite.has_total else None


def mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean, or None if a value is missing."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None


def table(
    suite: Suite, scores: Mapping[str, float], details: Mapping[str, str]
) -> Iterator[tuple[str, str, str, str]]:
    """Yields rows (group, benchmark, score in %, detail), then the means; a missing value is a dash.

    `scores` and `details` are by benchmark; a detail is the number of examples or how to get a missing set.
    """
    groups, total = means(suite, scores)
    for group in suite.groups:
        if group.of_languages and not any(one in scores for one in group.benchmarks):
            first = group.benchmarks[0]
            yield group.name, f"{first} ...", "-", details.get(first, "")
            continue
        for benchmark in group.benchmarks:
            detail = details.get(benchmark, "")
            yield group.name, benchmark, percent(scores.get(benchmark)), detail
        num_scores = sum(benchmark in scores for benchmark in group.benchmarks)
        of = f"{num_scores} of {len(group.benchmarks)} benchmarks"
        yield group.name, "mean", percent(groups[group.name]), of
    if suite.has_total:
        yield "total", "mean of groups", percent(total), ""


def percent(score: float | None) -> str:
    """Returns a score in % with one decimal, as in the paper."""
    return "-" if score is None else f"{100 * score:.1f}"


def chrf_plus_plus(items: Items) -> float:
    """Returns chrF++ of a corpus by sacrebleu: characters up to 6 and words up to 2, beta 2."""
    from sacrebleu.metrics.chrf import CHRF

    references, translations = zip(*items, strict=True)
    return CHRF(word_order=2).corpus_score(list(translations), [list(references)]).score / 100


def spbleu(items: Items) -> float:
    """Returns BLEU of a corpus by sacrebleu, over the SentencePiece tokens of FLORES-200.

    It is NaN if their model is not on this machine (`spbleu_missing`).
    """
    if spbleu_missing():
        return float("nan")
    from sacrebleu.metrics.bleu import BLEU

    references, translations = zip(*items, strict=True)
    metric = BLEU(tokenize="flores200")
    return metric.corpus_score(list(translations), [list(references)]).score / 100


def spbleu_missing() -> str:
    """Returns where sacrebleu needs the SentencePiece model of FLORES-200 and how to get it; empty if it is there."""
    from sacrebleu.tokenizers import tokenizer_spm
    from sacrebleu.utils import SACREBLEU_DIR

    url = tokenizer_spm.SPM_MODELS["flores200"]["url"]
    path = os.path.join(SACREBLEU_DIR, "models", os.path.basename(url))
    if os.path.isfile(path):
        return ""
    return f"{path} does not exist: curl -L {url} -o {path}"


def rouge_l(text: str, reference: str) -> float:
    """Returns the F measure of ROUGE-L by the package rouge_score over `words`; its own tokens are only a-z and 0-9."""
    return float(_scorer().score(reference, text)["rougeL"].fmeasure)


@functools.cache
def _scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return words(text)


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case: runs of letters, marks and numbers.

    In scripts without spaces between words, every letter is one.
    """
    out: list[str] = []
    # Whether a letter comes right before, and whether a word may go on after it.
    touches = goes_on = False
    for letter in unicodedata.normalize("NFC", text).lower():
        kind = unicodedata.category(letter)[0]
        if kind not in _WORD:
            touches = goes_on = False
            continue
        if kind == "M" and touches:
            out[-1] += letter
            continue
        alone = identify.script_of(letter) in _ALONE
        if goes_on and not alone:
            out[-1] += letter
        else:
            out.append(letter)
        touches, goes_on = True, not alone
    return out
