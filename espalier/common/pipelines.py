"""Steps of independent work over a whole corpus, by a pipeline of Apache Beam: on a cluster, or in processes of this machine.

A step does one piece of work for each of its elements, such as writing one shard, and begins when the step before it has ended.
Results go to files, never through the pipeline. A cluster may do an element twice, at the same time or after a worker was lost, and
a pipeline may be started again: so a piece of work writes the same bytes each time, replaces files whole, and the step that
completes the result (a manifest) is the last one, with one element. Apache Beam, the extra `beam`, is imported here only.
"""

import argparse
import contextlib
import dataclasses
import os
import platform
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from espalier.common import spelling, stages, versions
from espalier.common.storage import paths

_DIRECT = ("direct", "directrunner", "fnapirunner", "bundlebaseddirectrunner")
_FORWARDING = (
    "PortableRunner",
    "FlinkRunner",
    "SparkRunner",
)  # job servers have options of their own
_NAMESPACE = "espalier"  # of Beam's counters
_POLL_SECONDS = 1.0


class PipelineError(RuntimeError):
    """A pipeline that cannot be started, or that failed."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One piece of work for each of several elements, in any order.

    Attributes:
      name: what is done, such as 'write shards'; unique in a pipeline.
      work: called with an element; returns counts, which are summed over all elements, such as {'records': 10}. A function of a
        module, or a bound method of a dataclass; it is pickled once, so what all elements share belongs to it.
      elements: small values, such as the numbers of shards.
      paths: files and folders that the work reads or writes; those that are no addresses must be there on every worker.
    """

    name: str
    work: Callable[[Any], Mapping[str, int]]
    elements: Sequence[Any]
    paths: tuple[str, ...] = ()


