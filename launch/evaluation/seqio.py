"""SeqIO tasks with metric functions of their own, such as a benchmark's, on a trained model.

Example, where my_tasks.py registers a task "sums" with the features inputs and targets in the vocabulary
of the run, and with metric_fns:

  python -m launch.evaluate seqio --checkpoint=/tmp/espalier_tiny --module=my_tasks --task=sums

Examples, preprocessors, postprocess_fn and metrics are the task's, and SeqIO's Evaluator calls them.
Functions of (targets, predictions) are given greedy continuations of "inputs", those of (targets,
scores) the log-probability of "targets" after "inputs", summed over tokens. What the run reads before
every text (START_TOKEN, BOS) stands before "inputs"; an EOS that the task appends to them is read too,
so that most tasks for such models say add_eos=False of that feature.
"""

if __name__ == "__main__":
    from launch import cli
    from launch.run import load_run

    def add_flags(parser):
        load_run.add_flags(parser)
        group = parser.add_argument_group("tasks")
        group.add_argument(
            "--task", action="append", required=True, metavar="NAME", help="repeatable"
        )
        group.add_argument(
            "--module",
            action="append",
            default=[],
            metavar="NAME",
            help="module to import that registers tasks, such as one in this folder; repeatable",
        )
        group.add_argument("--split", default="validation", help="default validation")
        group.add_argument(
            "--num_examples", type=int, metavar="N", help="of each task, its first (default: all)"
        )
        group.add_argument(
            "--max_new_tokens", type=int, default=128, metavar="N", help="default 128"
        )
        group.add_argument("--json", metavar="FILE", help="also writes the metrics here")
        group.add_argument(
            "--output", metavar="FILE", help="writes every example and answer here, JSON lines"
        )

    def start_run(start):
        from data import cpu_tensorflow
        from data.text import user_data

        cpu_tensorflow.load()
        from launch.evaluation import seqio

        flags = start.flags
        for module in flags.module:
            user_data.import_mixtures(module=module)
        seqio.evaluate(
            start(),
            checkpoint=flags.checkpoint,
            params=flags.params,
            tasks=flags.task,
            split=flags.split,
            num_examples=flags.num_examples,
            max_new_tokens=flags.max_new_tokens,
            json_file=flags.json,
            output=flags.output,
        )

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.run.load_run:RunConfig",
            command="evaluate seqio",
            extra_flags=add_flags,
            run=start_run,
            default_files=load_run.default_files,
            unused={"VOCABULARY": "None"},
        )
    )

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from launch.evaluation import seqio_tasks
from launch.evaluation.seqio_answers import Answers
from launch.inference import row_files
from launch.run.load_run import LoadError, RunConfig


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
      {task: {"examples": their number, "metrics": what the task's functions return}}.

    Raises:
      LoadError: a task that cannot be evaluated, or numbers out of range.
    """
    if output:
        row_files.check_output(output)
    for flag, number in (("num_examples", num_examples), ("max_new_tokens", max_new_tokens)):
        if number is not None and number < 1:
            raise LoadError(f"--{flag}={number} must be at least 1.")
    found = [seqio_tasks.find(name, split) for name in dict.fromkeys(tasks)]
    results: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    with config.load(checkpoint, params=params) as run:
        for task in found:
            seqio_tasks.check_vocabulary(task, run.vocabulary)
        # All tasks are read before any is answered, so that errors come early.
        opened = [seqio_tasks.evaluator(task, split, num_examples) for task in found]
        asked = [seqio_tasks.examples(*pair) for pair in zip(opened, found, strict=True)]
        model = Answers(run, max_new_tokens)
        for task, evaluator, examples in zip(found, opened, asked, strict=True):
            wanted = seqio_tasks.outputs(task)
            predictions = scores = None
            if seqio_tasks.PREDICTION in wanted:
                predictions = model.predictions(examples)
            if seqio_tasks.SCORE in wanted:
                scores = model.scores(examples)
            metrics = seqio_tasks.compute(evaluator, task, predictions, scores)
            results[task.name] = {"examples": len(examples), "metrics": metrics}
            rows += _rows(task, examples, predictions, scores)
    if jax.process_index() == 0:
        shown = seqio_tasks.plain(results)
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
        row_files.write(output, rows, writer=jax.process_index() == 0)
    return results


def _rows(
    task: Any,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[str] | None,
    scores: Sequence[float] | None,
) -> Iterator[dict[str, Any]]:
    for i, example in enumerate(examples):
        row: dict[str, Any] = {"task": task.name, "example": i}
        for feature in seqio_tasks.FEATURES:
            row[feature] = task.output_features[feature].vocabulary.decode(example[feature])
        if predictions is not None:
            row["prediction"] = predictions[i]
        if scores is not None:
            row["score"] = scores[i]
        yield row


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics as a reader sees them, a line for each."""
    lines = []
    for task, found in results.items():
        lines.append(f"{task}, {found['examples']:,} examples")
        for name, value in found["metrics"].items():
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            lines.append(f"  {name}: {shown}")
    return "\n".join(lines)
