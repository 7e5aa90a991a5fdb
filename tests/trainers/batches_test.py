"""Global arrays hold the stream's rows on any mesh, and the prefetcher can be sent anywhere."""

import jax
import numpy as np
import pytest

from espalier.trainers import partitioning
from espalier.trainers.batches import Prefetcher, abstract_batch, global_batch


class Counting:
    """Row r of step s holds 1000 s + r; remembers what was asked for."""

    batch_size, length, source_names, fingerprint = 8, 4, ("a",), "f"

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def batch(self, step, lo, hi):
        if step == self.fails_at:
            raise OSError("the disk is gone")
        self.asked.append((step, lo, hi))
        rows = 1000 * step + np.arange(lo, hi)
        return {"x": np.repeat(rows[:, None], 4, 1), "source_ids": rows % 2}


@pytest.mark.parametrize(
    "shape", [{"data": 8}, {"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_rows_do_not_depend_on_the_mesh(shape):
    mesh = partitioning.make_mesh(shape=shape)
    stream = Counting()
    got = global_batch(
        stream, 3, partitioning.batch_sharding(mesh, partitioning.RULE_SETS["fsdp_tp"])
    )
    np.testing.assert_array_equal(got["x"][:, 0], 3000 + np.arange(8))
    np.testing.assert_array_equal(got["source_ids"], np.arange(8) % 2)
    want = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), got)
    like = abstract_batch(
        Counting(), partitioning.batch_sharding(mesh, partitioning.RULE_SETS["fsdp_tp"])
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), like) == want
    # Every range is read once, although several devices and both arrays need it.
    assert len(stream.asked) == len(set(stream.asked))


def sharding():
    mesh = partitioning.make_mesh(shape={"data": -1})
    return partitioning.batch_sharding(mesh, partitioning.RULE_SETS["dp"])


def test_prefetcher_goes_on_and_seeks():
    batches = Prefetcher(Counting(), sharding(), ahead=2)
    try:
        for step in (5, 6, 7, 2, 3, 10**6):
            assert int(batches.get(step)["x"][0, 0]) == 1000 * step
    finally:
        batches.close()


def test_an_error_of_the_stream_reaches_the_caller():
    batches = Prefetcher(Counting(fails_at=2), sharding())
    assert int(batches.get(1)["x"][0, 0]) == 1000
    with pytest.raises(OSError, match="the disk is gone"):
        batches.get(2)
    assert int(batches.get(3)["x"][0, 0]) == 3000  # and it can go on elsewhere
    batches.close()
    assert jax.device_count() == 8
