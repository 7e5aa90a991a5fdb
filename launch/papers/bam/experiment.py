"""Branch, train, mix (arXiv 2408.08274): runs with small models and at full size, and what is measured of them.

Phases are runs: what they start from is trained once, mixtures are made by `launch.upcycle` in between, and the
same command goes on wherever it was stopped. After a colon are the domains and the number of seeds:

  espalier sweep --sweep launch/papers/bam/experiment.py:synthetic,5 --out runs/bam/synthetic --workers 2

or `full` and DATA_ROOT, a folder of data with the tokenizer in its `tokenizer`: the 590M seed, its specialists, and the
mixtures of the paper's tables. To see these runs and their commands, which a cluster runs in the order of what they start from:

  espalier sweep --sweep launch/papers/bam/experiment.py:full,/data --out /runs/bam --dry_run
"""

import functools
from collections.abc import Sequence
from typing import Any

import ml_collections

from espalier.launch.papers.shared import domains, sweeps
from espalier.launch.papers.shared.domains import DomainRuns
from espalier.launch.papers.shared.sweeps import on_shares
from espalier.launch.precompile.table_rows import Row, tokens

BTX = {
    "btx": "BTX",
    "btx6": "BTX, 6 experts",
    "btx6_top3": "BTX, 6 experts, top-3",
}
BAM = {
    "bam": "BAM",
    "bam_shared_kv": "BAM, shared KV",
}
CHOSEN = {  # always with shared keys and values, and at equal compute
    "moa_top2": "top-2 attention, shared KV",
    "moa_top1": "top-1 attention, shared KV",
}
CONTROLS = {"bam_averaged": "BAM, averaged attentions"}
DENSE_LONG = "dense_long"
CACHES = {"shared_kv": "shared keys and values", "expert_kv": "own keys and values"}
SEED = "seed"
_SUFFIXES = {"_cm": "equal compute", "_long": "long"}


def matched(arm: str) -> str:
    """Returns the twin of an arm that ends when it has computed as much as BTX."""
    return f"{arm}_cm"


def long(arm: str) -> str:
    """Returns the twin of an arm that makes as many updates as dense training needs to be matched."""
    return f"{arm}_long"


class Runs(DomainRuns):
    """Runs of a part with the arms' names and their routers."""

    def label(self, arm: str) -> str:
        if arm.startswith("spec_"):
            return arm.replace("spec_", "specialist ", 1)
        if arm == DENSE_LONG:
            return "dense, all tokens"
        base, suffix = _split(arm)
        label = {**BTX, **BAM, **CHOSEN, **CONTROLS}.get(base) or base.replace("_", " ")
        return f"{label} ({_SUFFIXES[suffix]})" if suffix else label

    def top_1(self, arm: str) -> Sequence[str]:
        base, _ = _split(arm)
        if base not in {**BTX, **BAM, **CHOSEN, **CONTROLS} or base == "btx6_top3":
            return ()
        return ("mlp", "attention") if base == "moa_top1" else ("mlp",)


def _split(arm: str) -> tuple[str, str]:
    """Returns the arm of which one is a twin, and its suffix."""
    suffix = next((one for one in _SUFFIXES if arm.endswith(one)), "")
    return arm.removesuffix(suffix), suffix


def specialist(domain: str) -> str:
    return f"spec_{domain}"


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
    if data := sweeps.after("full", text):
        return _full_sweep(data)
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
    from espalier.launch.config import gin_config

    _, method, bindings = MIXTURES[arm]
    files = ("models/bam_590m", "runs/pretrain", f"methods/bam/{method}")
    row = f"TASK_FEATURE_LENGTHS={{'targets': {context}}}"
    unused = ("MODEL_DIR=''", "MIXTURE_OR_TASK_NAME=''", "TASKS=()", "BATCH_SIZE=1")
    config = gin_config.load(
        [f"t5x_configs/{file}.gin" for file in files],
        [row, *unused, *bindings],
        entry="espalier.launch.train:train",
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
        "espalier.launch.upcycle",
        *flags,
        "--trust_config",
        "--router_seed={SEED}",
        "--experts",
        *experts,
        "--to={run}",
    )
    return sweeps.made(*words)


# The runs of full size.

FULL = "t5x_configs/experiments/bam/full/"
FULL_DOMAINS = ("code", "law", "math")
FULL_CONTEXT, FULL_TOKENS = 2048, 100e9  # of the mixtures
# Arm -> (flags of launch.upcycle, file, bindings, copies of the seed).
FULL_MIXTURES = {
    "btx": (*MIXTURES["btx"], 1),
    **{
        f"btx{n}": (("--method=btx",), "btx", (f"EXPERTS={n}",), n - len(FULL_DOMAINS))
        for n in (5, 6, 7, 8)
    },
    "btx6_top3": (*MIXTURES["btx6_top3"], 3),
    **{
        arm: (*MIXTURES[arm], 1)
        for arm in ("bam", "bam_shared_kv", "moa_top1", "moa_top2", "bam_averaged")
    },
}
FULL_BALANCE_LOSS = 0.01  # the paper has no figure, nor whether chosen attentions have such a loss


