"""Opens the data of a run, checks it against the program, and describes it for the run's records."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.data import cpu_tensorflow
from espalier.data import tasks as task_registry
from espalier.data.stream import stream as streams
from espalier.data.tokenizers import vocabularies
from espalier.launch.config import build
from espalier.trainers.batches import Stream, TrainStream
from espalier.trainers.evaluate import EvalStream
from espalier.trainers.recipe import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """The opened data of a run.

    Attributes:
      stream, eval_streams: the training stream and the held-out splits.
      total_steps: updates of the run.
      tasks: `data.tasks.summary()`; empty for a run without SeqIO tasks.
      repeats: warnings about sources that reach their maximum number of epochs.
    """

    stream: TrainStream
    eval_streams: tuple[EvalStream, ...]
    total_steps: int
    tasks: Mapping[str, Any]
    repeats: Sequence[str]

    def vocabulary(self) -> Any:
        """Returns the SeqIO vocabulary, which all sources share."""
        return task_registry.vocabulary(self.stream.source_names[0])

    def chat_template(self) -> Any:
        """Returns the chat template of the data, or None."""
        return task_registry.chat_template(self.stream.source_names[0])

    def record(self) -> dict[str, Any]:
        """Returns the description of the data in run.json."""
        return {
            "data_fingerprint": self.stream.fingerprint,
            "data": self.stream.summary(),
            "epochs": self.stream.epochs(self.total_steps),
            **self.tasks,
        }

    def identity(self, program: Program) -> dict[str, Any]:
        """Returns the facts that a checkpoint and the run that continues from it must agree on."""
        recipe = program.recipe
        identity = {
            "data_fingerprint": self.stream.fingerprint,
            "model": dataclasses.asdict(recipe.model.config),
            "seed": recipe.seed,
        }
        if recipe.inputs_spec.unit != "tokens":
            return identity
        summary = self.stream.summary()
        return identity | {
            "vocabulary": summary["vocabulary"]["digest"],
            # Whether all documents begin with BOS; if so, prompts must too.
            "add_bos": task_registry.add_bos(self.stream.source_names),
            "start_token": summary["start_token"],
        }


def check_trained_vocabulary(program: Program) -> None:
    """Checks the size of the vocabulary that the configuration trains for VOCABULARY, before any text is read for it.

    Raises:
      ValueError: the model's table has fewer rows.
    """
    running = build.running()
    if running is not None and running.called_in("VOCABULARY") is vocabularies.sentencepiece:
        # Its other arguments would build the corpus.
        sizes = running.bound_to(vocabularies.sentencepiece, "size", "extra_ids")
        _check_table(program, sum(sizes.values()))


def open_data(
    program: Program,
    *,
    stream: Callable[..., TrainStream],
    positions: Mapping[str, Any],
    check_vocabulary: Callable[[str | None], None],
    tasks: Sequence[Callable[[], Any]],
    eval_stream: Callable[..., EvalStream] | None,
    eval_tasks: Sequence[str] | None,
    total_steps: int | None,
    total_tokens: float | None,
    total_epochs: float | None,
    of_prompts: bool,
) -> RunData:
    """Registers the tasks and opens the streams; for the other arguments see `launch.train.train`.

    Args:
      program: the program that will read the data.
      positions: positions in the sources where another run stopped; empty for their beginnings.
      check_vocabulary: called with the digest of the tasks' vocabulary before anything is tokenised.
      of_prompts: whether the stream has prompts, whose rows are not the recipe's inputs.

    Raises:
      ValueError: data that do not match the program, or would exceed their maximum number of epochs.
    """
    if tasks:  # a stream over token caches needs no TensorFlow, which takes seconds to import
        cpu_tensorflow.load()
    for register in tasks:
        register()
    if tasks and program.recipe.inputs_spec.unit == "tokens":
        check_vocabulary(task_registry.vocabulary_digest().get("vocabulary"))
    program.check_extras(task_registry.vocabulary_digest)
    if tasks and program.recipe.inputs_spec.unit == "tokens":
        # Before anything is tokenised; the run may use only some of the tasks.
        sizes = [task_registry.vocabulary(name).vocab_size for name in task_registry.sources()]
        _check_table(program, min(sizes, default=0))
    opened = stream(positions=positions) if positions else stream()
    if not of_prompts:
        _check_rows(program, opened)
    if program.recipe.inputs_spec.unit == "tokens":
        _check_vocabulary(program, opened)
    else:
        _check_images(program, opened)
    if total_tokens is not None:
        total_steps = opened.steps_for_tokens(total_tokens)
    elif total_epochs is not None:
        total_steps = opened.steps_for_epochs(total_epochs)
    assert total_steps is not None  # checked by `train`
    repeats = opened.check_repeats(total_steps)
    names = opened.source_names if eval_tasks is None else tuple(eval_tasks)
    return RunData(
        stream=opened,
        eval_streams=streams.held_out(eval_stream, names) if eval_stream else (),
        total_steps=total_steps,
        tasks=task_registry.summary() if tasks else {},
        repeats=repeats,
    )


def _check_rows(program: Program, stream: Stream) -> None:
    recipe = program.recipe
    for name, ours, theirs in (
        ("batch_size", recipe.batch_size, stream.batch_size),
        ("length", recipe.length, stream.length),
    ):
        if ours != theirs:
            raise ValueError(
                f"The recipe's {name} is {ours}, but the training stream's is {theirs}: bind both to one "
                "macro (BATCH_SIZE, TASK_FEATURE_LENGTHS), as the files in t5x_configs/runs do."
            )


def _check_vocabulary(program: Program, stream: Stream) -> None:
    """Checks that the embedding has a row for every id: JAX would clip a larger id silently."""
    rows = program.recipe.model.config.vocab_size
    _check_table(program, stream.summary()["vocabulary"]["size"])
    start = stream.summary().get("start_token")
    if isinstance(start, int) and start >= rows:
        raise ValueError(
            f"DOCUMENT_START = {start} is no token: the model's table has {rows} rows, from 0. Set it to the "
            "id of a token of the vocabulary."
        )


def _check_table(program: Program, size: int) -> None:
    rows = program.recipe.model.config.vocab_size
    if size > rows:
        raise ValueError(
            f"The data's vocabulary has {size} entries, but the model's table only {rows} rows: set "
            "config.TransformerConfig.vocab_size to at least that (a multiple of 128 is fastest), or "
            "use the model's own vocabulary. (VOCAB_SIZE is both, in models without a table of their own.)"
        )


def _check_images(program: Program, stream: Stream) -> None:
    recipe = program.recipe
    wanted = recipe.inputs_spec.arrays(1)["images"].shape[1:]
    shape, classes = stream.batch(0, 0, 1)["images"].shape[1:], stream.summary()["num_classes"]
    if shape != wanted:
        raise ValueError(
            f"The recipe's images are {list(wanted)}, but the training stream's are {list(shape)}: bind "
            "both to IMAGE_SIZE and CHANNELS, as runs/classify.gin does."
        )
    if classes != recipe.model.config.num_classes:
        raise ValueError(
            f"The data have {classes} classes, but the model {recipe.model.config.num_classes}: set "
            "NUM_CLASSES to that of the data."
        )
