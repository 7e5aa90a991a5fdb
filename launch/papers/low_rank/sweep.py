"""Low-rank training of a small character model: all claims of arXiv 2209.13569 on language.

First values and ranks, decay of the factors and of their product at two learning rates, a warm start, and
dense models that are as small as the factorised ones. 30 runs for each seed, of which a run is about a
minute on one core; the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/low_rank/sweep.py:3 --out runs/low_rank/lm --workers 2
"""

import ml_collections

from launch.papers.shared import configs

ARMS = "t5x_configs/experiments/low_rank/cpu/"
INITS = ("he", "spectral", "spectral_ones")
# Share of the smaller side of each matrix -> (WIDTH, MLP_WIDTH) of a dense model of as many parameters. The first is
# what arms have that name no other.
RANKS = {0.62: (64, 232), 0.3: (64, 43), 0.15: (40, 84)}
MAIN = 0.62
DECAYS = ("l2", "frobenius")
WEIGHTS = ("1e-4", "1e-3", "1e-2")
RATES = {"full": 3e-3, "half": 1.5e-3}


def get_config(seeds: str = "3") -> ml_collections.ConfigDict:
    arms = {"dense": _arm("base")}
    for rank, (width, mlp_width) in RANKS.items():
        arms[narrow(rank)] = _arm("base", WIDTH=width, MLP_WIDTH=mlp_width)
        arms |= {arm(init, rank): _arm("low_rank", FACTOR_INIT=init, RANK=rank) for init in INITS}
    arms[decayed("none", "half")] = _arm("low_rank", LEARNING_RATE=RATES["half"])
    for kind in DECAYS:
        for weight in WEIGHTS:
            for rate, value in RATES.items():
                settings = {"FACTOR_DECAY": kind, "FACTOR_DECAY_WEIGHT": float(weight)}
                arms[decayed(kind, rate, weight)] = _arm(
                    "low_rank", **settings, LEARNING_RATE=value
                )
    arms["dense_start"] = _arm("dense_start")
    arms["warm_start"] = _arm("warm_start", parent="dense_start")
    ratio = {"RANK_RULE": "param_ratio"}
    arms["spectral_ratio"] = _arm("low_rank", **ratio)
    arms["warm_start_ratio"] = _arm("warm_start", parent="dense_start", **ratio)
    return configs.config(arms, seeds=seeds)


def arm(init: str, rank: float = MAIN) -> str:
    """Returns the name of an arm without decay."""
    return init if rank == MAIN else f"{init}_rank{_percent(rank)}"


def narrow(rank: float) -> str:
    """Returns the name of the dense arm with as many parameters as the factorised ones of a rank."""
    return f"dense_narrow{_percent(rank)}"


def decayed(kind: str, rate: str, weight: str = "") -> str:
    """Returns the name of an arm of the decay grid, of spectral factors."""
    if kind == "none":
        return "spectral" if rate == "full" else f"spectral_none_{rate}"
    return f"spectral_{kind}_{rate}_{weight}"


def _percent(rank: float) -> str:
    return f"{round(100 * rank)}"


def _arm(file: str, *, parent: str | None = None, **macros: object) -> dict:
    bindings = tuple(f"{name}={value!r}" for name, value in macros.items())
    return configs.arm(f"{ARMS}{file}.gin", bindings=bindings, parent=parent)