def _full_sweep(data: str) -> ml_collections.ConfigDict:
    arms = {"seed": sweeps.arm(f"{FULL}seed.gin")}
    for domain in FULL_DOMAINS:
        others = {name: 0.0 for name in FULL_DOMAINS if name != domain}
        shares = {domain: 0.9, "web": 0.1, "general": 0.0, **others}
        settings = {"parent": "seed", "bindings": (f"SHARES={shares!r}",)}
        arms[domain] = sweeps.arm(f"{FULL}specialist.gin", **settings)
    branches = [f"{domain}={{{domain}}}" for domain in FULL_DOMAINS]
    for arm, (flags, file, bindings, copies) in FULL_MIXTURES.items():
        seeds = [f"general{i}={{seed}}" for i in range(copies)]
        command = (
            "{python}",
            "-m",
            "espalier.launch.upcycle",
            *flags,
            "--experts",
            *seeds,
            *branches,
        )
        arms[f"{arm}_start"] = {"made": (*command, "--to={run}")}
        start = f"{arm}_start"
        trained = {"parent": start, "bindings": (*balance(arm, FULL_BALANCE_LOSS), *bindings)}
        arms[arm] = sweeps.arm(f"{FULL}{file}.gin", **trained)
        if arm in COMPUTE_MATCHED:
            share = paper_flops("btx", FULL_CONTEXT) / paper_flops(arm, FULL_CONTEXT)
            trained["bindings"] += (f"TRAIN_TOKENS={share * FULL_TOKENS:.4g}",)
            arms[f"{arm}_cm"] = sweeps.arm(f"{FULL}{file}.gin", **trained)
    soup = (
        "{python}",
        "-m",
        "espalier.launch.upcycle",
        "--method=soup",
        "--experts",
        "general={seed}",
    )
    arms["soup"] = {"made": (*soup, *branches, "--to={run}")}
    return sweeps.config(arms, bindings=sweeps.data_root(data))


_PRETRAINING = "t5x_configs/runs/pretrain.gin"


def _program(name: str, title: str, *files: str) -> Row:
    return Row(
        name=name,
        title=title,
        files=(*(f"t5x_configs/{file}.gin" for file in files), _PRETRAINING),
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    )


ROWS = (
    _program("bam_590m", "Dense seed of 590M", "models/bam_590m"),
    _program("bam_2b", "Dense seed of 2B", "models/bam_2b"),
    _program("btx_4x590m", "BTX of four 590M seeds, the baseline", "models/btx_590m"),
    _program("bam_4x590m", "BAM of four 590M seeds", "models/bam_4x590m"),
    _program("bam_4x2b", "BAM of four 2B seeds", "models/bam_2b", "methods/bam/bam"),
)


# What is measured of the runs.

TITLE = "BAM, 2408.08274"
SEEDS = 5
PARTS = {**domains.PARTS, "caches": "the bytes of caches"}
EXPERTS = (2, 3, 4, 6, 8)
CACHE_LENGTH = 256  # tokens of one row


def run(*, parts: Sequence[str] = tuple(PARTS), **settings: Any) -> dict[str, Any]:
    """Returns the parts of `domains.run`, and 'caches', the result of `cache_bytes`.

    Further arguments and errors are those of `domains.run`.
    """
    measured = domains.run("bam", parts=[p for p in parts if p in domains.PARTS], **settings)
    return measured | ({"caches": cache_bytes()} if "caches" in parts else {})


def cache_bytes() -> dict[str, list[int]]:
    """Returns {"experts", "dense", "shared_kv", "expert_kv"}, in the order of EXPERTS.

    The latter three are bytes of keys and values of all layers, as decoding allocates them; nothing is run.
    """
    from espalier.model.attention import Attention
    from espalier.model.bam.moa import MixtureOfAttention

    out: dict[str, list[int]] = {"experts": [], "dense": [], "shared_kv": [], "expert_kv": []}
    for count in EXPERTS:
        kinds: dict[str, Any] = {
            "dense": Attention,
            "shared_kv": functools.partial(MixtureOfAttention, num_experts=count, shared_kv=True),
            "expert_kv": functools.partial(MixtureOfAttention, num_experts=count),
        }
        out["experts"].append(count)
        for kind, attention in kinds.items():
            out[kind].append(_bytes(attention))
    return out


def _bytes(attention: Any) -> int:
    import jax

    from espalier.model.config import TransformerConfig
    from espalier.model.kv_cache.full import FullCache
    from espalier.model.transformer import Block, Transformer
    from espalier.trainers.decoding import prefill

    config = TransformerConfig(
        vocab_size=48, num_layers=3, embed_dim=64, num_heads=4, mlp_dim=128, scan_layers=False
    )
    model = Transformer(config=config, block=functools.partial(Block, attention=attention))
    caches = jax.eval_shape(
        lambda: prefill.empty_caches(model, FullCache(), batch=1, length=CACHE_LENGTH)
    )
    arrays = [array for cache in caches for array in (cache.slots.k_BKSH, cache.slots.v_BKSH)]
    return sum(array.size * array.dtype.itemsize for array in arrays)
