"""SeqIO tasks with metric functions, as launch/evaluation/seqio.py asks them."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from data.stream import rows
from data.text.sources import names
from launch.run.load_run import LoadError
from trainers.telemetry import metric_writers

FEATURES = ("inputs", "targets")
PREDICTION, SCORE = "prediction", "score"


def find(name: str, split: str) -> Any:
    """A registered task that can be evaluated on a split.

    Args:
      name: of the task.
      split: of its examples.

    Returns:
      The task.

    Raises:
      LoadError: there is no such task or split, it has no metric functions, or it lacks one of FEATURES;
        or as of `outputs`.
    """
    import seqio

    known = seqio.TaskRegistry.names()
    if name in seqio.MixtureRegistry.names():
        members = [task.name for task in seqio.MixtureRegistry.get(name).tasks]
        raise LoadError(
            f"{name!r} is a mixture: give its tasks, --task={' --task='.join(members)}."
        )
    if name not in known:
        hint = f"; {names.nearest(name, sorted(known))}" if known else ": none is registered"
        raise LoadError(f"--task={name}: no such SeqIO task{hint} (--module=NAME registers more)")
    task = seqio.TaskRegistry.get(name)
    if not outputs(task):
        raise LoadError(f"The task {name!r} has no metric functions: nothing says what is right.")
    if split not in task.splits:
        raise LoadError(
            f"The task {name!r} has no split {split!r}; its splits are {', '.join(task.splits)}."
        )
    for feature in FEATURES:
        if feature not in task.output_features:
            raise LoadError(
                f"The task {name!r} has no feature {feature!r}, only "
                f"{', '.join(task.output_features)}: a model is asked for 'targets' given 'inputs'."
            )
    return task


def outputs(task: Any) -> set[str]:
    """What the metrics of a task are functions of, beside targets: PREDICTION, SCORE or both.

    Raises:
      LoadError: of something else.
    """
    from seqio import metrics as seqio_metrics

    refused = LoadError(
        f"The task {task.name!r} has a metric that is no function of (targets, predictions) or "
        "(targets, scores); no other is computed here."
    )
    try:
        metrics = task.metric_objs
    except ValueError:  # SeqIO looks at the arguments of functions only now
        raise refused from None
    kinds = {metric.model_output_type for metric in metrics}
    found = {seqio_metrics.ModelOutputType.to_str(kind) for kind in kinds}
    # Metric objects of other kinds take tokens padded to one shape.
    ours = all(isinstance(metric, seqio_metrics.PassthroughLegacyMetric) for metric in metrics)
    if not ours or found - {PREDICTION, SCORE}:
        raise refused
    return found


def check_vocabulary(task: Any, vocabulary: Any) -> None:
    """Raises LoadError where a task's tokens are not those of a run's vocabulary."""
    own = rows.vocabulary_digest(vocabulary)
    for feature in FEATURES:
        found = task.output_features[feature].vocabulary
        if rows.vocabulary_digest(found) != own:
            raise LoadError(
                f"The feature {feature!r} of the task {task.name!r} is encoded with another vocabulary "
                f"({found}) than the run's ({vocabulary}): its tokens would mean other texts. Register "
                "the task with the run's own."
            )


class _AsTheyAre:
    """A feature converter that leaves examples as the task has them: batches are made elsewhere.

    SeqIO's own lacks what SeqIO's evaluator asks of one.
    """

    TASK_FEATURES: Mapping[str, Any] = {}
    pack = False

    def __call__(self, dataset: Any, task_feature_lengths: Mapping[str, int]) -> Any:
        return dataset


class _Silent:
    """A logger that writes nothing; without any SeqIO warns that results are lost."""

    def __init__(self, output_dir: str):
        pass

    def __call__(self, **_: Any) -> None:
        pass


def evaluator(task: Any, split: str, num_examples: int | None) -> Any:
    """SeqIO's own evaluator of one task, which has read its examples.

    Args:
      task: as `find` returns it.
      split: of its examples.
      num_examples: the first so many; None for all.

    Raises:
      LoadError: a preprocessor wants to know the sequence length, or there are no examples.
    """
    import seqio

    try:
        found = seqio.Evaluator(
            task.name,
            _AsTheyAre(),
            eval_split=split,
            num_examples=num_examples,
            logger_cls=(_Silent,),
            log_dir=os.devnull,
            async_compute_metrics=False,  # functions may use the accelerator
        )
    except ValueError as error:
        if "`sequence_length`" not in str(error):
            raise
        raise LoadError(
            f"A preprocessor of the task {task.name!r} needs a sequence length; evaluation has whole "
            "examples. Give it a default, or another task."
        ) from None
    if not len(found.cached_task_datasets[task.name]):
        raise LoadError(f"The split {split!r} of the task {task.name!r} holds no example.")
    return found


def examples(found: Any, task: Any) -> list[Mapping[str, Any]]:
    """What an evaluator compares with, its FEATURES as lists of ids.

    Raises:
      LoadError: the inputs of an example, or its targets where they are to be scored, are empty.
    """
    needed = FEATURES if SCORE in outputs(task) else FEATURES[:1]
    read: list[Mapping[str, Any]] = []
    for i, example in enumerate(found.cached_task_datasets[task.name].as_numpy_iterator()):
        for feature in needed:
            if not len(example[feature]):
                what = "the prompt is empty" if feature == "inputs" else "nothing is to be scored"
                raise LoadError(f"Example {i} of the task {task.name!r}: {feature!r}, {what}.")
        read.append({**example, **{key: example[key].tolist() for key in FEATURES}})
    return read


def compute(
    found: Any,
    task: Any,
    predictions: Sequence[str] | None,
    scores: Sequence[float] | None,
) -> Mapping[str, Any]:
    """What the metric functions say of the answers to all examples, in their order.

    Args:
      found: of the task.
      task: whose functions to call.
      predictions: decoded, before the task's postprocessing; None where no function takes them.
      scores: of the targets; likewise.
    """
    metrics, _ = found.evaluate(
        compute_metrics=True,
        predict_fn=lambda _: list(enumerate(predictions or ())),
        score_fn=lambda _: list(enumerate(scores or ())),
    )
    return metrics.result()[task.name]


def plain(value: Any) -> Any:
    """What a metric function returned as JSON has it, a picture or histogram as its kind alone."""
    from seqio import metrics as seqio_metrics

    if isinstance(value, seqio_metrics.Scalar):
        return plain(value.value)
    if isinstance(value, seqio_metrics.Text):
        return plain(value.textdata)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "tolist"):  # of numpy and jax, scalars too
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return metric_writers.jsonable(value)
    return type(value).__name__
