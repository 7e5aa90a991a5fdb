"""Upcycling with a router that knows the experts' domains (arXiv 2408.15901), and one expert more, with small models.

A seed, an expert of each of twelve domains in four families, and one of a domain between two of them for later;
mixtures with the projection router on embeddings that are placed in several ways, with meaningless ones, and with a
linear router; then some are extended by the new expert and trained, half on its domain. The domains and the number of
seeds after a colon:

  python -m launch.sweep --sweep launch/papers/nexus/sweep.py:synthetic,5 --out runs/nexus/synthetic --workers 2
"""

import ml_collections

from launch.papers.shared import sweeps
from launch.papers.shared.sweeps import on_shares

CPU = "t5x_configs/experiments/nexus/cpu/"
METHODS = "t5x_configs/methods/nexus/"
# The domain of the seed, the domains of the experts, and the domain of the expert that is added.
DOMAINS = {
    "synthetic": (
        "lag_general",
        tuple(f"kin_{family}{share}" for family in "abcd" for share in ("", "70", "40")),
        "kin_ab",
    ),
    "real": (
        "english",
        ("docstrings", "python", "markup", "lang_es", "lang_nl", "lang_ja"),
        "cpp",
    ),
}
SEED_STEPS, EXPERT_STEPS, MIXTURE_STEPS, EXTENSION_STEPS = 800, 400, 500, 400
DOMAIN_DIM = 128  # below, the noise of a random projection hides which domains are related
# Embeddings -> flags of launch.prepare embed_domains. The paper does not centre; 34 is 3 sqrt(DOMAIN_DIM).
EMBEDDINGS = {
    "uncentred": ("--encoder=ngrams", "--mean=none"),
    "centred": ("--encoder=ngrams", "--mean=domains"),
    "lengthened": ("--encoder=ngrams", "--mean=domains", "--length=34"),
    "random": ("--encoder=random",),
}
LINEAR = "linear"
# Arm -> its embeddings, or the linear router.
MIXTURES = {
    "nexus": "uncentred",
    "nexus_centred": "centred",
    "nexus_lengthened": "lengthened",
    "nexus_random": "random",
    "linear": LINEAR,
}
EVALUATED = ("held_out", "routing")
LOW = ("nexus", "linear")  # also with a hundredth of the balance loss
# Arm -> (the mixture that is extended, flags).
EXTENSIONS = {
    "ext_nexus": ("nexus", ()),
    "ext_linear_reset": ("linear", ("--router=reset",)),
    "ext_linear_append": ("linear", ("--router=append",)),
    "ext_random": ("nexus_random", ()),
    "ext_centred": ("nexus_centred", ()),
    "ext_lengthened": ("nexus_lengthened", ()),
    "ext_levelled": ("nexus", ("--level",)),
}
TRAINED = ("ext_nexus", "ext_linear_reset", "ext_linear_append", "ext_random")


def get_config(text: str = "synthetic,5") -> ml_collections.ConfigDict:
    kind, _, seeds = text.partition(",")
    general, domains, new = DOMAINS[kind]
    mixed = {general: 0.25, **{domain: 0.75 / len(domains) for domain in domains}}
    old = (general, *domains)
    extended = {new: 0.5, **{domain: 0.5 / len(old) for domain in old}}
    started = {general: 0.85, **{domain: 0.15 / len(domains) for domain in domains}}
    arms = {"seed": on_shares(started, SEED_STEPS)}
    for domain in (*domains, new):
        arms[f"expert_{domain}"] = on_shares(
            {domain: 1.0}, EXPERT_STEPS, "LEARNING_RATE=1.5e-3", parent="seed"
        )
    experts = [f"{domain}={{expert_{domain}}}" for domain in domains]
    embed = ("launch.prepare", "embed_domains", f"--gin_file={CPU}{kind}.gin")
    sources = [f"--domain={domain}=task:{domain}" for domain in domains]
    for name, flags in EMBEDDINGS.items():
        words = (*embed, *flags, f"--dim={DOMAIN_DIM}", "--seed={SEED}", *sources)
        arms[f"{name}_domains"] = sweeps.made(*words, "--output={run}")
        words = (*embed, f"--extend={{{name}_domains}}", f"--domain={new}=task:{new}")
        arms[f"{name}_extended"] = sweeps.made(*words, "--output={run}")
    arms["merged"] = sweeps.made(
        *_upcycle("--method=soup"),
        f"{general}={{seed}}",
        *experts,
        "--to={run}",
        evaluations=("held_out",),
    )
    for arm, router in MIXTURES.items():
        flags = ["--router=linear"]
        if router != LINEAR:
            flags = ["--router=projection", f"--domains={{{router}_domains}}"]
        words = (*_upcycle("--method=nexus", "--seed_model={seed}", *flags), *experts)
        arms[f"{arm}_start"] = sweeps.made(*words, "--to={run}", evaluations=EVALUATED)
        trained = (len(domains), mixed, MIXTURE_STEPS, f"{arm}_start", router)
        arms[arm] = _mixture(*trained)
        if arm in LOW:
            arms[f"{arm}_low"] = _mixture(*trained, "BALANCE_LOSS=0.0005")
    for arm, (mixture, flags) in EXTENSIONS.items():
        router = MIXTURES[mixture]
        vectors = () if router == LINEAR else (f"--domains={{{router}_extended}}",)
        arms[f"{arm}_start"] = _extended(mixture, new, *flags, *vectors)
    for arm in TRAINED:
        trained = (len(domains) + 1, extended, EXTENSION_STEPS, f"{arm}_start")
        # A tenth of the peak of training, as at full size; at half of it the old domains are lost.
        rate = ("LEARNING_RATE=3e-4", "EVAL_PERIOD=50")
        arms[arm] = _mixture(*trained, MIXTURES[EXTENSIONS[arm][0]], *rate)
    tasks = (general, *domains, new)
    flags = ("--max_batches=4", f"--tasks={','.join(tasks)}")
    structure = {"call": "launch.evaluation.routing:structure"}
    return sweeps.config(
        arms,
        seeds=seeds or 5,
        gin_files=(f"{CPU}{kind}.gin",),
        evaluations={**sweeps.domain_evaluations(tasks, *flags), "structure": structure},
    )


def _mixture(
    experts: int, shares: dict, steps: int, parent: str, router: str, *bindings: str
) -> dict:
    projected = router != LINEAR
    width = (f"DOMAIN_DIM={DOMAIN_DIM}",) if projected else ()
    return on_shares(
        shares,
        steps,
        *(f"EXPERTS={experts}", *width, *bindings),
        parent=parent,
        gin_files=(f"{METHODS}{'nexus' if projected else 'nexus_linear'}.gin",),
        evaluations=("routing", *(("structure",) if projected else ())),
    )


def _upcycle(*flags: str) -> tuple[str, ...]:
    return ("launch.upcycle", *flags, "--trust_config", "--router_seed={SEED}", "--experts")


def _extended(mixture: str, new: str, *flags: str) -> dict:
    command = ("launch.upcycle", "extend", "--trust_config", "--router_seed={SEED}")
    words = (f"--moe={{{mixture}}}", f"--add={new}={{expert_{new}}}", *flags)
    return sweeps.made(*command, *words, "--to={run}", evaluations=EVALUATED)
