"""Makes faults on purpose and counts how many the project withstands: the table of docs/evidence/reliability.md.

Kills, damaged files, full and failing disks, NaN, wrong configurations, hostile files and more, on small runs of a
minute or less. Examples, from a checkout: a short sample of each row, and then all, in at most an hour on two cores:

  python -m tests.faults --out=/tmp/faults --sample
  python -m tests.faults --out=/tmp/faults --workers=2

Results are appended to OUT/results.jsonl, so a stopped table goes on with the same command. Every case that did not
hold is printed with the command that runs it again. The exit status is 0 if all held, 1 if something did not, 2 for
an error in the flags, and 75 after Ctrl-C or SIGTERM. `--write` also writes docs/evidence/reliability.md and reliability.json.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from espalier.launch import cli, environment

PROGRAM = "python -m tests.faults"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = cli.make_parser(__doc__, PROGRAM)
    parser.add_argument("--out", required=True, metavar="DIR", help="work folder, with all results")
    parser.add_argument("--rows", metavar="1,2,5", help="rows to run (default: all)")
    parser.add_argument("--case", metavar="NAME", help="run only this case, again if it is done")
    parser.add_argument("--sample", action="store_true", help="runs a few cases of each row")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of all choices (default 0)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="cases that run at the same time (1)"
    )
    parser.add_argument("--write", action="store_true", help="writes the table into docs/evidence/")
    flags = parser.parse_args(argv)

    def call() -> int:
        with cli.prepared(PROGRAM, own=argv is None, huge_pages=False):
            return _run(flags)

    try:
        return cli.status_of(call)
    except argparse.ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.USAGE_ERROR


def _run(flags: argparse.Namespace) -> int:
    from tests.faults import report, worker
    from tests.faults.table import selected

    if flags.workers < 1:
        raise argparse.ArgumentError(None, f"--workers={flags.workers}: give 1 or more.")
    rows = worker.rows()
    if flags.rows:
        numbers = _numbers(flags.rows, {row.number for row in rows})
        rows = [row for row in rows if row.number in numbers]
    cases = {row.number: selected(row, flags.seed, sample=flags.sample) for row in rows}
    planned = {number: [case.name for case in own] for number, own in cases.items()}
    out = pathlib.Path(os.path.abspath(flags.out))
    (out / "corpus").mkdir(parents=True, exist_ok=True)
    _check_seed(out, flags.seed)
    path = out / "results.jsonl"
    if flags.case is not None:
        planned = {
            number: [x for x in names if x == flags.case] for number, names in planned.items()
        }
        if not any(planned.values()):
            raise argparse.ArgumentError(
                None, f"--case={flags.case}: no such case in these rows. Give its --rows too."
            )
    done = {} if flags.case is not None else report.read(path)
    slow = {(n, case.name) for n, own in cases.items() for case in own if case.own_process}
    keys = [(n, name) for n, names in planned.items() for name in names if (n, name) not in done]
    keys.sort(key=lambda key: key in slow)  # quick cases first; otherwise in order
    interrupted = _run_cases(keys, out, flags)
    summaries = report.summarise(rows, planned, report.read(path))
    print("\n".join(report.lines(summaries, flags.seed)))
    if flags.write and not interrupted:
        command = " ".join([PROGRAM, *sys.argv[1:]])
        folder = pathlib.Path(environment.ROOT, "docs", "evidence")
        report.write(summaries, seed=flags.seed, command=command, folder=folder)
    if interrupted:
        return cli.INTERRUPTED
    return int(any(s.failures or s.done < s.planned for s in summaries))


def _numbers(text: str, known: set[int]) -> set[int]:
    numbers = {int(part) if part.strip().isdecimal() else 0 for part in text.split(",")}
    if unknown := numbers - known:
        raise argparse.ArgumentError(
            None,
            f"--rows={text}: there are no rows {sorted(unknown)}; choose from {sorted(known)}.",
        )
    return numbers


def _check_seed(out: pathlib.Path, seed: int) -> None:
    """Raises ArgumentError if the folder has results of another seed."""
    path = out / "seed.json"
    if path.exists() and (other := json.loads(path.read_text())) != seed:
        raise argparse.ArgumentError(
            None, f"{out} has results of --seed={other}: use this seed or another --out."
        )
    path.write_text(json.dumps(seed))


def _run_cases(
    keys: Sequence[tuple[int, str]], out: pathlib.Path, flags: argparse.Namespace
) -> bool:
    """Runs cases in worker processes and shows progress; returns whether a signal ended it."""
    from tests.faults import shim

    if not keys:
        return False
    path = out / "results.jsonl"
    library = shim.build(out)
    variables = {**os.environ, "ESPALIER_CACHE": str(out / "cache"), "PYTHONPATH": environment.ROOT}
    variables["JAX_COMPILATION_CACHE_DIR"] = str(out / "cache" / "xla")
    variables["JAX_PLATFORMS"] = "cpu"
    if library is not None:
        variables["LD_PRELOAD"] = str(library)
    size = path.stat().st_size if path.exists() else 0
    workers = [
        _start(keys[i :: flags.workers], i, out, flags, variables) for i in range(flags.workers)
    ]
    shown = 0
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        while any(w.poll() is None for w in workers):
            time.sleep(0.5)
            shown = _show(path, size, shown, len(keys))
        _show(path, size, shown, len(keys))
    except KeyboardInterrupt:
        return True
    finally:
        for w in workers:
            w.terminate()  # it ends the processes of its cases
        for w in workers:
            w.wait()
        for folder in out.glob("work_*"):
            if not any(folder.glob("*/*")):
                shutil.rmtree(folder, ignore_errors=True)
    failed = [w.returncode for w in workers if w.returncode]
    if failed:
        print(f"a worker ended with status {failed[0]}: see {out}/worker_*.log", file=sys.stderr)
    return False


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _start(
    keys: Sequence[tuple[int, str]],
    number: int,
    out: pathlib.Path,
    flags: argparse.Namespace,
    variables: dict[str, str],
) -> subprocess.Popen:
    task = {"out": str(out), "seed": flags.seed, "sample": flags.sample, "number": number}
    with open(out / f"worker_{number}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=variables,
            cwd=environment.ROOT,
            text=True,
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps({**task, "cases": list(keys)}))
    process.stdin.close()
    return process


def _show(path: pathlib.Path, start: int, shown: int, total: int) -> int:
    """Prints the results after the first `shown` ones of this start; returns their number."""
    if not path.exists():
        return shown
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    for number, line in enumerate(lines[shown:], shown + 1):
        result = json.loads(line)
        text = f"[{number}/{total}] row {result['row']}, {result['case'][:60]}: {result['verdict']}"
        if sys.stderr.isatty() and result["verdict"] == "held":
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif result["verdict"] != "held" or number % 25 == 0 or number == total:
            print(f"\r\033[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
    return len(lines)


if __name__ == "__main__":
    raise SystemExit(main())