def run(
    steps: Sequence[Step],
    *,
    beam_options: Sequence[str],
    progress: Callable[[], str] | None = None,
) -> dict[str, int]:
    """Does all steps by a pipeline, one after the other; prints and returns the sums of their counts.

    Args:
      steps: the steps.
      beam_options: options of the pipeline, see `parsed_options`.
      progress: returns how far the work is, which is said every ten seconds.

    Raises:
      PipelineError: Apache Beam is not installed, an option is unknown, the pipeline failed, or a worker has other versions or
        does not see a path.
    """
    flags = checked_options(beam_options)
    beam = apache_beam()
    # The runners of this machine show all that workers log.
    quiet = ["--default_sdk_harness_log_level=ERROR"] if is_local(flags) else []
    options = beam.options.pipeline_options.PipelineOptions([*quiet, *flags])
    pipeline = beam.Pipeline(runner=_runner(options), options=options)
    done = None
    for step in steps:
        done = _add(beam, pipeline, step, done)
    text = ", then ".join(f"{step.name} ({len(step.elements):,})" for step in steps)
    print(f"pipeline {' '.join(flags)}: {text}", file=sys.stderr, flush=True)
    if not is_local(flags) and (shared := _of_machine(steps)):
        print(f"every worker must see {', '.join(shared)}", file=sys.stderr, flush=True)
    with stages.stage(progress or (lambda: f"pipeline: {text}")):
        try:
            result = pipeline.run()
            state = result.wait_until_finish()
        except Exception as error:
            raise PipelineError(
                _problem("".join(traceback.format_exception_only(error)))
            ) from error
    if state not in ("DONE", None):
        raise PipelineError(f"the pipeline ended in state {state}; its runner's log says why")
    counts = _counters(beam, result)
    text = "".join(f", {n:,} {name}" for name, n in counts.items())
    print(f"pipeline done{text}", file=sys.stderr, flush=True)
    return counts


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --beam_pipeline_options, which `run` takes as `beam_options`."""
    parser.add_argument(
        "--beam_pipeline_options",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="do the work by an Apache Beam pipeline with these options, such as --runner=DataflowRunner,--region=REGION; "
        "may be repeated",
    )


def apache_beam() -> Any:
    """Returns the module apache_beam; raises PipelineError if the extra is not installed."""
    try:
        import apache_beam
        import apache_beam.options.pipeline_options
    except ImportError as error:
        raise PipelineError(
            f"--beam_pipeline_options needs Apache Beam, which is not installed ({error}): pip install -e '.[beam]' into an "
            "environment of its own (`make beam` makes .venv-beam), or remove the flag to use the processes of this machine."
        ) from None
    return apache_beam


def parsed_options(texts: Sequence[str]) -> list[str]:
    """Returns options as `--name=value` from texts with one or several of them, separated by commas, as SeqIO and TFDS take them.

    A comma separates where an option follows (`--name`, or `name=`), so that values may have commas. The dashes may be left out.

    Raises:
      PipelineError: a text begins with no option.
    """
    found = []
    for text in texts:
        for option in re.split(r",(?=\s*(?:--\w|\w+=))", text):
            option = option.strip()
            if not re.match(r"(--)?[A-Za-z]\w*(=|$)", option):
                raise PipelineError(
                    f"--beam_pipeline_options={text!r}: {option!r} is no option. Give --NAME=VALUE, separated by commas, such as "
                    "--beam_pipeline_options=--runner=DirectRunner,--direct_num_workers=4"
                )
            found.append(option if option.startswith("--") else f"--{option}")
    return found


def is_local(options: Sequence[str]) -> bool:
    """Returns whether all workers of a pipeline are on this machine, and so see its files."""
    values = dict(option[2:].partition("=")[::2] for option in options)
    runner = values.get("runner", "DirectRunner").lower()
    return runner in _DIRECT or values.get("environment_type") == "LOOPBACK"


def checked_options(texts: Sequence[str]) -> list[str]:
    """Returns `parsed_options`, after checking their names.

    Raises:
      PipelineError: Apache Beam is not installed, or it has no such option or runner.
    """
    flags = parsed_options(texts)
    options = apache_beam().options.pipeline_options
    with _exits_as_errors():
        given = options.PipelineOptions(flags)
        runner = given.view_as(options.StandardOptions).runner or "DirectRunner"
        known = given.get_all_options()
        unknown = given.get_all_options(retain_unknown_options=True).keys() - known.keys()
    short = runner.rpartition(".")[2]
    if unknown and short not in _FORWARDING:
        name = min(unknown)
        raise PipelineError(
            f"--beam_pipeline_options: Apache Beam has no option --{name}; {spelling.nearest(name, known)}"
        )
    names = [*options.StandardOptions.KNOWN_RUNNER_NAMES, *_DIRECT]
    if "." not in runner and not any(
        name.lower() in (runner.lower(), f"{runner.lower()}runner") for name in names
    ):
        raise PipelineError(
            f"--beam_pipeline_options: there is no runner {runner!r}; {spelling.nearest(runner, names)}"
        )
    return flags


@contextlib.contextmanager
def _exits_as_errors() -> Iterator[None]:
    """Context manager: argparse, which has said what is wrong, ends in an error and not the process."""
    try:
        yield
    except SystemExit:
        raise PipelineError("--beam_pipeline_options: a value is not valid, see above") from None


def _runner(options: Any) -> Any:
    """Returns the runner, or None for Beam's choice by name.

    The direct runner would first look for another program (Prism), which it downloads.
    """
    name = options.view_as(apache_beam().options.pipeline_options.StandardOptions).runner
    if name is not None and name.lower() not in _DIRECT:
        return None
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle

    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    provision = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(provision))


def _add(beam: Any, pipeline: Any, step: Step, before: Any) -> Any:
    """Adds a step to a pipeline; returns how many of its elements are done, which the next step waits for."""
    waits = [] if before is None else [beam.pvalue.AsSingleton(before)]
    return (
        pipeline
        | f"{step.name}: begin" >> beam.Create([None])
        | f"{step.name}: list" >> beam.FlatMap(_listed, list(step.elements), *waits)
        | f"{step.name}: distribute" >> beam.Reshuffle()
        | f"{step.name}" >> beam.Map(_do, step.work, versions.own(), step.paths)
        | f"{step.name}: done" >> beam.combiners.Count.Globally()
    )


def _listed(_: None, elements: Sequence[Any], before: int = 0) -> Sequence[Any]:
    del before  # only waited for
    return elements


def _do(
    element: Any,
    work: Callable[[Any], Mapping[str, int]],
    expected: Mapping[str, str],
    needed: Sequence[str],
) -> None:
    """Does one element on a worker."""
    from apache_beam.metrics import Metrics

    check_versions(expected)
    for path in needed:
        if not paths.is_remote(path) and not os.path.exists(path):
            raise PipelineError(
                f"worker {platform.node()} does not see {path}: mount the folder at the same place on every worker, or give an "
                "address of an object store"
            )
    for name, count in work(element).items():
        Metrics.counter(_NAMESPACE, name).inc(int(count))


def check_versions(expected: Mapping[str, str]) -> None:
    """Raises PipelineError if this worker has other versions than the process that started the pipeline."""
    if differing := versions.differing(expected, versions.own()):
        raise PipelineError(
            f"worker {platform.node()} has other versions than the process that started the pipeline, {differing}: give all workers "
            "its environment"
        )


def _of_machine(steps: Sequence[Step]) -> list[str]:
    return sorted({path for step in steps for path in step.paths if not paths.is_remote(path)})


def _counters(beam: Any, result: Any) -> dict[str, int]:
    wanted = beam.metrics.MetricsFilter().with_namespace(_NAMESPACE)
    total: Counter[str] = Counter()
    for counter in result.metrics().query(wanted)["counters"]:
        total[counter.key.metric.name] += counter.result
    return dict(sorted(total.items()))


def _problem(text: str) -> str:
    """Returns the message of the error of this project in the text of a runner's error, or else its last line."""
    text = re.sub(r" \[while running '.*?'\]", "", text.replace("\\n", "\n"))
    own = re.findall(r"^(?:espalier\.[\w.]+|ValueError|OSError): (.+)$", text, re.MULTILINE)
    lines = list(filter(None, map(str.strip, text.splitlines())))
    if own:
        return f"the pipeline failed: {own[-1]}"
    reason = lines[-1] if lines else "its runner gives no reason"
    return (
        f"the pipeline failed ({reason}). What is done is kept: the same command goes on after it"
    )
