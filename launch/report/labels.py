"""Titles and units of metrics, as reports show them."""

import math
import re

# Name of a metric as a pattern -> its title, with groups of the pattern, and its unit; "" for a number without one.
_LABELS = (
    (r"perplexity", "perplexity", ""),
    (r"bits_per_byte", "bits per byte", "bits per byte"),
    (r"(?:indicators/)?(accuracy|ended|mass|mass_chosen)", r"\1", "share"),
    (r"p_win", "P_win", "probability"),
    (r"(?:indicators/)?llh[/_](gap|chosen|rejected)", r"likelihood, \1", "nats per token"),
    (r"logps/(\w+)", r"log-probability, \1", "nats per completion"),
    (r"log_ratio/(\w+)", r"log-ratio to the reference, \1", "nats per completion"),
    (r"(?:indicators/)?(entropy|entropy_chosen)", r"\1 of the likeliest tokens", "bits"),
    (r"grad_norm", "gradient norm", ""),
    (r"param_norm", "norm of the parameters", ""),
    (r"update_norm", "norm of the update", ""),
    (r"learning_rate", "learning rate", ""),
    (r"(tokens|images)_per_second", r"\1 per second", r"\1/s"),
    (r"model_flops_per_second", "model FLOPs per second", "FLOP/s"),
    (r"mfu", "utilisation (MFU)", "share of the peak"),
    (r"skipped_updates", "skipped updates", "updates"),
)


def label(metric: str, loss_unit: str) -> tuple[str, str]:
    """Returns title and unit of a metric; `loss_unit` is the unit of the run's loss."""
    if metric == "loss" or metric.startswith("source_loss/"):
        source = metric.partition("/")[2]
        return (f"loss on {source}" if source else "loss"), loss_unit
    for pattern, title, unit in _LABELS:
        if match := re.fullmatch(pattern, metric):
            return match.expand(title).replace("_", " "), match.expand(unit)
    return metric.replace("_", " ").replace("/", ": "), ""


def number(value: float, digits: int = 3) -> str:
    """Returns a number as text of a page, with a minus sign, and never with one at zero."""
    text = f"{value:,.{digits}f}"
    if text.startswith("-") and not text.strip("-0.,"):
        text = text[1:]
    return text.replace("-", "−")


def short(value: float) -> str:
    """Returns a number with four digits at most, also a small or large one."""
    if not math.isfinite(value) or (value and not 1e-3 <= abs(value) < 1e5):
        return f"{value:.3g}".replace("-", "−")
    return number(value, max(0, 3 - len(str(int(abs(value)))) + 1))
