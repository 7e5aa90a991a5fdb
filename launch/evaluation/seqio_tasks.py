"""Metrics of SeqIO tasks on a run's model: the work of `launch.evaluate seqio`."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from data.stream import rows
from data.text.sources import names
from launch.evaluation.lm_eval.arguments import default_batch_tokens, unroll
from launch.evaluation.lm_eval.generation import Generation, Generator
from launch.inference import row_files
from launch.run.load_run import LoadedRun, LoadError, RunConfig
from model.kv_cache.full import FullCache
from trainers.decoding.settings import Sampling
from trainers.scoring.likelihoods import LikelihoodScorer
from trainers.scoring.scoring import Row
from trainers.telemetry import metric_writers

FEATURES = ("inputs", "targets")
PREDICTION, SCORE = "prediction", "score"


def evaluate(
    config: RunConfig,
    *,
    checkpoint: str,
    tasks: Sequence[str],
    params: str = "auto",
    split: str = "validation",
    num_examples: int | None = None,
    max_new_tokens: int = 128,
    json_file: str | None = None,
    output: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates registered tasks and prints their metrics.

    Args:
      config: of the run that made the checkpoint.
      checkpoint: step or run directory.
      tasks: names of SeqIO tasks.
      params: see launch/run/load_run.py.
      split: of every task.
      num_examples: the first so many of each task; None for all.
      max_new_tokens: of a prediction.
      json_file: where to write the metrics too; NaN and infinities as in metrics.jsonl.
      output: file for rows {"task", "example", "inputs", "targets", "prediction", "score"} of texts as
        they are before the task's postprocessing.

    Returns:
      {task: {"examples": their number, "metrics": the results of the task's functions}}.

    Raises:
      LoadError: a task that cannot be evaluated, or numbers out of range.
    """
    if output:
        row_files.check_output(output)
    for flag, number in (("num_examples", num_examples), ("max_new_tokens", max_new_tokens)):
        if number is not None and number < 1:
            raise LoadError(f"--{flag}={number} must be at least 1.")
    registered = [find(name, split) for name in dict.fromkeys(tasks)]
    results: dict[str, dict[str, Any]] = {}
    answers: list[dict[str, Any]] = []
    with config.load(checkpoint, params=params) as run:
        for task in registered:
            check_vocabulary(task, run.vocabulary)
        # All tasks are read before any is answered, so that errors come early.
        opened = [evaluator(task, split, num_examples) for task in registered]
        asked = [examples(*pair) for pair in zip(opened, registered, strict=True)]
        model = Answers(run, max_new_tokens)
        for task, its_evaluator, its_examples in zip(registered, opened, asked, strict=True):
            wanted = outputs(task)
            predictions = scores = None
            if PREDICTION in wanted:
                predictions = model.predictions(its_examples)
            if SCORE in wanted:
                scores = model.scores(its_examples)
            metrics = compute(its_evaluator, task, predictions, scores)
            results[task.name] = {"examples": len(its_examples), "metrics": metrics}
            answers += _rows(task, its_examples, predictions, scores)
    if jax.process_index() == 0:
        shown = plain(results)
        print(table(shown))
        if json_file:
            document = {
                "checkpoint": os.path.abspath(checkpoint),
                "params": params,
                "split": split,
                "max_new_tokens": max_new_tokens,
                "tasks": shown,
            }
            with open(json_file, "w", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    if output:
        row_files.write(output, answers, writer=jax.process_index() == 0)
    return results


def _rows(
    task: Any,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[str] | None,
    scores: Sequence[float] | None,
) -> Iterator[dict[str, Any]]:
    for i, example in enumerate(examples):
        row: dict[str, Any] = {"task": task.name, "example": i}
        for feature in FEATURES:
            row[feature] = task.output_features[feature].vocabulary.decode(example[feature])
        if predictions is not None:
            row["prediction"] = predictions[i]
        if scores is not None:
            row["score"] = scores[i]
        yield row


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics as a reader sees them, a line for each."""
    lines = []
    for task, result in results.items():
        lines.append(f"{task}, {result['examples']:,} examples")
        for name, value in result["metrics"].items():
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            lines.append(f"  {name}: {shown}")
    return "\n".join(lines)


class Answers:
    """A run's model as it answers examples of tasks.

    Args:
      run: the model; its layers are unrolled here, once for all that reads them.
      max_new_tokens: of a prediction.
    """

    def __init__(self, run: LoadedRun, max_new_tokens: int):
        unroll(run)
        batch_tokens = default_batch_tokens()
        self._run = run
        self._greedy = Generation(
            until=(), max_gen_toks=max_new_tokens, sampling=Sampling(temperature=0.0)
        )
        self._generator = Generator(
            run,
            ends=run.eos_ids,
            batch_tokens=batch_tokens,
            batch_size=None,
            policy=FullCache(),
            cache_dtype=None,
            prefill_chunk=None,
            seed=0,
        )
        self._scorer = LikelihoodScorer(
            run.model,
            run.params,
            batch_tokens=batch_tokens,
            row_shards=run.row_shards,
            sharding=run.row_sharding,
        )

    def predictions(self, examples: Sequence[Mapping[str, Any]]) -> list[str]:
        """Greedy continuations of the inputs, without the EOS that ends them."""
        return list(self._generator.stream(self._contexts(examples), self._greedy))

    def scores(self, examples: Sequence[Mapping[str, Any]]) -> list[float]:
        """Log-probabilities of the targets after the inputs, summed over tokens."""
        asked = [
            Row(context=context, targets=example["targets"])
            for context, example in zip(self._contexts(examples), examples, strict=True)
        ]
        likelihoods = dict(self._scorer.stream(asked))
        return [likelihoods[i].log_prob for i in range(len(asked))]

    def _contexts(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        run = self._run
        return [run.context(run.after_bos(example["inputs"])) for example in examples]


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
    """The model outputs that the metrics of a task take: PREDICTION, SCORE or both.

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
    output_names = {seqio_metrics.ModelOutputType.to_str(kind) for kind in kinds}
    # Metric objects of other kinds take tokens padded to one shape.
    ours = all(isinstance(metric, seqio_metrics.PassthroughLegacyMetric) for metric in metrics)
    if not ours or output_names - {PREDICTION, SCORE}:
        raise refused
    return output_names


def check_vocabulary(task: Any, vocabulary: Any) -> None:
    """Raises LoadError where a task's tokens are not those of a run's vocabulary."""
    own = rows.vocabulary_digest(vocabulary)
    for feature in FEATURES:
        feature_vocabulary = task.output_features[feature].vocabulary
        if rows.vocabulary_digest(feature_vocabulary) != own:
            raise LoadError(
                f"The feature {feature!r} of the task {task.name!r} is encoded with another vocabulary "
                f"({feature_vocabulary}) than the run's ({vocabulary}): its tokens would mean other texts. Register "
                "the task with the run's own."
            )


class _AsTheyAre:
    """A feature converter that returns examples unchanged: batches are made elsewhere.

    SeqIO's own passthrough converter lacks attributes that SeqIO's evaluator reads.
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
        result = seqio.Evaluator(
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
    if not len(result.cached_task_datasets[task.name]):
        raise LoadError(f"The split {split!r} of the task {task.name!r} holds no example.")
    return result


def examples(its_evaluator: Any, task: Any) -> list[Mapping[str, Any]]:
    """The examples of an evaluator, with FEATURES as lists of ids.

    Raises:
      LoadError: the inputs of an example, or its targets where they are to be scored, are empty.
    """
    needed = FEATURES if SCORE in outputs(task) else FEATURES[:1]
    read: list[Mapping[str, Any]] = []
    for i, example in enumerate(its_evaluator.cached_task_datasets[task.name].as_numpy_iterator()):
        for feature in needed:
            if not len(example[feature]):
                what = "the prompt is empty" if feature == "inputs" else "nothing is to be scored"
                raise LoadError(f"Example {i} of the task {task.name!r}: {feature!r}, {what}.")
        read.append({**example, **{key: example[key].tolist() for key in FEATURES}})
    return read


def compute(
    its_evaluator: Any,
    task: Any,
    predictions: Sequence[str] | None,
    scores: Sequence[float] | None,
) -> Mapping[str, Any]:
    """The values of the metric functions on the answers to all examples, in their order.

    Args:
      its_evaluator: of the task.
      task: whose functions to call.
      predictions: decoded, before the task's postprocessing; None where no function takes them.
      scores: of the targets; likewise.
    """
    metrics, _ = its_evaluator.evaluate(
        compute_metrics=True,
        predict_fn=lambda _: list(enumerate(predictions or ())),
        score_fn=lambda _: list(enumerate(scores or ())),
    )
    return metrics.result()[task.name]


def plain(value: Any) -> Any:
    """The result of a metric function as JSON; a picture or histogram becomes the name of its class."""
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
