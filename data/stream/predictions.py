"""Predictions of a frozen model for pairs or rows, computed once and shared between runs.

  <store>/<model>/about.json        the frozen model
  <store>/<model>/<sha256>.npz       parts: digests of pairs or rows [N, 16] uint8, values [N, ...] float32

A model's key is a digest of its parameters and configuration. The key of a pair or row is a digest of the ids that the
model reads (after tokenizer, template and truncation). So a stored value never belongs to another model or text. The name
of a part is a hash of its bytes and parts never change, so several runs may add to a store at the same time. An open store
is entirely in memory.

Shapes: N pairs or rows, B rows, K pairs of a row, D bytes of a digest, '...' shape of one value.
"""

import abc
import hashlib
import io
import json
import os
import pathlib
import weakref
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import files
from espalier.data.stream import row_stream

ABOUT = "about.json"
_DIGEST = 16  # bytes of the digest of a pair or row


class PredictionStoreError(ValueError):
    """Raised for a store that is damaged or belongs to another model, and for missing or non-finite values."""


class PredictionStore:
    """Stored predictions of one frozen model.

    Args:
      model: digest of the model's parameters and configuration.
      about: further facts for about.json.
      root: root directory of the store.
      shape: shape of one value.
      setting: gin macro that names the model, for error messages.

    Raises:
      PredictionStoreError: a part is damaged, or the directory belongs to another model.
    """

    def __init__(
        self,
        model: str,
        about: Mapping[str, Any],
        *,
        root: str | os.PathLike,
        shape: tuple[int, ...],
        setting: str,
    ):
        self.directory = pathlib.Path(root) / model[:32]
        self._model, self._about = model, dict(about)
        self._shape, self._setting = shape, setting
        self._values: dict[bytes, np.ndarray] = {}
        parts = sorted(self.directory.glob("*.npz"))
        if parts:  # without a part, another process may still be creating the store
            self._check()
        for part in parts:
            self._read(part)

    @classmethod
    def shared(
        cls,
        model: str,
        about: Mapping[str, Any],
        *,
        root: str | os.PathLike,
        **settings: Any,
    ) -> "PredictionStore":
        """Returns the store of a model in a root folder that this process has open, or a new one with these settings.

        The training stream and the held-out streams of a run share one store.
        """
        key = (os.path.abspath(root), model)
        store = _OPEN.get(key)
        if store is None:
            store = _OPEN[key] = cls(model, about, root=root, **settings)
        return store

    def __len__(self) -> int:
        return len(self._values)

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Returns the digests (hexadecimal) without a stored value."""
        return [digest for digest in digests if bytes.fromhex(digest) not in self._values]

    def get(self, digests: Sequence[str]) -> np.ndarray:
        """Returns values, float32 [N, ...]; 0 for the digest ''.

        Raises:
          PredictionStoreError: a digest has no stored value.
        """
        values = np.zeros((len(digests), *self._shape), np.float32)
        for n, digest in enumerate(digests):
            if digest:
                try:
                    values[n] = self._values[bytes.fromhex(digest)]
                except KeyError:
                    raise PredictionStoreError(
                        f"{self.directory} has no value for the data {digest[:16]}: the tokens have changed since "
                        "the run began (files, tokenizer, template or MAX_LENGTH). Start the command again to "
                        "compute the missing values."
                    ) from None
        return values

    def add(self, digests: Sequence[str], values: np.ndarray) -> None:
        """Adds values [N, ...], in memory and on disk.

        All processes of a run write: each may have a local disk, and on a shared disk they write the same files.
        """
        raw = np.frombuffer(b"".join(map(bytes.fromhex, digests)), np.uint8).reshape(-1, _DIGEST)
        values = np.asarray(values, np.float32)
        if not len(digests):
            return
        self._take(raw, values)
        buffer = io.BytesIO()
        np.savez(buffer, digests=raw, values=values)
        content = buffer.getvalue()
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / ABOUT).exists():
            about = {"model": self._model, **self._about}
            files.write_json(self.directory / ABOUT, about, synced=True, shared=True)
        # Synced and shared: several runs may use the store at once, and a damaged part is an error.
        part = self.directory / f"{hashlib.sha256(content).hexdigest()}.npz"
        files.write(part, content, synced=True, shared=True)

    def _check(self) -> None:
        path = self.directory / ABOUT
        try:
            model = json.loads(path.read_text())["model"]
        except (OSError, ValueError, KeyError, TypeError):
            raise PredictionStoreError(
                f"{path} cannot be read: the store is damaged. Delete {self.directory} to compute its values "
                "again."
            ) from None
        if model != self._model:
            raise PredictionStoreError(
                f"{self.directory} belongs to another {self._setting.lower()} model ({model[:16]}, not "
                f"{self._model[:16]}). Set another {self._setting}_STORE, or delete this one."
            )

    def _read(self, part: pathlib.Path) -> None:
        content = part.read_bytes()
        if hashlib.sha256(content).hexdigest() != part.stem:
            raise PredictionStoreError(
                f"{part} is damaged: it does not match the hash in its name. Delete it to compute its values "
                "again."
            )
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                raw_ND, values = arrays["digests"], arrays["values"]
        except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
            raise PredictionStoreError(
                f"{part} holds no arrays of this store ({error}). Delete it to compute its values again."
            ) from None
        self._take(raw_ND, values)

    def _take(self, raw_ND: np.ndarray, values: np.ndarray) -> None:
        if values.shape != (len(raw_ND), *self._shape):
            raise ValueError(
                f"values have shape {values.shape}, not {len(raw_ND)} times {self._shape}."
            )
        if not np.isfinite(values).all():
            raise PredictionStoreError(
                f"The log-probabilities of {self._setting} are not finite: check that this model fits the data."
            )
        for raw, value in zip(raw_ND, values, strict=True):
            self._values[raw.tobytes()] = value


# Open stores by (root, model), as long as they are in use.
_OPEN: weakref.WeakValueDictionary[tuple[str, str], PredictionStore] = weakref.WeakValueDictionary()


class StoredStream(row_stream.Iterable, abc.ABC):
    """A stream with additional columns that are read from a store.

    All other attributes are those of the wrapped stream.

    Args:
      stream: the stream.
      store: has values of all rows of the stream.
      model: digest of the parameters of the frozen model.
    """

    role: str  # of the model, in `summary`

    def __init__(self, stream: Any, store: PredictionStore, model: str):
        self._stream, self._store, self._model = stream, store, model

    def summary(self) -> dict[str, Any]:
        """Returns the stream's summary, with the digest of the model's parameters."""
        return {**self._stream.summary(), self.role: self._model}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns rows [lo, hi) of the batch of `step`."""
        batch = self._stream.batch(step, lo, hi)
        return batch | self.columns(batch, step, lo, hi)

    @abc.abstractmethod
    def columns(
        self, batch: Mapping[str, np.ndarray], step: int, lo: int, hi: int
    ) -> dict[str, np.ndarray]:
        """Returns the additional columns of rows [lo, hi) of the batch of `step`."""
