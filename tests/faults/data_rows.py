"""Rows about data: resumed at any step, changed under a run, preference rows, resume on other meshes."""

import functools
import itertools
import json
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from espalier.data.cache import store
from espalier.data.preference import records
from espalier.data.stream import rows
from espalier.data.stream.train_stream import Stream
from espalier.data.text.documents import DataError
from tests.faults import program
from tests.faults.table import Bench, Case, Lost, Row, Silent, refused

_LENGTH, _BATCH, _VOCABULARY = 32, 8, 500
_MIXTURES = {
    "one source": ((0, {"a": 1.0}),),
    "two sources": ((0, {"a": 0.7, "b": 0.3}),),
    "phases": ((0, {"a": 0.7, "b": 0.3}), (5, {"b": 0.5, "c": 0.5}), (11, {"c": 1.0})),
}


def _streams(seed: int) -> Iterator[Case]:
    mixtures = itertools.product(("best_fit", "concat"), _MIXTURES, (0, 1, seed + 2), (1, 2, 4))
    for packing, mixture, stream_seed, hosts in mixtures:
        name = f"{packing}, {mixture}, seed {stream_seed}, {hosts} hosts"
        act = functools.partial(_resumed, packing, mixture, stream_seed, hosts)
        yield Case(name, act)
    for packing, number in itertools.product(("best_fit", "concat"), range(4)):
        name = f"each token once in an epoch, {packing}, seed {number}"
        yield Case(name, functools.partial(_once, packing, number))


def _cache(bench: Bench, name: str) -> store.Cache:
    path = bench.out / "streams" / name
    with program.locked(bench, "streams"):
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            random_ = np.random.default_rng(list(name.encode()))
            sizes = np.minimum(random_.lognormal(3, 1.0, 60).astype(int) + 1, 200)
            documents = [random_.integers(1, _VOCABULARY, size) for size in sizes]
            rows_ = [{"targets": d, "document_id": f"{name}#{i}"} for i, d in enumerate(documents)]
            store.write(path, rows_, features={"targets": _VOCABULARY, "document_id": "text"})
    return store.open_cache(path)


def _stream(bench: Bench, packing: str, mixture: str, seed: int) -> Stream:
    sources = [
        rows.plan_source(name, _cache(bench, name), {"targets": _LENGTH}, packing=packing)
        for name in "abc"
    ]
    return Stream(sources, _MIXTURES[mixture], batch_size=_BATCH, seed=seed)


def _same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[k], other[k]) for k in one)


def _resumed(packing: str, mixture: str, seed: int, hosts: int, bench: Bench) -> None:
    """Compares the batches of one reader with those of several that start at a random step."""
    steps = 20
    whole = _stream(bench, packing, mixture, seed)
    batches = [whole.batch(step, 0, _BATCH) for step in range(steps)]
    start = bench.random(f"{packing} {mixture} {seed} {hosts}").randrange(1, steps)
    readers = [_stream(bench, packing, mixture, seed) for _ in range(hosts)]
    share = _BATCH // hosts
    for step in range(start, steps):
        parts = [r.batch(step, i * share, (i + 1) * share) for i, r in enumerate(readers)]
        joined = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        if not _same(joined, batches[step]):
            raise Silent(f"step {step} differs after a start at step {start} on {hosts} hosts")


def _once(packing: str, seed: int, bench: Bench) -> None:
    stream = _stream(bench, packing, "one source", seed)
    planned = rows.plan_source("a", _cache(bench, "a"), {"targets": _LENGTH}, packing=packing)
    counts: dict[bytes, int] = {}
    for row in range(planned.plan.num_rows):
        step, place = divmod(row, _BATCH)
        content = stream.batch(step, place, place + 1)["decoder_target_tokens"].tobytes()
        counts[content] = counts.get(content, 0) + 1
    tokens = sum(np.count_nonzero(np.frombuffer(c, np.int32)) * n for c, n in counts.items())
    if max(counts.values()) > 1 or tokens != planned.plan.tokens():
        raise Silent(f"{tokens} tokens in an epoch in place of {planned.plan.tokens()}")


def _changed(seed: int) -> Iterator[Case]:
    del seed
    for name in _CHANGES:
        yield Case(name, functools.partial(_change, name), 2400, own_process=True)


def _lines(change: Callable[[list[str]], list[str]]) -> Callable[[pathlib.Path], None]:
    def act(path: pathlib.Path) -> None:
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return act


_CHANGES: dict[str, tuple[Callable[[pathlib.Path], Any], bool]] = {
    "a letter": (_lines(lambda x: [x[0].replace("a", "b", 1), *x[1:]]), True),
    "a row less": (_lines(lambda x: x[1:]), True),
    "a row more": (_lines(lambda x: [*x, '{"text": "more"}\n']), True),
    "rows in another order": (_lines(lambda x: x[::-1]), True),
    "an empty file": (lambda path: path.write_text(""), True),
    "the file is gone": (lambda path: path.unlink(), True),
    "a damaged row": (_lines(lambda x: [*x, '{"text": \n']), True),
    "written again with the same rows": (_lines(lambda x: x), False),
}


