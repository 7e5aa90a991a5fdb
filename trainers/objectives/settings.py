"""Checks of the losses' settings. They run when a step is traced, so before a run's first update."""

import math


def check_positive(**settings: float) -> None:
    """Raises ValueError for a setting that is not a positive, finite number; beta = 0 would train nothing."""
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"{name} = {value} must be positive and finite: bind another number, or do not bind it."
            )


def check_not_negative(**settings: float) -> None:
    """Raises ValueError for a setting that is neither 0 nor a positive, finite number."""
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{name} = {value} must be 0 or positive, and finite: bind another number."
            )


def check_smoothing(label_smoothing: float, *, may_be_zero: bool = True) -> None:
    """Raises ValueError for a share of wrong labels with which no preference can be learned."""
    enough = label_smoothing >= 0 if may_be_zero else label_smoothing > 0
    if not (enough and label_smoothing < 0.5):
        interval = "[0, 0.5)" if may_be_zero else "(0, 0.5)"
        raise ValueError(
            f"label_smoothing = {label_smoothing}, the share of wrong labels, must lie in {interval}: "
            "swap chosen and rejected if most labels are wrong."
        )
