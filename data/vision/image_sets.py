"""Sets of labelled images with random access; each factory is called with (split=).

`Arrays` wraps arrays in memory. `digits` has the handwritten digits of scikit-learn. `tfds` reads a set of TensorFlow
Datasets by random access. data/vision/textures.py generates a set.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from espalier.common.ranges import Fraction, Seed, check_choice
from espalier.data import cpu_tensorflow

SPLITS = ("train", "validation")


class ImageSet(Protocol):
    """One split of a set."""

    name: str  # name of the set, also of a run's source and evaluation
    num_classes: int  # number of classes; labels are in [0, num_classes)
    size: int  # number of images
    digest: str  # digest of everything that determines images and labels

    def read(self, rows: np.ndarray) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """Returns images [H, W, C] uint8, possibly of different sizes, and labels [rows] of the rows."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """One split of a set, in memory."""

    name: str
    num_classes: int
    images_NHWC: np.ndarray
    labels_N: np.ndarray

    def __post_init__(self):
        images, labels = self.images_NHWC, self.labels_N
        if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.name!r}: images must be [N, H, W, C] of uint8 with one label each, not "
                f"{list(images.shape)} of {images.dtype} with labels {list(labels.shape)}."
            )
        _check_not_empty(self.name, len(labels))
        _check_labels(self.name, labels, self.num_classes)

    @property
    def size(self) -> int:
        return len(self.labels_N)

    @property
    def digest(self) -> str:
        sha256 = hashlib.sha256()
        for array in (self.images_NHWC, self.labels_N.astype(np.int64)):
            sha256.update(repr(array.shape).encode())
            sha256.update(np.ascontiguousarray(array))
        return sha256.hexdigest()

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images_NHWC[rows], self.labels_N[rows]


def digits(*, split: str, validation_fraction: Fraction = 0.2, seed: Seed = 0) -> Arrays:
    """Returns a split of scikit-learn's 1,797 handwritten digits, 8 x 8 grey (Alpaydin and Kaynak, 1998).

    Args:
      split: 'train' or 'validation'.
      validation_fraction: share to hold out.
      seed: seed of the split, since scikit-learn has none.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError(
            "The set 'digits' is part of scikit-learn, which is not installed: pip install scikit-learn, "
            "or use t5x_configs/data/textures.gin, which needs no package."
        ) from None
    check_choice("split", split, SPLITS)
    bunch = datasets.load_digits()
    images_NHWC = (bunch.images * (255 / 16)).round().astype(np.uint8)[..., None]
    order = np.random.default_rng(seed).permutation(len(images_NHWC))
    held_out = round(validation_fraction * len(order))
    rows = order[:held_out] if split == "validation" else order[held_out:]
    return Arrays("digits", 10, images_NHWC[rows], bunch.target[rows])


def tfds(
    *,
    split: str,
    name: str,
    splits: Sequence[str] = ("train", "test"),
    data_dir: str | os.PathLike | None = None,
) -> "Tfds":
    """Returns a split of a TensorFlow dataset with features 'image' and 'label', prepared for random access.

    Args:
      name: name and version, such as 'cifar100:3.0.2' or 'imagenet2012:5.1.0'.
      splits: TFDS names of the two splits; parts such as 'train[:98%]' are allowed.
      data_dir: directory of the prepared set; None for the default of TFDS.

    Raises:
      ValueError: there are no array_record files of the set; nothing is downloaded.
    """
    cpu_tensorflow.load()
    import tensorflow_datasets as datasets

    check_choice("split", split, SPLITS)
    named = splits[SPLITS.index(split)]
    builder = datasets.builder(name, data_dir=data_dir, file_format="array_record")
    try:
        source = builder.as_data_source(split=named)
    except (AssertionError, KeyError, ValueError, NotImplementedError, OSError) as error:
        message = str(error.args[0] if error.args else error)  # a KeyError's own text is quoted
        raise ValueError(
            f"TFDS_NAME = {name!r} cannot be read by random access from {builder.data_path}: "
            f"{message.splitlines()[0]} Prepare it once, on a machine with a network: "
            f"tfds build {name} --file_format=array_record --data_dir=DATA_DIR."
        ) from None
    label = builder.info.features["label"]
    identity = [builder.info.full_name, named, len(source), builder.info.splits[named].num_examples]
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()
    return Tfds(name.partition(":")[0], label.num_classes, len(source), digest, source)


@dataclasses.dataclass(frozen=True, eq=False)
class Tfds:
    """One split of a TensorFlow dataset, decoded on access; see `tfds`."""

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
