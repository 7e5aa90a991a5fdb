"""A paper's evaluation suite on a checkpoint: every benchmark, means by group, and the missing data sets.

Example, after a run in /tmp/espalier_tiny (see espalier train --help), `pip install -e
'.[eval]'` and with evaluation sets in /data/eval:

  espalier evaluate harness --checkpoint=/tmp/espalier_tiny --suite=code_mix --data_dir=/data/eval \\
    --code_results=/tmp/humaneval.json --json=/tmp/suite.json

Sets are read from local copies of their public repositories (launch/evaluate/suites/local_data.py) and never
downloaded. The table names the remedy for each missing set, and for each benchmark of code without --code_results (a
--json file of espalier evaluate code). Prompts, shots and metrics are in the task files of the suite's paper,
launch/papers/NAME/harness_tasks, which lm-evaluation-harness runs. With `--include_path launch/papers/NAME/harness_tasks`
and ESPALIER_EVAL_DATA=DIR they are tasks of espalier lm_eval too.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espalier.common.ranges import Size
from espalier.common.storage import output_files
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.evaluate.suites import scores
from espalier.launch.inference import row_files
from espalier.launch.load import load_run

if TYPE_CHECKING:
    from espalier.launch.evaluate.suites.scores import Suite, Task


class SuiteError(ValueError):
    """A suite that cannot be evaluated with these flags."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteFlags:
    """Data and arguments of an evaluation, and the files to write.

    Attributes:
      data_dir: folder of all evaluation sets (default: $ESPALIER_EVAL_DATA).
      code_results: a --json file of espalier evaluate code; repeatable.
      model_args: more arguments of the model, like --model_args of espalier lm_eval, such as batch_tokens=16384,dtype=float32.
      groups: name of a group of the suite to evaluate alone; repeatable.
      limit: number of examples of each benchmark (default: all).
      json: write the results to this JSON file.
      samples: file to write every example and answer to, JSON lines.
    """

    data_dir: str | None = None
    code_results: Sequence[str] | None = None
    model_args: str = ""
    groups: Sequence[str] | None = None
    limit: Size | None = None
    json: str | None = None
    samples: str | None = None


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    group = parser.add_argument_group("evaluation")
    suites = scores.names()
    group.add_argument(
        "--suite",
        choices=suites,
        default=suites[0],
        required=len(suites) > 1,
        help="run the suite of this paper",
    )
    setting_flags.add(group, SuiteFlags)


def _run(flags: argparse.Namespace) -> None:
    settings = SuiteFlags(**setting_flags.given(flags, SuiteFlags))
    evaluate(flags.checkpoint, flags.params, flags.suite, settings)


def evaluate(checkpoint: str, params: str, suite_name: str, flags: SuiteFlags) -> None:
    """Evaluates a checkpoint on the benchmarks with data, prints the table and writes the files.

    Raises:
      SuiteError: no data at all, or files that cannot be read or written.
      LoadError, WrongDataError: a checkpoint or a set that cannot be read.
    """
    from espalier.launch.lm_eval import __main__ as lm_eval

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"  # missing sets are reported at once, without network access
    row_files.check_output(flags.json, "json")
    row_files.check_output(flags.samples, "samples")
    lm_eval.register()
    try:
        suite = scores.find(suite_name).only(flags.groups)
    except ValueError as error:
        raise SuiteError(f"--groups: {error}") from None
    measured = code_results(flags.code_results or (), load_run.place(checkpoint), params)
    present, missing = _data(suite, measured, flags.data_dir)
    if not present and not measured:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in missing.items())
        raise SuiteError(f"There is no evaluation set:{reasons}")
    results = _evaluated(checkpoint, params, suite, present, flags) if present else {}
    results |= measured
    measured_scores = {name: result["score"] for name, result in results.items()}
    groups, total = scores.means(suite, measured_scores)
    details = {**missing, **{k: f"n = {v['n']:,}" for k, v in results.items()}}
    _print(suite, measured_scores, details)
    if flags.json:
        document = {
            "checkpoint": os.path.abspath(checkpoint),
            "params": params,
            "suite": suite.name,
            "data_dir": flags.data_dir,
            "limit": flags.limit,
            "model_args": flags.model_args,
            "benchmarks": results,
            "groups": groups,
            "total": total,
            "missing": missing,
        }
        row_files.write_json(flags.json, document)


def code_results(files: Sequence[str], step: str, params: str) -> dict[str, dict[str, Any]]:
    """Returns {"score": pass@1, "n": problems} by benchmark, from files written by espalier evaluate code --json.

    Args:
      files: paths of the files.
      step, params: the step directory and the choice of its parameters that must have the results.

    Raises:
      SuiteError: a file that is not such a result or is of another checkpoint, or two files for one benchmark.
    """
    results: dict[str, dict[str, Any]] = {}
    for path in files:
        try:
            result = json.loads(pathlib.Path(path).read_bytes())
            name, value = result["problems"], float(result["pass_at_k"]["1"])
            count = int(result["num_problems"])
            made_with = result.get("settings", {})
            of, chosen = made_with.get("checkpoint"), made_with.get("params")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SuiteError(
                f"--code_results={path} is not a file of espalier evaluate code --json with k=1 "
                f"({type(error).__name__}: {error})."
            ) from None
        if name in results:
            raise SuiteError(
                f"--code_results={path}: another file has results of {name} too; give one."
            )
        if of is not None and os.path.realpath(of) != os.path.realpath(step):
            raise SuiteError(
                f"--code_results={path} is of the checkpoint {of}, not of {step}: evaluate this one with "
                "espalier evaluate code."
            )
        if chosen not in (None, params):
            raise SuiteError(
                f"--code_results={path} was made with --params={chosen}, and the other benchmarks have --params={params}: "
                "evaluate both with the same."
            )
        results[name] = {"score": value, "n": count}
    return results


