"""SeqIO tasks with metric functions of their own, such as a benchmark's, on a trained model.

Example, where my_tasks.py registers a task "sums" with the features inputs and targets in the vocabulary
of the run, and with metric_fns:

  espalier evaluate seqio --checkpoint=/tmp/espalier_tiny --module=my_tasks --task=sums

SeqIO's Evaluator calls the task's preprocessors, postprocess_fn and metrics. Functions of (targets, predictions)
get greedy continuations of "inputs", functions of (targets, scores) the log-probability of "targets" after
"inputs", summed over tokens. The run's START_TOKEN and BOS come before "inputs". The model also reads an EOS that
the task appends to "inputs", so most tasks for such models set add_eos=False for that feature. An encoder-decoder
reads "inputs" as the task makes them.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.common.ranges import Size
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.inference import row_files
from espalier.launch.load import load_run, side_by_side
from espalier.launch.load.load_run import RunConfig


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = load_run.add_flags(parser)
    load_run.add_adapter_flag(group)
    load_run.add_weights_flag(group)
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="NAME",
        help="evaluate this SeqIO task; repeatable",
    )
    group.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="import this module, which registers tasks; repeatable",
    )
    names = ("split", "num_examples", "max_new_tokens", "output", "json")
    setting_flags.add(group, evaluate, names=names)


def _run(start: cli.Start) -> None:
    from espalier.data.text import user_data

    flags = start.flags
    for module in flags.module:
        user_data.import_mixtures(module=module)
    given = setting_flags.given(flags, evaluate)
    evaluate(start(), tasks=flags.task, **given)


def evaluate(
    config: RunConfig,
    *,
    checkpoint: str,
    tasks: Sequence[str],
    params: str = "auto",
    split: str = "validation",
    num_examples: Size | None = None,
    max_new_tokens: Size = 128,
    json: setting_flags.File | None = None,
    output: str | None = None,
    adapter: Sequence[str] = (),
) -> dict[Any, dict[str, Any]]:
    """Evaluates a checkpoint on registered tasks, and prints their metrics.

    Args:
      config: configuration of the checkpoint's run.
      checkpoint: step or run directory.
      tasks: names of SeqIO tasks.
      params: see launch/load/load_run.py.
      split: split of each task that is evaluated.
      num_examples: number of first examples of each task; all if not set.
      max_new_tokens: maximum tokens of a prediction.
      json: also write the metrics to this JSON file; NaN and infinities as in metrics.jsonl.
      output: file for rows {"task", "example", "inputs", "targets", "prediction", "score"}, JSON lines, with texts
        before the task's postprocessing; "adapter" too, if there are some.
      adapter: directories of adapters of this checkpoint, each of which is evaluated.

    Returns:
      {task: {"examples": their number, "metrics": the results of the task's functions}}, with adapters by directory.

    Raises:
      LoadError: a task that cannot be evaluated.
    """
    import jax

    from espalier.launch.evaluate import seqio_tasks
    from espalier.launch.evaluate.seqio_tasks import PREDICTION, SCORE

    row_files.check_output(output, compressed=True)
    row_files.check_output(json, "json")
    registered = [seqio_tasks.find(name, split) for name in dict.fromkeys(tasks)]
    results: dict[str | None, dict[str, dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    loads = side_by_side.load(config, checkpoint, adapter, params=params, encoder_decoders=True)
    with loads as runs:
        for task in registered:
            seqio_tasks.check_vocabulary(task, runs[0][1].vocabulary)
        # All tasks are read before the model runs, so that errors come early.
        evaluators = [seqio_tasks.evaluator(task, split, num_examples) for task in registered]
        examples = [*map(seqio_tasks.examples, evaluators, registered)]
        model = None
        for name, run in runs:
            model = seqio_tasks.answers_of(run, max_new_tokens, model)
            results[name] = {}
            named = {} if name is None else {"adapter": name}
            for task, evaluator, read in zip(registered, evaluators, examples, strict=True):
                outputs = seqio_tasks.outputs(task)
                predictions = model.predictions(read) if PREDICTION in outputs else None
                scores = model.scores(read) if SCORE in outputs else None
                metrics = seqio_tasks.compute(evaluator, task, predictions, scores)
                results[name][task.name] = {"examples": len(read), "metrics": metrics}
                answers = {PREDICTION: predictions, SCORE: scores}
                rows += [named | row for row in _rows(task, read, answers)]
    if jax.process_index() == 0:
        shown = {name: seqio_tasks.plain(each) for name, each in results.items()}
        for name, each in shown.items():
            print(_table(each) if name is None else f"--- {name}\n{_table(each)}")
        if json:
            document = {
                "checkpoint": os.path.abspath(checkpoint),
                "params": params,
                "split": split,
                "max_new_tokens": max_new_tokens,
                **({"adapters": shown} if adapter else {"tasks": shown[None]}),
            }
            row_files.write_json(json, document)
    if output:
        row_files.write(output, rows, writer=jax.process_index() == 0)
    return results if adapter else results[None]


def _rows(
    task: Any, examples: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[Any] | None]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of the output of one task."""
    for i, example in enumerate(examples):
        row: dict[str, Any] = {"task": task.name, "example": i}
        for feature in ("inputs", "targets"):
            row[feature] = task.output_features[feature].vocabulary.decode(example[feature])
        yield row | {key: values[i] for key, values in answers.items() if values is not None}


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the metrics as text, one per line."""
    lines = []
    for task, result in results.items():
        lines.append(f"{task}, {result['examples']:,} examples")
        for name, value in result["metrics"].items():
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            lines.append(f"  {name}: {shown}")
    return "\n".join(lines)


main = load_run.command(__doc__, "evaluate seqio", _run, _add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
