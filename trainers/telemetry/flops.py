"""Peak FLOP/s of devices, and the share of it that a run's model FLOPs (model/flops.py) reach."""

import re
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one device as jax counts devices, by `device_kind`, from data sheets.
# The longest name that `device_kind` begins with, in whole words, holds.
PEAK_FLOPS = {
    "TPU v3": 61.5e12,  # a core, half a chip
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # Ironwood, a core, half a chip
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla V100": 125e12,  # float16
}


def peak_flops(device: jax.Device) -> float | None:
    """Returns the device's dense bfloat16 peak in FLOP/s; None where it is unknown (CPUs)."""
    kind = device.device_kind
    matching = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}(?!\w)", kind)]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def utilisation(
    units_per_second: float, flops_per_unit: float, devices: list[jax.Device]
) -> float | None:
    """Returns the model FLOP utilisation: model FLOPs over the devices' peak; None if that is unknown.

    Units are tokens, or images.
    """
    peaks = [peak_flops(device) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    if not known or len(known) < len(peaks):
        return None
    return units_per_second * flops_per_unit / sum(known)


def estimate_seconds(model_flops: float, devices: list[jax.Device]) -> float:
    """Estimates the seconds that so many model FLOPs take, for the line printed at the start of a run.

    Where the peak is known, 40 % of it (what well-tuned dense models reach); otherwise 60 % of what
    one product of matrices of a layer's size is measured to do here, on all local devices together.
    """
    peaks = [peak_flops(device) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    if known and len(known) == len(peaks):
        return model_flops / (0.4 * sum(known))
    size = 1024
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    start = time.perf_counter()
    product(x, x).block_until_ready()
    # Simulated CPU devices share the machine, so their number does not multiply its speed.
    return model_flops / (0.6 * 2 * size**3 / (time.perf_counter() - start))
