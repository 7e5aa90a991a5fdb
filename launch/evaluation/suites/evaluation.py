"""The work of `launch.evaluate harness`: evaluates a checkpoint on the benchmarks of a suite whose data sets exist."""

import argparse
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch import lm_eval
from launch.evaluation.suites import local_data, scores
from launch.evaluation.suites.scores import Suite
from trainers.checkpoints import step_dir


class SuiteError(ValueError):
    """A suite that cannot be evaluated with these flags."""


def evaluate(flags: argparse.Namespace) -> None:
    """Evaluates with the flags of launch.evaluate harness, prints the table and writes the files.

    Raises:
      SuiteError: no data at all, or files that cannot be read or written.
      LoadError, WrongDataError: a checkpoint or a set that cannot be read.
    """
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"  # A missing set is reported at once, without network access.
    if flags.limit is not None and flags.limit < 1:
        raise SuiteError(f"--limit={flags.limit} must be at least 1.")
    for path in filter(None, (flags.json, flags.samples)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise SuiteError(f"{path}: there is no such folder. Create it first.")
    lm_eval.register()
    suite = scores.find(flags.suite)
    measured = code_results(flags.code_results, step_dir.resolve(flags.checkpoint))
    present, missing = _data(suite, measured, flags.data_dir)
    if not present and not measured:
        raise SuiteError(
            "No evaluation set is there:\n  " + "\n  ".join(f"{k}: {v}" for k, v in missing.items())
        )
    results = _run(suite, present, flags) if present else {}
    results |= measured
    measured_scores = {name: result["score"] for name, result in results.items()}
    groups, total = scores.means(suite, measured_scores)
    details = {**missing, **{k: f"n = {v['n']:,}" for k, v in results.items()}}
    _print(suite, measured_scores, details)
    if flags.json:
        document = {
            "checkpoint": os.path.abspath(flags.checkpoint),
            "params": flags.params,
            "suite": suite.name,
            "data_dir": flags.data_dir,
            "limit": flags.limit,
            "model_args": flags.model_args,
            "benchmarks": results,
            "groups": groups,
            "total": total,
            "missing": missing,
        }
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        pathlib.Path(flags.json).write_text(text, "utf-8")


def code_results(files: Sequence[str], step: Any = None) -> dict[str, dict[str, Any]]:
    """Returns {"score": pass@1, "n": problems} by benchmark, from files written by launch.evaluate code --json.

    Args:
      files: paths of the files.
      step: the required step directory of the results; None for any.

    Raises:
      SuiteError: a file that is not such a result or is of another checkpoint, or two files for one benchmark.
    """
    results: dict[str, dict[str, Any]] = {}
    for path in files:
        try:
            result = json.loads(pathlib.Path(path).read_bytes())
            name, value = result["problems"], float(result["pass_at_k"]["1"])
            count = int(result["num_problems"])
            of = result.get("settings", {}).get("checkpoint")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SuiteError(
                f"--code_results={path} is not what launch.evaluate code --json writes with k=1 "
                f"({type(error).__name__}: {error})."
            ) from None
        if name in results:
            raise SuiteError(f"--code_results={path}: {name} is given twice.")
        if None not in (step, of) and os.path.realpath(of) != os.path.realpath(step):
            raise SuiteError(
                f"--code_results={path} is of {of}, and not of the checkpoint {step}: measure this one with "
                "launch.evaluate code."
            )
        results[name] = {"score": value, "n": count}
    return results


def _data(
    suite: Suite, measured: Mapping[str, Any], data_dir: str | None
) -> tuple[list[str], dict[str, str]]:
    """Returns (benchmarks with well-formed sets, reason by benchmark why the others are not evaluated)."""
    present, missing = [], {}
    for name in suite.benchmarks:
        if name in measured:
            continue
        if name in suite.programs:
            missing[name] = suite.programs[name]
            continue
        try:
            local_data.find(suite.sources[name], data_dir)
            present.append(name)
        except local_data.MissingDataError as error:
            missing[name] = str(error)
    return present, missing


def _run(suite: Suite, present: Sequence[str], flags: argparse.Namespace) -> dict[str, Any]:
    """Returns {"score", "stderr", "n", ...} for each benchmark."""
    import datasets
    from lm_eval import simple_evaluate, utils
    from lm_eval.tasks import TaskManager

    from launch.evaluation.lm_eval.model import EspalierLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # Sets are checked before the model is restored: errors in sets are more common.
    manager = TaskManager(
        include_path=suite.tasks,
        include_defaults=False,
        metadata={"data_dir": flags.data_dir},
    )
    names = [f"{suite.name}_{name}" for name in present]
    loaded = manager.load(names)
    model = EspalierLM(
        flags.checkpoint, params=flags.params, **utils.simple_parse_args_string(flags.model_args)
    )
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
        name: _result(evaluated["results"][task], evaluated["n-samples"][task]["effective"])
        for name, task in zip(present, names, strict=True)
    }


def _result(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Returns the harness's numbers under plain names."""
    named = {key.partition(",")[0]: value for key, value in values.items() if "," in key}
    stderr = named.pop("score_stderr", None)
    metrics = {name: value for name, value in named.items() if not name.endswith("_stderr")}
    return {**metrics, "stderr": stderr if isinstance(stderr, float) else None, "n": count}


def _write_samples(path: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    from lm_eval.utils import handle_non_serializable

    with open(path, "w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in rows:
                line = {"task": task, **row}
                file.write(
                    json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n"
                )


def _print(suite: Suite, by_benchmark: Mapping[str, float], details: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{suite.name}: scores in %, 0-shot")
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
