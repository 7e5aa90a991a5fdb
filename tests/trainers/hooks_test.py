"""What a run takes as a hook."""

import pytest

from espalier.trainers.hooks import Hook, checked


class Counting(Hook):
    every = 2

    def __call__(self, step, state, metrics):
        return {"count": step}


class Similar:
    every = 2

    def __call__(self, step, state, metrics):
        return {"count": step}


def test_what_is_no_hook_is_refused_by_name():
    hook = Counting()
    assert checked(hook) is hook and not hook.ended and hook.prefix == ""
    with pytest.raises(ValueError, match="Similar is no hook: derive it from espalier.trainers"):
        checked(Similar())
