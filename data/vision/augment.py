"""Image transforms before normalisation: (image [H, W, C] uint8, generator) -> [S, S, C] uint8.

Each transform is a frozen dataclass, whose repr is part of a stream's fingerprint. It is a pure function of the
image and the generator; the stream passes a separate generator for every row (data/vision/images.py).
"""

import dataclasses
import math

import numpy as np

from espalier.common.ranges import Count, Fraction, Positive, Size


@dataclasses.dataclass(frozen=True)
class PadCropFlip:
    """Pads with zeros, crops to the original size, and flips with probability 1/2: for CIFAR."""

    padding: Count = 4  # pixels on each side
    # flip left and right with probability 1/2; False for images such as digits, which a flip
    # changes
    flip: bool = True

    def __call__(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width, _ = image_HWC.shape
        top, left = rng.integers(2 * self.padding + 1, size=2)
        flipped = rng.random() < 0.5
        padding = (self.padding, self.padding)
        padded = np.pad(image_HWC, (padding, padding, (0, 0)))
        crop = padded[top : top + height, left : left + width]
        return crop[:, ::-1] if self.flip and flipped else crop


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Crops a random rectangle, resizes it, and flips with probability 1/2: for ImageNet (arXiv 1409.4842)."""

    size: Size  # S
    area: tuple[Fraction, Fraction] = (
        0.08,
        1.0,
    )  # bounds of the rectangle's share of the image's area
    # bounds of width over height; its logarithm is uniform
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    # most rectangles to draw; if none fits into the image, the largest central square is used
    attempts: Size = 10

    def __call__(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left, height, width = self._rectangle(*image_HWC.shape[:2], rng)
        crop = resized(image_HWC[top : top + height, left : left + width], self.size, self.size)
        return crop[:, ::-1] if rng.random() < 0.5 else crop

    def _rectangle(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        for _ in range(self.attempts):
            pixels = rng.uniform(*self.area) * height * width
            ratio = math.exp(rng.uniform(*map(math.log, self.ratio)))
            w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < h <= height and 0 < w <= width:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side


@dataclasses.dataclass(frozen=True)
class CentreCrop:
    """Resizes the shorter side and crops the centre: for evaluation on ImageNet."""

    size: Size  # S
    shorter: Size  # length of the shorter side before the crop

    def __post_init__(self):
        if self.shorter < self.size:
            raise ValueError(
                f"CentreCrop.shorter is {self.shorter}, shorter than the crop of {self.size}: raise CentreCrop.shorter, or lower "
                "IMAGE_SIZE."
            )

    def __call__(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        del rng
        scale = self.shorter / min(image_HWC.shape[:2])
        height, width = (round(side * scale) for side in image_HWC.shape[:2])
        image_HWC = resized(image_HWC, height, width)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return image_HWC[top : top + self.size, left : left + self.size]


def resized(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the image at another size (Pillow's bilinear filter, which averages when it shrinks an image)."""
    from PIL import Image  # Pillow comes with matplotlib

    grey = image_HWC.shape[-1] == 1
    image = Image.fromarray(image_HWC[..., 0] if grey else image_HWC)
    out = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return out[..., None] if grey else out
