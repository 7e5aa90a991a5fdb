"""A training job without SeqIO: the project's licence and sources as bytes, from caches written once."""

import pathlib
import time

from espalier.data.cache import store
from espalier.data.stream import rows
from espalier.data.stream.row_stream import EvalStream
from espalier.data.stream.train_stream import Stream
from espalier.trainers.hooks import Hook
from espalier.trainers.objectives import lm

ROOT = pathlib.Path(__file__).resolve().parents[3]
FILES = {"licence": ["LICENSE"], "code": ["model/axes.py", "model/config.py", "trainers/step.py"]}
BYTES = 259  # ids of SeqIO's byte vocabulary: 3 special ones before the bytes

# One entry for each time an objective is traced.
TRACES: list[str] = []


def _records(name):
    for path in FILES[name]:
        for part, text in enumerate((ROOT / path).read_text(encoding="utf-8").split("\n\n")):
            ids = [byte + 3 for byte in text.encode("utf-8")]
            yield {"targets": [*ids, 1], "document_id": f"{path}#{part}"}


def _source(name, directory, length):
    path = pathlib.Path(directory) / name
    with store.building_lock(path):
        if not path.exists():
            features = {"targets": BYTES, "document_id": "text"}
            store.write(path, _records(name), features=features)
    return rows.plan_source(name, store.open_cache(path), {"targets": length})


def open_stream(
    *,
    directory,
    batch_size,
    length,
    phases=((0, {"licence": 1.0}),),
    seed=0,
    positions=None,
    max_epochs=None,
    on_cap="error",
):
    """Training batches of the phases."""
    names = [name for name in FILES if any(name in shares for _, shares in phases)]
    sources = [_source(name, directory, length) for name in names]
    return Stream(
        sources,
        phases,
        batch_size=batch_size,
        seed=seed,
        positions=positions,
        max_epochs=max_epochs,
        on_cap=on_cap,
    )


def open_split(*, task, directory, batch_size, length):
    """All rows of one source."""
    return EvalStream(_source(task, directory, length), batch_size=batch_size)


def objective(*, model, num_sources):
    """Language modelling that counts its traces."""
    loss_fn = lm.language_modelling(model=model, num_sources=num_sources)

    def counting(params, batch, rng):
        TRACES.append("objective")
        return loss_fn(params, batch, rng)

    return counting


# The run's operative configuration when a Witness was made, and at each of its rows.
WITNESSED: list[str] = []


class Witness:
    """A metric writer that looks at what is on disk."""

    def __init__(self, *, directory):
        self._file = pathlib.Path(directory) / "operative_config.gin"
        self.write()

    def write(self, *row):
        WITNESSED.append(self._file.read_text() if self._file.exists() else "")

    def close(self):
        pass


class Sleep(Hook):
    """A hook that makes steps slow enough to be killed in."""

    every = 1

    def __init__(self, *, run, seconds=0.1):
        del run
        self._seconds = seconds

    def __call__(self, step, state, metrics):
        time.sleep(self._seconds)


class LongSleep(Sleep):
    """A hook that makes steps slow enough for another process to start in them."""

    def __init__(self, *, run):
        super().__init__(run=run, seconds=2)
