"""Upcycling with a router that knows the experts' domains (arXiv 2408.15901), and one expert more: runs, small and full size.

A seed, an expert of each of six domains in three families, and one of a domain of a fourth family for later; mixtures with
the projection router on embeddings of the domains or on meaningless ones, and with a linear router; then some are extended
by the new expert and trained, half on its domain. The part `text` is the same on text of installed packages, with fewer arms,
and the part `balance` has biases that balance the experts instead of a loss.
After a colon are the part and the number of seeds:

  espalier sweep --sweep launch/papers/nexus/experiment.py:synthetic,3 --out runs/nexus/synthetic --workers 2

The domains of a part are the general one, the domains of a mixture's experts in their order, and last the new one, for
which an expert is added.

At full size (`full` and DATA_ROOT): experts, mixtures with both routers, anneal, and the code expert that is added. DATA_ROOT is a
folder of data with the tokenizer in its `tokenizer` and a trained seed of each size in `seed_470m` and `seed_2p8b`, whose training
the paper does not describe. Domains are embedded by a text encoder, as in the paper, whose own is not public: `sentence_model` is
one that sentence-transformers has saved, FULL_DOMAIN_DIM its width. To see the runs and their commands:

  espalier sweep --sweep launch/papers/nexus/experiment.py:full,/data --out /runs/nexus --dry_run
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from espalier.launch.papers.shared import domains as domain_runs
from espalier.launch.papers.shared import sweeps
from espalier.launch.papers.shared.domains import DomainRuns
from espalier.launch.papers.shared.sweeps import on_shares
from espalier.launch.precompile.table_rows import Row, tokens

OLD, NEW = "old-domain loss", "new-domain loss"
SEED, DENSE = "seed", "dense"
NEXUS, LINEAR, RANDOM = "nexus", "linear", "nexus_random"
ROUTERS = {NEXUS: "Nexus", RANDOM: "Nexus, random vectors", LINEAR: "linear router"}
LOW = {"nexus_low": "Nexus, weak balance", "linear_low": "linear router, weak balance"}
EXTENDED, RESET, APPENDED = "ext_nexus", "ext_linear_reset", "ext_linear_append"
EXTENSIONS = {
    EXTENDED: "Nexus",
    RESET: "linear router, drawn anew",
    APPENDED: "linear router, row appended",
}
STARTED = {  # only started, not trained
    "ext_random": "Nexus, random vectors",
    "ext_levelled": "Nexus, levelled",
}
BIASED = {"nexus_bias": "Nexus, biases", "linear_bias": "linear router, biases"}
NEXUS_BIAS, LINEAR_BIAS = BIASED
EXTENDED_BIAS, RESET_BIAS = "ext_nexus_bias", "ext_linear_reset_bias"
BIASED_EXTENSIONS = {
    EXTENDED_BIAS: "Nexus, biases",
    RESET_BIAS: "linear router, biases, drawn anew",
}
KEPT = "nexus_kept"  # not extended, and trained on the data of the extension
BUDGETS = (50, 100, 200)  # updates of an extension
_LABELS = {
    **ROUTERS,
    **LOW,
    **BIASED,
    **{
        arm: f"{label}, extended"
        for arm, label in {**EXTENSIONS, **STARTED, **BIASED_EXTENSIONS}.items()
    },
    KEPT: "Nexus, not extended",
    DENSE: "dense, all tokens",
}


class Runs(DomainRuns):
    """Runs of a part with the arms' names and their routers."""

    def label(self, arm: str) -> str:
        if arm.startswith("expert_"):
            return f"expert of {arm.removeprefix('expert_')}"
        base = arm.removesuffix("_start")
        label = _LABELS.get(base, base.replace("_", " "))
        return label if base == arm else f"{label}, before training"

    def top_1(self, arm: str) -> Sequence[str]:
        chosen = {**ROUTERS, **LOW, **EXTENSIONS, **BIASED, **BIASED_EXTENSIONS, KEPT: ""}
        return ("mlp",) if arm in chosen else ()

    @classmethod
    def more_groups(cls, domains: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return {OLD: domains[:-1], NEW: domains[-1:]}

    @property
    def initial(self) -> Sequence[str]:
        """The domains of the experts before the extension."""
        return self.domains[1:-1]

    def selectivity(self, arm: str) -> dict[int, np.ndarray]:
        """Returns by seed the new expert's share of the new domain's tokens minus its share of the old domains': [layer]."""
        out = {}
        for seed, taken_LD in self.taken(arm).items():
            out[seed] = taken_LD[:, -1] - taken_LD[:, :-1].mean(-1)
        return out

    def taken(self, arm: str) -> dict[int, np.ndarray]:
        """Returns by seed the new expert's share of each domain's tokens: [layer, domain]."""
        return {seed: chosen_LDE[..., -1] for seed, chosen_LDE in self.choices(arm).items()}

    def gates(self, arm: str) -> dict[int, float]:
        """Returns by seed the mean probability of the chosen expert over domains, in the last layer."""
        found = {
            seed: row["evaluations"][domain_runs.ROUTING].get("gates")
            for seed, row in self.find(arm).items()
            if row["evaluations"].get(domain_runs.ROUTING)
        }
        return {
            seed: float(np.mean([by_router["mlp"][-1] for by_router in gates.values()]))
            for seed, gates in found.items()
            if gates
        }

    def cosines(self, arm: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Returns by seed the cosines of the domains' vectors [i, j] and of the experts' in each layer [layer, i, j]."""
        structures = {
            seed: row["evaluations"]["structure"]
            for seed, row in self.find(arm).items()
            if row["evaluations"].get("structure")
        }
        return {
            seed: (np.array(one["vectors"]), np.array([*one["projected"].values()]))
            for seed, one in structures.items()
        }


def expert(domain: str) -> str:
    return f"expert_{domain}"


def start(arm: str) -> str:
    """Returns the arm that another one starts from; it is made, not trained."""
    return f"{arm}_start"


CPU = "t5x_configs/experiments/nexus/cpu/"
METHODS = "t5x_configs/methods/nexus/"
# The domain of the seed, the domains of the experts, and the domain of the expert that is added.
# A family has one lag, that of the new one lies between the others', and its table is its own: no mixture of old domains is
# like it, and its embedding is outside of their hull.
_KIN = ("kin_a", "kin_a70", "kin_c", "kin_c40", "kin_d", "kin_d70")
DOMAINS = {
    domain_runs.SYNTHETIC: ("lag_general", _KIN, "kin_b"),
    domain_runs.BALANCE: ("lag_general", _KIN, "kin_b"),
    domain_runs.TEXT: ("english", ("docstrings", "python", "markup", "lang_es"), "cpp"),
}
SEED_STEPS, EXPERT_STEPS, MIXTURE_STEPS, EXTENSION_STEPS = 800, 400, 600, BUDGETS[-1]
DOMAIN_DIM = 128  # below, the noise of a random projection hides which domains are related
EMBEDDED = 4000  # first documents of a domain, which are enough for its pairs of characters
# Embeddings -> flags of espalier prepare embed_domains. The paper does not centre.
EMBEDDINGS = {
    "uncentred": ("--encoder=ngrams", "--mean=none"),
    "random": ("--encoder=random",),
}
LINEAR_ROUTER = "linear"
# Arm -> its embeddings, or the linear router.
MIXTURES = {NEXUS: "uncentred", RANDOM: "random", LINEAR: LINEAR_ROUTER}
EVALUATED = ("held_out", "routing")
LOW_OF = (NEXUS, LINEAR)  # also with a hundredth of the balance loss
# Arm -> (the mixture that is extended, flags).
EXTENDED_BY = {
    EXTENDED: (NEXUS, ()),
    RESET: (LINEAR, ("--router=reset",)),
    APPENDED: (LINEAR, ("--router=append",)),
    "ext_random": (RANDOM, ()),
    "ext_levelled": (NEXUS, ("--level",)),
}
# The same of the part balance, whose experts are balanced by biases.
MIXTURES_BIASED = {NEXUS_BIAS: "uncentred", LINEAR_BIAS: LINEAR_ROUTER}
EXTENDED_BY_BIASED = {
    EXTENDED_BIAS: (NEXUS_BIAS, ()),
    RESET_BIAS: (LINEAR_BIAS, ("--router=reset",)),
}
TEXT_ARMS = {NEXUS, LINEAR, DENSE, EXTENDED, RESET}  # of the part `text`, with what they start from
AT_THE_END = "EVAL_PERIOD=100000"  # for arms whose losses on the way nothing reads


def get_config(text: str = "synthetic,3") -> ml_collections.ConfigDict:
    if data := sweeps.after("full", text):
        return _full_sweep(data)
    kind, _, seeds = text.partition(",")
    general, domains, new = DOMAINS[kind]
    mixed = {general: 0.25, **{domain: 0.75 / len(domains) for domain in domains}}
    old = (general, *domains)
    extended = {new: 0.5, **{domain: 0.5 / len(old) for domain in old}}
    started = {general: 0.85, **{domain: 0.15 / len(domains) for domain in domains}}
    mixtures, extensions = dict(MIXTURES), dict(EXTENDED_BY)
    if kind == domain_runs.TEXT:
        mixtures = {arm: router for arm, router in MIXTURES.items() if arm in TEXT_ARMS}
        extensions = {arm: made for arm, made in EXTENDED_BY.items() if arm in TEXT_ARMS}
    biases, forms = (), ()
    if kind == domain_runs.BALANCE:
        mixtures, extensions = dict(MIXTURES_BIASED), dict(EXTENDED_BY_BIASED)
        biases, forms = (f"BIAS_RATE={domain_runs.BIAS_RATE}",), (domain_runs.BALANCED_BY,)
    file = domain_runs.TEXT if kind == domain_runs.TEXT else domain_runs.SYNTHETIC
    arms = {SEED: on_shares(started, SEED_STEPS, AT_THE_END)}
    settings = ("LEARNING_RATE=1.5e-3", AT_THE_END)
    for domain in (*domains, new):
        arms[expert(domain)] = on_shares({domain: 1.0}, EXPERT_STEPS, *settings, parent=SEED)
    total = len(domains) * EXPERT_STEPS + MIXTURE_STEPS
    if kind != domain_runs.BALANCE:
        arms[DENSE] = on_shares(mixed, total, AT_THE_END, parent=SEED)
    experts = [f"{domain}={{expert_{domain}}}" for domain in domains]
    embed = ("espalier.launch.prepare", "embed_domains", f"--gin_file={CPU}{file}.gin")
    sources = [f"--domain={domain}=task:{domain}" for domain in domains]
    for name, flags in EMBEDDINGS.items():
        if name not in mixtures.values():
            continue
        if name != "random":
            flags = (*flags, f"--limit={EMBEDDED}")
        words = (*embed, *flags, f"--dim={DOMAIN_DIM}", "--seed={SEED}", *sources)
        arms[f"{name}_domains"] = sweeps.made(*words, "--output={run}")
        words = (*embed, f"--extend={{{name}_domains}}", f"--domain={new}=task:{new}")
        arms[f"{name}_extended"] = sweeps.made(*words, "--output={run}")
    for arm, router in mixtures.items():
        flags = ["--router=linear"]
        if router != LINEAR_ROUTER:
            flags = ["--router=projection", f"--domains={{{router}_domains}}"]
        words = (*_upcycle("--method=nexus", "--seed_model={seed}", *flags), *experts)
        arms[start(arm)] = sweeps.made(*words, "--to={run}")
        trained = (len(domains), mixed, MIXTURE_STEPS, start(arm), router)
        arms[arm] = _mixture(*trained, AT_THE_END, *biases, forms=forms)
        if arm in LOW_OF and kind == domain_runs.SYNTHETIC:
            arms[f"{arm}_low"] = _mixture(*trained, AT_THE_END, "BALANCE_LOSS=0.0005")
    # A tenth of the peak of training, as at full size; at half of it the old domains are lost.
    rate = ("LEARNING_RATE=3e-4", "EVAL_PERIOD=50")
    for arm, (mixture, flags) in extensions.items():
        router = mixtures[mixture]
        vectors = () if router == LINEAR_ROUTER else (f"--domains={{{router}_extended}}",)
        arms[start(arm)] = _extended(mixture, new, *flags, *vectors)
        if arm in {**EXTENSIONS, **BIASED_EXTENSIONS}:
            trained = (len(domains) + 1, extended, EXTENSION_STEPS, start(arm), router)
            arms[arm] = _mixture(*trained, *rate, *biases, forms=forms)
    if kind == domain_runs.SYNTHETIC:
        trained = (len(domains), extended, EXTENSION_STEPS, NEXUS, MIXTURES[NEXUS])
        arms[KEPT] = _mixture(*trained, *rate)
    tasks = (general, *domains, new)
    flags = ("--max_batches=4", f"--tasks={','.join(tasks)}")
    structure = {"call": "espalier.launch.evaluate.routing:structure"}
    return sweeps.config(
        arms,
        seeds=seeds or SEEDS[0],
        gin_files=(f"{CPU}{file}.gin",),
        evaluations={**sweeps.domain_evaluations(tasks, *flags), "structure": structure},
    )


def _mixture(
    experts: int,
    shares: dict,
    steps: int,
    parent: str,
    router: str,
    *bindings: str,
    forms: tuple[str, ...] = (),
) -> dict:
    projected = router != LINEAR_ROUTER
    width = (f"DOMAIN_DIM={DOMAIN_DIM}",) if projected else ()
    return on_shares(
        shares,
        steps,
        *(f"EXPERTS={experts}", *width, *bindings),
        parent=parent,
        gin_files=(f"{METHODS}{'nexus' if projected else 'nexus_linear'}.gin", *forms),
        evaluations=("routing", *(("structure",) if projected else ())),
    )


def _upcycle(*flags: str) -> tuple[str, ...]:
    return (
        "espalier.launch.upcycle",
        *flags,
        "--trust_config",
        "--router_seed={SEED}",
        "--experts",
    )


def _extended(mixture: str, new: str, *flags: str) -> dict:
    command = ("espalier.launch.upcycle", "extend", "--trust_config", "--router_seed={SEED}")
    words = (f"--moe={{{mixture}}}", f"--add={new}={{expert_{new}}}", *flags)
    return sweeps.made(*command, *words, "--to={run}", evaluations=EVALUATED)


# The runs of full size.

FULL = "t5x_configs/experiments/nexus/full/"
# SlimPajama's shares of tokens, in per cent.
FULL_TOKENS = {
    "arxiv": 4.6,
    "books": 4.2,
    "c4": 26.7,
    "wikipedia": 3.8,
    "github": 5.2,
    "stackexchange": 3.3,
}
SIZES = {"470m": tuple(FULL_TOKENS), "2p8b": ("arxiv", "books", "c4", "wikipedia")}
CODE = "code"
PRETRAINING = 0.25  # of the mixture's tokens; not published
ANNEALED = 0.7  # and of the anneal's
FULL_DOMAIN_DIM = 1024
LIMIT = 200_000  # documents of a domain that those embedded are drawn from; all are hundreds of gigabytes


def _full_sweep(data: str) -> ml_collections.ConfigDict:
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

    every = (*domains, *((CODE,) if large else ()))
    for domain in every:
        tokens = ("TRAIN_TOKENS=8e9", "WARMUP_STEPS=763") if domain == CODE else budget
        train(domain, "expert", {domain: 1.0}, *tokens, f"INITIAL_CHECKPOINT_PATH={seed!r}")
    embed = (
        *("espalier.launch.prepare", "embed_domains", "--gin_file=t5x_configs/data/nexus_full.gin"),
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
        added = (f"--extend={{domains_{size}}}", f"--domain={CODE}=task:{CODE}")
        make("extended", *embed, *added, "--output={run}")
    experts = [f"{domain}={{{domain}_{size}}}" for domain in domains]
    make(
        "merged",
        "espalier.launch.upcycle",
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
        width = (f"DOMAIN_DIM={FULL_DOMAIN_DIM}",) if projected else ()
        count = (f"EXPERTS={len(domains)}", *width)
        method = "nexus" if projected else "nexus_linear"
        flags = [f"--router={router}", f"--seed_model={seed}"]
        flags += [f"--domains={{domains_{size}}}"] if projected else []
        command = ("espalier.launch.upcycle", "--method=nexus", *flags, "--experts", *experts)
        make(f"{arm}_start", *command, "--to={run}")
        for suffix, (shares, more) in variants.items():
            name = f"{arm}{suffix}"
            start = {"method": method, "parent": f"{arm}_start"}
            train(f"{name}_mixed", "expert", shares, *count, *budget, *more, **start)
            start = {"method": method, "parent": f"{name}_mixed"}
            train(name, "anneal", annealed, *count, *more, **start)
        extensions = {f"{arm}_with_{CODE}": [f"--domains={{extended_{size}}}"]}
        if not projected:
            extensions = {f"{arm}_{x}_with_{CODE}": [f"--router={x}"] for x in ("reset", "append")}
        for name, flags in extensions.items() if large else ():
            added = [f"--moe={{{arm}_{size}}}", f"--add={CODE}={{{CODE}_{size}}}", *flags]
            make(f"{name}_start", "espalier.launch.upcycle", "extend", *added, "--to={run}")
            more = (f"EXPERTS={len(domains) + 1}", *width)
            start = {"method": method, "parent": f"{name}_start"}
            train(name, "extension", {CODE: 0.5, **rest}, *more, **start)
    return arms


def _shares(domains: tuple[str, ...], pretraining: float) -> dict[str, float]:
    """Domains in proportion to their tokens beside pre-training data; they sum to 1."""
    total = sum(FULL_TOKENS[domain] for domain in domains)
    shares = {domain: (1 - pretraining) * FULL_TOKENS[domain] / total for domain in domains}
    return {"pretraining": pretraining, **shares}


_FILES = ("t5x_configs/models/nexus_4x2p8b.gin", "t5x_configs/runs/pretrain.gin")

ROWS = (
    Row(
        name="nexus_6x470m",
        title="Nexus of 6 x 470M",
        files=("t5x_configs/models/nexus_6x470m.gin", "t5x_configs/runs/pretrain.gin"),
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    ),
    Row(
        name="nexus_4x2p8b",
        title="Nexus of 4 x 2.8B",
        files=_FILES,
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    ),
    Row(
        name="nexus_4x2p8b_extended",
        title="Nexus of 4 x 2.8B with a fifth expert",
        files=_FILES,
        topology="v5e:16x16",
        bindings=("EXPERTS=5", *tokens(512, 2048)),
    ),
)


# What is measured of the runs.

TITLE = "Nexus, 2408.15901"
SEEDS = (3, 5)  # most effects of the first rounds were five times their deviation and more
EARLIER = (
    "seeds 0 to 2, with centred embeddings and shares as means over layers",
    "seeds 10 to 14, with twelve experts and a new domain between two old ones, which no router of this kind can choose; they "
    "planned the numbers of seeds",
)
PARTS = {part: domain_runs.PARTS[part] for part in DOMAINS}
SWEEPS = {part: f"nexus/experiment:{part},{{seeds}}" for part in DOMAINS}


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the parts of `domains.run`, whose arguments and errors these are."""
    return domain_runs.run("nexus", parts=parts, model_dir=model_dir, seeds=seeds, **options)
