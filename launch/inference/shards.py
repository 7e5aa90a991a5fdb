"""A file of rows that a pipeline makes of the rows of another file, shard by shard and in any process.

Beside the file OUT, the folder OUT.shards has the inputs of each shard, and then its rows, so that a worker reads what it needs
and nothing else. A shard that is there is not made again. The process that started the pipeline joins them in the order of the
inputs. A worker opens the command's model once, in a thread of its own: meshes of JAX belong to a thread.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from espalier.common import files, pipelines, versions
from espalier.common.storage import output_files, paths
from espalier.launch import cli, environment
from espalier.launch.inference import row_files
from espalier.launch.load import hf_checkpoint, load_run

_RECORD = "shards.json"  # written once all inputs are there
_FILE = re.compile(r"\d{6,}\.(inputs|\d+)\.jsonl")  # see `Shards._inputs` and `Shards._rows`
_BYTES = 10 << 30  # of inputs, above which shards grow instead of becoming more
_FLAG = "--beam_pipeline_options"

# Rows of the result, of each of the streams that follow one another there; a stream is read before the next one is made.
Streams = Iterable[Iterable[Mapping[str, Any]]]
Scorer = Callable[[Sequence[Any]], Streams]  # of rows of the inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shards:
    """The folder of the shards of a file.

    Attributes:
      folder: a path or an address.
      count: number of shards.
      rows: number of all rows of the inputs.
      streams: streams of rows that a shard has, which follow one another in the file.
    """

    folder: str
    count: int
    rows: int
    streams: int

    def inputs(self, shard: int) -> list[Any]:
        """Returns the rows of the inputs that are a shard's."""
        return [json.loads(line) for line in paths.read(self._inputs(shard)).splitlines()]

    def write(self, shard: int, streams: Streams) -> None:
        """Writes the rows of a shard; the last stream completes it."""
        for stream, rows in enumerate(streams):
            output_files.write(self._rows(shard, stream), b"".join(map(row_files.line, rows)))

    def is_done(self, shard: int) -> bool:
        return paths.exists(self._rows(shard, self.streams - 1))

    def missing(self) -> list[int]:
        """Returns the shards that are not done."""
        there = set(_names(self.folder))
        last = self.streams - 1
        return [i for i in range(self.count) if os.path.basename(self._rows(i, last)) not in there]

    def joined(self) -> Iterator[bytes]:
        """Yields the rows of all shards, as they follow one another in the file."""
        for stream, shard in itertools.product(range(self.streams), range(self.count)):
            yield paths.read(self._rows(shard, stream))

    def remove(self) -> None:
        """Removes the folder."""
        paths.delete(paths.join(self.folder, _RECORD))  # without it the rest counts for nothing
        if not paths.is_remote(self.folder):
            shutil.rmtree(self.folder)
            return
        paths.delete(*(paths.join(self.folder, name) for name in paths.entries(self.folder)))

    def _inputs(self, shard: int) -> str:
        return paths.join(self.folder, f"{shard:06d}.inputs.jsonl")

    def _rows(self, shard: int, stream: int) -> str:
        return paths.join(self.folder, f"{shard:06d}.{stream}.jsonl")


def _names(folder: str) -> list[str]:
    return paths.names(folder) if paths.is_remote(folder) else os.listdir(folder)


def _clear(folder: str) -> None:
    """Deletes the files of shards in a folder, and no others."""
    paths.delete(*(paths.join(folder, name) for name in _names(folder) if _FILE.fullmatch(name)))


def divided(
    out: str, rows: Iterable[Any], *, size: int, streams: int, record: Mapping[str, Any]
) -> Shards:
    """Returns the shards of a file, after writing the inputs of each, unless an earlier start has.

    Args:
      out: the file, a path or an address.
      rows: the inputs, JSON each.
      size: rows of a shard.
      streams: see `Shards`.
      record: what the rows of the result depend on.

    Raises:
      RowFileError: there are shards of another record.
    """
    folder = f"{paths.absolute(out)}.shards"
    place = paths.join(folder, _RECORD)
    record = json.loads(json.dumps({**record, "size": size, "versions": versions.own()}))
    if paths.exists(place):
        stored = files.json_object(paths.read(place)) or {}
        if names := sorted(name for name in record if stored.get(name) != record[name]):
            raise row_files.RowFileError(
                f"{folder} has shards of other {', '.join(names)}: give the same again to continue them, or delete the folder."
            )
        return Shards(folder=folder, streams=streams, count=stored["count"], rows=stored["rows"])
    if not paths.is_remote(folder):
        os.makedirs(folder, exist_ok=True)
    _clear(folder)  # of a removal or a start that stopped, perhaps of another model
    iterator, count, total = iter(rows), 0, 0
    shards = Shards(folder=folder, streams=streams, count=0, rows=0)
    while part := list(itertools.islice(iterator, size)):
        output_files.write(shards._inputs(count), b"".join(map(row_files.line, part)))
        count, total = count + 1, total + len(part)
    row_files.write_json(place, {**record, "count": count, "rows": total})
    return dataclasses.replace(shards, count=count, rows=total)


