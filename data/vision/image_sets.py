"""Sets of labelled images that a stream reads row by row; each factory is called with (split=).

`arrays` wraps what is in memory, `digits` the handwritten digits that come with scikit-learn, and `tfds` a set
of TensorFlow Datasets, read at random. data/vision/textures.py generates one.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from data import cpu_tensorflow

SPLITS = ("train", "validation")


class ImageSet(Protocol):
    """A split of a set.

    Attributes:
      name: of the set; a run's source and evaluation are called so.
      num_classes: labels are below it.
      size: images.
      digest: of all that decides what is read.
    """

    name: str
    num_classes: int
    size: int
    digest: str

    def read(self, rows: np.ndarray) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """Images [H, W, C] uint8, not all of one size perhaps, and labels [rows] of these rows."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """A set in memory.

    Raises:
      ValueError: no images, other types than are needed, or a label without a class.
    """

    name: str
    num_classes: int
    images_NHWC: np.ndarray
    labels_N: np.ndarray

    def __post_init__(self):
        images, labels = self.images_NHWC, self.labels_N
        if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.name!r}: images are [N, H, W, C] of uint8 with a label each, not "
                f"{list(images.shape)} of {images.dtype} with labels {list(labels.shape)}."
            )
        _check_not_empty(self.name, len(labels))
        _check_labels(self.name, labels, self.num_classes)

    @property
    def size(self) -> int:
        return len(self.labels_N)

    @property
    def digest(self) -> str:
        found = hashlib.sha256()
        for array in (self.images_NHWC, self.labels_N.astype(np.int64)):
            found.update(repr(array.shape).encode())
            found.update(np.ascontiguousarray(array))
        return found.hexdigest()

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images_NHWC[rows], self.labels_N[rows]


def digits(*, split: str, validation_fraction: float = 0.2, seed: int = 0) -> Arrays:
    """1,797 handwritten digits, 8 x 8 grey (Alpaydin and Kaynak, 1998), from the package scikit-learn.

    Args:
      split: 'train' or 'validation', which the set itself does not have: drawn by `seed`.
      validation_fraction: share that is held out.
      seed: of the split.

    Raises:
      ImportError: scikit-learn is not installed.
      ValueError: an unknown split.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError(
            "The set 'digits' comes with scikit-learn, which is not installed: pip install scikit-learn, "
            "or use t5x_configs/data/textures.gin, which needs nothing."
        ) from None
    check_split(split)
    found = datasets.load_digits()
    images_NHWC = (found.images * (255 / 16)).round().astype(np.uint8)[..., None]
    order = np.random.default_rng(seed).permutation(len(images_NHWC))
    held_out = round(validation_fraction * len(order))
    rows = order[:held_out] if split == "validation" else order[held_out:]
    return Arrays("digits", 10, images_NHWC[rows], found.target[rows])


def tfds(
    *,
    split: str,
    name: str,
    splits: Sequence[str] = ("train", "test"),
    data_dir: str | os.PathLike | None = None,
) -> "Tfds":
    """A set of TensorFlow Datasets with features 'image' and 'label', already prepared for random access.

    Args:
      split: 'train' or 'validation'.
      name: such as 'cifar100:3.0.2', 'imagenet2012:5.1.0'.
      splits: what the set calls the two; parts such as 'train[:98%]' serve too.
      data_dir: where it was prepared; TFDS's own default if None.

    Raises:
      ValueError: an unknown split, or a set that is not there in array_record files; nothing is downloaded.
    """
    cpu_tensorflow.load()
    import tensorflow_datasets as datasets

    check_split(split)
    named = splits[SPLITS.index(split)]
    builder = datasets.builder(name, data_dir=data_dir, file_format="array_record")
    try:
        source = builder.as_data_source(split=named)
    except (AssertionError, KeyError, ValueError, NotImplementedError, OSError) as error:
        said = str(error.args[0] if error.args else error)  # a KeyError's own text is quoted
        raise ValueError(
            f"TFDS_NAME = {name!r} cannot be read at random from {builder.data_path}: "
            f"{said.splitlines()[0]} Prepare it once, on a machine with a network: "
            f"tfds build {name} --file_format=array_record --data_dir=DATA_DIR."
        ) from None
    label = builder.info.features["label"]
    told = [builder.info.full_name, named, len(source), builder.info.splits[named].num_examples]
    digest = hashlib.sha256(repr(told).encode()).hexdigest()
    return Tfds(name.partition(":")[0], label.num_classes, len(source), digest, source)


@dataclasses.dataclass(frozen=True, eq=False)
class Tfds:
    """A split of TensorFlow Datasets, decoded as it is read; see `tfds`."""

    name: str
    num_classes: int
    size: int
    digest: str
    source: Any

    def __post_init__(self):
        _check_not_empty(self.name, self.size)

    def read(self, rows: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        examples = self.source.__getitems__(rows.tolist())
        labels = np.array([example["label"] for example in examples])
        _check_labels(self.name, labels, self.num_classes)
        return [np.asarray(example["image"]) for example in examples], labels


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split = {split!r} is none of {', '.join(map(repr, SPLITS))}.")


def _check_not_empty(name: str, size: int) -> None:
    if not size:
        raise ValueError(f"{name!r} holds no images: choose another split or set.")


def _check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{name!r} has the label {labels[row]} (row {row}), but labels lie in [0, {num_classes}): "
            "correct the labels, or num_classes."
        )
