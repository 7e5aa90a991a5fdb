"""Eight simulated CPU devices, exact products, and no silent rank promotion."""

import os
import sys

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
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def seqio_registries_as_found():
    """SeqIO's registries are global: what a module's tests register ends with the module."""
    before = _registered()
    yield
    if "data.tasks" in sys.modules:
        sys.modules["data.tasks"].clear()
    for kind, names in _registered().items():
        for name in names - before.get(kind, set()):
            getattr(sys.modules["seqio"], kind).remove(name)


def _registered():
    seqio = sys.modules.get("seqio")  # importing it takes seconds, and most tests do without
    kinds = ("MixtureRegistry", "TaskRegistry") if seqio else ()
    return {kind: set(getattr(seqio, kind).names()) for kind in kinds}