def size_of(window: int, inputs: str) -> int:
    """Returns the rows of a shard: a multiple of the rows that are sorted by length together, so that batches stay the same.

    Args:
      window: rows that are sorted together.
      inputs: the file of the inputs, of this machine.
    """
    return window * (1 + os.path.getsize(inputs) // _BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker does for a shard.

    Attributes:
      shards: the shards.
      scorer: 'module:function' of a context manager, called with `words` and `shards`, that yields a `Scorer`.
      words: of the command line, which configures it.
    """

    shards: Shards
    scorer: str
    words: tuple[str, ...]

    def do(self, shard: int) -> dict[str, int]:
        """Writes a shard, unless it is there."""
        if self.shards.is_done(shard):
            return {}
        answer: concurrent.futures.Future[dict[str, int]] = concurrent.futures.Future()
        with _lock:
            if self not in _requests:
                _requests[self] = queue.SimpleQueue()
                threading.Thread(target=_serve, args=(self, _requests[self]), daemon=True).start()
        _requests[self].put((shard, answer))
        return answer.result()


_lock = threading.Lock()
_requests: dict[Work, queue.SimpleQueue] = {}  # of this process: (shard, where the answer goes)


def _serve(work: Work, requests: queue.SimpleQueue) -> None:
    """Answers requests for shards, one after the other; if the model cannot be opened, with this error."""
    try:
        environment.prepare()
        module, _, name = work.scorer.partition(":")
        with getattr(importlib.import_module(module), name)(work.words, work.shards) as score:
            while True:
                shard, answer = requests.get()
                try:
                    rows = work.shards.inputs(shard)
                    work.shards.write(shard, score(rows))
                    answer.set_result({"rows": len(rows)})
                except BaseException as error:
                    answer.set_exception(_failure(error))
    except BaseException as error:
        while True:
            requests.get()[1].set_exception(_failure(error))


def _failure(error: BaseException) -> Exception:
    """Returns an error for who waits for an answer: SystemExit would end the thread of a worker that has other shards."""
    return error if isinstance(error, Exception) else RuntimeError(f"the scorer ended: {error!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How a command makes its rows by Apache Beam.

    Attributes:
      options: of the pipeline.
      scorer: see `Work`.
      words: the command line of the scorer, with the step that all workers read, though the run may write newer ones.
      checkpoint: this step, or a Hugging Face directory.
      record: what the rows of every command depend on.
    """

    options: tuple[str, ...]
    scorer: str
    words: tuple[str, ...]
    checkpoint: str
    record: Mapping[str, Any]

    def made(
        self,
        out: str,
        rows: Iterable[Any],
        *,
        size: int,
        record: Mapping[str, Any],
        reads: Sequence[str],
        streams: int = 1,
    ) -> Shards:
        """Returns the shards of a file, all of them done.

        Args:
          out, rows, size, record, streams: see `divided`.
          reads: files and folders that workers read beside the shards.
        """
        pipelines.checked_options(self.options)  # before the inputs are written
        shards = divided(out, rows, size=size, streams=streams, record={**self.record, **record})
        if missing := shards.missing():
            work = Work(shards=shards, scorer=self.scorer, words=self.words)
            step = pipelines.Step("score rows", work.do, missing, (shards.folder, *reads))
            pipelines.run([step], beam_options=self.options, progress=lambda: _progress(shards))
        return shards


def _progress(shards: Shards) -> str:
    return f"scoring: {shards.count - len(shards.missing()):,} of {shards.count:,} shards are done"


def pipeline(start: cli.Start, scorer: str) -> Pipeline | None:
    """Returns the pipeline that the flags of a command ask for, if they do."""
    options = start.flags.beam_pipeline_options
    if not options:
        return None
    if start.flags.coordinator_address:
        raise row_files.RowFileError(
            f"{_FLAG}: a pipeline has its own workers: remove --coordinator_address."
        )
    checkpoint = load_run.place(start.flags.checkpoint)
    adapters = {name: load_run.place(name) for name in getattr(start.flags, "adapter", ())}
    words, given = [], iter(start.words)
    for word in given:
        flag, equals, _ = word.partition("=")
        if flag not in (_FLAG, "--checkpoint", "--adapter"):
            words.append(word)
        elif not equals:
            next(given)
    words.append(f"--checkpoint={checkpoint}")
    for name in getattr(start.flags, "adapter", ()):
        words += [f"--adapter={adapters[name]}", f"--adapter_name={name}"]
    return Pipeline(
        options=tuple(options),
        scorer=scorer,
        words=tuple(words),
        checkpoint=checkpoint,
        record={
            "checkpoint": checkpoint,
            "adapters": adapters,
            "configuration": _digest(start.config.text, checkpoint),
        },
    )


def _digest(configuration: str, checkpoint: str) -> str:
    """Returns the SHA-256 of the text of a configuration, wherever this machine has its copy of the run's files."""
    from espalier.trainers.checkpoints import step_dir

    if hf_checkpoint.is_hf(checkpoint):
        copy, _ = hf_checkpoint.recorded(checkpoint)
    else:
        copy = os.fspath(step_dir.files_of_run(step_dir.absolute(checkpoint)))
    return hashlib.sha256(configuration.replace(copy, "RUN").encode()).hexdigest()
