"""Upcycling with a router that knows the experts' domains (arXiv 2408.15901), and one expert more: runs, small and full size.

A seed, an expert of each of twelve domains in four families, and one of a domain between two of them for later;
mixtures with the projection router on embeddings that are placed in several ways, with meaningless ones, and with a
linear router; then some are extended by the new expert and trained, half on its domain. After a colon are the domains and the
number of seeds:

  espalier sweep --sweep launch/papers/nexus/experiment.py:synthetic,5 --out runs/nexus/synthetic --workers 2

The domains of a part are the general one, the domains of a mixture's experts in their order, and last the new one, for
which an expert is added.

At full size (`full` and DATA_ROOT): experts, mixtures with both routers, anneal, and the code expert that is added. DATA_ROOT is a
folder of data with the tokenizer in its `tokenizer` and a trained seed of each size in `seed_470m` and `seed_2p8b`, whose training
the paper does not describe. Domains are embedded by a text encoder, as in the paper, whose own is not public: `sentence_model` is
one that sentence-transformers has saved, FULL_DOMAIN_DIM its width. To see the runs and their commands:

  espalier sweep --sweep launch/papers/nexus/experiment.py:full,/data --out /runs/nexus --dry_run
"""

import functools
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from espalier.launch.papers.shared import domains as domain_runs
from espalier.launch.papers.shared import sweeps
from espalier.launch.papers.shared.domains import DomainRuns
from espalier.launch.papers.shared.sweeps import on_shares
from espalier.launch.precompile.table_rows import Row, tokens

OLD, NEW = "old-domain loss", "new-domain loss"
SEED, MERGED = "seed", "merged"
NEXUS, LINEAR, RANDOM = "nexus", "linear", "nexus_random"
# Nexus by how its embeddings are placed; the first one is the paper's, and Nexus elsewhere on the page.
PLACED = {
    NEXUS: "Nexus",
    "nexus_centred": "Nexus, centred",
    "nexus_lengthened": "Nexus, centred and lengthened",
}
ROUTERS = {**PLACED, RANDOM: "Nexus, random vectors", LINEAR: "linear router"}
LOW = {"nexus_low": "Nexus, weak balance", "linear_low": "linear router, weak balance"}
EXTENDED, RESET, APPENDED = "ext_nexus", "ext_linear_reset", "ext_linear_append"
EXTENSIONS = {
    EXTENDED: "Nexus",
    RESET: "linear router, drawn anew",
    APPENDED: "linear router, row appended",
    "ext_random": "Nexus, random vectors",
}
STARTED = {  # only started, not trained
    "ext_centred": "Nexus, centred",
    "ext_lengthened": "Nexus, centred and lengthened",
    "ext_levelled": "Nexus, levelled",
}
BUDGETS = (50, 100, 200, 400)  # updates of an extension
_LABELS = {
    **ROUTERS,
    **LOW,
    **{arm: f"{label}, extended" for arm, label in {**EXTENSIONS, **STARTED}.items()},
    MERGED: "experts merged",
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
        return ("mlp",) if arm in {**ROUTERS, **LOW, **EXTENSIONS} else ()

    @classmethod
    def more_groups(cls, domains: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return {OLD: domains[:-1], NEW: domains[-1:]}

    @property
    def initial(self) -> Sequence[str]:
        """The domains of the experts before the extension."""
        return self.domains[1:-1]

    def selectivity(self, arm: str) -> dict[int, np.ndarray]:
        """Returns by seed the new expert's share of the new domain's tokens less its share of the old domains': [layer]."""
        out = {}
        for seed, taken_LD in self.taken(arm).items():
            out[seed] = taken_LD[:, -1] - taken_LD[:, :-1].mean(-1)
        return out

    def taken(self, arm: str) -> dict[int, np.ndarray]:
        """Returns by seed the new expert's share of each domain's tokens: [layer, domain]."""
        return {seed: chosen_LDE[..., -1] for seed, chosen_LDE in self.choices(arm).items()}

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
LINEAR_ROUTER = "linear"
# Arm -> its embeddings, or the linear router.
MIXTURES = {
    "nexus": "uncentred",
    "nexus_centred": "centred",
    "nexus_lengthened": "lengthened",
    "nexus_random": "random",
    "linear": LINEAR_ROUTER,
}
EVALUATED = ("held_out", "routing")
LOW_OF = ("nexus", "linear")  # also with a hundredth of the balance loss
# Arm -> (the mixture that is extended, flags).
EXTENDED_BY = {
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
    if data := sweeps.after("full", text):
        return _full_sweep(data)
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
    embed = ("espalier.launch.prepare", "embed_domains", f"--gin_file={CPU}{kind}.gin")
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
        if router != LINEAR_ROUTER:
            flags = ["--router=projection", f"--domains={{{router}_domains}}"]
        words = (*_upcycle("--method=nexus", "--seed_model={seed}", *flags), *experts)
        arms[f"{arm}_start"] = sweeps.made(*words, "--to={run}", evaluations=EVALUATED)
        trained = (len(domains), mixed, MIXTURE_STEPS, f"{arm}_start", router)
        arms[arm] = _mixture(*trained)
        if arm in LOW_OF:
            arms[f"{arm}_low"] = _mixture(*trained, "BALANCE_LOSS=0.0005")
    for arm, (mixture, flags) in EXTENDED_BY.items():
        router = MIXTURES[mixture]
        vectors = () if router == LINEAR_ROUTER else (f"--domains={{{router}_extended}}",)
        arms[f"{arm}_start"] = _extended(mixture, new, *flags, *vectors)
    for arm in TRAINED:
        trained = (len(domains) + 1, extended, EXTENSION_STEPS, f"{arm}_start")
        # A tenth of the peak of training, as at full size; at half of it the old domains are lost.
        rate = ("LEARNING_RATE=3e-4", "EVAL_PERIOD=50")
        arms[arm] = _mixture(*trained, MIXTURES[EXTENDED_BY[arm][0]], *rate)
    tasks = (general, *domains, new)
    flags = ("--max_batches=4", f"--tasks={','.join(tasks)}")
    structure = {"call": "espalier.launch.evaluate.routing:structure"}
    return sweeps.config(
        arms,
        seeds=seeds or 5,
        gin_files=(f"{CPU}{kind}.gin",),
        evaluations={**sweeps.domain_evaluations(tasks, *flags), "structure": structure},
    )


def _mixture(
    experts: int, shares: dict, steps: int, parent: str, router: str, *bindings: str
) -> dict:
    projected = router != LINEAR_ROUTER
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
SEEDS = 5
PARTS = domain_runs.PARTS
run = functools.partial(domain_runs.run, "nexus")
