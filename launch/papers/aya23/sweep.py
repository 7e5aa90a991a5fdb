"""Aya 23 (arXiv 2405.15032) with small models on made languages: what more languages cost, and what a base is worth.

Fourteen runs for each seed, of about a minute on one core; the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/aya23/sweep.py:5 --out runs/aya23/toy --workers 2
"""

import ml_collections

from launch.papers.shared import sweeps

CPU = "t5x_configs/experiments/aya23/cpu/"
COUNTS = (4, 8, 16)  # languages
WIDTHS = {"narrow": (32, 96), "wide": (96, 288)}  # width, and hidden width of the FFN
KV_HEADS = (4, 1)  # the base has 2 of 4
TUNING_STEPS = 200
REQUESTS = 2048  # instructions of each kind and pair of languages in the full mixture
BASE = "base"  # eight languages, width 64


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    arms = {
        breadth(count, width): _arm(
            MIXTURE_OR_TASK_NAME=f"toy_mix_{count}", WIDTH=size, HIDDEN=hidden
        )
        for width, (size, hidden) in WIDTHS.items()
        for count in COUNTS
    }
    arms[BASE] = _arm()
    arms["sequential"] = _arm("transformer.Block.layout='sequential'")
    # As many parameters as three matrices of 192.
    arms["gelu"] = _arm("MLP=@mlp.Mlp", "mlp.Mlp.activation='gelu'", HIDDEN=288)
    arms |= {heads(count): _arm(KV_HEADS=count) for count in KV_HEADS}
    arms["scratch"] = _tuned(REQUESTS)
    arms["tuned"] = _tuned(REQUESTS // 4, parent=BASE)
    arms["tuned_full"] = _tuned(REQUESTS, parent=BASE)
    evaluations = {"answers": {"call": "launch.papers.aya23.answers:exact"}}
    return sweeps.config(arms, seeds=seeds, evaluations=evaluations)


def breadth(count: int, width: str) -> str:
    """Returns the name of the arm that trains on so many languages at a width of WIDTHS."""
    return f"languages{count}_{width}"


def heads(count: int) -> str:
    """Returns the name of the arm with so many heads of keys and values."""
    return f"kv{count}"


def _arm(*bindings: str, **macros: object) -> dict:
    settings = tuple(f"{name}={value!r}" for name, value in macros.items())
    return sweeps.arm(f"{CPU}toy.gin", bindings=(*settings, *bindings), evaluations=())


def _tuned(requests: int, parent: str | None = None) -> dict:
    """Returns an arm that is tuned on a mixture of this size, always for as many updates."""
    return sweeps.arm(
        f"{CPU}toy_instruct.gin",
        bindings=(f"TRAIN_STEPS={TUNING_STEPS}", f"REQUESTS={requests}"),
        evaluations=("answers",),
        parent=parent,
    )
