"""Documents of influence that are in no JSON lines: those of SeqIO mixtures, and training sequences in their order.

Of a sequence, the step is known at which a run has seen it.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from espalier.common import spelling
from espalier.common.storage import paths
from espalier.data.rows.megatron import SequenceFile
from espalier.launch.load.load_run import LoadedRun, LoadError
from espalier.trainers.scoring.scoring import Row

_AT_A_TIME = 256
# What is only of sequences.
SETTINGS = ("sequence_tokens", "step_sequences", "first_step", "end_step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """The sequences of a range of training steps.

    Attributes:
      file: all sequences.
      step_sequences: sequences of one step.
      start, stop: the first sequence, and the one after the last.
      first_step, end_step: the range, as it is recorded.
    """

    file: SequenceFile
    step_sequences: int
    start: int
    stop: int
    first_step: int
    end_step: int | None

    @property
    def count(self) -> int:
        return self.stop - self.start

    def rows(self, run: LoadedRun) -> Iterator[tuple[str, Row]]:
        """Yields (place, row) of each sequence, whose first token is read alone and all others are predicted."""
        for first in range(self.start, self.stop, _AT_A_TIME):
            yield from self._rows(run, first, min(first + _AT_A_TIME, self.stop))

    def chosen(self, run: LoadedRun, wanted: Collection[int]) -> Iterator[tuple[int, Row]]:
        """Yields (number, row) of some documents by number, ascending."""
        for number in sorted(wanted):
            at = self.start + number
            for _, row in self._rows(run, at, at + 1):
                yield number, row

    def facts(self, number: int) -> dict[str, Any]:
        """Returns a document's sequence and the step that read it, both from 0, by name."""
        sequence = self.start + number
        return {"sequence": sequence, "step": sequence // self.step_sequences}

    def record(self, limit: int | None) -> dict[str, Any]:
        """Returns what identifies the documents; reads them once."""
        stop = self.stop if limit is None else min(self.stop, self.start + limit)
        return {
            **{"sequences": paths.absolute(self.file.name), "tokens": self.file.tokens},
            **{"step_sequences": self.step_sequences, "limit": limit},
            **{"first_step": self.first_step, "end_step": self.end_step},
            "sha256": self.file.digest(self.start, stop),
        }

    def _rows(self, run: LoadedRun, start: int, stop: int) -> Iterator[tuple[str, Row]]:
        size = run.model.config.vocab_size
        for at, tokens in enumerate(self.file.rows(start, stop).tolist(), start):
            where = f"{self.file.name}.bin, sequence {at:,}"
            if (most := max(tokens)) >= size:
                raise LoadError(
                    f"{where} has the token {most}, and the model {size:,} tokens: give the model that was trained on these "
                    "sequences."
                )
            yield where, Row(context=tokens[:1], targets=tokens[1:])


def order_of(
    run: LoadedRun,
    name: str,
    *,
    tokens: int,
    step_sequences: int,
    first_step: int,
    end_step: int | None,
) -> Order:
    """Returns the sequences of the files `name`.bin and .idx; see `Source` for the arguments.

    Raises:
      LoadError: settings that do not fit, or an encoder-decoder.
      DataError: see `SequenceFile`.
    """
    if run.encodes:
        raise LoadError(
            "--sequences are of decoders, and the model is an encoder-decoder: give --documents."
        )
    file = SequenceFile(name, tokens=tokens)
    steps = -(-file.count // step_sequences)
    end = steps if end_step is None else end_step
    if not first_step < end <= steps:
        raise LoadError(
            f"--first_step={first_step} and --end_step={end} must choose steps of the {steps:,} that {file.count:,} sequences are, "
            f"{step_sequences:,} each."
        )
    return Order(
        file=file,
        step_sequences=step_sequences,
        start=first_step * step_sequences,
        stop=min(end * step_sequences, file.count),
        first_step=first_step,
        end_step=end_step,
    )


def length_of(run: LoadedRun, tokens: int) -> int:
    """Returns the number of predicted tokens of a sequence; raises LoadError if they are more than the model's positions."""
    limit = run.model.max_length
    if limit is not None and tokens - 1 > limit:
        raise LoadError(
            f"--sequence_tokens={tokens}: the model reads {limit:,} positions, and these sequences have {tokens - 1:,} before the "
            "last token: give the model that was trained on them, or read their beginnings, --length=N."
        )
    return tokens - 1


def check_mixture(run: LoadedRun, name: str, split: str) -> None:
    """Raises LoadError if a mixture is not registered, has no such split, or another vocabulary."""
    from espalier.data import tasks
    from espalier.data.stream.rows import vocabulary_digest

    seqio = tasks.in_seqio()
    names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in names:
        raise LoadError(
            f"--mixture={name}: no such SeqIO mixture or task; {spelling.nearest(name, sorted(names))} (--module=NAME "
            "registers more)."
        )
    mixture = seqio.get_mixture_or_task(name)
    own = vocabulary_digest(run.vocabulary)
    for feature, settings in mixture.output_features.items():
        if feature in ("inputs", "targets") and vocabulary_digest(settings.vocabulary) != own:
            raise LoadError(
                f"--mixture={name}: its feature {feature!r} has another vocabulary than the run: register it with the run's."
            )
    for task in tasks_of(name):
        if split not in task.splits:
            raise LoadError(
                f"--mixture={name}: the task {task.name} has no split {split!r}; it has {', '.join(task.splits)}."
            )


def tasks_of(name: str) -> list[Any]:
    """Returns the SeqIO tasks that a mixture reads."""
    import seqio

    mixture = seqio.get_mixture_or_task(name)
    if not hasattr(mixture, "tasks"):
        return [mixture]
    return [task for task in mixture.tasks if mixture.get_rate(task) > 0]


def examples(name: str, split: str, length: int) -> Iterator[Mapping[str, Any]]:
    """Yields the examples of a mixture, mixed by its rates in a fixed order, once each, and in their whole length.

    SeqIO's own iterator of a mixture ends with the first task that ends.
    """
    import seqio
    import tensorflow as tf

    mixture = seqio.get_mixture_or_task(name)
    features = tuple(mixture.output_features)
    lengths = dict.fromkeys(features, length)
    every = tasks_of(name)
    datasets = [
        task.get_dataset(lengths, split=split, shuffle=False, trim_output_features=False).map(
            lambda example: {feature: example[feature] for feature in features}
        )
        for task in every
    ]
    rates = [mixture.get_rate(task) for task in every] if len(every) > 1 else [1.0]
    mixed = tf.data.Dataset.sample_from_datasets(
        datasets, rates, seed=42, stop_on_empty_dataset=False
    )
    yield from mixed.as_numpy_iterator()
