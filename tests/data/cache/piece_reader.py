"""A task that other processes can load: the bytes of documents as tokens."""

import dataclasses
import os
import pathlib
import signal
import time
from typing import Any

import numpy as np

FEATURES = {"targets": 256, "document_id": "text"}


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Yields the documents of a source."""

    source: Any

    def records(self, split, pieces):
        for piece in pieces:
            for example in self.source.read_examples(piece, split):
                text = example["text"]
                yield {
                    "targets": np.frombuffer(text.encode(), np.uint8),
                    "targets_pretokenized": text,
                    "document_id": example["document_id"],
                }


@dataclasses.dataclass(frozen=True)
class Slow(Bytes):
    """Takes 10 ms for a document."""

    def records(self, split, pieces):
        for record in super().records(split, pieces):
            time.sleep(0.01)
            yield record


@dataclasses.dataclass(frozen=True)
class Killed(Bytes):
    """Kills its process at a document, once."""

    at: str = ""
    flag: str = ""

    def records(self, split, pieces):
        for record in super().records(split, pieces):
            if record["document_id"] == self.at and not os.path.exists(self.flag):
                pathlib.Path(self.flag).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield record


def square(item, report):
    report(item)
    if item == 5:
        raise ValueError("five")
    return item * item


def process(item, report):
    return os.getpid()


def imported(item, report):
    import sys

    import espalier.data.data_source  # noqa: F401  (what a worker reads a source by)

    return sorted({"jax", "tensorflow", "seqio"} & set(sys.modules))


def sleep(item, report):
    time.sleep(item)


class Same:
    """A task of one record."""

    def records(self, split, pieces):
        yield {"targets": np.arange(50, dtype=np.int32)}
