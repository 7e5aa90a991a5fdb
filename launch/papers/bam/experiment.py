"""Branch, train, mix (arXiv 2408.08274): runs with small models and at full size, and what is measured of them.

Phases are runs: what they start from is trained once, mixtures are made by `espalier upcycle` in between, and the
same command goes on wherever it was stopped. After a colon are the part (synthetic, text, sizes or balance) and the number of seeds:

  espalier sweep --sweep launch/papers/bam/experiment.py:synthetic,3 --out runs/bam/synthetic --workers 2

or `full` and DATA_ROOT, a folder of data with the tokenizer in its `tokenizer`: the 590M seed, its specialists, and the
mixtures of the paper's tables. To see these runs and their commands, which a cluster runs in the order of what they start from:

  espalier sweep --sweep launch/papers/bam/experiment.py:full,/data --out /runs/bam --dry_run
"""

import functools
import json
import pathlib
import re
import subprocess
import sys
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
DENSE_LONG, DENSE = "dense_long", "dense"
SEED = "seed"
WIDTH, WIDTHS = (
    64,
    (32, 128),
)  # of the models of the parts synthetic and text, and of the part sizes
_SUFFIXES = {
    "_cm": "equal compute",
    "_long": "long",
    "_bias": "biases",
    **{f"_w{width}": f"width {width}" for width in WIDTHS},
}


def matched(arm: str) -> str:
    """Returns the twin of an arm that ends when it has computed as much as BTX."""
    return f"{arm}_cm"


def long(arm: str) -> str:
    """Returns the twin of an arm that makes as many updates as dense training needs to be matched."""
    return f"{arm}_long"


def biased(arm: str) -> str:
    """Returns the twin of an arm whose FFN experts are balanced by biases, without a balance loss."""
    return f"{arm}_bias"


def wide(arm: str, width: int) -> str:
    """Returns the twin of an arm in a model of another width."""
    return f"{arm}_w{width}"


class Runs(DomainRuns):
    """Runs of a part with the arms' names and their routers."""

    def label(self, arm: str) -> str:
        if arm in (DENSE, DENSE_LONG):
            return "dense, all tokens"
        base, suffix = _split(arm)
        base = base.replace("spec_", "specialist ", 1)
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
_LAGS = ("lag_general", "lag_4", "lag_7", "lag_11")
DOMAINS = {
    domains.SYNTHETIC: _LAGS,
    domains.TEXT: ("english", "python", "markup", "lang_es"),
    domains.SIZES: _LAGS,
    domains.BALANCE: _LAGS,
}
SEED_STEPS, SPECIALIST_STEPS, MIXTURE_STEPS, LONG_STEPS = 800, 600, 600, 1500
TEXT_SPECIALIST_STEPS = 400
AT_THE_END = "EVAL_PERIOD=100000"  # for arms whose losses on the way nothing reads
# With a weight of 0.01 a top-1 router sends nearly all tokens of a layer to one expert, and a z-loss adds to that.
BALANCE_LOSS = 0.05
# Arm -> (flags of espalier upcycle, method file, bindings of training that match the flags). Chosen attentions share keys and
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
LONG = ("btx", "bam")  # also trained for LONG_STEPS updates, named `<arm>_long`
PAIR = ("btx", "bam")  # the mixtures of the parts sizes, text and balance
CONTEXT = 1024  # tokens; the paper does not publish it


