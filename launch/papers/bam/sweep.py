"""Branch, train, mix (arXiv 2408.08274) with small models: a seed, three specialists, and the mixtures made of them.

Phases are runs: what they start from is trained once, mixtures are made by `launch.upcycle` in between, and the
same command goes on wherever it was stopped. 28 runs for each seed; the domains and the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/bam/sweep.py:synthetic,3 --out runs/bam/synthetic --workers 2
"""

import functools

import ml_collections

from launch.papers.shared import configs
from launch.papers.shared.configs import on_shares

CPU = "t5x_configs/experiments/bam/cpu/"
METHODS = "t5x_configs/methods/bam/"
# The general domain, on which the seed is trained, and the domains of the specialists.
DOMAINS = {
    "synthetic": ("lag_general", "lag_4", "lag_7", "lag_11"),
    "real": ("english", "python", "markup", "lang_es"),
}
SEED_STEPS, SPECIALIST_STEPS, MIXTURE_STEPS = 800, 600, 600


def _chosen(top_k: int) -> tuple[str, ...]:
    """Chosen attentions need a balance loss, as FFNs do."""
    return (f"ATTENTION_TOP_K={top_k}", "moa.MixtureOfAttention.balance_loss=0.01")


# Arm -> (flags of launch.upcycle, method file, bindings of training that match the flags).
MIXTURES = {
    "btx": (("--method=btx",), "btx", ()),
    "btx6": (("--method=btx",), "btx", ("EXPERTS=6",)),
    "btx6_top3": (("--method=btx", "--top_k=3"), "btx", ("EXPERTS=6", "TOP_K=3")),
    "bam": (("--method=bam",), "bam", ()),
    "bam_shared_kv": (("--method=bam", "--shared_kv"), "bam", ("SHARED_KV=True",)),
    "moa_top1": (("--method=bam", "--attention_top_k=1"), "bam", _chosen(1)),
    "moa_top2": (("--method=bam", "--attention_top_k=2"), "bam", _chosen(2)),
    "bam_averaged": (("--method=bam", "--average_attention"), "bam", ()),
}
# Also trained for as many FLOPs as btx.
MATCHED = ("btx6_top3", "bam", "bam_shared_kv", "moa_top1", "moa_top2", "bam_averaged")


def get_config(text: str = "synthetic,3") -> ml_collections.ConfigDict:
    kind, _, seeds = text.partition(",")
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
    arms["soup"] = _made(("--method=soup",), (seed, *specialists), evaluations=("held_out",))
    total = len(domains) * SPECIALIST_STEPS + MIXTURE_STEPS
    arms["dense_continued"] = on_shares(even, total, parent="seed")
    for arm, (flags, method, bindings) in MIXTURES.items():
        copies = [f"{general}{i}={{seed}}" for i in (2, 3)] if arm.startswith("btx6") else []
        arms[f"{arm}_start"] = _made(flags, (seed, *copies, *specialists))
        arms[arm] = _mixture(even, MIXTURE_STEPS, f"{arm}_start", method, bindings)
    for arm in MATCHED:
        _, method, bindings = MIXTURES[arm]
        cost = train_flops_per_token(arm, kind) / train_flops_per_token("btx", kind)
        steps = round(MIXTURE_STEPS / cost)
        arms[f"{arm}_cm"] = _mixture(even, steps, f"{arm}_start", method, bindings)
    flags = (f"--tasks={','.join(DOMAINS[kind])}",)
    flags += ("--max_batches=4",) if kind == "real" else ()  # as in training
    return configs.config(
        arms,
        seeds=seeds or 3,
        gin_files=(f"{CPU}{kind}.gin",),
        evaluations=configs.domain_evaluations(DOMAINS[kind], *flags),
    )


@functools.cache
def train_flops_per_token(arm: str, kind: str) -> float:
    """Returns the model FLOPs of training a dense model or a mixture on one token of a row."""
    from launch.config import gin_config

    files, bindings = [f"{CPU}{kind}.gin"], ["MODEL_DIR=''"]
    arm = arm.removesuffix("_cm")
    if arm in MIXTURES:
        _, method, own = MIXTURES[arm]
        files.append(f"{METHODS}{method}.gin")
        bindings += own
    config = gin_config.load(files, bindings, entry="launch.train:train")
    recipe = config.arguments()["recipe"]
    return 3.0 * recipe.model.forward_flops(recipe.inputs_spec.arrays(1))


def _mixture(shares: dict, steps: int, parent: str, method: str, bindings: tuple) -> dict:
    files = (f"{METHODS}{method}.gin",)
    return on_shares(
        shares, steps, *bindings, parent=parent, gin_files=files, evaluations=("routing",)
    )


def _made(flags: tuple, experts: tuple, evaluations: tuple = ()) -> dict:
    words = (
        "launch.upcycle",
        *flags,
        "--trust_config",
        "--router_seed={SEED}",
        "--experts",
        *experts,
        "--to={run}",
    )
    return configs.made(*words, evaluations=evaluations)
