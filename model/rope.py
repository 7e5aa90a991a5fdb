"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864) in its published variants.

Shapes: B batch, T length, N heads, H head dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotates pairs of each head by angles that grow with the position.

    Attributes:
      base: theta; pair i turns by position * base^(-2i/H).
      layout: 'half' pairs dimension i with i + H/2 (Llama); 'interleaved' pairs 2i with 2i+1
        (GPT-J, Cohere).
      scaling: 'none'; 'linear' divides positions by `factor`; 'llama3' stretches only the long
        wavelengths, as Llama 3.1 does.
      factor: how many times longer the context becomes.
      original_length: context length before scaling ('llama3').
      low_freq_factor: wavelengths above original_length / low_freq_factor are fully stretched.
      high_freq_factor: wavelengths below original_length / high_freq_factor stay as they are.

    Raises:
      ValueError: an unknown layout or scaling, or 'llama3' bounds in the wrong order.
    """

    base: float = 10_000.0
    layout: str = "half"
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        if self.layout not in ("half", "interleaved"):
            raise ValueError(f"Rope.layout = {self.layout!r}: use 'half' or 'interleaved'.")
        if self.scaling not in ("none", "linear", "llama3"):
            raise ValueError(f"Rope.scaling = {self.scaling!r}: use 'none', 'linear' or 'llama3'.")
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("Rope: high_freq_factor must exceed low_freq_factor.")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each of the H/2 pairs, float32."""
        if head_dim % 2:
            raise ValueError(f"Rope needs an even head_dim, got {head_dim}.")
        # Far positions multiply whatever is rounded here: published models were trained on reciprocals
        # of float32 powers, which XLA's power misses by up to eight units in the last place.
        exponent_P = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        power_P = (np.float64(self.base) ** exponent_P.astype(np.float64)).astype(np.float32)
        freq_P = np.float32(1) / power_P
        if self.scaling == "linear":
            return freq_P / np.float32(self.factor)
        if self.scaling == "llama3":
            # The steps of the published code, each rounded to float32: where keep_P is small, any other
            # order moves the frequency by several units in the last place.
            wavelength_P = np.float32(1) / freq_P * np.float32(2 * math.pi)
            turns_P = np.float32(1) / wavelength_P * np.float32(self.original_length)
            # 0 where stretched fully, 1 where unchanged, linear in the turns between the two bounds.
            keep_P = (turns_P - np.float32(self.low_freq_factor)) / np.float32(
                self.high_freq_factor - self.low_freq_factor
            )
            keep_P = np.clip(keep_P, np.float32(0), np.float32(1))
            return (1 - keep_P) * freq_P / np.float32(self.factor) + keep_P * freq_P
        return freq_P

    def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Rotates x_BTNH by its positions; float32 inside, the input's dtype outside."""
        angle_BTP = positions_BT[..., None].astype(jnp.float32) * self.frequencies(
            x_BTNH.shape[-1]
        ).reshape(1, 1, -1)
        cos, sin = jnp.cos(angle_BTP)[:, :, None, :], jnp.sin(angle_BTP)[:, :, None, :]
        x = x_BTNH.astype(jnp.float32)
        if self.layout == "half":
            # Whole-width tables and a roll: one pass over x, where concatenating its halves takes two.
            cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
            out = x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin
        else:
            a, b = x[..., 0::2], x[..., 1::2]
            out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
        return out.astype(x_BTNH.dtype)
