"""Bars that are stages where there is no terminal."""

import gc
import io
import re

import pytest

from espalier.common import bars, stages
from espalier.common.bars import Bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def newest():
    text = stages._stages[-1].text if stages._stages else ""
    return text if isinstance(text, str) else text()


@pytest.fixture(autouse=True)
def no_stages_of_earlier_tests():
    """An error that ended a bar's loop holds the bar, and with it the stage, until it is collected."""
    gc.collect()
    assert newest() == ""


@pytest.fixture
def clock(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_bar_says_how_far_it_is(clock):
    seen = []
    for _ in Bar(range(4), desc="eval python", unit="batch", file=io.StringIO()):
        seen.append(newest())
        clock[0] += 30.0
    assert seen[:3] == [
        "eval python: 0/4 batch",
        "eval python: 1/4 batch (about 90 s left)".replace("90 s", "2 min"),
        "eval python: 2/4 batch (about 60 s left)",
    ]
    assert newest() == ""


def test_what_was_done_before_does_not_count_for_the_remaining_time(clock):
    with Bar(total=100, initial=50, desc="covariances", unit="document", file=io.StringIO()) as bar:
        assert newest() == "covariances: 50/100 document"
        clock[0] += 10.0
        bar.update(10)
        assert newest() == "covariances: 60/100 document (about 40 s left)"
    assert newest() == ""


def test_sizes_are_scaled_and_a_total_may_be_unknown():
    with Bar(desc="weights", unit="B", unit_scale=True, file=io.StringIO()) as bar:
        bar.update(2_500_000)
        assert re.fullmatch(r"weights: 2\.50M B \([\d.]+[kMGTP]?/s\)", newest())
        bar.set_postfix_str("1 of 3 files")
        assert newest().endswith("/s), 1 of 3 files")


def test_on_a_terminal_it_is_a_bar_and_no_stage():
    screen = Terminal()
    for _ in Bar(range(3), desc="eval", file=screen, ncols=60, mininterval=0):
        assert newest() == ""
    assert "eval: 100%" in screen.getvalue()


def test_a_bar_that_is_left_early_ends_its_stage():
    with pytest.raises(KeyError), Bar(total=2, desc="x", file=io.StringIO()):
        raise KeyError
    for _ in Bar(range(3), desc="x", file=io.StringIO()):
        break
    assert newest() == ""
    for _ in Bar(range(3), file=io.StringIO(), disable=True):  # one without a name is quiet
        assert newest() == ""
