"""Peaks by the name of a device, and the share of them that is reached."""

from types import SimpleNamespace

import pytest

from espalier.trainers.telemetry import flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L400", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_kind(kind, peak):
    assert flops.peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_utilisation():
    v5e = SimpleNamespace(device_kind="TPU v5 lite")
    assert flops.utilisation(1e4, 197e8, [v5e] * 4) == pytest.approx(0.25)
    assert flops.utilisation(1e4, 197e8, [v5e, SimpleNamespace(device_kind="cpu")]) is None
    assert flops.utilisation(1e4, 197e8, []) is None
