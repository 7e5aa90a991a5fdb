"""The work of `launch.evaluate code`: samples of a model or a file, their verdicts, and pass@k."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import tqdm

from data.sandbox import code_sandbox
from data.text import code_problems
from launch.config import setting_flags
from launch.evaluation.pass_at_k import mean_pass_at_k
from launch.inference import row_files

_TEMPERATURE, _TOP_P = (
    0.8,
    0.95,
)  # with several samples per problem, as in the paper that defines pass@k

Key = tuple[str, int]  # (task_id of a problem, index of a sample from 0)


class EvaluationError(ValueError):
    """Flags or solutions that do not match the problems."""


class Samples(Protocol):
    """A source of completions.

    Attributes:
      settings: everything that the completions depend on, as JSON.
      keys: keys of all completions.
    """

    settings: dict[str, Any]
    keys: Sequence[Key]

    def make(self, keys: Sequence[Key]) -> Iterator[tuple[Key, str]]:
        """Yields the completions of `keys`, in any order."""


class FileSamples:
    """Completions in a file of rows.

    Raises:
      EvaluationError: a row without a matching problem or a completion, or a problem without a row.
    """

    def __init__(self, path: str, problems: code_problems.Problems):
        self._completions: dict[Key, str] = {}
        counts: collections.Counter[str] = collections.Counter()
        example = '{"task_id": ..., "completion": "..."}'
        for where, row in row_files.read(path, example=example, flag="solutions"):
            id, completion = str(row.get("task_id")), row.get("completion")
            if id not in problems.problems:
                raise EvaluationError(f"{where}: there is no problem {id!r}.")
            if not isinstance(completion, str):
                raise EvaluationError(f"{where}: no 'completion'; rows are {example}.")
            self._completions[id, counts[id]] = completion
            counts[id] += 1
        without = [id for id in problems.problems if not counts[id]]
        if without:
            raise EvaluationError(
                f"--solutions={path} has none for {len(without)} problems, the first {without[0]!r}. "
                "Give one for each; an empty one fails."
            )
        content = json.dumps(list(self._completions.items()))
        self.settings = {"solutions": hashlib.sha256(content.encode()).hexdigest()}
        self.keys = tuple(self._completions)

    def make(self, keys: Sequence[Key]) -> Iterator[tuple[Key, str]]:
        return ((key, self._completions[key]) for key in keys)


class ModelSamples:
    """Completions of a model, with the settings of the flags."""

    def __init__(self, flags: Any, start: Any, problems: code_problems.Problems):
        from trainers.checkpoints import step_dir

        if flags.samples < 1:
            raise EvaluationError(f"--samples={flags.samples} must be at least 1.")
        several = flags.samples > 1
        temperature = flags.temperature
        if temperature is None:
            temperature = _TEMPERATURE if several else 0.0
        if several and temperature == 0:
            raise EvaluationError(
                f"--temperature=0 makes all --samples={flags.samples} of a problem the same: draw one, "
                "or set a temperature."
            )
        top_p = _TOP_P if flags.top_p is None and temperature else flags.top_p
        self._flags, self._start, self._problems = flags, start, problems
        self._sampling = {"temperature": temperature, "top_p": top_p}
        self.settings = {
            **self._sampling,
            "checkpoint": str(step_dir.resolve(flags.checkpoint)),
            "params": flags.params,
            "seed": flags.seed,
            "max_new_tokens": flags.max_new_tokens,
            "chat": flags.chat,
        }
        self.keys = [(id, n) for id in problems.problems for n in range(flags.samples)]

    def make(self, keys: Sequence[Key]) -> Iterator[tuple[Key, str]]:
        from launch.inference.generate import generate
        from trainers.decoding.settings import Sampling, Settings

        flags, wanted = self._flags, set(keys)
        ids = {id for id, _ in keys}
        # All samples of a problem are generated together, including those that are already in the file.
        todo = [
            (index, problem)
            for index, problem in enumerate(self._problems.problems.values())
            if problem.task_id in ids
        ]
        rows = generate(
            self._start(),
            [(f"problem {problem.task_id}", self._row(problem)) for _, problem in todo],
            checkpoint=flags.checkpoint,
            params=flags.params,
            settings=Settings(
                max_new_tokens=flags.max_new_tokens,
                num_samples=flags.samples,
                sampling=Sampling(**self._sampling),
            ),
            stops=() if flags.chat else self._problems.stops,
            seed=flags.seed,
            batch_size=flags.batch_size,
            indices=[index for index, _ in todo],
        )
        for row in rows:
            key = row["task_id"], row["sample"]
            if key in wanted:
                text = row["text"]
                yield key, self._problems.problems[key[0]].answer(text) if flags.chat else text

    def _row(self, problem: code_problems.Problem) -> dict[str, Any]:
        if self._flags.chat:
            messages = [{"role": "user", "content": problem.request}]
            return {"task_id": problem.task_id, "messages": messages}
        return {"task_id": problem.task_id, "text": problem.prompt}


def run(flags: Any, start: Any) -> dict[str, Any] | None:
    """Evaluates with the settings of the flags, prints the scores and returns the content of --json.

    Args:
      flags: flags of launch/evaluation/code.py.
      start: makes the configuration of the checkpoint's run; None with --solutions.

    Returns:
      The scores; None on all processes but the first.

    Raises:
      EvaluationError: flags, solutions or rows that do not match the problems.
      ProblemsError, SandboxError, DataError, RowFileError.
    """
    problems = code_problems.load(flags.problems)
    row_files.check_output(flags.output)
    limits = code_sandbox.Limits(
        **setting_flags.given(flags, code_sandbox.Limits), memory_bytes=flags.memory_mb << 20
    )
    samples: Samples
    if flags.checkpoint is None:
        samples = FileSamples(flags.solutions, problems)
    else:
        samples = ModelSamples(flags, start, problems)
    fewest = min(collections.Counter(id for id, _ in samples.keys).values())
    if wrong := [k for k in flags.k if not 1 <= k <= fewest]:
        raise EvaluationError(f"--k={wrong[0]}: there are {fewest} samples of a problem.")
    settings = {
        **samples.settings,
        "problems": problems.digest,
        "limits": dataclasses.asdict(limits),
    }
    writes = _writes(flags)
    with row_files.resumed(flags.output, writer=writes) as file:
        rows = CodeRows(file, settings)
        missing = [key for key in samples.keys if key not in rows.by_key]
        if len(missing) < len(samples.keys):
            there = len(samples.keys) - len(missing)
            print(f"{there:,} of {len(samples.keys):,} rows are there already", file=sys.stderr)
        with code_sandbox.Sandbox(limits, workers=flags.workers, require=flags.require) as sandbox:
            protections = dataclasses.asdict(sandbox.protections)
            completions = samples.make(missing) if missing else ()
            if not writes:
                collections.deque(completions, maxlen=0)  # generated by all processes together
                return None
            _try(completions, problems, sandbox, rows, count=len(missing))
    document = {
        **scores([rows.by_key[key] for key in samples.keys], flags.k, name=problems.name),
        "settings": settings,
        "protections": protections,
    }
    print(table(document))
    if flags.json:
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        pathlib.Path(flags.json).write_text(text, "utf-8")
    return document


class CodeRows:
    """Rows of samples and their verdicts, with which a stopped command can resume.

    Each row has "made_with", a hash of the settings; rows of other settings are errors.

    Args:
      file: file of the existing rows, to which new rows are added.
      settings: everything that the rows depend on, as JSON.

    Attributes:
      by_key: the row of each sample.

    Raises:
      EvaluationError: existing rows were made with other settings.
    """

    def __init__(self, file: row_files.ResumedRows, settings: Mapping[str, Any]):
        content = json.dumps(settings, sort_keys=True)
        self._made_with = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._file = file
        self.by_key: dict[Key, dict[str, Any]] = {}
        for place, row in file.rows:
            if row.get("made_with") != self._made_with:
                raise EvaluationError(
                    f"--output={place}: made with another checkpoint, other problems or other settings. "
                    "Choose another file, or delete this one."
                )
            self.by_key[row["task_id"], row["sample"]] = row

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds the row of a sample."""
        whole = {**row, "made_with": self._made_with}
        self._file.add(whole)
        self.by_key[row["task_id"], row["sample"]] = whole


