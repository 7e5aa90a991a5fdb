"""BAM (arXiv 2408.08274) at full size: the 590M seed, its specialists, and the mixtures of the paper's tables.

The folder of data after a colon is DATA_ROOT, with the tokenizer in its `tokenizer`. To see the runs and their
commands, which a cluster runs in the order of what they start from (a run for as much compute as another is the same with
fewer TRAIN_TOKENS):

  python -m launch.sweep --sweep launch/papers/bam/full_sweep.py:/data --out /runs/bam --dry_run
"""

import ml_collections

from launch.papers.shared import configs

FULL = "t5x_configs/experiments/bam/full/"
DOMAINS = ("code", "law", "math")


def _chosen(top_k: int) -> tuple[str, ...]:
    """The paper does not say whether attentions that are chosen have a balance loss; here they do."""
    return (f"ATTENTION_TOP_K={top_k}", "moa.MixtureOfAttention.balance_loss=0.01")


# Arm -> (flags of launch.upcycle, file, bindings, copies of the seed).
MIXTURES = {
    "btx": (("--method=btx",), "btx", (), 1),
    **{
        f"btx{n}": (("--method=btx",), "btx", (f"EXPERTS={n}",), n - len(DOMAINS))
        for n in (5, 6, 7, 8)
    },
    "btx6_top3": (("--method=btx", "--top_k=3"), "btx", ("EXPERTS=6", "TOP_K=3"), 3),
    "bam": (("--method=bam",), "bam", (), 1),
    "bam_shared_kv": (("--method=bam", "--shared_kv"), "bam", ("SHARED_KV=True",), 1),
    **{
        f"moa_top{k}": (("--method=bam", f"--attention_top_k={k}"), "bam", _chosen(k), 1)
        for k in (1, 2)
    },
}


def get_config(data: str) -> ml_collections.ConfigDict:
    arms = {"seed": configs.arm(f"{FULL}seed.gin")}
    for domain in DOMAINS:
        arms[domain] = configs.arm(f"{FULL}specialist_{domain}.gin", parent="seed")
    branches = [f"{domain}={{{domain}}}" for domain in DOMAINS]
    for arm, (flags, file, bindings, copies) in MIXTURES.items():
        seeds = [f"general{i}={{seed}}" for i in range(copies)]
        command = ("{python}", "-m", "launch.upcycle", *flags, "--experts", *seeds, *branches)
        arms[f"{arm}_start"] = {"made": (*command, "--to={run}")}
        start = f"{arm}_start"
        arms[arm] = configs.arm(f"{FULL}{file}.gin", parent=start, bindings=bindings)
    return configs.config(arms, bindings=configs.data_root(data))
