"""The record of a step, meta.json: its number, its metrics, and the run's facts about itself.

A record with checksums that match may still have been written by another program, so each value that a run counts
with is checked before anything is read.
"""

from collections.abc import Callable, Mapping
from typing import Any

from trainers.telemetry import marks, window
from trainers.telemetry.json_numbers import is_count, is_number
from trainers.telemetry.metric_writers import MARKS

_MOST_STEPS = 2**31  # the state counts them in 32 bits
_FIELDS = {"step", "metrics", "meta"}


def check(record: Any) -> None:
    """Raises ValueError, with the key and its value, unless `record` is what a save writes."""
    if not isinstance(record, dict) or record.keys() != _FIELDS:
        raise ValueError(f"is not a record of {', '.join(sorted(_FIELDS))}")
    if not isinstance(record["meta"], dict) or not isinstance(record["metrics"], dict):
        raise ValueError("is not a record: metrics and meta are objects")
    _expect("step", record["step"], _is_step, "a number of steps")
    for name, value in record["metrics"].items():
        _expect(f"metrics.{name}", value, is_number, "a number")
    for name, (test, kind) in _FACTS.items():
        if name in record["meta"]:
            _expect(f"meta.{name}", record["meta"][name], test, kind)
    if record["meta"].get("skipped", 0) > record["step"]:
        raise ValueError(f"has meta.skipped {record['meta']['skipped']} of {record['step']} steps")
    for name, parse in {"window": window.Window().restore, MARKS: marks.from_json}.items():
        if name in record["meta"]:
            try:
                parse(record["meta"][name])
            except ValueError as error:
                raise ValueError(f"has meta.{name}, which {error}") from None


def _expect(key: str, value: Any, test: Callable[[Any], bool], kind: str) -> None:
    if not test(value):
        text = repr(value)
        raise ValueError(
            f"has {key} = {text[:40]}{'...' * (len(text) > 40)} in the place of {kind}"
        )


def _is_step(value: Any) -> bool:
    return is_count(value) and value < _MOST_STEPS


def _are_positions(value: Any) -> bool:
    """Returns whether a value is the positions of a stream, {source: {"rows": count, "order": digest}}."""
    return isinstance(value, dict) and all(
        isinstance(place, dict) and is_count(place.get("rows")) and "order" in place
        for place in value.values()
    )


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


# What a run reads from the facts of its own or a parent's checkpoint, and how an error names each.
_FACTS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("data_step", "skipped", "bad_in_a_row", "rollbacks"), (_is_step, "a number of steps")
    ),
    "learning_rate": (lambda value: value is None or is_number(value), "a number"),
    "positions": (_are_positions, "the rows read of each source"),
    "inference_part": (lambda value: type(value) is str, "a name"),
    "hooks_left_out": (lambda value: type(value) is bool, "true or false"),
    "added": (lambda value: type(value) is str and value != "", "the beginning of a name"),
    **dict.fromkeys(("initial", "hf", "upcycled"), (_is_object, "an object")),
}
