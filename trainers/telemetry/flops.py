"""Peak FLOP/s of devices, and model FLOP utilisation (model FLOPs are in model/flops.py)."""

import functools
import re
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one JAX device, by `device_kind`, from data sheets. The entry with the longest
# name that is a prefix of `device_kind`, in whole words, is used.
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
    """Returns the device's dense bfloat16 peak in FLOP/s; None if it is unknown (CPUs)."""
    kind = device.device_kind
    matching = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}(?!\w)", kind)]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def _total_peak(devices: list[jax.Device]) -> float | None:
    peaks = [peak_flops(device) for device in devices]
    return None if None in peaks or not peaks else sum(filter(None, peaks))


def utilisation(
    units_per_second: float, flops_per_unit: float, devices: list[jax.Device]
) -> float | None:
    """Returns model FLOPs (of tokens or images) divided by the devices' peak; None if it is unknown."""
    peak = _total_peak(devices)
    return None if peak is None else units_per_second * flops_per_unit / peak


def estimate_seconds(model_flops: float, devices: list[jax.Device]) -> float:
    """Returns an estimate of the seconds for a number of model FLOPs, printed at the start of a run.

    The assumed rate is 40 % of the peak if it is known, which well-tuned dense models reach. Otherwise it
    is 60 % of the measured rate of a matrix product of a layer's size on all local devices together.
    """
    if (peak := _total_peak(devices)) is not None:
        return model_flops / (0.4 * peak)
    return model_flops / (0.6 * _measured_rate())


@functools.cache
def _measured_rate() -> float:
    """Returns the FLOP/s of a matrix product on the local devices together, measured once in a process."""
    size = 1024
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    start = time.perf_counter()
    product(x, x).block_until_ready()
    # Simulated CPU devices share one machine, so more of them are not faster.
    return 2 * size**3 / (time.perf_counter() - start)
