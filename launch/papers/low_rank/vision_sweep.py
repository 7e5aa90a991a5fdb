"""Low-rank training of a small residual network on generated textures, with batch normalisation and SGD.

The scale of normalised layers does not change their outputs, so that arguments by an effective step size apply.
 Factors begin in three ways, are decayed in three, and are trained at a rate and at half of it.
19 runs for each seed, of about 25 seconds on a core, the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/low_rank/vision_sweep.py:3 --out runs/low_rank/vision --workers 2
"""

import itertools

import ml_collections

from launch.papers.shared import configs

ARMS = "t5x_configs/experiments/low_rank/cpu/"
INITS = ("he", "spectral", "spectral_ones")
DECAYS = ("none", "l2", "frobenius")
RATES = {"full": 0.1, "half": 0.05}


def get_config(seeds: str = "3") -> ml_collections.ConfigDict:
    arms = {"dense": configs.arm(f"{ARMS}textures.gin")}
    for init, decay, rate in itertools.product(INITS, DECAYS, RATES):
        macros = {"FACTOR_INIT": init, "FACTOR_DECAY": decay, "LEARNING_RATE": RATES[rate]}
        bindings = tuple(f"{name}={value!r}" for name, value in macros.items())
        arms[arm(init, decay, rate)] = configs.arm(
            f"{ARMS}textures_low_rank.gin", bindings=bindings
        )
    return configs.config(arms, seeds=seeds)


def arm(init: str, decay: str = "none", rate: str = "full") -> str:
    """Returns the name of an arm in factors."""
    return f"{init}_{decay}_{rate}"
