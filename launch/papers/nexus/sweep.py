"""Upcycling with a router that knows the experts' domains (arXiv 2408.15901), and one expert more, with small models.

A seed, six experts and a seventh for later; mixtures with the projection router, with linear and MLP ones, and with
meaningless domain vectors; then each is extended by the seventh expert and trained, half on its domain. 37 runs for
each seed; the domains and the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/nexus/sweep.py:synthetic,3 --out runs/nexus/synthetic --workers 2
"""

import ml_collections

from launch.papers.shared import configs
from launch.papers.shared.configs import on_shares

CPU = "t5x_configs/experiments/nexus/cpu/"
METHODS = "t5x_configs/methods/nexus/"
# The domain of the seed, the domains of the experts, and the domain of the expert that is added.
DOMAINS = {
    "synthetic": (
        "lag_general",
        ("lag_4", "lag_5", "lag_7", "lag_9", "lag_13", "lag_15"),
        "lag_11",
    ),
    "real": (
        "english",
        ("docstrings", "python", "markup", "lang_es", "lang_nl", "lang_ja"),
        "cpp",
    ),
}
SEED_STEPS, EXPERT_STEPS, MIXTURE_STEPS, EXTENSION_STEPS = 800, 600, 600, 400
DOMAIN_DIM = 64  # below, the noise of a random projection hides which domains are related
# Arm -> (the embeddings it reads, its router).
MIXTURES = {
    "nexus": ("ngrams", "projection"),
    "linear": ("ngrams", "linear"),
    "mlp_router": ("ngrams", "mlp"),
    "nexus_random": ("random", "projection"),
    "nexus_one_hot": ("one_hot", "projection"),
}
EVALUATED = ("held_out", "routing")
LOW = ("nexus", "linear")  # also with a hundredth of the balance loss
# A mixture that was trained with a router z-loss, and what an expert that is added to it then draws: started only.
Z_LOSS, Z_START = "nexus_z_loss", "ext_nexus_z_loss_start"
# Arm -> (the mixture that is extended, flags).
EXTENSIONS = {
    "ext_nexus": ("nexus", ()),
    "ext_linear_reset": ("linear", ("--router=reset",)),
    "ext_linear_append": ("linear", ("--router=append",)),
    "ext_random": ("nexus_random", ()),
}


def get_config(text: str = "synthetic,3") -> ml_collections.ConfigDict:
    kind, _, seeds = text.partition(",")
    general, domains, new = DOMAINS[kind]
    mixed = {general: 0.25, **{domain: 0.125 for domain in domains}}
    extended = {new: 0.5, **{domain: 0.5 / 7 for domain in (general, *domains)}}
    started = {general: 0.85, **{domain: 0.025 for domain in domains}}
    arms = {"seed": on_shares(started, SEED_STEPS)}
    for domain in (*domains, new):
        arms[f"expert_{domain}"] = on_shares(
            {domain: 1.0}, EXPERT_STEPS, "LEARNING_RATE=1.5e-3", parent="seed"
        )
    experts = [f"{domain}={{expert_{domain}}}" for domain in domains]
    for encoder in ("ngrams", "random", "one_hot"):
        embed = ("launch.prepare", "embed_domains", f"--gin_file={CPU}{kind}.gin")
        settings = (f"--encoder={encoder}", f"--dim={DOMAIN_DIM}") + (
            ("--seed={SEED}",) if encoder != "one_hot" else ()
        )
        sources = [f"--domain={domain}=task:{domain}" for domain in domains]
        arms[f"{encoder}_domains"] = configs.made(*embed, *settings, *sources, "--output={run}")
        if encoder != "one_hot":
            old = f"--extend={{{encoder}_domains}}"
            added = f"--domain={new}=task:{new}"
            arms[f"{encoder}_extended"] = configs.made(*embed, old, added, "--output={run}")
    arms["merged"] = configs.made(
        *_upcycle("--method=soup"),
        f"{general}={{seed}}",
        *experts,
        "--to={run}",
        evaluations=("held_out",),
    )
    total = len(domains) * EXPERT_STEPS + MIXTURE_STEPS
    arms["dense_continued"] = on_shares(mixed, total, parent="seed")
    for arm, (encoder, router) in MIXTURES.items():
        flags = [f"--router={router}", "--seed_model={seed}"]
        if router != "linear":
            flags.append(f"--domains={{{encoder}_domains}}")
        arms[f"{arm}_start"] = configs.made(
            *_upcycle("--method=nexus", *flags), *experts, "--to={run}", evaluations=EVALUATED
        )
        arms[arm] = _mixture(mixed, MIXTURE_STEPS, f"{arm}_start", router)
        if arm in LOW:
            arms[f"{arm}_low"] = _mixture(
                mixed, MIXTURE_STEPS, f"{arm}_start", router, "BALANCE_LOSS=0.0005"
            )
    for arm, (mixture, flags) in EXTENSIONS.items():
        encoder, router = MIXTURES[mixture]
        vectors = () if router == "linear" else (f"--domains={{{encoder}_extended}}",)
        arms[f"{arm}_start"] = _extended(mixture, new, *flags, *vectors)
        arms[arm] = _mixture(
            extended,
            EXTENSION_STEPS,
            f"{arm}_start",
            router,
            f"EXPERTS={len(domains) + 1}",
            "LEARNING_RATE=1.5e-3",
            "EVAL_PERIOD=50",
        )
    arms[Z_LOSS] = _mixture(
        mixed, MIXTURE_STEPS, "nexus_start", "projection", "ROUTER_Z_LOSS=0.001"
    )
    arms[Z_START] = _extended(Z_LOSS, new, "--domains={ngrams_extended}")
    tasks = (general, *domains, new)
    flags = ("--max_batches=4", f"--tasks={','.join(tasks)}")
    structure = {"call": "launch.evaluation.routing:structure"}
    return configs.config(
        arms,
        seeds=seeds or 3,
        gin_files=(f"{CPU}{kind}.gin",),
        evaluations={**configs.domain_evaluations(tasks, *flags), "structure": structure},
    )


def _mixture(shares: dict, steps: int, parent: str, router: str, *bindings: str) -> dict:
    file = {"projection": "nexus", "linear": "nexus_linear", "mlp": "nexus_mlp"}[router]
    width = () if router == "linear" else (f"DOMAIN_DIM={DOMAIN_DIM}",)
    return on_shares(
        shares,
        steps,
        *("EXPERTS=6", *width, *bindings),
        parent=parent,
        gin_files=(f"{METHODS}{file}.gin",),
        evaluations=("routing", *(("structure",) if router == "projection" else ())),
    )


def _upcycle(*flags: str) -> tuple[str, ...]:
    return ("launch.upcycle", *flags, "--trust_config", "--router_seed={SEED}", "--experts")


def _extended(mixture: str, new: str, *flags: str) -> dict:
    command = ("launch.upcycle", "extend", "--trust_config", "--router_seed={SEED}")
    words = (f"--moe={{{mixture}}}", f"--add={new}={{expert_{new}}}", *flags)
    return configs.made(*command, *words, "--to={run}", evaluations=EVALUATED)