def _writes(flags: Any) -> bool:
    if flags.checkpoint is None:
        return True
    import jax

    return jax.process_index() == 0


def _try(
    samples: Iterable[tuple[Key, str]],
    problems: code_problems.Problems,
    sandbox: code_sandbox.Sandbox,
    rows: CodeRows,
    *,
    count: int,
) -> None:
    """Runs programs in parallel with generation, and writes rows in the order in which samples are generated."""
    pending: collections.deque[tuple[Key, str, concurrent.futures.Future[code_sandbox.Result]]] = (
        collections.deque()
    )
    bar = tqdm.tqdm(total=count, desc="programs", file=sys.stderr, disable=None)

    def write_first() -> None:
        (id, sample), completion, future = pending.popleft()
        result = future.result()
        rows.add(
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

    with bar:
        try:
            for (id, sample), completion in samples:
                program = problems.problems[id].program(completion)
                pending.append(((id, sample), completion, sandbox.submit(program)))
                while pending and pending[0][2].done():
                    write_first()
        finally:  # run and write completions even if generating more of them fails
            while pending:
                write_first()


def scores(rows: Iterable[dict[str, Any]], ks: Sequence[int], *, name: str) -> dict[str, Any]:
    """Returns pass@k with its interval, and counts of the verdicts.

    Args:
      rows: rows with "task_id" and "status".
      ks: values of k.
      name: name of the benchmark.
    """
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
        "pass_at_k": {k: estimate.value for k, estimate in estimates.items()},
        "intervals": {k: [estimate.low, estimate.high] for k, estimate in estimates.items()},
        "statuses": dict(statuses.most_common()),
    }


def table(document: dict[str, Any]) -> str:
    """Returns a table of the scores."""
    lines = [
        f"{document['problems']}: {document['num_problems']:,} problems, "
        f"{document['num_samples']:,} programs"
    ]
    for k, value in document["pass_at_k"].items():
        low, high = document["intervals"][k]
        lines.append(f"  pass@{k:<5} {value:.4f}  (95 % interval {low:.4f} to {high:.4f})")
    lines += [f"  {status:10} {count:7,}" for status, count in document["statuses"].items()]
    return "\n".join(lines)
