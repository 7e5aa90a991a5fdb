"""SeqIO tasks, their examples and metrics, and a run's predictions and scores, for `espalier evaluate seqio`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import spelling
from espalier.data.stream import rows
from espalier.launch.inference.generate import decoder_for
from espalier.launch.inference.score import row_of
from espalier.launch.inference.texts import Texts, decoder_of
from espalier.launch.lm_eval.arguments import (
    Generation,
    Generator,
    default_batch_tokens,
    default_generation_tokens,
)
from espalier.launch.load.load_run import LoadedRun, LoadError
from espalier.model.kv_cache.full import FullCache
from espalier.trainers.decoding.decoder import Decoder
from espalier.trainers.decoding.settings import Sampling, Settings
from espalier.trainers.scoring.likelihoods import LikelihoodScorer
from espalier.trainers.scoring.scoring import Scorer
from espalier.trainers.telemetry import metric_writers

FEATURES = ("inputs", "targets")
PREDICTION, SCORE = "prediction", "score"
_ROWS = 32  # rows of a batch of an encoder-decoder


class Answers:
    """Computes predictions and scores of a run's model on examples of tasks.

    Args:
      run: the model; its layers are unrolled here, once for all users of the run.
      max_new_tokens: maximum new tokens of a prediction.
    """

    def __init__(self, run: LoadedRun, max_new_tokens: int):
        self.model = run.model
        run.unroll()
        self._run = run
        self._greedy = Generation(
            until=(), max_gen_toks=max_new_tokens, sampling=Sampling(temperature=0.0)
        )
        self._generator = Generator(
            run,
            ends=run.eos_ids,
            batch_tokens=default_generation_tokens(),
            policy=FullCache(),
        )
        self._scorer = LikelihoodScorer(
            run.model,
            run.params,
            batch_tokens=default_batch_tokens(),
            row_shards=run.row_shards,
            sharding=run.row_sharding,
        )

    def use(self, run: LoadedRun) -> None:
        """Sets another run of an equal model, for which all programs stay."""
        run.unroll()
        self._run = run
        self._generator.use(run)
        self._scorer.use(run.params)

    def predictions(self, examples: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns greedy continuations of the inputs, without EOS."""
        return list(self._generator.stream(self._contexts(examples), self._greedy))

    def scores(self, examples: Sequence[Mapping[str, Any]]) -> list[float]:
        """Returns log-probabilities of the targets after the inputs, summed over tokens."""
        run, pairs = self._run, zip(self._contexts(examples), examples, strict=True)
        scored = [row_of(run, context, example["targets"]) for context, example in pairs]
        likelihoods = dict(self._scorer.stream(scored))
        return [likelihoods[i].log_prob for i in range(len(scored))]

    def _contexts(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        run = self._run
        return [run.context(run.after_bos(example["inputs"])) for example in examples]


class EncoderAnswers:
    """The predictions and scores of an encoder-decoder, which reads the inputs as the task makes them, EOS included.
    With prompt tuning, its virtual tokens come first.

    Args:
      run, max_new_tokens: see `Answers`.
    """

    def __init__(self, run: LoadedRun, max_new_tokens: int):
        self.model = run.model
        self._run = run
        self._settings = Settings(max_new_tokens=max_new_tokens)
        # By size of a batch; their programs serve all tasks.
        self._decoders: dict[int, Decoder] = {}
        self._scorers: dict[int, Scorer] = {}

    def use(self, run: LoadedRun) -> None:
        """Sets another run of an equal model, for which all programs stay."""
        self._run = run
        for each in (*self._decoders.values(), *self._scorers.values()):
            each.use(run.params)

    def predictions(self, examples: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns greedy targets of the inputs, without EOS."""
        run = self._run
        size = run.batch_size(_ROWS, len(examples))
        if size not in self._decoders:
            self._decoders[size] = decoder_for(run, self._settings, batch_size=size)
        texts = Texts(decoder_of(run.vocabulary), ends=run.eos_ids)
        continued = self._decoders[size].stream(
            [run.prefixed(example["inputs"]) for example in examples]
        )
        return [texts.text(continuation.tokens)[0] for continuation in continued]

    def scores(self, examples: Sequence[Mapping[str, Any]]) -> list[float]:
        """Returns log-probabilities of the targets given the inputs, summed over tokens."""
        run = self._run
        size = run.batch_size(_ROWS, len(examples))
        if size not in self._scorers:
            options: dict[str, Any] = {"batch_size": size, "sharding": run.row_sharding}
            self._scorers[size] = Scorer(run.model, run.params, **options)
        scored = [row_of(run, run.prefixed(e["inputs"]), e["targets"]) for e in examples]
        return [float(log_probs.sum()) for log_probs in self._scorers[size].stream(scored)]


def answers_of(
    run: LoadedRun, max_new_tokens: int, earlier: Answers | EncoderAnswers | None = None
) -> Answers | EncoderAnswers:
    """Returns the `Answers` that computes a run's predictions and scores: `earlier`, if it is of the same model."""
    if earlier is not None and earlier.model is run.model:
        earlier.use(run)
        return earlier
    return (EncoderAnswers if run.encodes else Answers)(run, max_new_tokens)


def find(name: str, split: str) -> Any:
    """Returns a registered task, after checking that it can be evaluated on a split.

    Raises:
      LoadError: there is no such task or split, it has no metric functions, or it lacks one of FEATURES; see also
        `outputs`.
    """
    from espalier.data import tasks

    seqio = tasks.in_seqio()
    registered = seqio.TaskRegistry.names()
    if name in seqio.MixtureRegistry.names():
        members = [task.name for task in seqio.MixtureRegistry.get(name).tasks]
        raise LoadError(
            f"{name!r} is a mixture: give its tasks, --task={' --task='.join(members)}."
        )
    if name not in registered:
        hint = spelling.nearest(name, sorted(registered))
        raise LoadError(f"--task={name}: no such SeqIO task; {hint} (--module=NAME registers more)")
    task = seqio.TaskRegistry.get(name)
    if not outputs(task):
        raise LoadError(f"The task {name!r} has no metric functions: give it metric_fns.")
    if split not in task.splits:
        raise LoadError(
            f"The task {name!r} has no split {split!r}; its splits are {', '.join(task.splits)}."
        )
    for feature in FEATURES:
        if feature not in task.output_features:
            raise LoadError(
                f"The task {name!r} has no feature {feature!r}, only "
                f"{', '.join(task.output_features)}: the model predicts 'targets' from 'inputs'."
            )
    return task


def outputs(task: Any) -> set[str]:
    """Returns the model outputs that the metrics of a task take: PREDICTION, SCORE or both.

    Raises:
      LoadError: a metric takes another output.
    """
    from seqio import metrics as seqio_metrics

    refused = LoadError(
        f"The task {task.name!r} has a metric that is not a function of (targets, predictions) or "
        "(targets, scores); only these are supported."
    )
    try:
        metrics = task.metric_objs
    except ValueError:  # SeqIO checks the arguments of metric functions only at this access
        raise refused from None
    kinds = {metric.model_output_type for metric in metrics}
    output_names = {seqio_metrics.ModelOutputType.to_str(kind) for kind in kinds}
    # Metric objects of other kinds take tokens padded to one shape.
    ours = all(isinstance(metric, seqio_metrics.PassthroughLegacyMetric) for metric in metrics)
    if not ours or output_names - {PREDICTION, SCORE}:
        raise refused
    return output_names


def check_vocabulary(task: Any, vocabulary: Any) -> None:
    """Raises LoadError if a task's vocabulary is not the run's."""
    own = rows.vocabulary_digest(vocabulary)
    for feature in FEATURES:
        feature_vocabulary = task.output_features[feature].vocabulary
        if rows.vocabulary_digest(feature_vocabulary) != own:
            raise LoadError(
                f"The feature {feature!r} of the task {task.name!r} is encoded with another vocabulary "
                f"({feature_vocabulary}) than the run's ({vocabulary}). Register the task with the run's "
                "vocabulary."
            )


class _Unchanged:
    """A feature converter that returns examples unchanged: `Answers` makes the batches.

    SeqIO's passthrough converter lacks attributes that its evaluator reads.
    """

    TASK_FEATURES: Mapping[str, Any] = {}
    pack = False

    def __call__(self, dataset: Any, task_feature_lengths: Mapping[str, int]) -> Any:
        return dataset


class _Silent:
    """A logger that writes nothing; without a logger SeqIO warns that results are lost."""

    def __init__(self, output_dir: str):
        pass

    def __call__(self, **_: Any) -> None:
        pass


def evaluator(task: Any, split: str, num_examples: int | None) -> Any:
    """Returns SeqIO's evaluator of one task, with its first `num_examples` examples loaded; None for all.

    Raises:
      LoadError: a preprocessor requires a sequence length, or there are no examples.
    """
    import seqio

    try:
        result = seqio.Evaluator(
            task.name,
            _Unchanged(),
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
            f"A preprocessor of the task {task.name!r} needs a sequence length, but evaluation uses whole "
            "examples. Give the length a default, or choose another task."
        ) from None
    if not len(result.cached_task_datasets[task.name]):
        raise LoadError(f"The split {split!r} of the task {task.name!r} has no examples.")
    return result


def examples(its_evaluator: Any, task: Any) -> list[Mapping[str, Any]]:
    """Returns the examples of an evaluator, with FEATURES as lists of ids.

    Raises:
      LoadError: the inputs of an example, or its targets if they are scored, are empty.
    """
    needed = FEATURES if SCORE in outputs(task) else FEATURES[:1]
    result: list[Mapping[str, Any]] = []
    for i, example in enumerate(its_evaluator.cached_task_datasets[task.name].as_numpy_iterator()):
        for feature in needed:
            if not len(example[feature]):
                what = "prompt" if feature == "inputs" else "text to score"
                raise LoadError(
                    f"Example {i} of the task {task.name!r}: {feature!r}, the {what}, is empty."
                )
        result.append({**example, **{key: example[key].tolist() for key in FEATURES}})
    return result


def compute(
    its_evaluator: Any,
    task: Any,
    predictions: Sequence[str] | None,
    scores: Sequence[float] | None,
) -> Mapping[str, Any]:
    """Returns the values of the task's metric functions on all examples.

    Args:
      its_evaluator: evaluator of the task.
      task: the task.
      predictions: decoded predictions in the order of the examples, before postprocessing; None if not used.
      scores: scores of the targets in the same order; None if not used.
    """
    metrics, _ = its_evaluator.evaluate(
        compute_metrics=True,
        predict_fn=lambda _: list(enumerate(predictions or ())),
        score_fn=lambda _: list(enumerate(scores or ())),
    )
    return metrics.result()[task.name]


def plain(value: Any) -> Any:
    """Returns the result of a metric function as JSON; an image or histogram becomes the name of its class."""
    from seqio import metrics as seqio_metrics

    if isinstance(value, seqio_metrics.Scalar | seqio_metrics.Text):
        return plain(value.value if isinstance(value, seqio_metrics.Scalar) else value.textdata)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    is_json = value is None or isinstance(value, bool | int | float | str)
    return metric_writers.jsonable(value) if is_json else type(value).__name__
