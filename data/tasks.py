"""SeqIO tasks and mixtures, registered by plain functions that gin binds.

Every task yields `targets`, tokens with BOS and EOS as asked for, `targets_pretokenized`, their
text, and `document_id`. A mixture's rates are shares of bytes of text, which is what tokens follow;
SeqIO's own iterator would read them as shares of examples.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from data.text import corpus as corpus_lib
from data.text import document_source
from data.text.document_files import DocumentFiles
from data.text.sources import names

# What this module registered, by name: task or mixture -> facts for the record of a run.
_TASKS: dict[str, dict[str, Any]] = {}
_MIXTURES: dict[str, dict[str, Any]] = {}
_CORPORA: dict[str, dict[str, Any]] = {}


def register_corpus(
    *,
    vocabulary: Any,
    corpus: corpus_lib.Corpus | None = None,
    sources: Sequence[str] = ("all",),
    temperature: float = 1.0,
    language_temperature: float = 3.0,
    add_bos: bool = False,
    add_eos: bool = True,
) -> None:
    """Registers the corpus: tasks `english`, `docstrings`, `python`, `cpp`, `markup`, `lang_<code>`.

    The mixtures are `text` (english, docstrings), `code` (python, cpp), `multilingual` (all
    languages) and `all`, each of the sources that are there. Calling it again with the same
    arguments changes nothing.

    Args:
      vocabulary: a SeqIO vocabulary, as `data.tokenizers.vocabularies` makes.
      corpus: an assembled corpus; by default `data.text.corpus.assemble(sources=sources)`.
      sources: names of sources or groups to register.
      temperature: a source of b bytes has the rate b ** (1 / temperature) in a mixture.
      language_temperature: the same in `multilingual`, whose sizes differ by ten times.
      add_bos: begin each document with the vocabulary's BOS.
      add_eos: end each document with EOS.

    Raises:
      ValueError: for an unknown source, or one that is not in the corpus.
    """
    wanted = names.resolve(sources)
    if corpus is None:
        corpus = corpus_lib.assemble(sources=sources)
    present = [source for source in wanted if source in corpus.sources]
    if not present:
        raise ValueError(
            f"none of the sources {', '.join(wanted)} is in the corpus, which holds "
            f"{', '.join(corpus.sources)}"
        )
    for source in present:
        files = DocumentFiles(
            name=source,
            files={split: (str(corpus.file(source, split)),) for split in corpus.splits(source)},
            format=corpus_lib.FORMAT,
            validation_fraction=0.0,
            root=str(corpus.directory),
            cache=document_source.source_cache(corpus.directory.parents[1]),
        )
        register_source(
            source,
            document_source.DocumentSource(files),
            origin="register_corpus",
            vocabulary=vocabulary,
            add_bos=add_bos,
            add_eos=add_eos,
        )
    for group, members in names.GROUPS.items():
        members = [source for source in members if source in present]
        exponent = 1 / (language_temperature if group == "multilingual" else temperature)
        if members:
            register_mixture(group, {source: corpus.size(source) ** exponent for source in members})
    _CORPORA[corpus.hash] = corpus.summary()


def register_source(
    name: str, source: Any, *, origin: str, vocabulary: Any, add_bos: bool, add_eos: bool
) -> None:
    """Registers a task over a source of `{"text", "document_id"}`.

    Args:
      name: of the task.
      source: satisfies `seqio.DataSourceInterface` and has a `digest`.
      origin: the function that registers it; a later call of the same one replaces the task.
      vocabulary: a SeqIO vocabulary.
      add_bos: begin each document with BOS.
      add_eos: end each document with EOS.

    Raises:
      ValueError: the name is taken by another task, or BOS or EOS is asked of a vocabulary without it.
    """
    import seqio

    check_special_ids(name, vocabulary, add_bos=add_bos, add_eos=add_eos)
    _make_room(name, seqio.TaskRegistry, _TASKS, origin)
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map=_KEYS),
            seqio.preprocessors.tokenize,
            *([prepend_bos] if add_bos else []),
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(vocabulary=vocabulary, add_eos=add_eos)},
    )
    _TASKS[name] = {
        "source": source,
        "origin": origin,
        "vocabulary": str(vocabulary),
        "add_bos": add_bos,
        "add_eos": add_eos,
    }


def check_special_ids(name: str, vocabulary: Any, *, add_bos: bool, add_eos: bool) -> None:
    """Raises ValueError if a task asks for a BOS or EOS that its vocabulary does not have."""
    for token, asked in (("bos", add_bos), ("eos", add_eos)):
        if asked and getattr(vocabulary, f"{token}_id") in (None, -1):
            raise ValueError(
                f"task {name!r}: add_{token}=True, but {vocabulary} has no {token.upper()}; set "
                f"add_{token}=False or use a vocabulary that has one"
            )


def register_tokens(name: str, source: Any, *, origin: str, vocab_size: int) -> None:
    """Registers a task over a source of `{"targets", "loss_weights"}`: ids that are no text's.

    Args:
      name: of the task.
      source: satisfies `seqio.DataSourceInterface` and has a `digest`.
      origin: the function that registers it; a later call of the same one replaces the task.
      vocab_size: number of ids; 0 precedes every document, and none means BOS or EOS.

    Raises:
      ValueError: the name is taken by another task.
    """
    import seqio

    register_features(
        name,
        source,
        origin=origin,
        features={"targets": seqio.PassThroughVocabulary(vocab_size), "loss_weights": None},
        facts={"vocabulary": f"{vocab_size} ids", "add_bos": False, "add_eos": False},
    )


def register_features(
    name: str,
    source: Any,
    *,
    origin: str,
    features: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Registers a task over a source that yields its features as they are trained on.

    Args:
      name: of the task.
      source: satisfies `seqio.DataSourceInterface` and has a `digest`.
      origin: the function that registers it; a later call of the same one replaces the task.
      features: name -> vocabulary of its ids; None for one of float32.
      facts: for the record of a run.

    Raises:
      ValueError: the name is taken by another task.
    """
    import seqio
    import tensorflow as tf

    _make_room(name, seqio.TaskRegistry, _TASKS, origin)
    numbers = {"vocabulary": seqio.PassThroughVocabulary(1), "dtype": tf.float32}
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[],
        output_features={
            feature: seqio.Feature(
                **(numbers if vocabulary is None else {"vocabulary": vocabulary}), add_eos=False
            )
            for feature, vocabulary in features.items()
        },
    )
    _TASKS[name] = {"source": source, "origin": origin, **facts}


