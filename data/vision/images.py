"""Streams of labelled images: batches as a pure function of (seed, step), as for rows of tokens.

Position p of a run is step x batch size + row. A stateless permutation of the epoch maps p to an image
(data/stream/order.py), and the image's augmentation uses a generator seeded by (seed, p) only. So any step is computed
directly, and batches depend neither on hosts nor on restarts.

Shapes: B rows, S side of the images, C channels.
"""

import abc
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.ranges import Finite, Positive, Seed, Size
from espalier.data.cache import store
from espalier.data.stream import order, row_stream, stream
from espalier.data.vision.image_sets import ImageSet

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
_VERSION = 1  # raise it when the same settings give other batches
_PART = 16  # least number of images per thread


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How images become batches; `make_stream` describes the fields.

    Raises:
      ValueError: the settings do not fit together.
    """

    batch_size: Size
    image_size: Size
    channels: Size = 3
    mean: Sequence[Finite] = (0.5, 0.5, 0.5)
    std: Sequence[Positive] = (0.25, 0.25, 0.25)
    transform: Transform | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be positive.")
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise ValueError(
                f"mean = {tuple(self.mean)} and std = {tuple(self.std)} must have one number for each of the "
                f"{self.channels} channels, and std must be positive."
            )


class _Images(row_stream.Iterable, abc.ABC):
    """Base class of both streams: reads rows of a set and makes batches."""

    length = 1  # an image is one unit

    def __init__(self, images: ImageSet, settings: ImageSettings, *, seed: int):
        self.batch_size = settings.batch_size
        self._images, self._transform, self._seed = images, settings.transform, seed
        self._threads = len(os.sched_getaffinity(0))
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "images")
        self._shape = (settings.image_size, settings.image_size, settings.channels)
        self._mean_C, self._std_C = np.float32(settings.mean), np.float32(settings.std)
        self.source_names = (images.name,)
        self.fingerprint = store.digest(
            {
                "version": _VERSION,
                "images": images.digest,
                "batch_size": self.batch_size,
                "shape": self._shape,
                "mean": list(settings.mean),
                "std": list(settings.std),
                "transform": repr(self._transform),
                "seed": seed,
                "kind": type(self).__name__,
            }
        )
        self.batch(0, 0, 1)  # raises for wrong image sizes before the first step

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns rows [lo, hi) of the batch of `step`.

        Returns:
          'images' [B, S, S, C] float32, normalised per channel; 'labels' [B] int32; 'weights' [B] float32.
          Rows past the end have weight 0 and images of 0.
        """
        place_B, _, row_B = self._locate(step, lo, hi)
        held = np.flatnonzero(row_B >= 0)
        images_BSSC = np.zeros((len(row_B), *self._shape), np.float32)
        labels_B = np.zeros(len(row_B), np.int32)

        def fill(part: np.ndarray) -> None:
            originals, labels_B[part] = self._images.read(row_B[part])
            pixels = [
                self._transformed(*arguments)
                for arguments in zip(originals, row_B[part], place_B[part], strict=True)
            ]
            images_BSSC[part] = (np.stack(pixels) / np.float32(255) - self._mean_C) / self._std_C

        # Decoding and resizing release the GIL; each thread fills separate rows.
        parts = np.array_split(held, max(1, min(self._threads, len(held) // _PART)))
        list(self._pool.map(fill, [part for part in parts if part.size]))
        weights_B = (row_B >= 0).astype(np.float32)
        return {"images": images_BSSC, "labels": labels_B, "weights": weights_B}

    def documents(self, step: int, lo: int, hi: int) -> list[dict[str, Any]]:
        """Returns set, epoch and row of each image."""
        _, epoch_B, row_B = self._locate(step, lo, hi)
        return [
            {"source": self._images.name, "epoch": int(epoch), "row": int(row)}
            for epoch, row in zip(epoch_B, row_B, strict=True)
        ]

    def summary(self) -> dict[str, Any]:
        """Returns facts for the record of a run."""
        return {
            "fingerprint": self.fingerprint,
            "batch_size": self.batch_size,
            "image_shape": list(self._shape),
            "num_classes": self._images.num_classes,
            "transform": repr(self._transform),
            "sources": {
                self._images.name: {"images": self._images.size, "digest": self._images.digest}
            },
        }

    def notices(self) -> list[tuple[str, str]]:
        """Returns messages on data that are not read; all images are."""
        return []

    @abc.abstractmethod
    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (position in the run, epoch, row of the set) of each row; row -1 for no image."""

    def _places(self, step: int, lo: int, hi: int) -> np.ndarray:
        if not 0 <= lo <= hi <= self.batch_size:
            raise ValueError(f"Rows [{lo}, {hi}) are not within a batch of {self.batch_size}.")
        return step * self.batch_size + np.arange(lo, hi, dtype=np.int64)

    def _transformed(self, image: np.ndarray, row: int, place: int) -> np.ndarray:
        if self._transform is not None:
            # A generator from a key is cheap; one from a seed would hash the seed first.
            key = np.array([self._seed, place], np.uint64)
            image = self._transform(image, np.random.Generator(np.random.Philox(key=key)))
        if image.shape != self._shape:
            raise ValueError(
                f"{self._images.name!r}, row {row}: the image has shape {list(image.shape)}, not "
                f"{list(self._shape)}. Set IMAGE_SIZE and CHANNELS to those of the data, or a transform "
                "that produces this size (data/vision/augment.py)."
            )
        return image


class ImageStream(_Images):
    """An endless stream over one set with a new permutation in each epoch; see `make_stream`."""

    def __init__(
        self,
        images: ImageSet,
        settings: ImageSettings,
        *,
        seed: int,
        positions: Mapping[str, Mapping[str, Any]] | None,
    ):
        self._before = 0
        super().__init__(images, settings, seed=seed)
        if (earlier := (positions or {}).get(images.name)) is not None:
            if earlier["order"] != self._order:
                raise ValueError(
                    f"{images.name!r} cannot continue where the earlier run stopped: its images or the seed "
                    "have changed. Restore these, or start from the beginning (INITIAL_DATA = 'restart')."
                )
            self._before = int(earlier["rows"])

    def steps_for_tokens(self, tokens: float) -> int:
        """Returns the number of steps that train on `tokens` images, rounded up."""
        return -int(-tokens // self.batch_size)

    def steps_for_epochs(self, epochs: float) -> int:
        """Returns the number of steps that read `epochs` epochs, rounded up."""
        return -int(-epochs * self._images.size // self.batch_size)

    def epochs(self, step: int) -> dict[str, float]:
        """Returns the number of epochs read before `step`, including those before this run."""
        return {self._images.name: self._read(step) / self._images.size}

    def positions(self, step: int) -> dict[str, dict[str, Any]]:
        """Returns the number of rows read before `step`, so that a later phase can continue from there."""
        return {self._images.name: {"rows": self._read(step), "order": self._order}}

    def check_repeats(self, steps: int) -> list[str]:
        """Returns no warnings: image sets are meant to be read many times."""
        del steps
        return []

    @property
    def _order(self) -> str:
        return store.digest([self._seed, self._images.digest])[:16]

    def _read(self, step: int) -> int:
        return self._before + step * self.batch_size

    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place_B = self._before + self._places(step, lo, hi)
        shuffled = order.shuffled_rows(place_B, self._images.size, self._seed, self._images.name)
        return place_B, *shuffled


class ImageEvalStream(_Images):
    """A stream of every image of a split once, in arbitrary order; rows past the end have weight 0."""

    bytes_per_token = 0.0  # images have no text

    def __init__(self, images: ImageSet, settings: ImageSettings):
        self.name = images.name
        super().__init__(images, settings, seed=0)

    @property
    def num_steps(self) -> int:
        return -(-self._images.size // self.batch_size)

    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place_B = self._places(step, lo, hi)
        if not 0 <= step < self.num_steps:
            raise ValueError(
                f"Batch {step} of {self.name!r} does not exist: it has {self.num_steps} batches."
            )
        row_B = order.evaluation_rows(place_B, self._images.size, self.name)
        return place_B, np.zeros_like(place_B), row_B


@stream.with_settings(ImageSettings)
def make_stream(
    *,
    images: Callable[..., ImageSet],
    settings: ImageSettings,
    seed: Seed = 0,
    positions: Mapping[str, Mapping[str, Any]] | None = None,
) -> ImageStream:
    """Returns the training stream of a set.

    Args:
      images: factory of the set, called with (split=).
      batch_size: rows of the global batch.
      image_size: S, the side of the images after `transform`.
      channels: C.
      mean, std: mean and standard deviation of each channel, for values in [0, 1].
      transform: a transform such as those in data/vision/augment.py; None for no transform.
      seed: seed of the order and the augmentation.
      positions: the result of `positions` of another stream, to continue where it stopped.

    Raises:
      ValueError: the set is empty, its image sizes or labels are wrong, or the settings do not fit together.
    """
    return ImageStream(images(split="train"), settings, seed=seed, positions=positions)


@stream.with_settings(ImageSettings)
def make_eval_stream(
    *,
    images: Callable[..., ImageSet],
    task: str,
    settings: ImageSettings,
) -> ImageEvalStream:
    """Returns the evaluation stream of a set, which must have the name `task`: every held-out image once.

    `make_stream` describes the other arguments and errors.
    """
    image_set = images(split="validation")
    if image_set.name != task:
        raise ValueError(
            f"{task!r} cannot be evaluated: the name of the set is {image_set.name!r}."
        )
    return ImageEvalStream(image_set, settings)
