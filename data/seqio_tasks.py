"""Tasks and SeqIO: this project's tasks as SeqIO's own, and the tasks that users register with SeqIO.

SeqIO, and with it TensorFlow, is imported by `hand_over` alone: when SeqIO is to read a task of this project, or before a module
of users that registers tasks with SeqIO.
"""

import functools
import importlib
import os
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from espalier.data import cpu_tensorflow
from espalier.data.cache import description, fingerprint
from espalier.data.pieces import Piece, parts
from espalier.data.task import DOCUMENT_ID, TARGETS, TEXT, Feature, Record, Task
from espalier.data.tokenizers import vocabulary as vocabularies

CACHED_AS = "data.tasks"  # the name by which caches know `prepend_bos`
_BYTES_PER_PART = 32_000_000  # of source files, as stored (possibly compressed)
_RECORDS_PER_PART = 20_000

_given: dict[str, Any] = {}  # what `hand_over` has registered: name -> SeqIO's task or mixture
_modules: dict[str, str] = {}  # name of a task that users register -> the module that does it


def loaded() -> Any | None:
    """Returns SeqIO if it is imported, so that others may have registered tasks, else None."""
    return sys.modules.get("seqio")


def hand_over(tasks: Iterable[Task], mixtures: Mapping[str, Mapping[str, float]]) -> Any:
    """Registers tasks and mixtures with SeqIO, unless they are, and returns SeqIO."""
    cpu_tensorflow.load()  # before SeqIO imports it
    import seqio

    for own in ("Vocabulary", "PassThroughVocabulary", "ByteVocabulary", "SentencePieceVocabulary"):
        getattr(seqio, own).register(getattr(vocabularies, own))  # SeqIO asks by `isinstance`
    for task in tasks:
        if task.name not in _given:
            _given[task.name] = _add(seqio, task)
    for name, rates in mixtures.items():
        if name not in _given:
            _given[name] = seqio.MixtureRegistry.add(name, list(rates.items()))
    return seqio


def forget(name: str) -> None:
    """Removes a task or mixture that `hand_over` has registered, if it has."""
    if (given := _given.pop(name, None)) is not None and (seqio := loaded()):
        for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
            if name in registry.names() and registry.get(name) is given:
                registry.remove(name)


def names() -> set[str]:
    """Returns the names of the tasks and mixtures that others have registered with SeqIO."""
    if (seqio := loaded()) is None:
        return set()
    return {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} - _given.keys()


def find(name: str) -> "SeqioTask":
    """Returns a task that others have registered with SeqIO."""
    seqio = loaded()
    assert seqio is not None
    return SeqioTask(seqio.TaskRegistry.get(name), _modules.get(name))


def rates(name: str) -> tuple[dict[str, float], float] | None:
    """Returns {task: rate} and the sum of all rates of a mixture that others have registered; None for a task."""
    seqio = loaded()
    assert seqio is not None
    if name not in seqio.MixtureRegistry.names():
        return None
    mixture = seqio.MixtureRegistry.get(name)
    return {task.name: mixture.get_rate(task) for task in mixture.tasks}, mixture.total_rate


def remember(names: Iterable[str], module: str) -> None:
    """Notes that a module registers tasks when it is imported: other processes find them by it."""
    _modules.update(dict.fromkeys(names, module))


def _add(seqio: Any, task: Task) -> Any:
    import tensorflow as tf

    text: list[Any] = []
    if task.tokenises:
        keys = {TARGETS: TEXT, DOCUMENT_ID: DOCUMENT_ID}
        text = [
            functools.partial(seqio.preprocessors.rekey, key_map=keys),
            seqio.preprocessors.tokenize,
            *([prepend_bos] if task.add_bos else []),
            seqio.preprocessors.append_eos,
        ]
    features = {
        name: seqio.Feature(
            feature.vocabulary,
            add_eos=feature.add_eos,
            dtype=tf.as_dtype(feature.dtype),
            required=feature.required,
        )
        for name, feature in task.output_features.items()
    }
    return seqio.TaskRegistry.add(
        task.name,
        source=task.source,
        preprocessors=text,
        output_features=features,
        **task.evaluation,
    )


