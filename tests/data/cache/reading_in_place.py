"""A stream reads the same rows of caches that are read in place."""

import numpy as np

from espalier.data.cache import in_place


def check(make, caches, monkeypatch):
    """`make` returns a stream of `caches`, name -> cache."""
    want = [make().batch(step, 0, 8) for step in range(3)]
    for name, opened in list(caches.items()):
        monkeypatch.setitem(caches, name, in_place.open_cache(opened.directory))
    stream = make()
    for step, batch in enumerate(want):
        got = stream.batch(step, 0, 8)
        assert list(got) == list(batch)
        for name in batch:
            np.testing.assert_array_equal(got[name], batch[name], err_msg=name)
