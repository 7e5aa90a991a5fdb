"""Ten classes of generated colour textures: an image set for small networks, without a download.

A texture is Gaussian noise with the power spectrum of its class, along a random direction of colour. In some classes
the field is cut to two values. Classes differ only in second-order statistics and in the cut. Phase, colours, contrast,
change of scale, rotation and additional white noise are random for each image. So classes overlap, and no classifier is
always right.

Shapes: N images, S side of the square.
"""

import dataclasses

import numpy as np

from espalier.common.ranges import Count, NonNegative, Seed, Size, check_choice
from espalier.data.vision import image_sets

CHANNELS = 3
CONTRASTS = (0.08, 0.25)  # least and largest standard deviation of a field along its colour
_VERSION = 1  # raise it when the same settings begin to give other images


@dataclasses.dataclass(frozen=True)
class Texture:
    """The spectrum of a class: a ring of frequencies, or two opposite parts of a ring."""

    frequency: float  # radius of the ring, in cycles per pixel
    width: float  # width of the ring, as a share of `frequency`
    angle: float | None = None  # direction of the waves, in degrees; None for all directions
    spread: float = 20.0  # standard deviation of the direction, in degrees
    # whether the field is cut to two values, which gives blobs and stripes with sharp edges
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
    size: Size = 16,
    train_images: Size = 8000,
    validation_images: Count = 2000,
    scale: NonNegative = 0.2,
    turn: NonNegative = 15.0,
    noise: NonNegative = 0.04,
    seed: Seed = 0,
) -> image_sets.Arrays:
    """Returns a split of the set, the same for the same arguments.

    Args:
      split: 'train' or 'validation'.
      size: S.
      train_images, validation_images: images of each split, with equal shares of the classes.
      scale: standard deviation of the logarithm of the change of scale.
      turn: standard deviation of the rotation, in degrees.
      noise: standard deviation of white noise per pixel and channel, for values in [0, 1].
      seed: seed of all random choices.

    Raises:
      ValueError: `split` is unknown, or the images are smaller than a wave.
    """
    check_choice("split", split, image_sets.SPLITS)
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
    """Returns random fields [N, S, S] of the classes `labels_N`, each with mean 0 and standard deviation 1."""
    count = len(labels_N)
    fy_SS, fx_SS = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    radius_SS, angle_SS = np.hypot(fy_SS, fx_SS), np.degrees(np.arctan2(fy_SS, fx_SS))
    attribute = {
        name: np.array([getattr(CLASSES[label], name) for label in labels_N])[:, None, None]
        for name in ("frequency", "width", "spread", "cut")
    }
    directed = np.array([CLASSES[label].angle is not None for label in labels_N])[:, None, None]
    angle = np.array([CLASSES[label].angle or 0.0 for label in labels_N])[:, None, None]
    frequency = attribute["frequency"] * np.exp(scale * rng.normal(size=(count, 1, 1)))
    angle = angle + turn * rng.normal(size=(count, 1, 1))
    power_NSS = np.exp(-0.5 * ((radius_SS - frequency) / (attribute["width"] * frequency)) ** 2)
    off_NSS = (angle_SS - angle + 90.0) % 180.0 - 90.0  # opposite directions are the same wave
    power_NSS *= np.where(directed, np.exp(-0.5 * (off_NSS / attribute["spread"]) ** 2), 1.0)
    power_NSS[:, 0, 0] = 0.0
    white_NSS = np.fft.fft2(rng.normal(size=(count, size, size)))
    field_NSS = np.fft.ifft2(white_NSS * np.sqrt(power_NSS + 1e-4)).real
    field_NSS = np.where(attribute["cut"], np.sign(field_NSS), field_NSS)
    field_NSS -= field_NSS.mean((1, 2), keepdims=True)
    return field_NSS / field_NSS.std((1, 2), keepdims=True)
