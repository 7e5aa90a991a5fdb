"""Platform and reference switches, and that a jitted function notices them."""

import jax
import pytest

from espalier.model.kernels import platform


def test_defaults_to_the_backend_and_nests():
    assert platform.target_platform() == jax.default_backend() == "cpu"
    with platform.use_platform("tpu"):
        assert platform.target_platform() == "tpu"
        with platform.use_platform("cuda"):
            assert platform.target_platform() == "gpu"
        assert platform.target_platform() == "tpu"
    assert platform.target_platform() == "cpu"


def test_unknown_platform_is_refused():
    with pytest.raises(ValueError, match="'npu'"), platform.use_platform("npu"):
        pass


def test_a_jitted_function_is_traced_again_under_another_setting():
    seen = []

    @jax.jit
    def f(x):
        seen.append((platform.target_platform(), platform.reference_forms()))
        return x

    f(1.0)
    f(1.0)
    with platform.use_platform("tpu"):
        f(1.0)
    with platform.use_reference_forms():
        f(1.0)
        assert platform.target_platform() == "cpu"
    f(1.0)
    assert seen == [("cpu", False), ("tpu", False), ("cpu", True)]
