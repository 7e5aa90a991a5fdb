"""What is done to an image before it is normalised: (image [H, W, C] uint8, generator) -> [S, S, C] uint8.

Each is a frozen dataclass, whose text goes into a stream's fingerprint, and a pure function of the image
and of what the generator draws; the stream gives every row a generator of its own (data/vision/images.py).
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class PadCropFlip:
    """Zeros around the image, a crop of its own size, and a flip in half of all cases: CIFAR's.

    Attributes:
      padding: pixels on each side.
      flip: mirrors left and right; not for digits, whose sides mean something.
    """

    padding: int = 4
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
    """A rectangle of random area and shape, resized, and a flip: ImageNet's (arXiv 1409.4842).

    Attributes:
      size: S.
      area: least and largest share of the image's area.
      ratio: least and largest width over height, drawn evenly in its logarithm.
      attempts: rectangles drawn before the largest square in the middle is taken.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    attempts: int = 10

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
    """The shorter side resized, and the middle of that: how ImageNet is evaluated.

    Attributes:
      size: S.
      shorter: length of the shorter side before the crop.
    """

    size: int
    shorter: int

    def __call__(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        del rng
        scale = self.shorter / min(image_HWC.shape[:2])
        height, width = (max(round(side * scale), self.size) for side in image_HWC.shape[:2])
        image_HWC = resized(image_HWC, height, width)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return image_HWC[top : top + self.size, left : left + self.size]


def resized(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image at another size, averaged where that is smaller (Pillow's bilinear filter)."""
    from PIL import Image  # Pillow comes with matplotlib

    grey = image_HWC.shape[-1] == 1
    image = Image.fromarray(image_HWC[..., 0] if grey else image_HWC)
    out = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return out[..., None] if grey else out