def get_config(text: str = "synthetic,3") -> ml_collections.ConfigDict:
    if data := sweeps.after("full", text):
        return _full_sweep(data)
    kind, _, seeds = text.partition(",")
    names = DOMAINS[kind]
    even = {domain: 0.25 for domain in names}
    if kind == domains.SIZES:
        arms = {}
        for width in WIDTHS:
            for arm, settings in _small(names, even, PAIR, SPECIALIST_STEPS).items():
                arms[wide(arm, width)] = _at_width(settings, width)
    elif kind == domains.TEXT:
        arms = _small(names, even, PAIR, TEXT_SPECIALIST_STEPS)
        arms[DENSE] = _dense(even, TEXT_SPECIALIST_STEPS, MIXTURE_STEPS)
    elif kind == domains.BALANCE:
        arms = _small(names, even, PAIR, SPECIALIST_STEPS)
        for arm in PAIR:
            arms[biased(arm)] = _biased(even, arm)
    else:
        arms = _small(names, even, DATA_MATCHED, SPECIALIST_STEPS)
        for arm in COMPUTE_MATCHED:
            if f"{arm}_start" not in arms:
                arms[f"{arm}_start"] = _start(names, arm)
            arms[matched(arm)] = _mixture(even, equal_compute(arm), arm, AT_THE_END)
        for arm in LONG:
            arms[long(arm)] = _mixture(even, LONG_STEPS, arm, AT_THE_END)
        arms[DENSE_LONG] = _dense(even, SPECIALIST_STEPS, LONG_STEPS)
    file = domains.TEXT if kind == domains.TEXT else domains.SYNTHETIC
    return sweeps.config(
        arms,
        seeds=seeds or SEEDS[0],
        gin_files=(f"{CPU}{file}.gin",),
        evaluations={"routing": sweeps.domain_evaluations(names)["routing"]},
    )


def _small(names: Sequence[str], even: dict, mixtures: Sequence[str], steps: int) -> dict:
    """Returns the seed, specialists of so many updates, and mixtures of MIXTURE_STEPS with what they start from."""
    general, *special = names
    shares = {general: 0.85, **{x: 0.05 for x in special}}
    arms = {SEED: on_shares(shares, SEED_STEPS, AT_THE_END)}
    for domain in special:
        shares = {domain: 0.9, general: 0.1}
        settings = ("LEARNING_RATE=1.5e-3", AT_THE_END)
        arms[specialist(domain)] = on_shares(shares, steps, *settings, parent=SEED)
    for arm in mixtures:
        arms[f"{arm}_start"] = _start(names, arm)
        arms[arm] = _mixture(even, MIXTURE_STEPS, arm)
    return arms


def _start(names: Sequence[str], arm: str) -> dict:
    general, *special = names
    flags, _, _ = MIXTURES[arm]
    copies = [f"{general}{i}={{seed}}" for i in (2, 3)] if arm.startswith("btx6") else []
    specialists = [f"{domain}={{{specialist(domain)}}}" for domain in special]
    return _made(flags, (f"{general}={{seed}}", *copies, *specialists))


def _dense(even: dict, specialist_steps: int, mixture_steps: int) -> dict:
    """Returns the seed trained on as many tokens as all specialists and a mixture together."""
    total = (len(even) - 1) * specialist_steps + mixture_steps
    return on_shares(even, total, AT_THE_END, parent=SEED)


def _at_width(arm: dict, width: int) -> dict:
    """Returns an arm in a model of another width; heads are as wide as at WIDTH, and rates and updates the same."""
    if arm.get("made"):
        made = rf"{{\1_w{width}}}"
        words = [re.sub(rf"{{({SEED}|spec_\w+)}}", made, word) for word in arm["made"]]
        return {**arm, "made": tuple(words)}
    heads = 4 * width // WIDTH
    sizes = {"embed_dim": width, "num_heads": heads, "num_kv_heads": heads, "mlp_dim": 2 * width}
    bindings = [f"config.TransformerConfig.{name}={size}" for name, size in sizes.items()]
    parent = {"parent": wide(arm["parent"], width)} if arm.get("parent") else {}
    return {**arm, "bindings": (*arm["bindings"], *bindings), **parent}


def equal_compute(arm: str) -> int:
    """Returns the updates in which an arm would compute as much as BTX in MIXTURE_STEPS, were it the paper's 590M model.

    There the 256,000 symbols of the head cost every arm the same. Here the head is nearly free, so that BAM would get
    less than half of BTX's tokens.
    """
    return round(MIXTURE_STEPS * paper_flops("btx", CONTEXT) / paper_flops(arm, CONTEXT))


@functools.cache
def paper_flops(arm: str, context: int) -> float:
    """Returns the model FLOPs of one row of `context` tokens through an arm made of the paper's 590M models."""
    recipe = paper_recipe(arm, context)
    return recipe.model.forward_flops(recipe.inputs_spec.arrays(1))


