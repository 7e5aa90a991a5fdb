"""SeqIO tasks with metric functions, as launch/evaluate_seqio.py asks them."""

from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from data import rows
from data.sources import names
from launch.load_run import LoadError

FEATURES = ("inputs", "targets")
_TYPES = seqio.metrics.ModelOutputType
_OUTPUTS = (_TYPES.PREDICTION, _TYPES.SCORE)


def find(name: str, split: str) -> seqio.Task:
    """A registered task that can be evaluated on a split.

    Args:
      name: of the task.
      split: of its examples.

    Returns:
      The task.

    Raises:
      LoadError: there is no such task or split, it has no metric functions or some that want what is
        not computed here, or it lacks one of FEATURES.
    """
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
    if not task.metric_objs:
        raise LoadError(f"The task {name!r} has no metric functions: nothing says what is right.")
    for metric in task.metric_objs:
        # Other metric objects take tokens padded to one shape, or more than one value a target.
        ours = isinstance(metric, seqio.metrics.PassthroughLegacyMetric)
        if not ours or metric.model_output_type not in _OUTPUTS:
            raise LoadError(
                f"The task {name!r} has a metric that is no function of (targets, predictions) or "
                "(targets, scores); no other is computed here."
            )
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


def check_vocabulary(task: seqio.Task, vocabulary: Any) -> None:
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


def evaluator(task: seqio.Task, split: str, num_examples: int | None) -> seqio.Evaluator:
    """SeqIO's own evaluator of one task, which has read its examples.

    Args:
      task: as `find` returns it.
      split: of its examples.
      num_examples: the first so many; None for all.

    Raises:
      LoadError: a preprocessor wants to know the sequence length, or there are no examples.
    """
    try:
        found = seqio.Evaluator(
            task.name,
            # Models are asked in batches of our own, so that examples stay as the task has them.
            seqio.PassThroughFeatureConverter(),
            eval_split=split,
            num_examples=num_examples,
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


def examples(found: seqio.Evaluator, task: seqio.Task) -> list[Mapping[str, Any]]:
    """What an evaluator compares with, its FEATURES as lists of ids.

    Raises:
      LoadError: the inputs of an example, or its targets where they are to be scored, are empty.
    """
    needed = FEATURES if task.score_metric_fns else FEATURES[:1]
    read = []
    for i, example in enumerate(found.cached_task_datasets[task.name].as_numpy_iterator()):
        for feature in needed:
            if not len(example[feature]):
                what = "the prompt is empty" if feature == "inputs" else "nothing is to be scored"
                raise LoadError(f"Example {i} of the task {task.name!r}: {feature!r}, {what}.")
        read.append({**example, **{key: example[key].tolist() for key in FEATURES}})
    return read


def compute(
    found: seqio.Evaluator,
    task: seqio.Task,
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
    answers = {_TYPES.PREDICTION: predictions, _TYPES.SCORE: scores}
    functions = {
        kind: lambda _, values=values: list(enumerate(values))
        for kind, values in answers.items()
        if values is not None
    }
    metrics, _ = found.evaluate(compute_metrics=True, model_fns=functions)
    return metrics.result()[task.name]


def plain(value: Any) -> Any:
    """A metric's value as a number or text; of pictures, sounds and histograms what they are."""
    if isinstance(value, seqio.metrics.Scalar):
        return value.value
    if isinstance(value, seqio.metrics.Text):
        text = value.textdata
        return text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    if isinstance(value, seqio.metrics.MetricValue):
        return type(value).__name__
    return value
