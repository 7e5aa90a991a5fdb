"""Low-rank training of a small residual network on generated textures, with batch normalisation and SGD.

Where layers are normalised their scale says nothing of what they compute, so that arguments by an effective
step size apply. Every arm comes at a rate and at half of it; factors begin in three ways and are decayed in
three. 20 runs for each seed, of about 25 seconds on a core, the number of seeds after a colon:

  python -m launch.sweep --sweep launch/sweeps/low_rank_textures.py:3 --out runs/low_rank/textures --workers 2
"""

import itertools

import ml_collections

ARMS = "t5x_configs/experiments/low_rank/cpu/"
INITS = ("he", "spectral", "spectral_ones")
DECAYS = ("none", "l2", "frobenius")
RATES = {"": 0.1, "_half_rate": 0.05}


def get_config(seeds: str = "3") -> ml_collections.ConfigDict:
    arms = {}
    for suffix, rate in RATES.items():
        bindings = (f"LEARNING_RATE={rate}",)
        arms[f"dense{suffix}"] = {"gin_files": (f"{ARMS}textures.gin",), "bindings": bindings}
        for init, decay in itertools.product(INITS, DECAYS):
            arms[f"{init}_{decay}{suffix}"] = {
                "gin_files": (f"{ARMS}textures_{init}.gin",),
                "bindings": (*bindings, f"FACTOR_DECAY={decay!r}"),
            }
    return ml_collections.ConfigDict({"seeds": tuple(range(int(seeds))), "arms": arms})
