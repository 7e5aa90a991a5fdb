"""Rotary position embeddings (Su et al., RoFormer, arXiv 2104.09864) and published variants.

Shapes: B batch, T length, N heads, H head dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.ranges import Positive, Size, recordable, refuse_set


@recordable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotates pairs of each head by angles that grow with the position.

    Attributes:
      base: theta; pair i is rotated by the angle position * base^(-2i/H).
      layout: 'half' pairs dimension i with i + H/2 (Llama); 'interleaved' pairs 2i with 2i+1
        (GPT-J, Cohere).
      scaling: 'none'; 'linear' divides positions by `factor`; 'llama3' stretches only long
        wavelengths, as in Llama 3.1.
      factor: factor by which the context becomes longer.
      original_length: context length before scaling ('llama3').
      low_freq_factor: wavelengths above original_length / low_freq_factor are fully stretched.
      high_freq_factor: wavelengths below original_length / high_freq_factor are not stretched.

    Raises:
      ValueError: an unknown layout or scaling, 'llama3' bounds in the wrong order, or a setting of another scaling.
    """

    base: Positive = 10_000.0
    layout: str = "half"
    scaling: str = "none"
    factor: Positive = 1.0
    original_length: Size = 8192
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0

    def __post_init__(self):
        if self.layout not in ("half", "interleaved"):
            raise ValueError(f"Rope.layout = {self.layout!r}: use 'half' or 'interleaved'.")
        if self.scaling not in ("none", "linear", "llama3"):
            raise ValueError(f"Rope.scaling = {self.scaling!r}: use 'none', 'linear' or 'llama3'.")
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("Rope: high_freq_factor must exceed low_freq_factor.")
        of_llama3 = ("original_length", "low_freq_factor", "high_freq_factor")
        unread = {"none": ("factor", *of_llama3), "linear": of_llama3}.get(self.scaling, ())
        refuse_set(self, unread, f"scaling = {self.scaling!r}")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each of the H/2 pairs, in radians, float32.

        Raises:
          ValueError: head_dim is odd.
        """
        if head_dim % 2:
            raise ValueError(f"Rope needs an even head_dim, got {head_dim}.")
        # Rounding errors grow with the position. Published models were trained with reciprocals of
        # float32 powers; XLA's power differs from these by up to eight units in the last place.
        exponent_P = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        power_P = (np.float64(self.base) ** exponent_P.astype(np.float64)).astype(np.float32)
        freq_P = np.float32(1) / power_P
        if self.scaling == "linear":
            return freq_P / np.float32(self.factor)
        if self.scaling == "llama3":
            # The steps of the published code, each rounded to float32. Where keep_P is small, another
            # order changes the frequency by several units in the last place.
            wavelength_P = np.float32(1) / freq_P * np.float32(2 * math.pi)
            turns_P = np.float32(1) / wavelength_P * np.float32(self.original_length)
            # 0: fully stretched; 1: unchanged; linear in the number of turns between the two bounds.
            keep_P = (turns_P - np.float32(self.low_freq_factor)) / np.float32(
                self.high_freq_factor - self.low_freq_factor
            )
            keep_P = np.clip(keep_P, np.float32(0), np.float32(1))
            return (1 - keep_P) * freq_P / np.float32(self.factor) + keep_P * freq_P
        return freq_P

    def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns x_BTNH rotated by its positions, computed in float32, in the input's dtype."""
        angle_BTP = positions_BT[..., None].astype(jnp.float32) * self.frequencies(
            x_BTNH.shape[-1]
        ).reshape(1, 1, -1)
        cos, sin = jnp.cos(angle_BTP)[:, :, None, :], jnp.sin(angle_BTP)[:, :, None, :]
        x = x_BTNH.astype(jnp.float32)
        if self.layout == "half":
            # Full-width tables and a roll need one pass over x; concatenating its halves needs two.
            cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
            out = x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin
        else:
            a, b = x[..., 0::2], x[..., 1::2]
            out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
        return out.astype(x_BTNH.dtype)
