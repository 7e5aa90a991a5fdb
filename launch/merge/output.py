"""What both writers of a merge share: threads that merge blocks, their progress, the plan's table, merge.json, the model card.

A merge that was killed goes on, by the list of finished parts in its partial folder (`Journal`).
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import files
from espalier.common.bars import Bar
from espalier.launch.convert import model_card
from espalier.launch.merge.models import Model, NativeModel, Read
from espalier.launch.merge.plan import Planned, Planner
from espalier.launch.merge.settings import Merge, MergeError
from espalier.model.transforms.base import aligned
from espalier.model.transforms.merge import Job
from espalier.model.transforms.merge_methods import METHODS

BLOCK_BYTES = 16 << 20
RECORD = "merge.json"
_JOURNAL = "merge.progress"
_CARD = """\
A merge by the method `{method}`{seed} of:

{parents}

Made by Espalier (`espalier merge`) with this configuration, also in `{record}`:

```yaml
{configuration}
```"""


def progress(planned: Sequence[Planned], initial: int = 0) -> Bar:
    """Returns a bar over the bytes of the output, of which an earlier run has written `initial`."""
    total = out_bytes(planned)
    return Bar(total=total, initial=initial, unit="B", unit_scale=True, desc="merge")


class Workers(contextlib.AbstractContextManager):
    """Threads for blocks.

    Args:
      block_bytes: bytes of an input that are in memory at a time, in all threads together.
      threads: number of threads; None for one for each processor that this process may use.
    """

    def __init__(self, *, block_bytes: int = BLOCK_BYTES, threads: int | None = None):
        self.threads = threads or len(os.sched_getaffinity(0))
        self._block_bytes = max(1, block_bytes // (self.threads + 1))
        self._pool = concurrent.futures.ThreadPoolExecutor(self.threads, "merge")

    def run(self, x: Planned, reads: Sequence[Read]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the blocks of a merged tensor in order, as (first index, values)."""
        widest = max(dtype.itemsize for dtype in x.dtypes)
        block = max(1, self._block_bytes // widest)
        if x.job is None:
            size = int(np.prod(x.shape))
            yield from (
                (low, reads[0](low, min(low + block, size))) for low in range(0, size, block)
            )
            return
        yield from x.job.blocks(reads, x.dtypes, block=block, pool=self._pool, threads=self.threads)

    def check_equal(self, planned: Sequence[Planned], models: Any, file: str) -> None:
        """Raises MergeError if tensors that are not floats differ between models."""
        for x in planned:
            if x.job is not None:
                continue
            reads = [models[path].read(name) for path, name in x.inputs]
            size, step = int(np.prod(x.shape)), 1 << 20
            for low in range(0, size, step):
                first, *others = (read(low, min(low + step, size)) for read in reads)
                for (path, _), other in zip(x.inputs[1:], others, strict=True):
                    if not np.array_equal(first, other):
                        raise MergeError(
                            f"{file}: {x.name} holds {first.dtype.name}, which cannot be averaged, and differs between "
                            f"{x.inputs[0][0]} and {path}: make them equal, or leave out one of the models."
                        )

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def table(planned: Sequence[Planned]) -> list[str]:
    """Returns lines of a table of the tensors: name, shape, dtype, method with its parameters, inputs."""
    paths = list(dict.fromkeys(path for x in planned for path, _ in x.inputs))
    numbers = {path: f"m{i}" for i, path in enumerate(paths)}
    rows = [("tensor", "shape", "dtype", "merged by", "of")]
    for x in planned:
        how = "equal in all" if x.job is None else _shown(x.job)
        inputs = [
            f"{numbers[path]}:{name}" if name != x.name else numbers[path]
            for path, name in x.inputs
        ]
        shape = " x ".join(map(str, x.shape)) or "1"
        rows.append((x.name, shape, x.out_dtype.name, how, " ".join(inputs)))
    return [*(f"{number} = {path}" for path, number in numbers.items()), *aligned(rows, right=())]


def _shown(job: Job) -> str:
    method = METHODS[job.method]
    words = []
    for name, value in job.values.items():
        if value != method.parameters[name].default and value is not None:
            shown = ",".join(map(_number, value)) if isinstance(value, list) else _number(value)
            words.append(f"{name}={shown}")
    return " ".join([job.method, *words])


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def out_bytes(planned: Sequence[Planned]) -> int:
    """Returns the bytes of the output's tensors."""
    return sum(int(np.prod(x.shape)) * x.out_dtype.itemsize for x in planned)


def record(planner: Planner) -> dict[str, Any]:
    """Returns the record of a result: the configuration as it was read, the seed, and the models with their fingerprints."""
    return {
        "configuration": json.loads(json.dumps(planner.merge.text, default=str)),
        "seed": planner.seed,
        "made_of": made_of(planner.merge, planner.models),
        "inputs": [planner.models[path].fingerprint() for path in planner.merge.models()],
    }


def made_of(merge: Merge, models: Mapping[str, Model]) -> list[str]:
    """Returns the names of the models, with the steps of runs, as model cards show parents."""
    names = []
    for path in merge.merged_models():
        model = models[path]
        name = os.path.basename(os.path.abspath(os.fspath(model.folder)))
        step = f", step {model.source.step.name}" if isinstance(model, NativeModel) else ""
        names.append(f"{name}{step}")
    return names


def text(name: str, merge: Merge, record: Mapping[str, Any]) -> str:
    """Returns the model card."""
    import yaml

    configuration = yaml.safe_dump(
        record["configuration"], sort_keys=False, allow_unicode=True, default_flow_style=None
    )
    body = _CARD.format(
        method=merge.method,
        seed=f", seed {record['seed']}" if merge.is_random else "",
        parents="\n".join(f"- `{model}`" for model in record["made_of"]),
        record=RECORD,
        configuration=configuration.rstrip().replace("```", "` ` `"),
    )
    title = name.removeprefix(".").removesuffix(".partial")
    return model_card.page(title, body, of="the models above", tags="tags: [merge]\n")


def fingerprint(planner: Planner, planned: Sequence[Planned], **settings: Any) -> str:
    """Returns a digest of all that decides the output: the plan, the models, the configuration and these settings."""
    state = {
        "planned": [repr(x) for x in planned],
        "merge": record(planner),
        **settings,
    }
    text = json.dumps(state, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Journal:
    """The list of finished parts in a partial folder; they are on the disk before they are listed.

    Args:
      folder: the partial folder.
      fingerprint: of the merge.
      again: whether the list goes on.
    """

    def __init__(self, folder: str, fingerprint: str, *, again: bool):
        self._path = os.path.join(folder, _JOURNAL)
        if not again:
            pathlib.Path(self._path).unlink(missing_ok=True)
            self.add([fingerprint])

    def add(self, entries: Sequence[Any]) -> None:
        # Synced, because what it lists is not merged again.
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        files.append(self._path, lines, synced=True)

    def finish(self) -> None:
        os.unlink(self._path)


def finished(folder: str, fingerprint: str) -> list[Any] | None:
    """Returns the finished parts in a partial folder; None if it is of another merge, or not readable."""
    with contextlib.suppress(OSError, ValueError):
        values = []
        for line in pathlib.Path(folder, _JOURNAL).read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last may be cut short
                values.append(json.loads(line))
        if values and values[0] == fingerprint:
            return values[1:]
    return None
