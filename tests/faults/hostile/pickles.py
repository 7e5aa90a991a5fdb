"""The row about pickles instead of weights and settings."""

import functools
import hashlib
import io
import os
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.faults import calls
from tests.faults.hostile import checkpoint
from tests.faults.table import Bench, Case, Row, Unclear, refused


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: pathlib.Path):
        self._path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


def _pickles(seed: int) -> Iterator[Case]:
    del seed
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "model.pth",
        "consolidated.00.pth",
        "adapter.bin",
    ):
        yield Case(f"weights in {name}", functools.partial(_pickled_weights, name, False))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "x.npy", "x.pkl"):
        act = functools.partial(_pickled_weights, name, True)
        yield Case(f"{name} beside safetensors", act)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        yield Case(f"{name} is a pickle", functools.partial(_pickled_file, name))
    yield Case("a GGUF file is a pickle", _pickled_gguf)
    for name in ("x.npy", "x.npz"):
        yield Case(f"a part of a reference store is {name}", functools.partial(_pickled_part, name))


def _written(path: pathlib.Path, bench: Bench) -> None:
    payload = _Payload(bench.folder / "executed")
    if path.suffix == ".npy":
        np.save(path, np.array([payload], object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(payload))


def _pickled_weights(name: str, beside: bool, bench: Bench) -> None:
    folder = checkpoint.write(bench.folder / "hf")
    _written(folder / name, bench)
    if beside:
        status, text = calls.call(
            "convert", [f"--from_hf={folder}", f"--to={bench.folder / 'run'}"]
        )
        if status not in (0, 2):
            raise Unclear(f"status {status}: ...{text[-300:]}")
    else:
        (folder / "model.safetensors").unlink()
        checkpoint.check_refused(bench, folder)
    checkpoint.check_not_executed(bench)


def _pickled_file(name: str, bench: Bench) -> None:
    folder = checkpoint.write(bench.folder / "hf")
    (folder / "tokenizer.json").write_text("{}")
    _written(folder / name, bench)
    checkpoint.check_refused(
        bench, folder, name if name != "tokenizer_config.json" else "tokenizer"
    )
    checkpoint.check_not_executed(bench)


def _pickled_gguf(bench: Bench) -> None:
    _written(bench.folder / "x.gguf", bench)
    flags = [f"--from_gguf={bench.folder / 'x.gguf'}", f"--to={bench.folder / 'run'}"]
    calls.refused("convert", flags, "x.gguf")
    checkpoint.check_not_executed(bench)


def _pickled_part(name: str, bench: Bench) -> None:
    """Puts a pickle, with the hash that its name must have, in the place of stored numbers."""
    from espalier.data.stream.predictions import ABOUT, PredictionStore, PredictionStoreError

    folder, content = bench.folder / "store" / "m", io.BytesIO()
    folder.mkdir(parents=True)
    (folder / ABOUT).write_text('{"model": "m"}')
    values = np.array([_Payload(bench.folder / "executed")], object)
    if name == "x.npz":
        np.savez(content, digests=values, values=values)
    else:
        np.save(content, values, allow_pickle=True)
    part = folder / f"{hashlib.sha256(content.getvalue()).hexdigest()}.npz"
    part.write_bytes(content.getvalue())
    refused(
        lambda: PredictionStore(
            "m", {}, root=bench.folder / "store", shape=(2,), setting="REFERENCE"
        ),
        PredictionStoreError,
    )
    checkpoint.check_not_executed(bench)


ROWS = (Row(16, "pickles instead of weights and settings", "never executed", _pickles, sample=2),)
