"""The least time of a step from one chip's figures, against the published rates by hand."""

import pytest

from espalier.launch.precompile import tpu_topology


def times(**changed):
    settings = dict(flops=0.0, hbm_bytes=0.0, sent=0.0, sent_between_slices=0.0, model_flops=None)
    return tpu_topology.roofline(tpu_topology.CHIPS["v5e"], **(settings | changed))


@pytest.mark.parametrize(
    ("figures", "bound", "seconds", "one_ring"),
    [
        ({"flops": 197e12}, "compute", 1.0, 1.0),
        ({"hbm_bytes": 1638e9}, "hbm", 2.0, 2.0),
        # Four links of 45 GB/s, or the two of one ring.
        ({"sent": 360e9}, "links", 2.0, 4.0),
        ({"sent_between_slices": 6.25e9, "flops": 197e12}, "network", 2.0, 2.0),
        ({"flops": 3 * 197e12, "sent": 360e9}, "compute", 3.0, 4.0),
    ],
)
def test_the_busiest_resource_bounds_a_step(figures, bound, seconds, one_ring):
    found = times(**figures)
    assert found.bound_by == bound
    assert (found.step, found.step_one_ring) == pytest.approx((seconds, one_ring))
    assert found.as_json()["mfu_bound"] is None


def test_the_model_s_share_of_the_peak():
    found = times(flops=2 * 197e12, sent=540e9, model_flops=1.5 * 197e12).as_json()
    assert found["mfu_bound"] == pytest.approx(0.5)  # three seconds of links
    assert found["mfu_bound_one_ring"] == pytest.approx(0.25)


def test_a_chip_has_two_links_in_each_dimension():
    assert {name: chip.wire_rate / chip.link_rate for name, chip in tpu_topology.CHIPS.items()} == {
        **{"v4": 6, "v5e": 4},
        **{"v5p": 6, "v6e": 4},
    }
