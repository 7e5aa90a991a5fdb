"""Rotary position embeddings (Su et al., RoFormer, arXiv 2104.09864) and published variants.

Shapes: B batch, T length, N heads, H head dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.ranges import Fraction, Positive, Size, check_choice, recordable, refuse_set

# The settings that each kind of scaling reads.
SCALINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_length", "beta_fast", "beta_slow", "truncate"),
        "attention_factor",
    ),
}


@recordable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotates pairs of each head by angles that grow with the position.

    Attributes:
      base: theta; pair i is rotated by the angle position * base^(-2i/H).
      layout: 'half' pairs dimension i with i + H/2 (Llama); 'interleaved' pairs 2i with 2i+1
        (GPT-J, Cohere).
      fraction: share of the H dimensions that is rotated, the first ones; H above is their number (GPT-NeoX).
      scaling: 'none'; 'linear' divides positions by `factor`; 'llama3' stretches only long
        wavelengths, as in Llama 3.1; 'yarn' too, and makes logits larger (YaRN, arXiv 2309.00071).
      factor: factor by which the context becomes longer.
      original_length: context length before scaling ('llama3', 'yarn').
      low_freq_factor: wavelengths above original_length / low_freq_factor are fully stretched ('llama3').
      high_freq_factor: wavelengths below original_length / high_freq_factor are not stretched ('llama3').
      beta_fast: pairs that turn more often than this in original_length are not stretched ('yarn').
      beta_slow: pairs that turn less often than this in original_length are fully stretched ('yarn').
      truncate: whether these two bounds are rounded outwards to whole pairs ('yarn').
      attention_factor: factor on rotated queries and keys ('yarn'); None for the paper's, 0.1 ln(factor) + 1.

    Raises:
      ValueError: an unknown layout or scaling, bounds in the wrong order, or a setting of another scaling.
    """

    base: Positive = 10_000.0
    layout: str = "half"
    fraction: Fraction = 1.0
    scaling: str = "none"
    factor: Positive = 1.0
    original_length: Size = 8192
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    attention_factor: Positive | None = None

    def __post_init__(self):
        if self.layout not in ("half", "interleaved"):
            raise ValueError(f"Rope.layout = {self.layout!r}: use 'half' or 'interleaved'.")
        check_choice("Rope.scaling", self.scaling, SCALINGS)
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("Rope: high_freq_factor must exceed low_freq_factor.")
        if self.scaling == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError("Rope: beta_fast must exceed beta_slow.")
        known = {name for names in SCALINGS.values() for name in names}
        unread = known - set(SCALINGS[self.scaling])
        refuse_set(self, sorted(unread), f"scaling = {self.scaling!r}")

    @property
    def magnitude(self) -> float:
        """The factor on rotated queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        longer = self.scaling == "yarn" and self.factor > 1
        return 0.1 * math.log(self.factor) + 1.0 if longer else 1.0

    def rotated_dims(self, head_dim: int) -> int:
        """Returns the number of dimensions of a head that are rotated.

        Raises:
          ValueError: it is odd or zero.
        """
        count = int(head_dim * self.fraction)
        if count % 2 or not count:
            raise ValueError(
                f"Rope rotates pairs, and {count} of head_dim = {head_dim} dimensions are no even number of at least 2: "
                "change head_dim or Rope.fraction."
            )
        return count

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each rotated pair, in radians, float32.

        Raises:
          ValueError: an odd number of dimensions is rotated.
        """
        dims = self.rotated_dims(head_dim)
        # Rounding errors grow with the position. Published models were trained with reciprocals of
        # float32 powers; XLA's power differs from these by up to eight units in the last place.
        exponent_P = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
        power_P = (np.float64(self.base) ** exponent_P.astype(np.float64)).astype(np.float32)
        freq_P = np.float32(1) / power_P
        if self.scaling == "linear":
            return freq_P / np.float32(self.factor)
        # The steps of the published code, each rounded to float32. Where keep_P is small, another
        # order changes the frequency by several units in the last place.
        if self.scaling == "llama3":
            wavelength_P = np.float32(1) / freq_P * np.float32(2 * math.pi)
            turns_P = np.float32(1) / wavelength_P * np.float32(self.original_length)
            # 0: fully stretched; 1: unchanged; linear in the number of turns between the two bounds.
            keep_P = (turns_P - np.float32(self.low_freq_factor)) / np.float32(
                self.high_freq_factor - self.low_freq_factor
            )
            keep_P = np.clip(keep_P, np.float32(0), np.float32(1))
            return (1 - keep_P) * freq_P / np.float32(self.factor) + keep_P * freq_P
        if self.scaling == "yarn":
            stretched_P = np.float32(1) / (np.float32(self.factor) * power_P)
            keep_P = np.float32(1) - self._ramp(dims)
            return stretched_P * (np.float32(1) - keep_P) + freq_P * keep_P
        return freq_P

    def _ramp(self, dims: int) -> np.ndarray:
        """Returns how far YaRN stretches each pair, float32: 0 not at all, 1 fully; linear in the pair between the bounds."""
        # The pair, as a number that need not be whole, that turns so often in original_length.
        low, high = (
            dims
            * math.log(self.original_length / (turns * 2 * math.pi))
            / (2 * math.log(self.base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        if low == high:
            high += 0.001
        pairs_P = np.arange(dims // 2, dtype=np.float32)
        ramp_P = (pairs_P - np.float32(low)) / np.float32(high - low)
        return np.clip(ramp_P, np.float32(0), np.float32(1))

    def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns x_BTNH rotated by its positions, computed in float32, in the input's dtype."""
        return self._rotated(x_BTNH, positions_BT, self.magnitude)

    def moved(self, rotated_BTNH: jax.Array, distance_BT: jax.Array) -> jax.Array:
        """Returns what is rotated by its positions, as at positions that are larger by a distance."""
        return self._rotated(rotated_BTNH, distance_BT, 1.0)

    def _rotated(self, x_BTNH: jax.Array, positions_BT: jax.Array, magnitude: float) -> jax.Array:
        frequencies_P = self.frequencies(x_BTNH.shape[-1])
        angle_BTP = positions_BT[..., None].astype(jnp.float32) * frequencies_P.reshape(1, 1, -1)
        cos, sin = jnp.cos(angle_BTP)[:, :, None, :], jnp.sin(angle_BTP)[:, :, None, :]
        if magnitude != 1:
            cos, sin = cos * magnitude, sin * magnitude
        dims = 2 * len(frequencies_P)
        part = dims < x_BTNH.shape[-1]
        x = (x_BTNH[..., :dims] if part else x_BTNH).astype(jnp.float32)
        if self.layout == "half":
            # Full-width tables and a roll need one pass over x; concatenating its halves needs two.
            cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
            out = x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin
        else:
            a, b = x[..., 0::2], x[..., 1::2]
            out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
        out = out.astype(x_BTNH.dtype)
        return jnp.concatenate([out, x_BTNH[..., dims:]], axis=-1) if part else out
