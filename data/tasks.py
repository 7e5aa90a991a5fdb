"""SeqIO tasks and mixtures, registered by plain functions that gin binds.

Every task yields `targets` (token ids, with BOS and EOS where the task adds them),
`targets_pretokenized` (their text) and `document_id`. A mixture's rates are shares of bytes of
text, which are roughly proportional to tokens. SeqIO's own iterator treats rates as shares of
examples.
"""

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.common import spelling

# Tasks, mixtures and corpora registered by this module: name -> facts recorded with a run.
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
    import seqio

    check_special_ids(name, vocabulary, add_bos=add_bos, add_eos=add_eos)
    _register(
        name,
        source,
        origin,
        {"vocabulary": str(vocabulary), "add_bos": add_bos, "add_eos": add_eos},
        preprocessors=[
            functools.partial(
                seqio.preprocessors.rekey,
                key_map={"targets": "text", "document_id": "document_id"},
            ),
            seqio.preprocessors.tokenize,
            *([prepend_bos] if add_bos else []),
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(vocabulary=vocabulary, add_eos=add_eos)},
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
      source: satisfies `seqio.DataSourceInterface`, and has a `digest` and the `name` of the task.
      origin: name of the registering function; a later call of the same function replaces the task.
      features: feature -> vocabulary of its ids; None for a float32 feature.
      facts: recorded with a run.
      **task: further arguments of `seqio.TaskRegistry.add`.

    Raises:
      ValueError: another task has this name.
    """
    import seqio
    import tensorflow as tf

    numbers = {"vocabulary": seqio.PassThroughVocabulary(1), "dtype": tf.float32}
    _register(
        source.name,
        source,
        origin,
        facts,
        preprocessors=[],
        output_features={
            feature: seqio.Feature(
                **(numbers if vocabulary is None else {"vocabulary": vocabulary}), add_eos=False
            )
            for feature, vocabulary in features.items()
        },
        **task,
    )


def _register(name: str, source: Any, origin: str, facts: Mapping[str, Any], **task: Any) -> None:
    import seqio

    _make_room(name, seqio.TaskRegistry, _TASKS, origin)
    seqio.TaskRegistry.add(name, source=source, **task)
    _TASKS[name] = {"source": source, "origin": origin, **facts}


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


def prepend_bos(dataset, output_features):
    """Begins `targets` with the vocabulary's BOS."""
    import tensorflow as tf

    bos = output_features["targets"].vocabulary.bos_id

    def prepend(example):
        return {**example, "targets": tf.concat([[bos], example["targets"]], axis=0)}

    return dataset.map(prepend)


def register_mixture(name: str, rates: Mapping[str, float]) -> None:
    """Registers a mixture of tasks and mixtures by their rates; replaces one of an earlier call.

    Raises:
      ValueError: another task or mixture has this name, or a member is not registered.
    """
    import seqio

    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    for member in rates:
        if member not in known:
            raise ValueError(
                f"mixture {name!r}: no task or mixture {member!r}; {spelling.nearest(member, known)}"
            )
    _make_room(name, seqio.MixtureRegistry, _MIXTURES, "register_mixture")
    seqio.MixtureRegistry.add(name, [(member, float(rate)) for member, rate in rates.items()])
    _MIXTURES[name] = {"rates": dict(rates), "origin": "register_mixture"}


def _make_room(name: str, registry: Any, own: dict[str, dict[str, Any]], origin: str) -> None:
    """Removes a registration of the same origin; raises ValueError if another one has the name."""
    import seqio

    if name in own and own[name]["origin"] == origin:
        own.pop(name)
        registry.remove(name)
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise ValueError(
            f"the name {name!r} is taken by a task or mixture registered elsewhere; choose another"
        )


def clear() -> None:
    """Removes every task and mixture that this module registered; for notebooks and tests."""
    if not (_TASKS or _MIXTURES):
        return
    import seqio

    for own, registry in ((_MIXTURES, seqio.MixtureRegistry), (_TASKS, seqio.TaskRegistry)):
        for name in own:
            registry.remove(name)
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
    """Returns the SeqIO vocabulary of a task's feature 'targets', else 'chosen', else 'prompt'."""
    import seqio

    features = seqio.get_mixture_or_task(task_name).output_features
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


def summary() -> dict[str, Any]:
    """Returns the facts recorded with a run: tasks with sizes and hashes, mixtures, and corpora."""
    tasks = {}
    for name, facts in _TASKS.items():
        source = facts["source"]
        tasks[name] = {
            "digest": source.digest,
            "documents": {split: source.num_input_examples(split) for split in source.splits},
            **{
                key: counts
                for key in ("dropped", "noted")
                if (counts := getattr(source, key, None))
            },
            **{key: value for key, value in facts.items() if key != "source"},
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
