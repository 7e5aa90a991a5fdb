"""Ten classes of generated colour textures: a set for small convolutional networks that needs no download.

A texture is Gaussian noise with a class's power spectrum, as it is or cut to two values, along a random direction
of colour. Only the statistics of second order and the cut tell classes apart: phase, colours, contrast, a
change of scale, a turn and white noise on top are drawn for each image, so that classes overlap and no network
tells all of them apart.

Shapes: N images, S side of the square.
"""

import dataclasses

import numpy as np

from data.vision import image_sets

CHANNELS = 3
CONTRASTS = (0.08, 0.25)  # least and largest standard deviation of a field along its colour
_VERSION = 1  # raise it when the same settings begin to give other images


@dataclasses.dataclass(frozen=True)
class Texture:
    """The spectrum of a class: a ring of frequencies, or two opposite parts of one.

    Attributes:
      frequency: where the ring lies, in cycles per pixel.
      width: of the ring, as a share of its frequency.
      angle: of the waves, in degrees; None for all directions.
      spread: of the angle, in degrees.
      cut: whether the field is cut to two values: blobs and stripes with edges.
    """

    frequency: float
    width: float
    angle: float | None = None
    spread: float = 20.0
    cut: bool = False


CLASSES = (
    Texture(0.12, 0.3),
    Texture(0.22, 0.3),
    Texture(0.12, 0.3, cut=True),
    Texture(0.22, 0.3, cut=True),
    Texture(0.17, 0.25, angle=0.0),
    Texture(0.17, 0.25, angle=45.0),
    Texture(0.17, 0.25, angle=90.0),
    Texture(0.17, 0.25, angle=135.0),
    Texture(0.17, 0.08, angle=0.0, spread=6.0, cut=True),
    Texture(0.17, 0.08, angle=90.0, spread=6.0, cut=True),
)


def textures(
    *,
    split: str,
    size: int = 16,
    train_images: int = 8000,
    validation_images: int = 2000,
    scale: float = 0.2,
    turn: float = 15.0,
    noise: float = 0.04,
    seed: int = 0,
) -> image_sets.Arrays:
    """A split of the set, the same for the same arguments.

    Args:
      split: 'train' or 'validation'.
      size: S.
      train_images, validation_images: of each split, the classes in equal shares.
      scale: standard deviation of the logarithm of the change of scale.
      turn: standard deviation of the turn, in degrees.
      noise: standard deviation of white noise per pixel and channel, of values in [0, 1].
      seed: of everything.

    Raises:
      ValueError: an unknown split, or images smaller than a wave.
    """
    image_sets.check_split(split)
    if size < 8:
        raise ValueError(
            f"textures: size = {size} is smaller than a wave; IMAGE_SIZE is at least 8."
        )
    count = train_images if split == "train" else validation_images
    rng = np.random.default_rng((_VERSION, seed, image_sets.SPLITS.index(split)))
    labels_N = np.arange(count) % len(CLASSES)
    field_NSS = fields(rng, labels_N, size, scale=scale, turn=turn)
    middle_NC = rng.uniform(0.3, 0.7, (count, CHANNELS))
    towards_NC = rng.normal(size=(count, CHANNELS))
    towards_NC /= np.linalg.norm(towards_NC, axis=-1, keepdims=True)
    contrast_N1 = rng.uniform(*CONTRASTS, (count, 1))
    image_NSSC = field_NSS[..., None] * (contrast_N1 * towards_NC)[:, None, None]
    image_NSSC += middle_NC[:, None, None] + noise * rng.normal(size=image_NSSC.shape)
    return image_sets.Arrays(
        name="textures",
        num_classes=len(CLASSES),
        images_NHWC=(255 * image_NSSC.clip(0, 1)).round().astype(np.uint8),
        labels_N=labels_N,
    )


def fields(
    rng: np.random.Generator, labels_N: np.ndarray, size: int, *, scale: float, turn: float
) -> np.ndarray:
    """Fields of these classes, [N, S, S], each of mean 0 and standard deviation 1."""
    count = len(labels_N)
    fy_SS, fx_SS = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    radius_SS, angle_SS = np.hypot(fy_SS, fx_SS), np.degrees(np.arctan2(fy_SS, fx_SS))
    of = {
        name: np.array([getattr(CLASSES[label], name) for label in labels_N])[:, None, None]
        for name in ("frequency", "width", "spread", "cut")
    }
    directed = np.array([CLASSES[label].angle is not None for label in labels_N])[:, None, None]
    angle = np.array([CLASSES[label].angle or 0.0 for label in labels_N])[:, None, None]
    frequency = of["frequency"] * np.exp(scale * rng.normal(size=(count, 1, 1)))
    angle = angle + turn * rng.normal(size=(count, 1, 1))
    power_NSS = np.exp(-0.5 * ((radius_SS - frequency) / (of["width"] * frequency)) ** 2)
    off_NSS = (angle_SS - angle + 90.0) % 180.0 - 90.0  # a wave and its opposite are one
    power_NSS *= np.where(directed, np.exp(-0.5 * (off_NSS / of["spread"]) ** 2), 1.0)
    power_NSS[:, 0, 0] = 0.0
    white_NSS = np.fft.fft2(rng.normal(size=(count, size, size)))
    field_NSS = np.fft.ifft2(white_NSS * np.sqrt(power_NSS + 1e-4)).real
    field_NSS = np.where(of["cut"], np.sign(field_NSS), field_NSS)
    field_NSS -= field_NSS.mean((1, 2), keepdims=True)
    return field_NSS / field_NSS.std((1, 2), keepdims=True)
