"""Nexus (arXiv 2408.15901) at full size: experts, mixtures with both routers, anneal, and the code expert that is added.

The folder of data after a colon is DATA_ROOT, with the tokenizer in its `tokenizer` and a trained seed of each size in
`seed_470m` and `seed_2p8b`, whose training the paper does not describe. Domains are embedded by a text encoder, as in the
paper, whose own is not public: `sentence_model` is one that sentence-transformers has saved, DOMAIN_DIM its width. To see
the runs and their commands:

  python -m launch.sweep --sweep launch/papers/nexus/full_sweep.py:/data --out /runs/nexus --dry_run
"""

import ml_collections

from launch.papers.shared import sweeps

FULL = "t5x_configs/experiments/nexus/full/"
METHODS = "t5x_configs/methods/nexus/"
# SlimPajama's shares of tokens, in per cent.
TOKENS = {
    "arxiv": 4.6,
    "books": 4.2,
    "c4": 26.7,
    "wikipedia": 3.8,
    "github": 5.2,
    "stackexchange": 3.3,
}
SIZES = {"470m": tuple(TOKENS), "2p8b": ("arxiv", "books", "c4", "wikipedia")}
NEW = "code"
PRETRAINING = 0.25  # of the mixture's tokens; not published
ANNEALED = 0.7  # and of the anneal's
DOMAIN_DIM = 1024
LIMIT = 200_000  # documents of a domain that those embedded are drawn from; all are hundreds of gigabytes


def get_config(data: str) -> ml_collections.ConfigDict:
    arms = {}
    for size, domains in SIZES.items():
        arms |= _of_size(data, size, domains)
    return sweeps.config(arms, bindings=sweeps.data_root(data))


def _of_size(data: str, size: str, domains: tuple[str, ...]) -> dict:
    large = size == "2p8b"
    sized = (f"{FULL}size_2p8b.gin",) if large else ()
    budget = ("TRAIN_TOKENS=40e9", "WARMUP_STEPS=3815") if large else ()
    seed = f"{data}/seed_{size}"
    arms = {}

    def train(arm: str, file: str, shares: dict, *bindings: str, method: str = "", **parent: str):
        methods = (f"{METHODS}{method}.gin",) if method else ()
        arms[f"{arm}_{size}"] = {
            "gin_files": (f"{FULL}{file}.gin", *sized, *methods),
            "bindings": (f"SHARES={shares!r}", *bindings),
            **{key: f"{value}_{size}" for key, value in parent.items()},
        }

    def make(arm: str, *command: str):
        arms[f"{arm}_{size}"] = {"made": ("{python}", "-m", *command)}

    every = (*domains, *((NEW,) if large else ()))
    for domain in every:
        tokens = ("TRAIN_TOKENS=8e9", "WARMUP_STEPS=763") if domain == NEW else budget
        train(domain, "expert", {domain: 1.0}, *tokens, f"INITIAL_CHECKPOINT_PATH={seed!r}")
    embed = (
        *("launch.prepare", "embed_domains", "--gin_file=t5x_configs/data/nexus_full.gin"),
        f"--gin.DATA_ROOT={data!r}",
        f"--gin.TOKENIZER={data + '/tokenizer'!r}",
        f"--gin.SHARES={dict.fromkeys(every, 0.0) | {domains[0]: 1.0}!r}",
        f"--limit={LIMIT}",
    )
    sources = [f"--domain={domain}=task:{domain}" for domain in domains]
    # Not centred, as in the paper.
    encoder = ("--encoder=sentences", f"--sentence_model={data}/sentence_model", "--mean=none")
    make("domains", *embed, *encoder, *sources, "--output={run}")
    if large:
        added = (f"--extend={{domains_{size}}}", f"--domain={NEW}=task:{NEW}")
        make("extended", *embed, *added, "--output={run}")
    experts = [f"{domain}={{{domain}_{size}}}" for domain in domains]
    make(
        "merged",
        "launch.upcycle",
        "--method=soup",
        "--experts",
        f"seed={seed}",
        *experts,
        "--to={run}",
    )
    mixed, annealed = (_shares(domains, share) for share in (PRETRAINING, ANNEALED))
    # Suffix of a mixture -> (its shares, bindings of both phases); the ablations are of the smaller size.
    variants: dict[str, tuple[dict, tuple[str, ...]]] = {"": (mixed, ())}
    if not large:
        even = {
            "pretraining": PRETRAINING,
            **dict.fromkeys(domains, (1 - PRETRAINING) / len(domains)),
        }
        variants |= {"_low": (mixed, ("BALANCE_LOSS=0.0005",)), "_uniform": (even, ())}
    rest = {name: 0.5 / (len(domains) + 1) for name in ("pretraining", *domains)}
    for arm, router in (("nexus", "projection"), ("linear", "linear")):
        projected = router == "projection"
        width = (f"DOMAIN_DIM={DOMAIN_DIM}",) if projected else ()
        count = (f"EXPERTS={len(domains)}", *width)
        method = "nexus" if projected else "nexus_linear"
        flags = [f"--router={router}", f"--seed_model={seed}"]
        flags += [f"--domains={{domains_{size}}}"] if projected else []
        command = ("launch.upcycle", "--method=nexus", *flags, "--experts", *experts)
        make(f"{arm}_start", *command, "--to={run}")
        for suffix, (shares, more) in variants.items():
            name = f"{arm}{suffix}"
            start = {"method": method, "parent": f"{arm}_start"}
            train(f"{name}_mixed", "expert", shares, *count, *budget, *more, **start)
            start = {"method": method, "parent": f"{name}_mixed"}
            train(name, "anneal", annealed, *count, *more, **start)
        extensions = {f"{arm}_with_{NEW}": [f"--domains={{extended_{size}}}"]}
        if not projected:
            extensions = {f"{arm}_{x}_with_{NEW}": [f"--router={x}"] for x in ("reset", "append")}
        for name, flags in extensions.items() if large else ():
            added = [f"--moe={{{arm}_{size}}}", f"--add={NEW}={{{NEW}_{size}}}", *flags]
            make(f"{name}_start", "launch.upcycle", "extend", *added, "--to={run}")
            more = (f"EXPERTS={len(domains) + 1}", *width)
            start = {"method": method, "parent": f"{name}_start"}
            train(name, "extension", {NEW: 0.5, **rest}, *more, **start)
    return arms


def _shares(domains: tuple[str, ...], pretraining: float) -> dict[str, float]:
    """Domains in proportion to their tokens beside pre-training data; they sum to 1."""
    total = sum(TOKENS[domain] for domain in domains)
    shares = {domain: (1 - pretraining) * TOKENS[domain] / total for domain in domains}
    return {"pretraining": pretraining, **shares}