def _change(name: str, bench: Bench) -> None:
    change, is_other = _CHANGES[name]
    data = bench.folder / "rows.jsonl"
    shutil.copy(program.corpus(bench), data)
    binding, run = f"FILES={str(data)!r}", bench.folder / "run"
    program.train(bench, run, binding, "TRAIN_STEPS=8").succeeded()
    content = data.read_bytes()
    change(data)
    process = program.train(bench, run, binding)
    if is_other:
        process.refused()
        data.write_bytes(content)
        process = program.train(bench, run, binding)
    process.succeeded()
    program.ends_like(bench, run)


def _meshes(seed: int) -> Iterator[Case]:
    del seed
    for before, after, mesh in (
        (1, 2, "{'data': 2}"),
        (1, 2, "{'fsdp': 2}"),
        (1, 4, "{'fsdp': 4}"),
        (1, 8, "{'data': 2, 'fsdp': 4}"),
        (2, 1, "{'fsdp': 1}"),
        (4, 2, "{'fsdp': 2}"),
        (8, 1, "{'fsdp': 1}"),
        (8, 4, "{'data': 4}"),
    ):
        act = functools.partial(_other_mesh, before, after, mesh)
        yield Case(f"{before} devices, then {after} as {mesh}", act, 2400, own_process=True)


def _devices(count: int) -> dict[str, str]:
    import os

    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags.strip()}


def _other_mesh(before: int, after: int, mesh: str, bench: Bench) -> None:
    run = bench.folder / "run"
    program.train(bench, run, "TRAIN_STEPS=8", environment=_devices(before)).succeeded()
    saved = program.digests(run, 8)
    program.train(bench, run, f"MESH={mesh}", environment=_devices(after)).succeeded()
    if program.digests(run, 8) != saved:
        raise Lost("the step of the first mesh has changed")
    here, there = program.rows(run), program.rows(program.whole(bench))
    if here.keys() != there.keys():
        raise Lost(f"rows of steps {sorted(here)} in place of {sorted(there)}")
    worst = max(abs(here[s]["loss"] / there[s]["loss"] - 1) for s in here if "loss" in here[s])
    if worst > 1e-6:
        raise Silent(f"a loss differs by {worst:.1e}, more than 1e-6")


_WORDS = (
    "",
    " ",
    "yes",
    "no",
    "\u202eabc",
    "a\u200db",
    "\ud800",
    "é",
    "e\u0301",
    "用户",
    "x" * 5000,
)


def _preferences(seed: int) -> Iterator[Case]:
    random_ = random.Random(seed)
    rows_: list[Any] = [
        {"prompt": p, "chosen": c, "rejected": r}
        for p, c, r in itertools.product(("Q: ", "\u202e", "\udfff"), _WORDS, _WORDS[:4])
    ]
    rows_ += [{"prompt": "p", "completion": w, "label": x} for w in _WORDS for x in (True, 1, None)]
    wrong: tuple[Any, ...] = (None, 3, [], {}, [3], [{"role": "user"}], [{"content": "x"}], True)
    for value in wrong:
        rows_ += [{"prompt": value, "chosen": "a", "rejected": "b"}]
        rows_ += [{"prompt": "p", "chosen": value, "rejected": "b"}]
        rows_ += [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": value}]
        rows_ += [{"prompt": "p", "chosen": "a", "rejected": "b", "tools": value}]
    random_.shuffle(rows_)
    for number in range(0, len(rows_), 20):
        part = rows_[number : number + 20]
        yield Case(f"rows {number} to {number + len(part) - 1}", functools.partial(_parse, part))


def _parse(rows_: list[dict[str, Any]], bench: Bench) -> int:
    """Parses rows, each of which is a record that repeats its texts, is counted, or is an error with its place."""
    del bench
    for row in rows_:
        try:
            record = records.parse(row, "x.jsonl, line 3", "x.jsonl:3")
        except records.DegenerateError as error:
            assert error.reason
            continue
        except DataError as error:
            refused(functools.partial(_raise, error), DataError, naming="x.jsonl, line 3")
            continue
        texts = [row.get(k) for k in ("prompt", "chosen", "rejected", "completion") if k in row]
        if not all(isinstance(text, str) for text in texts):
            continue
        json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate must have been refused
        if [record.prompt, *record.completions] != texts:
            raise Silent(f"{row} became {record}")
    return len(rows_)


def _raise(error: Exception) -> None:
    raise error


ROWS = (
    Row(
        6,
        "a run continues on another mesh of 1, 2, 4 or 8 devices",
        "the saved state is exact; losses agree to 1e-6",
        _meshes,
        sample=0,
    ),
    Row(
        7,
        "data resumed: packing x mixture x seed x hosts",
        "the same rows at the same step; each token once in an epoch",
        _streams,
        sample=6,
    ),
    Row(
        8,
        "data changed under a run",
        "refused; with the data back it ends bit-equal",
        _changed,
        sample=0,
    ),
    Row(
        20,
        "preference rows: empty, equal, malformed, hostile Unicode",
        "a record with the same texts, counted, or an error with its place",
        _preferences,
        sample=3,
    ),
)