def prepend_bos(dataset, output_features):
    """Begins `targets` with the vocabulary's BOS."""
    import tensorflow as tf

    bos = output_features["targets"].vocabulary.bos_id

    def prepend(example):
        return {**example, "targets": tf.concat([[bos], example["targets"]], axis=0)}

    return dataset.map(prepend)


class SeqioTask:
    """A task that somebody has registered with SeqIO, with what caches ask of `data.task.Task`.

    Attributes:
      task: the `seqio.Task`.
      module: the module that registers it, by which other processes find it; None if nobody knows.
    """

    def __init__(self, task: Any, module: str | None = None):
        self.task, self.module = task, module

    def __reduce__(self) -> Any:
        if self.module is None:
            raise pickle.PicklingError(
                f"the SeqIO task {self.name!r} cannot be found by other processes: register it in a module that "
                "user_data.import_mixtures imports"
            )
        return _find, (self.module, self.name)

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def source(self) -> Any:
        return self.task.source

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.task.splits)

    @property
    def output_features(self) -> dict[str, Feature]:
        """The features that are vectors of numbers.

        Raises:
          ValueError: a feature is not a vector.
        """
        out = {}
        for name, feature in self.task.output_features.items():
            if feature.rank != 1:
                raise ValueError(
                    f"Task {self.name!r}: feature {name!r} has rank {feature.rank}; only vectors of "
                    "tokens are cached."
                )
            vocabulary = getattr(feature, "vocabulary", None)
            dtype = feature.dtype.name
            out[name] = Feature(vocabulary, bool(feature.add_eos), dtype, feature.required)
        return out

    def made_by(self) -> dict[str, Any]:
        """Describes the steps from the source's examples to records, as JSON."""
        import tensorflow as tf

        return {
            "version": fingerprint.describe(getattr(self.task, "version", None)),
            "preprocessors": [fingerprint.describe(step) for step in self.task.preprocessors],
            "tensorflow": tf.__version__,
        }

    def pieces(self, split: str) -> tuple[Piece, ...]:
        """Returns the parts that can be read alone.

        They are groups of source files. A source with arbitrary sharding gets more parts if it has many examples; any other
        source would have to be read completely for every part. Starting a part takes a quarter of a second, so thousands of
        small files do not get a part each.
        """
        sizes = [os.path.getsize(path) for path in description.files_of(self.source, split)]
        count = max(min(len(sizes), -(-sum(sizes) // _BYTES_PER_PART)), 1)
        if self.source.supports_arbitrary_sharding:
            examples = self.source.num_input_examples(split) or 0
            count = max(count, -(-examples // _RECORDS_PER_PART))
        return parts(split, count)

    def records(self, split: str, pieces: Sequence[Piece] | None = None) -> Iterator[Record]:
        """Yields the preprocessed examples of parts, or of all, untrimmed, in source order.

        Raises:
          ValueError: the preprocessors do not yield a required output feature.
        """
        for part in parts("", 1) if pieces is None else pieces:
            yield from self._part(split, part)

    def _part(self, split: str, part: Piece) -> Iterator[Record]:
        cpu_tensorflow.load()
        import seqio

        info = None if part.end == 1 else seqio.ShardInfo(index=part.begin, num_shards=part.end)
        dataset = self.source.get_dataset(split=split, shuffle=False, shard_info=info)
        dataset = self.task.preprocess_precache(dataset, seed=0)
        dataset = self.task.preprocess_postcache(dataset, sequence_length=None, seed=0)
        required = [name for name, feature in self.task.output_features.items() if feature.required]
        missing = [name for name in required if name not in dataset.element_spec]
        if missing:
            raise ValueError(
                f"Task {self.name!r}: the preprocessors yield {', '.join(dataset.element_spec)} but "
                f"not the output feature {', '.join(missing)}."
            )
        return dataset.as_numpy_iterator()


def _find(module: str, name: str) -> SeqioTask:
    hand_over((), {})
    importlib.import_module(module)
    return SeqioTask(loaded().TaskRegistry.get(name), module)  # type: ignore[union-attr]