def paper_recipe(arm: str, context: int, *more: str) -> Any:
    """Returns the recipe of an arm made of the paper's 590M models, with further bindings; of the seed for `dense`."""
    from espalier.launch.config import gin_config

    _, method, bindings = ((), None, ()) if arm == DENSE else MIXTURES[arm]
    files = ["models/bam_590m", "runs/pretrain", *([f"methods/bam/{method}"] if method else [])]
    row = f"TASK_FEATURE_LENGTHS={{'targets': {context}}}"
    unused = ("MODEL_DIR=''", "MIXTURE_OR_TASK_NAME=''", "TASKS=()", "BATCH_SIZE=1")
    config = gin_config.load(
        [f"t5x_configs/{file}.gin" for file in files],
        [row, *unused, *bindings, *more],
        entry="espalier.launch.train:train",
    )
    return config.arguments()["recipe"]


def balance(arm: str, weight: float) -> tuple[str, ...]:
    """Returns the bindings of the balance loss of an arm's FFN router, and of its attention router if that chooses."""
    attention = (f"moa.MixtureOfAttention.balance_loss={weight}",) if arm.startswith("moa") else ()
    return (f"BALANCE_LOSS={weight}", *attention)


def _mixture(shares: dict, steps: int, arm: str, *settings: str) -> dict:
    _, method, bindings = MIXTURES[arm]
    return on_shares(
        shares,
        steps,
        *(*balance(arm, BALANCE_LOSS), "ROUTER_Z_LOSS=0.0", *bindings, *settings),
        parent=f"{arm}_start",
        gin_files=(f"{METHODS}{method}.gin",),
        evaluations=("routing",),
    )


def _biased(shares: dict, arm: str) -> dict:
    _, method, bindings = MIXTURES[arm]
    rate = f"BIAS_RATE={domains.BIAS_RATE}"
    return on_shares(
        shares,
        MIXTURE_STEPS,
        *(rate, "ROUTER_Z_LOSS=0.0", *bindings, AT_THE_END),
        parent=f"{arm}_start",
        gin_files=(f"{METHODS}{method}.gin", domains.BALANCED_BY),
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
# Arm -> (flags of espalier upcycle, file, bindings, copies of the seed).
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


# What is measured.

TITLE = "BAM, 2408.08274"
SEEDS = (3, 5)  # effects of the first rounds were ten times their deviation and more
EARLIER = (
    "seeds 0 to 2, with a balance loss of 0.01 and a z-loss, under which a router of BTX collapsed in two of them",
    "seeds 10 to 14, with several effects for each claim; they planned the numbers of seeds",
)
LATENCY = "latency"
PARTS = {**domains.PARTS, LATENCY: "seconds of the paper's 590M models"}
SWEEPS = {part: f"bam/experiment:{part},{{seeds}}" for part in domains.PARTS}


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the results of the sweep by part, and 'latency', {session: result of `latency.session`}.

    Args:
      model_dir: parent of the folders of the parts.
      seeds: number of seeds, and of processes that measure latencies.
      parts: of PARTS.
      **options: `workers`, `minutes` and `further` of `sweeps.rows`.
    """
    swept = [part for part in parts if part != LATENCY]
    measured = domains.run("bam", parts=swept, model_dir=model_dir, seeds=seeds, **options)
    if LATENCY in parts:
        stages = sweeps.Stages(pathlib.Path(model_dir, LATENCY))
        measured[LATENCY] = {
            str(seed): stages.get(
                f"session{seed}", {"seed": seed}, functools.partial(_session, stages.folder, seed)
            )
            for seed in sweeps.seeds(seeds)
        }
    return measured


def _session(folder: pathlib.Path, seed: int) -> dict[str, Any]:
    """Returns what a process of its own measures."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"measured{seed}.json"
    command = [sys.executable, "-m", "espalier.launch.papers.bam.latency", str(path), str(seed)]
    subprocess.run(command, check=True)
    return json.loads(path.read_bytes())
