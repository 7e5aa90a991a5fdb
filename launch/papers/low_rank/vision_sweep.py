"""Low-rank training of a small residual network on generated textures, with batch normalisation and SGD.

The scale of normalised layers does not change their outputs, so that arguments by an effective step size apply. The
dense network is decayed, and so are all factors; each is trained at a rate and at half of it. 8 runs for each seed, of
about a minute on a core, the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/low_rank/vision_sweep.py:5 --out runs/low_rank/vision --workers 2
"""

import ml_collections

from launch.papers.shared import sweeps

ARMS = "t5x_configs/experiments/low_rank/cpu/"
RATES = {"full": 0.1, "half": 0.05}
# (start, decay) of the factors.
FACTORS = (("spectral", "l2"), ("spectral", "frobenius"), ("spectral_ones", "frobenius"))


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    arms = {}
    for rate, value in RATES.items():
        macros = {"LEARNING_RATE": value}
        arms[dense(rate)] = _arm("textures", macros)
        for init, decay in FACTORS:
            settings = {"FACTOR_INIT": init, "FACTOR_DECAY": decay, **macros}
            arms[arm(init, decay, rate)] = _arm("textures_low_rank", settings)
    return sweeps.config(arms, seeds=seeds)


def dense(rate: str) -> str:
    """Returns the name of a dense arm."""
    return "dense" if rate == "full" else f"dense_{rate}"


def arm(init: str, decay: str, rate: str) -> str:
    """Returns the name of an arm in factors."""
    return f"{init}_{decay}_{rate}"


def _arm(file: str, macros: dict[str, object]) -> dict:
    bindings = tuple(f"{name}={value!r}" for name, value in macros.items())
    return sweeps.arm(f"{ARMS}{file}.gin", bindings=bindings)