def _data(
    suite: "Suite", measured: Mapping[str, Any], data_dir: str | None
) -> tuple[list[str], dict[str, str]]:
    """Returns (benchmarks with well-formed sets, reason by benchmark why the others are not evaluated)."""
    present, missing = [], {}
    for name in suite.benchmarks:
        if name in measured:
            continue
        if reason := suite.missing(name, data_dir):
            missing[name] = reason
        else:
            present.append(name)
    return present, missing


def _model_args(text: str) -> dict[str, Any]:
    """Returns --model_args as `espalier lm_eval` reads them; raises SuiteError for what cannot be read, or is a flag."""
    from lm_eval._cli.utils import key_val_to_dict

    try:
        given = key_val_to_dict(text)
    except ValueError as error:
        raise SuiteError(f"--model_args={text}: {error}.") from None
    for name in {"checkpoint", "params"} & given.keys():
        raise SuiteError(f"--model_args: {name} is a flag of this command: give --{name}.")
    return given


def _evaluated(
    checkpoint: str, params: str, suite: "Suite", present: Sequence[str], flags: SuiteFlags
) -> dict[str, Any]:
    """Returns {"score", "stderr", "n", ...} for each benchmark."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from espalier.launch.lm_eval.model import EspalierLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    model_args = _model_args(flags.model_args)
    # Sets are checked before the model is restored: errors in sets are more common.
    tasks = {name: suite.task(name) for name in present}
    manager = TaskManager(
        include_path=_folders(suite, list(tasks.values())),
        include_defaults=False,
        metadata={"data_dir": flags.data_dir},
    )
    loaded = manager.load(_specs(list(tasks.values())))
    model = EspalierLM(checkpoint, params=params, **model_args)
    try:
        evaluated = simple_evaluate(
            model,
            tasks=list(loaded["tasks"].values()),
            task_manager=manager,
            limit=flags.limit,
            log_samples=flags.samples is not None,
        )
    finally:
        model.close()
    if flags.samples:
        _write_samples(flags.samples, evaluated["samples"])
    return {
        name: _plain_names(
            evaluated["results"][task.name],
            evaluated["n-samples"][task.name]["effective"],
            task.metric,
        )
        for name, task in tasks.items()
    }


def _folders(suite: "Suite", tasks: Sequence["Task"]) -> list[str]:
    """Returns the folders of the files that describe tasks: the suite's own, and those of the harness."""
    import lm_eval.tasks

    own = [suite.tasks] if any(task.settings is None for task in tasks) else []
    harness = os.path.dirname(lm_eval.tasks.__file__)
    return own + [os.path.join(harness, one) for one in sorted({t.folder for t in tasks} - {""})]


def _specs(tasks: Sequence["Task"]) -> list[Any]:
    """Returns each task once, as TaskManager.load takes them: by name, by configuration, or in a group with its changes."""
    specs: dict[str, Any] = {}
    for task in tasks:
        changed = {"task": task.name, **(task.settings or {})}
        if task.folder:
            specs[task.name] = {"group": f"changed_{task.name}", "task": [changed]}
        else:
            specs[task.name] = task.name if task.settings is None else changed
    return list(specs.values())


def _plain_names(values: Mapping[str, Any], count: int, metric: str) -> dict[str, Any]:
    """Returns the harness's numbers, with the name of the filter removed from their names, and `metric` as 'score'."""
    named = {key.partition(",")[0]: value for key, value in values.items() if "," in key}
    if metric != "score":
        name, _, filter = metric.partition(",")
        named["score"] = values[f"{name},{filter or 'none'}"]
        named["score_stderr"] = values.get(f"{name}_stderr,{filter or 'none'}")
    stderr = named.pop("score_stderr", None)
    metrics = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in named.items()
        if not name.endswith("_stderr")
    }
    return {**metrics, "stderr": stderr if isinstance(stderr, float) else None, "n": count}


def _write_samples(path: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    from lm_eval.utils import handle_non_serializable

    with output_files.opened(path) as file:
        for task, rows in samples.items():
            for row in rows:
                line = {"task": task, **row}
                text = json.dumps(line, default=handle_non_serializable, ensure_ascii=False)
                file.write(f"{text}\n".encode("utf-8", "backslashreplace"))


def _print(suite: "Suite", by_benchmark: Mapping[str, float], details: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    shots = ", 0-shot" if suite.has_total else ""
    table = Table(title=f"{suite.name}: scores in %{shots}")
    for title, justify in (("group", "left"), ("benchmark", "left"), ("score", "right")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("examples, or how to get them", overflow="fold")
    last = ""
    for group, benchmark, score, detail in scores.table(suite, by_benchmark, details):
        if group != last and last:
            table.add_section()
        style = "bold" if benchmark.startswith("mean") else None
        table.add_row("" if group == last else group, benchmark, score, detail, style=style)
        last = group
    Console(soft_wrap=False).print(table)


main = cli.command(__doc__, "evaluate harness", _run, add_flags=_add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