_KEYS = {"targets": "text", "document_id": "document_id"}


def prepend_bos(dataset, output_features):
    """Begins `targets` with the vocabulary's BOS."""
    import tensorflow as tf

    bos = output_features["targets"].vocabulary.bos_id

    def prepend(example):
        return {**example, "targets": tf.concat([[bos], example["targets"]], axis=0)}

    return dataset.map(prepend)


def register_mixture(name: str, rates: Mapping[str, float]) -> None:
    """Registers a mixture of tasks or mixtures by their rates; a later call replaces it.

    Raises:
      ValueError: the name is taken, or a member is not registered.
    """
    import seqio

    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    for member in rates:
        if member not in known:
            raise ValueError(
                f"mixture {name!r}: no task or mixture {member!r}; {names.nearest(member, known)}"
            )
    _make_room(name, seqio.MixtureRegistry, _MIXTURES, "register_mixture")
    seqio.MixtureRegistry.add(name, [(member, float(rate)) for member, rate in rates.items()])
    _MIXTURES[name] = {"rates": dict(rates), "origin": "register_mixture"}


def _make_room(name: str, registry: Any, own: dict[str, dict[str, Any]], origin: str) -> None:
    """Takes an earlier registration of the same origin back; refuses to replace any other."""
    import seqio

    if name in own and own[name]["origin"] == origin:
        own.pop(name)
        registry.remove(name)
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise ValueError(
            f"the name {name!r} is taken by a task or mixture registered elsewhere; choose another"
        )


def clear() -> None:
    """Takes back everything that was registered here, as notebooks and tests need."""
    if not (_TASKS or _MIXTURES):
        return
    import seqio

    for own, registry in ((_MIXTURES, seqio.MixtureRegistry), (_TASKS, seqio.TaskRegistry)):
        for name in own:
            registry.remove(name)
        own.clear()
    _CORPORA.clear()


def sources() -> dict[str, Any]:
    """The data source of each task registered here."""
    return {name: facts["source"] for name, facts in _TASKS.items()}


def source_digest(task_name: str) -> str:
    """SHA-256 of what a registered task reads: its files, remembered by size and time.

    Raises:
      ValueError: no such task was registered here.
    """
    if task_name not in _TASKS:
        raise ValueError(f"no task {task_name!r}; {names.nearest(task_name, list(_TASKS))}")
    return _TASKS[task_name]["source"].digest


def vocabulary(task_name: str) -> Any:
    """The SeqIO vocabulary of a task's targets, or of its completions or prompts where it has those."""
    import seqio

    features = seqio.get_mixture_or_task(task_name).output_features
    feature = next(name for name in ("targets", "chosen", "prompt") if name in features)
    return features[feature].vocabulary


def vocabulary_digest() -> dict[str, str]:
    """Returns {'vocabulary': digest} of the tasks registered here, before any of them is read; {} if they have several."""
    from data.stream import rows

    digests = {rows.vocabulary_digest(vocabulary(name)) for name in _TASKS}
    return {"vocabulary": digests.pop()} if len(digests) == 1 else {}


def summary() -> dict[str, Any]:
    """What a run records of its data: tasks with sizes and hashes, mixtures, and corpora."""
    tasks = {}
    for name, facts in _TASKS.items():
        source = facts["source"]
        tasks[name] = {
            "digest": source.digest,
            "documents": {split: source.num_input_examples(split) for split in source.splits},
            **{key: seen for key in ("dropped", "noted") if (seen := getattr(source, key, None))},
            **{key: value for key, value in facts.items() if key != "source"},
        }
    mixtures = {name: facts["rates"] for name, facts in _MIXTURES.items()}
    return {"tasks": tasks, "mixtures": mixtures, "corpora": dict(_CORPORA)}
