"""Low-rank training of a small character model: all claims of arXiv 2209.13569 on language.

First values and ranks, decay of the factors and of their product at two learning rates, warm starts, and the two rates
trained for three times as long. 26 runs for each seed, of half a minute on one core; the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/low_rank/sweep.py:5 --out runs/low_rank/lm --workers 2
"""

import itertools

import ml_collections

from launch.papers.shared import sweeps

ARMS = "t5x_configs/experiments/low_rank/cpu/"
INITS = ("he", "spectral", "spectral_ones")
RANKS = (0.62, 0.3)  # shares of the smaller side of each matrix
MAIN = 0.62
DECAYS = ("l2", "frobenius")
WEIGHTS = ("1e-3", "1e-2")
RATES = {"full": 3e-3, "half": 1.5e-3}
LONG = 4500  # updates


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    arms = {"dense": _arm("base"), "dense_half": _arm("base", LEARNING_RATE=RATES["half"])}
    for rank, init in itertools.product(RANKS, INITS):
        arms[arm(init, rank)] = _arm("low_rank", FACTOR_INIT=init, RANK=rank)
    arms[decayed("none", "half")] = _arm("low_rank", LEARNING_RATE=RATES["half"])
    for kind, weight, rate in itertools.product(DECAYS, WEIGHTS, RATES):
        settings = {"FACTOR_DECAY": kind, "FACTOR_DECAY_WEIGHT": float(weight)}
        arms[decayed(kind, rate, weight)] = _arm("low_rank", **settings, LEARNING_RATE=RATES[rate])
    for rate, value in RATES.items():
        settings = {"TRAIN_STEPS": LONG, "EVAL_PERIOD": 750, "LEARNING_RATE": value}
        arms[long(rate)] = _arm("low_rank", **settings)
    arms["dense_start"] = _arm("dense_start")
    ratio = {"RANK_RULE": "param_ratio"}
    for rate, value in RATES.items():
        arms[ratio_arm(rate)] = _arm("low_rank", LEARNING_RATE=value, **ratio)
        # The paper halves the rate of a warm start; the schedule is the dense start's.
        scale = {"RATE_SCALE": value / RATES["full"]}
        arms[warm(rate)] = _arm("warm_start", parent="dense_start", **scale)
        arms[warm(rate, "_ratio")] = _arm("warm_start", parent="dense_start", **scale, **ratio)
    return sweeps.config(arms, seeds=seeds)


def arm(init: str, rank: float = MAIN) -> str:
    """Returns the name of an arm without decay."""
    return init if rank == MAIN else f"{init}_rank{round(100 * rank)}"


def decayed(kind: str, rate: str, weight: str = "") -> str:
    """Returns the name of an arm of the decay grid, of spectral factors."""
    if kind == "none":
        return "spectral" if rate == "full" else f"spectral_none_{rate}"
    return f"spectral_{kind}_{rate}_{weight}"


def long(rate: str) -> str:
    """Returns the name of an arm of spectral factors that is trained for longer."""
    return f"spectral_long_{rate}"


def ratio_arm(rate: str) -> str:
    """Returns the name of an arm of spectral factors whose ranks are a share of the parameters."""
    return "spectral_ratio" if rate == "full" else f"spectral_ratio_{rate}"


def warm(rate: str, ranks: str = "") -> str:
    """Returns the name of an arm that starts dense, with a rate after it; `ranks` is '_ratio' for those of `ratio_arm`."""
    return f"warm_start{ranks}_{rate}"


def _arm(file: str, *, parent: str | None = None, **macros: object) -> dict:
    bindings = tuple(f"{name}={value!r}" for name, value in macros.items())
    return sweeps.arm(f"{ARMS}{file}.gin", bindings=bindings, parent=parent)
