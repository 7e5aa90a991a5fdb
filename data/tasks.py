"""The table of tasks and mixtures, registered by plain functions that gin binds.

Every task of texts yields `targets` (token ids, with BOS and EOS where the task adds them),
`targets_pretokenized` (their text) and `document_id`. A mixture's rates are shares of bytes of
text, which are roughly proportional to tokens. SeqIO's own iterator treats rates as shares of
examples. Users may register tasks and mixtures with SeqIO too: then all names are in one space, and SeqIO has the tasks of
this table (`in_seqio`).
"""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.common import spelling
from espalier.data import seqio_tasks
from espalier.data.task import Feature, Task
from espalier.data.text.row_files import bad_rows_text
from espalier.data.tokenizers.vocabulary import PassThroughVocabulary

_NAME = re.compile(r"[\w.:#]+")  # SeqIO's rule
# Tasks, mixtures and corpora registered by this module: name -> facts recorded with a run, and the 'task'.
_TASKS: dict[str, dict[str, Any]] = {}
_MIXTURES: dict[str, dict[str, Any]] = {}
_CORPORA: dict[str, dict[str, Any]] = {}


class Tally(dict[str, dict[str, Any]]):
    """Counts of events during reading: reason -> {'rows': number of rows, 'first': place of the first one}."""

    def add(self, reason: str, where: str) -> None:
        self.setdefault(reason, {"rows": 0, "first": where})["rows"] += 1

    def merge(self, later: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds the counts of what is read after this."""
        for reason, counts in later.items():
            self.setdefault(reason, {**counts, "rows": 0})["rows"] += counts["rows"]

    def __str__(self) -> str:
        return ", ".join(
            f"{x['rows']:,} {reason} (first: {x['first']})" for reason, x in self.items()
        )


def __getattr__(name: str) -> Any:
    """Returns `register_corpus`, which gin files name here: who only reads tasks need not import what builds a corpus."""
    if name != "register_corpus":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("espalier.data.text.user_data").register_corpus


def __dir__() -> list[str]:
    return sorted([*globals(), "register_corpus"])


def register_source(
    name: str, source: Any, *, origin: str, vocabulary: Any, add_bos: bool, add_eos: bool
) -> None:
    """Registers a task that tokenizes a source of `{"text", "document_id"}`.

    `register_rows` describes `source` and `origin`.

    Raises:
      ValueError: another task has this name, or the vocabulary lacks the BOS or EOS to be added.
    """
    check_special_ids(name, vocabulary, add_bos=add_bos, add_eos=add_eos)
    features = {"targets": Feature(vocabulary, add_eos)}
    _register(
        Task(name, source, features, tokenises=True, add_bos=add_bos),
        origin,
        {"vocabulary": str(vocabulary), "add_bos": add_bos, "add_eos": add_eos},
    )


def check_special_ids(name: str, vocabulary: Any, *, add_bos: bool, add_eos: bool) -> None:
    """Raises ValueError if a task adds a BOS or EOS that its vocabulary does not have."""
    for token, added in (("bos", add_bos), ("eos", add_eos)):
        if added and getattr(vocabulary, f"{token}_id") in (None, -1):
            raise ValueError(
                f"task {name!r}: add_{token}=True, but {vocabulary} has no {token.upper()}; set "
                f"add_{token}=False or use a vocabulary that has one"
            )


def register_rows(
    source: Any,
    *,
    origin: str,
    features: Mapping[str, Any],
    facts: Mapping[str, Any],
    **task: Any,
) -> None:
    """Registers a task over a source whose features need no preprocessing.

    Args:
      source: one of `data.data_source`, with a `digest` and the `name` of the task.
      origin: name of the registering function; a later call of the same function replaces the task.
      features: feature -> vocabulary of its ids; None for a float32 feature.
      facts: recorded with a run.
      **task: what SeqIO evaluates the task by: `postprocess_fn` and `metric_fns` of `seqio.Task`.

    Raises:
      ValueError: another task has this name.
    """
    numbers = Feature(PassThroughVocabulary(1), dtype="float32")
    output_features = {
        feature: numbers if vocabulary is None else Feature(vocabulary)
        for feature, vocabulary in features.items()
    }
    _register(Task(source.name, source, output_features, evaluation=task), origin, facts)


def _register(task: Task, origin: str, facts: Mapping[str, Any]) -> None:
    if not _NAME.fullmatch(task.name):
        raise ValueError(
            f"the name {task.name!r} of a task has other characters than letters, digits and _ . : #; choose another"
        )
    _make_room(task.name, _TASKS, origin)
    _TASKS[task.name] = {"task": task, "source": task.source, "origin": origin, **facts}
    _tell_seqio()


def _tell_seqio() -> None:
    if seqio_tasks.loaded():  # whoever imported it may ask it for any task
        in_seqio()


def in_seqio() -> Any:
    """Returns SeqIO, imported, with all tasks and mixtures of this table."""
    mixtures = {name: facts["rates"] for name, facts in _MIXTURES.items()}
    return seqio_tasks.hand_over([facts["task"] for facts in _TASKS.values()], mixtures)


def register_generated(
    generated: Sequence[Any],
    *,
    mixture: str,
    symbols: str,
    origin: str,
    vocabulary: Any,
    add_eos: bool,
) -> None:
    """Registers a task for each `data.data_source.GeneratedSource`, and their mixture with equal rates.

    Raises:
      ValueError: the vocabulary lacks one of `symbols`, the characters of the documents.
    """
    check_symbols(vocabulary, symbols)
    for source in generated:
        register_source(
            source.name,
            source,
            origin=origin,
            vocabulary=vocabulary,
            add_bos=False,
            add_eos=add_eos,
        )
    register_mixture(mixture, dict.fromkeys((source.name for source in generated), 1.0))


def check_symbols(vocabulary: Any, symbols: str) -> None:
    """Raises ValueError if a vocabulary lacks one of the characters of generated documents."""
    if missing := [s for s in symbols if vocabulary.unk_id in vocabulary.encode(s)]:
        raise ValueError(
            f"{vocabulary} lacks {''.join(missing)!r}, characters of the generated documents: set "
            f"vocabularies.characters.symbols = {symbols!r}."
        )


def register_mixture(name: str, rates: Mapping[str, float]) -> None:
    """Registers a mixture of tasks and mixtures by their rates; replaces one of an earlier call.

    Raises:
      ValueError: another task or mixture has this name, or a member is not registered.
    """
    for member in rates:
        if member not in names():
            raise ValueError(
                f"mixture {name!r}: no task or mixture {member!r}; {spelling.nearest(member, sorted(names()))}"
            )
    _make_room(name, _MIXTURES, "register_mixture")
    found = {member: float(rate) for member, rate in rates.items()}
    _MIXTURES[name] = {"rates": found, "origin": "register_mixture"}
    features = {task: tuple(find(task).output_features) for task in members(name)}
    if len(set(features.values())) != 1:
        del _MIXTURES[name]
        raise ValueError(
            f"mixture {name!r} contains tasks with different output features: {features}"
        )
    _tell_seqio()


def _make_room(name: str, own: dict[str, dict[str, Any]], origin: str) -> None:
    """Removes a registration of the same origin; raises ValueError if another one has the name."""
    if name in own and own[name]["origin"] == origin:
        own.pop(name)
        seqio_tasks.forget(name)
    if name in names():
        raise ValueError(
            f"the name {name!r} is taken by a task or mixture registered elsewhere; choose another"
        )


def names() -> set[str]:
    """Returns the names of all tasks and mixtures, SeqIO's included."""
    return {*_TASKS, *_MIXTURES} | seqio_tasks.names()


def find(name: str) -> Task | seqio_tasks.SeqioTask:
    """Returns the task of a name: of this table, or one that others have registered with SeqIO."""
    return _TASKS[name]["task"] if name in _TASKS else seqio_tasks.find(name)


def members(name: str) -> dict[str, float]:
    """Returns {task: rate} of a mixture, in the order of names, or of one task; the rates are SeqIO's.

    Raises:
      ValueError: no such task or mixture is registered.
    """
    return _members(name)[0]


def _members(name: str) -> tuple[dict[str, float], float]:
    """Returns the rates of a mixture's tasks, and the sum of the rates of its members."""
    if name in _TASKS:
        return {name: 1.0}, 1.0
    if name not in _MIXTURES:
        if name not in seqio_tasks.names():
            raise ValueError(
                f"No mixture or task is called {name!r}; {spelling.nearest(name, sorted(names()))} "
                "(mixtures and tasks of SeqIO are registered by importing the module that defines them)."
            )
        return seqio_tasks.rates(name) or ({name: 1.0}, 1.0)
    given = _MIXTURES[name]["rates"]
    rates: dict[str, float] = {}
    for mixed in (True, False):  # in SeqIO's order, because sums of floats depend on it
        for member, rate in given.items():
            inner, total = _members(member)
            if (member not in inner) == mixed:
                for task, its_rate in inner.items():
                    share = rate * its_rate / total if mixed else rate
                    rates[task] = rates.get(task, 0.0) + share
    return dict(sorted(rates.items())), sum(given.values())


def clear() -> None:
    """Removes every task and mixture that this module registered; for notebooks and tests."""
    for own in (_MIXTURES, _TASKS):
        for name in own:
            seqio_tasks.forget(name)
        own.clear()
    _CORPORA.clear()


def sources() -> dict[str, Any]:
    """Returns {task: data source} of the tasks that this module registered."""
    return {name: facts["source"] for name, facts in _TASKS.items()}


def record_corpus(digest: str, facts: Mapping[str, Any]) -> None:
    """Adds a corpus whose sources are tasks to the facts that are recorded with a run."""
    _CORPORA[digest] = dict(facts)


def registered(origin: str) -> dict[str, dict[str, Any]]:
    """Returns {task: its source and facts} of the tasks that a function registered."""
    return {name: facts for name, facts in _TASKS.items() if facts["origin"] == origin}


def vocabulary(task_name: str) -> Any:
    """Returns the vocabulary of a task's feature 'targets', else 'chosen', else 'prompt'."""
    features = find(task_name).output_features
    feature = next(name for name in ("targets", "chosen", "prompt") if name in features)
    return features[feature].vocabulary


def vocabulary_digest() -> dict[str, str]:
    """Returns {'vocabulary': digest} of the registered tasks, without reading their data.

    Returns {} if their vocabularies differ, or if no task is registered.
    """
    from espalier.data.stream import rows

    digests = {rows.vocabulary_digest(vocabulary(name)) for name in _TASKS}
    return {"vocabulary": digests.pop()} if len(digests) == 1 else {}


def add_bos(task_names: Sequence[str]) -> bool:
    """Returns whether the texts of all these tasks begin with BOS."""
    return all(_TASKS.get(name, {}).get("add_bos", False) for name in task_names)


def chat_template(task_name: str) -> Any:
    """Returns the chat template by which a task renders messages, or None."""
    tokeniser = getattr(_TASKS.get(task_name, {}).get("source"), "tokeniser", None)
    return getattr(tokeniser, "template", None)


def open_cached(name: str) -> None:
    """Notes that a task is read from its cache alone: its source, which may be gone, has no part in `summary`."""
    if name in _TASKS:
        _TASKS[name]["use_cached"] = True


def summary() -> dict[str, Any]:
    """Returns the facts recorded with a run: tasks with sizes and hashes, mixtures, and corpora."""
    tasks = {}
    for name, facts in _TASKS.items():
        source = facts["source"]
        if facts.get("use_cached"):
            tasks[name] = {k: v for k, v in facts.items() if k not in ("task", "source")}
            continue
        tasks[name] = {
            "digest": source.digest,
            "documents": {split: source.num_input_examples(split) for split in source.splits},
            **{
                key: counts
                for key in ("dropped", "noted", "bad_rows")
                if (counts := getattr(source, key, None))
            },
            **{key: value for key, value in facts.items() if key not in ("task", "source")},
        }
    mixtures = {name: facts["rates"] for name, facts in _MIXTURES.items()}
    return {"tasks": tasks, "mixtures": mixtures, "corpora": dict(_CORPORA)}


def notices(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, text) of messages on what was dropped or noted while files were read; above 5 % as WARNING.

    Args:
      summary: result of `summary`; empty for a run without tasks.
    """
    tasks = summary.get("tasks", {})
    return [line for task, facts in tasks.items() for line in _file_notices(task, facts)]


def _file_notices(task: str, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from espalier.data.stream import rows

    dropped, noted = facts.get("dropped", {}), facts.get("noted", {})
    documents = [
        f"{name} {count['documents']:,} documents ({count['bytes'] / 1e6:.1f} MB)"
        for name, count in dropped.items()
        if "documents" in count
    ]
    if documents:
        yield "dropped", f"{task}: {', '.join(documents)}"
    elif dropped:
        lost = sum(count["rows"] for count in dropped.values())
        share = lost / (lost + sum(facts["documents"].values()))
        yield rows.notice("dropped", share, f"{task}: {Tally(dropped)}, {share:.1%} of all rows")
    if noted:
        yield "noted", f"{task}: {Tally(noted)}"
    if (bad := facts.get("bad_rows", {})).get("rows"):
        share = bad["rows"] / (bad["rows"] + sum(facts["documents"].values()))
        yield rows.notice("bad rows", share, f"{task}: {bad_rows_text(bad)}")
