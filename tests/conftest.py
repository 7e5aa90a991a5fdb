"""Eight simulated CPU devices, exact products, and no silent rank promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little: less optimised programs halve their time.
for name, value in (
    ("xla_force_host_platform_device_count", 8),
    ("xla_backend_optimization_level", 0),
):
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
