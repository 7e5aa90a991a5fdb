"""Schedules against closed forms at the steps that matter."""

import math

import numpy as np
import pytest

from espalier.trainers.optim import schedules


def test_cosine_peaks_after_warmup_and_never_rises_again():
    lr = schedules.cosine(peak=3e-4, total_steps=10_000, warmup_steps=1325, final_fraction=0.1)
    assert float(lr(0)) == 0.0
    assert float(lr(1325)) == pytest.approx(3e-4, abs=1e-7)
    assert float(lr(10_000)) == pytest.approx(3e-5, abs=1e-7)
    values = np.array([float(lr(s)) for s in range(1325, 10_000, 75)])
    assert np.all(np.diff(values) <= 1e-9)
    halfway = 3e-4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert float(lr(1325 + (10_000 - 1325) / 2)) == pytest.approx(halfway, rel=1e-4)


def test_the_peak_may_come_first():
    assert float(schedules.constant(1e-3)(7)) == pytest.approx(1e-3)
    by_name = schedules.cosine(peak=0.1, total_steps=10)
    assert float(schedules.cosine(0.1, total_steps=10)(3)) == float(by_name(3))


def test_cooldown_starts_where_the_run_stopped_and_ends_at_its_floor():
    before = schedules.cosine(peak=1e-3, total_steps=1000, warmup_steps=10)
    lr = schedules.cooldown(before=before, start_step=400, steps=100)
    for step in (0, 5, 10, 399):
        assert float(lr(step)) == float(before(step))
    start = float(before(400))
    assert float(lr(400)) == pytest.approx(start)
    assert float(lr(450)) == pytest.approx((start + 1e-6) / 2, rel=1e-5)
    assert float(lr(500)) == pytest.approx(1e-6, abs=1e-9)


def test_wsd_is_flat_then_falls_to_zero():
    lr = schedules.wsd(peak=0.1, total_steps=100, decay_steps=20, warmup_steps=10)
    assert [round(float(lr(s)), 6) for s in (5, 10, 50, 80, 90, 100)] == [
        0.05,
        0.1,
        0.1,
        0.1,
        0.05,
        0.0,
    ]


def test_wsd_may_have_no_flat_part_and_names_its_own_lengths():
    falls = schedules.wsd(1.0, total_steps=4, decay_steps=4)
    assert [float(falls(s)) for s in (0, 2, 4)] == [1.0, 0.5, 0.0]
    rises = schedules.wsd(1.0, total_steps=4, decay_steps=2, warmup_steps=2)
    assert [float(rises(s)) for s in range(5)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="= 50 and decay_steps = 60 must fit .* = 100"):
        schedules.wsd(1.0, total_steps=100, decay_steps=60, warmup_steps=50)


def test_stepwise_falls_at_its_shares_of_the_run():
    lr = schedules.stepwise(peak=0.1, total_steps=200)
    found = [float(lr(step)) for step in (0, 59, 60, 119, 120, 159, 160, 199)]
    want = [0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    warm = schedules.stepwise(peak=0.1, total_steps=200, warmup_steps=10)
    assert [round(float(warm(step)), 6) for step in (0, 5, 10, 59, 60)] == [0, 0.05, 0.1, 0.1, 0.02]
    waits = schedules.stepwise(peak=0.1, total_steps=None)
    assert float(schedules.span(waits, schedules.Span(20))(6)) == pytest.approx(0.02)
    with pytest.raises(ValueError, match="must increase within"):
        schedules.stepwise(peak=0.1, total_steps=10, at=(0.5, 0.3))


def test_rsqrt_falls_with_the_root():
    lr = schedules.rsqrt(peak=1.0, warmup_steps=100)
    assert float(lr(100)) == pytest.approx(1.0)
    assert float(lr(400)) == pytest.approx(0.5)


def test_linear_and_constant():
    lr = schedules.linear(peak=2.0, total_steps=10, final=1.0)
    assert [float(lr(s)) for s in (0, 5, 10, 20)] == [2.0, 1.5, 1.0, 1.0]
    assert float(schedules.constant(peak=0.5, warmup_steps=2)(1)) == 0.25


def test_phases_restart_their_own_clock():
    lr = schedules.phases(
        schedules=(
            schedules.linear(peak=1.0, total_steps=10),
            schedules.constant(peak=3.0, warmup_steps=2),
        ),
        starts=(0, 10),
    )
    assert [float(lr(s)) for s in (0, 5, 10, 11, 12)] == [1.0, 0.5, 0.0, 1.5, 3.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.cosine(peak=1.0, total_steps=5, warmup_steps=5),
        lambda: schedules.rsqrt(peak=1.0, warmup_steps=0),
        lambda: schedules.cooldown(before=schedules.constant(peak=1.0), start_step=3, steps=0),
        lambda: schedules.phases(schedules=(), starts=()),
        lambda: schedules.wsd(1.0, total_steps=100, decay_steps=200, warmup_steps=0),
        lambda: schedules.wsd(1.0, total_steps=100, decay_steps=200, warmup_steps=None),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(("total", "expected"), [(1, 0), (50, 1), (10_000, 100), (10_001, 101)])
def test_by_default_runs_warm_up_for_one_update_in_a_hundred(total, expected):
    given = schedules.cosine(peak=1.0, total_steps=total, warmup_steps=expected)
    default = schedules.cosine(peak=1.0, total_steps=total, warmup_steps=None)
    steps = [0, 1, expected, total - 1]
    assert [float(default(s)) for s in steps] == [float(given(s)) for s in steps]


def test_a_continued_schedule_is_scaled_from_its_start_after_a_rise():
    before = schedules.cosine(peak=1.0, total_steps=100, warmup_steps=10)
    rate = schedules.continued(before=before, start_step=40, warmup_steps=4, scale=0.5)
    steps = np.arange(100)
    rise = np.clip((steps - 40) / 4, 0, 1)
    want = np.where(steps < 40, 1.0, 0.5 * rise) * np.array([before(step) for step in steps])
    np.testing.assert_allclose([rate(step) for step in steps], want, rtol=1e-6)
    at_once = schedules.continued(before=before, start_step=40, scale=0.5)
    assert at_once(40) == pytest.approx(0.5 * before(40))
    waiting = schedules.cosine(peak=1.0, total_steps=None, warmup_steps=10)
    later = schedules.continued(before=waiting, start_step=40, warmup_steps=4, scale=0.5)
    known = schedules.span(later, schedules.Span(100))
    assert [known(step) for step in (39, 42, 90)] == [rate(step) for step in (39, 42, 90)]
    with pytest.raises(ValueError, match="must not be negative"):
        schedules.continued(before=before, start_step=-1)


def test_a_number_is_a_constant_schedule():
    assert schedules.as_schedule(3e-3)(7) == pytest.approx(3e-3)
    assert schedules.as_schedule(np.float32(3e-3))(7) == pytest.approx(3e-3)
    assert schedules.constant(3e-3)(7) == pytest.approx(3e-3)
    assert schedules.span(3e-3, schedules.Span(100))(7) == pytest.approx(3e-3)
    assert schedules.cooldown(before=1.0, start_step=2, steps=2, final=0.0)(3) == pytest.approx(0.5)
    assert schedules.continued(before=1.0, start_step=2, scale=0.5)(3) == pytest.approx(0.5)
    assert schedules.phases(schedules=[1.0, 2.0], starts=[0, 3])(4) == pytest.approx(2.0)
