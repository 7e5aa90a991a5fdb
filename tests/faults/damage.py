"""Rows about damaged files: every file of a checkpoint and of a run, changed in every way."""

import functools
import os
import pathlib
import random
import re
import shutil
from collections.abc import Callable, Iterator

from etils import epath

from espalier.trainers.checkpoints import array_files, step_dir
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError
from tests.faults import program
from tests.faults.table import Bench, Case, Row, Silent, Unclear, refused

_NEWEST, _BEFORE = 8, 6  # steps of the run that is damaged
_FILES = 13  # files of a step; which number of them Orbax writes can differ
Damage = Callable[[pathlib.Path, random.Random], None]


def flip(path: pathlib.Path, choice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    path.write_bytes(data)


def truncate(path: pathlib.Path, choice: random.Random) -> None:
    os.truncate(path, choice.randrange(path.stat().st_size))


def delete(path: pathlib.Path, choice: random.Random) -> None:
    del choice
    path.unlink()


def zero(path: pathlib.Path, choice: random.Random) -> None:
    del choice
    path.write_bytes(bytes(path.stat().st_size))


def swap(path: pathlib.Path, choice: random.Random) -> None:
    """Replaces a file by another one of its folder's run with other content."""
    others = [p for p in sorted(path.parents[1].rglob("*")) if p.is_file() and p != path]
    others = [p for p in others if p.read_bytes() != path.read_bytes()]
    path.write_bytes(choice.choice(others).read_bytes())


DAMAGES: dict[str, Damage] = {f.__name__: f for f in (flip, truncate, delete, zero, swap)}


def _step_files(run: pathlib.Path) -> list[pathlib.Path]:
    folder = run / "checkpoints" / str(_NEWEST)
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _of_a_step(names: tuple[str, ...], copies: int) -> Callable[[int], Iterator[Case]]:
    """Returns the cases that damage each file of a step, and read the run in this process."""

    def cases(seed: int) -> Iterator[Case]:
        for name in names:
            for number in range(_FILES):
                for copy in range(copies):
                    act = functools.partial(_damaged_step, name, number)
                    end = f", place {copy}" if copies > 1 else ""
                    key = f"{name} of file {number} of a step{end}"
                    yield Case(key, functools.partial(act, f"{seed} {key}"))

    return cases


def _damaged_step(name: str, number: int, key: str, bench: Bench) -> None:
    run = program.half_way(bench)
    files = _step_files(run)
    path = files[number % len(files)]
    DAMAGES[name](path, bench.random(key))
    below = str(path.relative_to(run / "checkpoints" / str(_NEWEST)))
    newest = epath.Path(run / "checkpoints" / str(_NEWEST))
    refused(lambda: _read(newest), DamagedCheckpointError, naming=below)
    step = step_dir.newest_good(run, _read)
    if step != _BEFORE:
        raise Silent(f"step {step} was read in place of {_BEFORE}")


def _read(step: epath.Path) -> int:
    """Reads and verifies every array of a step; returns its number."""
    import jax

    recorded = step_dir.read_manifest(step)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(entry.shape, entry.dtype, sharding=device)
        for name, entry in recorded.arrays.items()
    }
    step_dir.read_record(step, recorded)
    array_files.read_verified(step, recorded, wanted)
    return int(step.name)


_RUN_FILES = ("config.gin", "run.json", "model.json", "metrics.jsonl", "vocabulary.json")
_RUN_FILES += ("operative_config.gin", "parameters.txt", "lifetime.json")


def _of_a_run(names: tuple[str, ...]) -> Callable[[int], Iterator[Case]]:
    """Returns the cases in which a process goes on with a run, one of whose files is damaged."""

    def cases(seed: int) -> Iterator[Case]:
        for name in names:
            for file in _RUN_FILES:
                key = f"{name} of {file} before a run goes on"
                act = functools.partial(_damaged_run, name, file, f"{seed} {key}")
                yield Case(key, act, 2400, own_process=True)
            key = f"{name} of the largest file of a step before a run goes on"
            act = functools.partial(_goes_on, name, f"{seed} {key}")
            yield Case(key, act, 2400, own_process=True)
            key = f"{name} of files of a token cache"
            act = functools.partial(_damaged_cache, name, f"{seed} {key}")
            yield Case(key, act, 2400, own_process=True)

    return cases


def _damaged_run(name: str, file: str, key: str, bench: Bench) -> None:
    run = program.half_way(bench)
    DAMAGES[name](run / file, bench.random(key))
    process = program.train(bench, run)
    if process.wait() == 2:
        # What is damaged may also be set aside by hand.
        process.refused(file)
        return
    text = process.succeeded()
    damaged_metrics = file == "metrics.jsonl"
    if damaged_metrics and "metrics.jsonl" not in text:
        program.ends_like(bench, run)
    program.ends_like(bench, run, metrics=not damaged_metrics)


def _goes_on(name: str, key: str, bench: Bench) -> None:
    run = program.half_way(bench)
    DAMAGES[name](max(_step_files(run), key=lambda p: p.stat().st_size), bench.random(key))
    text = program.train(bench, run).succeeded()
    if not re.search(rf"step {_BEFORE} from .*step {_NEWEST} is damaged", text):
        raise Unclear(f"the damaged step is not named: {text[-700:]}")
    program.ends_like(bench, run)


def _damaged_cache(name: str, key: str, bench: Bench) -> int:
    """Damages one file of the token cache, which must be named or made again, never read."""
    program.whole(bench)
    cache = bench.folder / "cache"
    source = bench.out / "cache"
    shutil.copytree(source, cache, ignore=shutil.ignore_patterns("xla"))
    choice = bench.random(key)
    files = sorted(p for p in cache.rglob("*") if p.is_file() and p.stat().st_size)
    path = choice.choice(files)
    DAMAGES[name](path, choice)
    run = bench.folder / "run"
    process = program.train(bench, run, environment={"ESPALIER_CACHE": str(cache)})
    if process.wait() == 2:
        process.refused(str(path.parent.name))
        return 1
    process.succeeded()
    program.ends_like(bench, run)
    return 1


ROWS = (
    Row(
        3,
        "one bit flipped in any file of a step or a run",
        "the file is named; the step before it is used; the run ends bit-equal",
        lambda seed: [*_of_a_step(("flip",), 3)(seed), *_of_a_run(("flip",))(seed)],
        sample=3,
    ),
    Row(
        4,
        "a file is cut, deleted, zeroed or another one",
        "the file is named; the step before it is used; the run ends bit-equal",
        lambda seed: [
            *_of_a_step(("truncate", "delete", "zero", "swap"), 1)(seed),
            *_of_a_run(("truncate", "delete", "zero"))(seed),
        ],
        sample=3,
    ),
)
