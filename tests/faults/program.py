"""Commands of the project as processes of a case, and the run that cases damage.

A process is forked from one that has imported the project, because importing takes longer than a small run.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from espalier.launch import cli
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.telemetry.metric_writers import measures_time, read_jsonl
from tests.faults.table import Bench, Lost, NotTried, Silent, Unclear

STEPS, PERIOD = 12, 3  # updates of the run, and between its saves
_NOT_TRIED = 76  # exit status of a process in which the fault cannot be made
_HALF = 8  # between two saves and two rows


@dataclasses.dataclass
class Process:
    """A running command with its output in a file."""

    pid: int
    log: pathlib.Path
    status: int | None = None  # minus the number of a signal that ended it

    def poll(self) -> int | None:
        """Returns the exit status; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = 600.0) -> int:
        """Returns the exit status; kills the process and raises Unclear if it takes too long.

        Raises:
          NotTried: `before` could not make the fault.
        """
        end = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise Unclear(
                    f"no end after {seconds:.0f} s; its output ends with {self.text[-300:]}"
                )
            time.sleep(0.02)
        if status == _NOT_TRIED:
            raise NotTried(self.text.rpartition("not tried: ")[2].strip())
        return status

    def signal(self, number: int) -> None:
        """Sends a signal, if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def refused(self, *words: str, status: int = cli.USAGE_ERROR) -> str:
        """Waits for the end, which must be one clear error with these words; returns its text.

        Raises:
          Silent: the status is 0.
          Unclear: another status, a traceback, or an error without the words.
        """
        ended = self.wait()
        text = self.text
        if ended == 0:
            raise Silent("the command ended with status 0")
        if (
            ended != status
            or "Traceback (most recent call last)" in text
            or "\nerror: " not in text
        ):
            raise Unclear(f"status {ended} in place of {status}: ...{text[-500:]}")
        message = text[text.rindex("\nerror: ") :].strip()
        if missing := [word for word in words if word not in message]:
            raise Unclear(f"the error does not name {missing}: {message[:500]}")
        return message

    def succeeded(self) -> str:
        """Waits for the end, which must have status 0; returns the output."""
        if status := self.wait():
            raise Unclear(f"status {status} in place of 0: ...{self.text[-700:]}")
        return self.text


def start(
    bench: Bench,
    command: str,
    flags: Sequence[str],
    *,
    before: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Process:
    """Starts `python -m espalier.launch.COMMAND FLAGS` in a forked process; `before` is called in it first."""

    def act() -> int:
        if before is not None:
            before()
        return _run(command, list(flags))

    return fork(bench, act, environment)


def fork(
    bench: Bench, act: Callable[[], int | None], environment: Mapping[str, str] | None = None
) -> Process:
    """Calls `act` in a forked process, whose exit status it returns; None is 0."""
    number = len(list(bench.folder.glob("process_*.log")))
    log = bench.folder / f"process_{number}.log"
    log.touch()
    if pid := os.fork():
        return Process(pid, log)
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.environ.update(environment or {})
        status = act() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except NotTried as reason:
        os.write(1, f"not tried: {reason}".encode())
        status = _NOT_TRIED
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run(command: str, flags: list[str]) -> int:
    if command == "train":
        return cli.main("Trains.", entry="espalier.launch.train:train", argv=flags)
    return importlib.import_module(cli.module_of(command)).main(flags)


def corpus(bench: Bench) -> pathlib.Path:
    """Returns a JSONL file of 200 short documents, which it writes the first time."""
    path = bench.out / "corpus" / "rows.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        random_ = random.Random(0)
        words = [
            "".join(random_.choices("abcdefghij", k=random_.randint(2, 8))) for _ in range(200)
        ]
        texts = (" ".join(random_.choices(words, k=40)) for _ in range(200))
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        partial.rename(path)
    return path


def train_flags(bench: Bench, run: pathlib.Path | str, *bindings: str) -> list[str]:
    """Returns the flags of a tiny run of 12 updates on the corpus, which saves every 3 updates."""
    files = [
        f"--gin_file=t5x_configs/{x}.gin" for x in ("models/tiny", "data/files", "runs/pretrain")
    ]
    sizes = {"embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16, "vocab_size": 264}
    settings = [
        f"MODEL_DIR={str(run)!r}",
        f"FILES={str(corpus(bench))!r}",
        "MIXTURE_OR_TASK_NAME='files'",
        "VOCABULARY=@vocabularies.byte()",
        "VALIDATION_FRACTION=0.05",
        "TASK_FEATURE_LENGTHS={'targets': 48}",
        "BATCH_SIZE=8",
        f"TRAIN_STEPS={STEPS}",
        f"schedules.cosine.total_steps={STEPS}",
        "LEARNING_RATE=3e-3",
        f"CHECKPOINT_PERIOD={PERIOD}",
        "LOG_PERIOD=2",
        "train.train.eval_tasks=()",
        *(f"config.TransformerConfig.{name}={size}" for name, size in sizes.items()),
        *bindings,
    ]
    return [*files, *(f"--gin.{setting}" for setting in settings)]


def local_tier(disk: pathlib.Path) -> list[str]:
    """Returns the flags by which the tiny run also saves on a disk of its host, at every update."""
    return [
        "--gin_file=t5x_configs/runs/local_checkpoints.gin",
        f"--gin.LOCAL_CHECKPOINT_DIR={str(disk)!r}",
        "--gin.LOCAL_CHECKPOINT_PERIOD=1",
    ]


def train(bench: Bench, run: pathlib.Path | str, *bindings: str, **options: Any) -> Process:
    """Starts or continues the tiny run in directory or address `run`."""
    return start(bench, "train", train_flags(bench, run, *bindings), **options)


@contextlib.contextmanager
def locked(bench: Bench, name: str) -> Iterator[None]:
    """Lets one process at a time make what cases share."""
    with open(bench.out / f".{name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def base(
    bench: Bench, name: str, *bindings: str, before: Callable[[], None] | None = None
) -> pathlib.Path:
    """Returns the finished run `name`, which no case may change; it is made the first time."""
    path = bench.out / "base" / name
    with locked(bench, "base"):
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            partial = path.with_name(f".{name}")
            shutil.rmtree(partial, ignore_errors=True)
            train(bench, partial, *bindings, before=before).succeeded()
            partial.rename(path)
    return path


def whole(bench: Bench) -> pathlib.Path:
    """Returns the run to which nothing has happened."""
    return base(bench, "whole")


def half_way(bench: Bench) -> pathlib.Path:
    """Returns the case's own copy of a run that stopped after 8 of 12 updates, with checkpoints 3, 6 and 8."""
    source = base(bench, "half", f"TRAIN_STEPS={_HALF}")
    return shutil.copytree(source, bench.folder / "run")


def digests(run: pathlib.Path, step: int = STEPS) -> Mapping[str, Any]:
    """Returns the recorded shape, dtype and digest of each array of a step."""
    return step_dir.read_manifest(epath.Path(run) / "checkpoints" / str(step)).arrays


def rows(run: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Returns the metrics that do not depend on the clock, by step."""
    result: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(run / "metrics.jsonl"):
        fields = {k: v for k, v in row.items() if not measures_time(k)}
        result.setdefault(row["step"], {}).update(fields)
    return result


def ends_like(bench: Bench, run: pathlib.Path, *, metrics: bool = True) -> None:
    """Checks that a finished run equals the whole one bit for bit.

    Raises:
      Silent: parameters or state differ.
      Lost: rows of metrics are missing or differ.
    """
    reference = whole(bench)
    if digests(run) != digests(reference):
        raise Silent("the last step differs from that of the run to which nothing happened")
    if metrics and rows(run) != rows(reference):
        raise Lost("metrics.jsonl differs from that of the run to which nothing happened")


def good_step(run: pathlib.Path) -> int:
    """Returns the newest complete step; 0 if there is none."""
    return max(step_dir.complete_steps(epath.Path(run) / "checkpoints"), default=0)
