"""BAM (arXiv 2408.08274) at full size: the 590M seed, its specialists, and the mixtures of the paper's tables.

The folder of data after a colon is DATA_ROOT, with the tokenizer in its `tokenizer`. To see the runs and their
commands, which a cluster runs in the order of what they start from:

  python -m launch.sweep --sweep launch/papers/bam/full_sweep.py:/data --out /runs/bam --dry_run
"""

import ml_collections

from launch.papers.bam import sweep
from launch.papers.shared import sweeps

FULL = "t5x_configs/experiments/bam/full/"
DOMAINS = ("code", "law", "math")
CONTEXT, TOKENS = 2048, 100e9  # of the mixtures
# Arm -> (flags of launch.upcycle, file, bindings, copies of the seed).
MIXTURES = {
    "btx": (*sweep.MIXTURES["btx"], 1),
    **{
        f"btx{n}": (("--method=btx",), "btx", (f"EXPERTS={n}",), n - len(DOMAINS))
        for n in (5, 6, 7, 8)
    },
    "btx6_top3": (*sweep.MIXTURES["btx6_top3"], 3),
    **{
        arm: (*sweep.MIXTURES[arm], 1)
        for arm in ("bam", "bam_shared_kv", "moa_top1", "moa_top2", "bam_averaged")
    },
}
BALANCE_LOSS = 0.01  # the paper has no figure, nor whether chosen attentions have such a loss


def get_config(data: str) -> ml_collections.ConfigDict:
    arms = {"seed": sweeps.arm(f"{FULL}seed.gin")}
    for domain in DOMAINS:
        arms[domain] = sweeps.arm(f"{FULL}specialist_{domain}.gin", parent="seed")
    branches = [f"{domain}={{{domain}}}" for domain in DOMAINS]
    for arm, (flags, file, bindings, copies) in MIXTURES.items():
        seeds = [f"general{i}={{seed}}" for i in range(copies)]
        command = ("{python}", "-m", "launch.upcycle", *flags, "--experts", *seeds, *branches)
        arms[f"{arm}_start"] = {"made": (*command, "--to={run}")}
        start = f"{arm}_start"
        trained = {"parent": start, "bindings": (*sweep.balance(arm, BALANCE_LOSS), *bindings)}
        arms[arm] = sweeps.arm(f"{FULL}{file}.gin", **trained)
        if arm in sweep.COMPUTE_MATCHED:
            share = sweep.paper_flops("btx", CONTEXT) / sweep.paper_flops(arm, CONTEXT)
            trained["bindings"] += (f"TRAIN_TOKENS={share * TOKENS:.4g}",)
            arms[f"{arm}_cm"] = sweeps.arm(f"{FULL}{file}.gin", **trained)
    soup = ("{python}", "-m", "launch.upcycle", "--method=soup", "--experts", "general={seed}")
    arms["soup"] = {"made": (*soup, *branches, "--to={run}")}
    return sweeps.config(arms, bindings=sweeps.data_root(data))
