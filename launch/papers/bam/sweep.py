"""Branch, train, mix (arXiv 2408.08274) with small models: a seed, three specialists, and the mixtures made of them.

Phases are runs: what they start from is trained once, mixtures are made by `launch.upcycle` in between, and the
same command goes on wherever it was stopped. The domains and the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/bam/sweep.py:synthetic,5 --out runs/bam/synthetic --workers 2
"""

import functools

import ml_collections

from launch.papers.shared import sweeps
from launch.papers.shared.sweeps import on_shares

CPU = "t5x_configs/experiments/bam/cpu/"
METHODS = "t5x_configs/methods/bam/"
# The general domain, on which the seed is trained, and the domains of the specialists.
DOMAINS = {
    "synthetic": ("lag_general", "lag_4", "lag_7", "lag_11"),
    "real": ("english", "python", "markup", "lang_es"),
}
SEED_STEPS, SPECIALIST_STEPS, MIXTURE_STEPS, LONG_STEPS = 800, 600, 600, 1600
# With a weight of 0.01 a top-1 router sends nearly all tokens of a layer to one expert, and a z-loss adds to that.
BALANCE_LOSS = 0.05
# Arm -> (flags of launch.upcycle, method file, bindings of training that match the flags). Chosen attentions share keys and
# values, as they seem to in the paper's ablation: its soft row has the losses of shared ones.
MIXTURES = {
    "btx": (("--method=btx",), "btx", ()),
    "btx6": (("--method=btx",), "btx", ("EXPERTS=6",)),
    "btx6_top3": (("--method=btx", "--top_k=3"), "btx", ("EXPERTS=6", "TOP_K=3")),
    "bam": (("--method=bam",), "bam", ()),
    "bam_shared_kv": (("--method=bam", "--shared_kv"), "bam", ("SHARED_KV=True",)),
    **{
        f"moa_top{k}": (
            ("--method=bam", "--shared_kv", f"--attention_top_k={k}"),
            "bam",
            ("SHARED_KV=True", f"ATTENTION_TOP_K={k}"),
        )
        for k in (1, 2)
    },
    "bam_averaged": (("--method=bam", "--average_attention"), "bam", ()),
}
DATA_MATCHED = ("btx", "btx6", "btx6_top3", "bam", "bam_shared_kv", "bam_averaged")
COMPUTE_MATCHED = ("bam", "bam_shared_kv", "moa_top2", "moa_top1")  # named `<arm>_cm`
LONG = ("btx", "bam")  # also trained for LONG_STEPS updates, named `<arm>_long`, in LONG_SEEDS
LONG_SEEDS = 3
CONTEXT = 1024  # tokens; the paper does not publish it


def get_config(text: str = "synthetic,5") -> ml_collections.ConfigDict:
    kind, _, seeds = text.partition(",")
    seeds = sweeps.seeds(seeds or 5)
    general, *domains = DOMAINS[kind]
    even = {domain: 0.25 for domain in DOMAINS[kind]}
    arms = {"seed": on_shares({general: 0.85, **{x: 0.05 for x in domains}}, SEED_STEPS)}
    for domain in domains:
        shares = {domain: 0.9, general: 0.1}
        arms[f"spec_{domain}"] = on_shares(
            shares, SPECIALIST_STEPS, "LEARNING_RATE=1.5e-3", parent="seed"
        )
    specialists = [f"{domain}={{spec_{domain}}}" for domain in domains]
    seed = f"{general}={{seed}}"
    for arm, (flags, _, _) in MIXTURES.items():
        copies = [f"{general}{i}={{seed}}" for i in (2, 3)] if arm.startswith("btx6") else []
        arms[f"{arm}_start"] = _made(flags, (seed, *copies, *specialists))
    for arm in DATA_MATCHED:
        arms[arm] = _mixture(even, MIXTURE_STEPS, arm)
    for arm in COMPUTE_MATCHED:
        arms[f"{arm}_cm"] = _mixture(even, equal_compute(arm), arm)
    few = {"seeds": seeds[:LONG_SEEDS]}
    for arm in LONG:
        arms[f"{arm}_long"] = {**_mixture(even, LONG_STEPS, arm), **few}
    total = len(domains) * SPECIALIST_STEPS + LONG_STEPS
    arms["dense_long"] = {**on_shares(even, total, parent="seed"), **few}
    return sweeps.config(
        arms,
        seeds=seeds,
        gin_files=(f"{CPU}{kind}.gin",),
        evaluations={"routing": sweeps.domain_evaluations(DOMAINS[kind])["routing"]},
    )


def equal_compute(arm: str) -> int:
    """Returns the updates in which an arm would compute as much as BTX in MIXTURE_STEPS, were it the paper's 590M model.

    There the 256,000 symbols of the head cost every arm the same. Here the head is nearly free, so that BAM would get
    less than half of BTX's tokens.
    """
    return round(MIXTURE_STEPS * paper_flops("btx", CONTEXT) / paper_flops(arm, CONTEXT))


@functools.cache
def paper_flops(arm: str, context: int) -> float:
    """Returns the model FLOPs of one row of `context` tokens through an arm made of the paper's 590M models."""
    from launch.config import gin_config

    _, method, bindings = MIXTURES[arm]
    files = ("models/bam_590m", "runs/pretrain", f"methods/bam/{method}")
    row = f"TASK_FEATURE_LENGTHS={{'targets': {context}}}"
    unused = ("MODEL_DIR=''", "MIXTURE_OR_TASK_NAME=''", "TASKS=()", "BATCH_SIZE=1")
    config = gin_config.load(
        [f"t5x_configs/{file}.gin" for file in files],
        [row, *unused, *bindings],
        entry="launch.train:train",
    )
    recipe = config.arguments()["recipe"]
    return recipe.model.forward_flops(recipe.inputs_spec.arrays(1))


def balance(arm: str, weight: float) -> tuple[str, ...]:
    """Returns the bindings of the balance loss of an arm's FFN router, and of its attention router if that chooses."""
    attention = (f"moa.MixtureOfAttention.balance_loss={weight}",) if arm.startswith("moa") else ()
    return (f"BALANCE_LOSS={weight}", *attention)


def _mixture(shares: dict, steps: int, arm: str) -> dict:
    _, method, bindings = MIXTURES[arm]
    return on_shares(
        shares,
        steps,
        *(*balance(arm, BALANCE_LOSS), "ROUTER_Z_LOSS=0.0", *bindings),
        parent=f"{arm}_start",
        gin_files=(f"{METHODS}{method}.gin",),
        evaluations=("routing",),
    )


def _made(flags: tuple, experts: tuple) -> dict:
    words = (
        "launch.upcycle",
        *flags,
        "--trust_config",
        "--router_seed={SEED}",
        "--experts",
        *experts,
        "--to={run}",
    )
    return sweeps.made(*words)
