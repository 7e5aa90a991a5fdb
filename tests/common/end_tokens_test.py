"""The end tokens of vocabularies with one, several or none."""

import types

import pytest

from espalier.common.end_tokens import eos_ids, read_ends


@pytest.mark.parametrize(
    ("eos_id", "more", "ends", "read"),
    [
        (1, {}, (1,), (1,)),
        (5, {"eos_ids": (7, 5, 9)}, (7, 5, 9), (5, 7, 9)),
        (5, {"eos_ids": (7,)}, (7,), (5, 7)),
        (None, {"eos_ids": (7, 9)}, (7, 9), (7, 9)),
        (-1, {"eos_ids": ()}, (), ()),
    ],
)
def test_eos_is_read_first(eos_id, more, ends, read):
    vocabulary = types.SimpleNamespace(eos_id=eos_id, **more)
    assert (eos_ids(vocabulary), read_ends(vocabulary)) == (ends, read)
    assert eos_ids(None) == read_ends(None) == ()
