"""Rank classification: accuracy of the most probable answer choice, for each prompt template of held-out tasks.

Example, after a run with t5x_configs/data/instructions.gin (docs/use/instructions.md):

  espalier evaluate ranks --checkpoint=/runs/tuned --trust_config --json=/tmp/ranks.json

Every answer choice is scored by its log-likelihood after the prompt, as a sum and per token. A set's accuracy is the
median over templates; a task's is the mean over its sets, and the result is the mean over tasks. The tasks are those of
the run's config.gin, and reading it calls the functions that it names, hence --trust_config. --gin.HELD_OUT evaluates
others.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.inference import row_files
from espalier.launch.load import load_run, side_by_side
from espalier.launch.load.load_run import LoadError, RunConfig

GIN = "t5x_configs/runs/evaluate_ranks.gin"


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = load_run.add_flags(parser)
    load_run.add_adapter_flag(group)
    load_run.add_trust_flag(group)
    setting_flags.add(group, evaluate, names=("json",))


def _run(start: cli.Start) -> None:
    row_files.check_output(getattr(start.flags, "json", None), "json")
    start(**setting_flags.given(start.flags, evaluate))


def evaluate(
    *,
    config: RunConfig,
    register: Sequence[Callable[[], Any]],
    checkpoint: str = "",
    params: str = "auto",
    json: setting_flags.File | None = None,
    adapter: Sequence[str] = (),
) -> dict[str, Any]:
    """Ranks the answer choices of held-out tasks, and prints the accuracies.

    Args:
      config: configuration of the checkpoint's run.
      register: functions that register SeqIO tasks, one of them with held-out tasks.
      checkpoint: step or run directory.
      params: see launch/load/load_run.py.
      json: also write the results to this JSON file.
      adapter: directories of adapters of this checkpoint, each of which is evaluated.

    Returns:
      {"accuracy", "accuracy_per_token", "base_rate", "tasks": {task: {the same, "rows", "templates": {set: {template: the
      same}}}}}; the base rate is the accuracy of always giving the one best choice, by its number. With adapters {"adapters": {directory: this}}.

    Raises:
      LoadError: there are no held-out tasks, or they have another form or vocabulary than the run.
      DataError: a template does not fit a row.
    """
    import jax

    from espalier.data import tasks
    from espalier.data.instructions import ranking
    from espalier.data.instructions.tasks import ORIGIN
    from espalier.launch.evaluate import seqio_tasks

    earlier = tasks.registered(ORIGIN)  # of another call in this process
    for call in register:
        call()
    held_out = {
        name: facts
        for name, facts in tasks.registered(ORIGIN).items()
        if "held_out" in facts and facts is not earlier.get(name)
    }
    encodes = config.model.row.encodes
    if not held_out:
        raise LoadError(
            f"There are no held-out tasks: give --gin_file=t5x_configs/data/instructions{'' if encodes else '_decoder'}.gin or a "
            "file that includes it, and set HELD_OUT = {'task': ['set', ...]}."
        )
    form = "encoder_decoder" if encodes else "decoder"
    for name, facts in held_out.items():
        if facts["form"] != form:
            raise LoadError(
                f"The task {name!r} has form = {facts['form']!r}, but the run's model is of the form {form!r}: set "
                f"FORM = {form!r}."
            )
        facts["source"].num_input_examples("validation")  # errors come before the model is loaded
    results: dict[str | None, dict[str, Any]] = {}
    loads = side_by_side.load(config, checkpoint, adapter, params=params, encoder_decoders=True)
    with loads as runs:
        model = None
        for directory, run in runs:
            model = seqio_tasks.answers_of(run, 1, model)
            accuracies = {}
            for name in held_out:
                task = seqio_tasks.find(name, "validation")
                seqio_tasks.check_vocabulary(task, run.vocabulary)
                evaluator = seqio_tasks.evaluator(task, "validation", None)
                scores = model.scores(seqio_tasks.examples(evaluator, task))
                examples = evaluator.cached_task_datasets[name].as_numpy_iterator()
                options = [ranking.option("", example, is_target=True) for example in examples]
                accuracies[name] = {
                    **seqio_tasks.compute(evaluator, task, None, scores),
                    **ranking.base(options),
                }
            results[directory] = summarised(held_out, accuracies)
    of_all = {"adapters": results} if adapter else results[None]
    if jax.process_index() == 0:
        for directory, each in results.items():
            print(_table(each) if directory is None else f"--- {directory}\n{_table(each)}")
        if json:
            document = {"checkpoint": os.path.abspath(checkpoint), "params": params, **of_all}
            row_files.write_json(json, document)
    return of_all


def summarised(
    held_out: Mapping[str, Mapping[str, Any]], accuracies: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Returns the results of `evaluate`.

    Args:
      held_out: SeqIO task -> {"held_out": evaluated task, "set", "template"}.
      accuracies: SeqIO task -> its metrics.
    """
    from espalier.data.instructions import ranking

    metrics = (*ranking.METRICS, ranking.BASE_RATE)
    templates: dict[str, dict[str, dict[str, Any]]] = {}
    for name, facts in held_out.items():
        sets = templates.setdefault(facts["held_out"], {})
        sets.setdefault(facts["set"], {})[facts["template"]] = accuracies[name]
    tasks = {
        task: {
            **ranking.summary(sets, metrics),
            "rows": sum(max(one["rows"] for one in each.values()) for each in sets.values()),
            "templates": sets,
        }
        for task, sets in templates.items()
    }
    means = {
        metric: statistics.fmean(each[metric] for each in tasks.values()) for metric in metrics
    }
    return {**means, "tasks": tasks}


def _table(results: Mapping[str, Any]) -> str:
    rows = {**results["tasks"], "mean": results}
    width = max(map(len, rows))
    lines = [f"{'task':{width}}  accuracy  per token  base rate    rows"]
    lines += [
        f"{name:{width}}  {each['accuracy']:8.4f}  {each['accuracy_per_token']:9.4f}  {each['base_rate']:9.4f}  "
        + (f"{each['rows']:6,}" if "rows" in each else f"{'':6}")
        for name, each in rows.items()
    ]
    return "\n".join(lines)


main = load_run.trusting_command(
    __doc__,
    "evaluate ranks",
    _run,
    _add_flags,
    entry="espalier.launch.evaluate.ranks:evaluate",
    own=GIN,
)

if __name__ == "__main__":
    raise SystemExit(main())
