"""The stopping rule on made-up series."""

import dataclasses
import json

import numpy as np
import pytest

from espalier.trainers.preference.indicators.alarm import PREFIX, Monitor, Reading, StoppingRule

EXACT = StoppingRule(smoothing=0.0)


def series(entropy, mass=None, llh=None):
    """Readings ten steps apart; the likelihood falls where nothing else is said."""
    count = len(entropy)
    mass = [0.9] * count if mass is None else mass
    llh = [-1 - 0.1 * i for i in range(count)] if llh is None else llh
    return [
        Reading(step=10 * i, entropy=e, mass=m, llh_chosen=x)
        for i, (e, m, x) in enumerate(zip(entropy, mass, llh, strict=True))
    ]


RISE_AND_FALL = [2.0, 2.2, 2.4, 2.38, 2.35, 2.3, 2.2]


def test_entropy_that_turned_and_fell_thrice_raises_the_alarm():
    found = EXACT(series(RISE_AND_FALL))
    assert (found.step, found.before) == (50, 40)
    assert "three" not in found.reason and "3 evaluations in a row, to 2.300 bits" in found.reason
    assert "4.2 % below its maximum" in found.reason


@pytest.mark.parametrize(
    ("why", "entropy", "llh"),
    [
        ("too few drops", [2.4, 2.2, 2.0], None),
        ("not in a row", [2.4, 2.3, 2.2, 2.25, 2.2, 2.1], None),
        ("no further than 3 %", [2.4, 2.39, 2.38, 2.37, 2.36, 2.35], None),
        ("likelihood rises", RISE_AND_FALL, [-2 + 0.1 * i for i in range(7)]),
        ("entropy rises", [2.0, 2.1, 2.2, 2.3, 2.4], None),
        ("nothing yet", [], None),
        ("the first reading", [2.0], None),
    ],
)
def test_no_alarm(why, entropy, llh):
    assert EXACT(series(entropy, llh=llh)) is None, why


def test_mass_two_points_below_its_first_value_raises_the_alarm():
    rising = [2.0, 2.1, 2.2, 2.3]
    assert EXACT(series(rising, mass=[0.9, 0.95, 0.89, 0.881])) is None
    found = EXACT(series(rising, mass=[0.9, 0.95, 0.89, 0.879]))
    assert (found.step, found.before) == (30, 20)
    assert "0.879, 2.1 points below its first value" in found.reason
    smoothed = StoppingRule(smoothing=0.5)(series(rising, mass=[0.95, 0.95, 0.95, 0.85]))
    assert "is smoothed 0.900 (read 0.850), 5.0 points below its" in smoothed.reason


def test_the_likelihood_must_have_fallen_as_far_as_asked():
    """Both signals wait for the fall; the averages decide, and a fall of exactly that size is enough."""
    llh = [-1.0, -1.25, -1.5, -1.75, -2.0, -2.25, -2.5]
    entropy = series(RISE_AND_FALL, llh=llh)
    assert EXACT(entropy).step == 50
    asked = StoppingRule(smoothing=0.0, llh_drop=1.25)
    assert asked(entropy).step == 50
    assert StoppingRule(smoothing=0.0, llh_drop=1.5)(entropy).step == 60
    assert StoppingRule(smoothing=0.0, llh_drop=1.75)(entropy) is None
    mass = series([2.0] * 7, mass=[0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8], llh=llh)
    assert EXACT(mass).step == 10 and asked(mass).step == 50
    # Smoothed, the likelihood follows a step late.
    assert StoppingRule(llh_drop=1.25)(mass).step == 60
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="llh_drop"):
            StoppingRule(llh_drop=wrong)


def test_averages_are_exponential():
    """One bad reading among good ones is smoothed away; the closed form of a step says when one is not."""
    noisy = series([2.0] * 6, mass=[0.9, 0.9, 0.865, 0.9, 0.9, 0.9])
    assert EXACT(noisy).step == 20 and StoppingRule(smoothing=0.5)(noisy) is None
    # After n readings of 0.86 the average has come 1 - 0.8^n of the way of 0.04: past 0.02 at n = 4.
    stepped = series([2.0] * 9, mass=[0.9] + [0.86] * 8)
    assert StoppingRule(smoothing=0.8)(stepped).step == 40


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_more_readings_never_change_an_alarm(smoothing):
    rule, rng = StoppingRule(smoothing=smoothing), np.random.default_rng(0)
    readings = series(
        (2.5 - 0.02 * np.arange(40) + 0.02 * rng.normal(size=40)).tolist(),
        mass=(0.9 - 0.001 * np.arange(40)).tolist(),
    )
    known = None
    for count in range(len(readings) + 1):
        found = rule(readings[:count])
        assert known is None or found == known
        known = found
    assert known is not None


def test_what_cannot_be_compared_raises_no_alarm():
    assert EXACT(series([float("nan")] * 6, mass=[float("nan")] * 6)) is None


@pytest.mark.parametrize(
    "setting", [{"smoothing": 1.0}, {"drops": 0}, {"entropy_drop": -0.1}, {"mass_drop": 1.0}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        StoppingRule(**setting)


@pytest.mark.parametrize("start", [0, 10, 30])
def test_a_run_that_goes_on_from_any_of_its_steps_has_the_readings_up_to_it(tmp_path, start):
    readings = series(RISE_AND_FALL)
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as rows:
        for reading in readings:
            row = {f"{PREFIX}{k}": v for k, v in dataclasses.asdict(reading).items() if k != "step"}
            rows.write(json.dumps({"step": reading.step, **row}) + "\n")
    monitor = Monitor.recovered(EXACT, file, start)
    assert monitor.first_step == 0 and monitor.alarm is None
    alarms = [
        monitor.add(reading.step, dataclasses.asdict(reading))
        for reading in readings
        if reading.step > start
    ]
    assert [alarm for alarm in alarms if alarm] == [EXACT(readings)]
