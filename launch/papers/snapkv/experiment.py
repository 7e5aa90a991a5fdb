"""SnapKV (arXiv 2404.14469): retrieval models and LongBench, a chat model and the time of decoding, and programs of full size.

Retrieval models are trained phase by phase. A phase ends when the model answers its share of each kind of prompts exactly, or at its
limit of updates; the next starts from its parameters and moments. Three runs for each seed, together some minutes on one core; the
number of seeds after a colon:

  espalier sweep --sweep launch/papers/snapkv/experiment.py:3 --out runs/snapkv/retrieval --workers 2

At full size (`full` and a folder of data) LongBench is answered with the whole cache, with SnapKV at three capacities and with H2O, as in
table 1. The folder has Hugging Face checkpoints in `models`, and the files of LongBench's data archive in `eval/longbench`. Window 32
and max pooling over 7; prompts of more than 31,500 tokens or so lose their middle. To see the commands:

  espalier sweep --sweep launch/papers/snapkv/experiment.py:full,/data --out /runs/longbench --dry_run

Programs of full size read a prompt of 131,072 tokens and continue it, with and without SnapKV. The model has the shape of the paper's
LWM-Text-Chat-1M, which is Llama 2 7B's; weights are bfloat16.
"""

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from espalier.launch.papers.shared import sweeps
from espalier.launch.papers.shared.sweeps import Stages
from espalier.launch.precompile.table_rows import Row, tokens

GIN = "t5x_configs/experiments/snapkv/retrieval.gin"


class Phase(NamedTuple):
    """A phase of training.

    Attributes:
      shares: what is read, by share of tokens.
      length: tokens of a row, which hold the longest of these documents.
      kinds: the prompts that end it.
      limit: of updates.
      share: of prompts of each kind that are answered exactly, at which it ends.
    """

    shares: Mapping[str, float]
    length: int
    kinds: tuple[tuple[int, str], ...]
    limit: int
    share: float


# A document with the question first has four answer tokens at any length: it needs a large share. The last phase reads
# 12 lines too: both positions of the question are compared at 12 lines, and would be forgotten.
PHASES = {
    "lines_3": Phase({"retrieval_3": 1.0}, 128, ((3, "last"),), 3000, 0.95),
    "lines_12": Phase(
        {"retrieval_12": 0.4, "retrieval_first_6": 0.3, "retrieval_first_12": 0.3},
        256,
        ((12, "last"), (6, "first")),
        4000,
        0.8,
    ),
    "lines_48": Phase(
        {"retrieval_48": 0.4, "retrieval_12": 0.1, "retrieval_first_12": 0.5},
        512,
        ((48, "last"), (12, "last"), (12, "first")),
        4000,
        0.95,
    ),
}
LAST = list(PHASES)[-1]


def get_config(seeds: str = "3") -> ml_collections.ConfigDict:
    if data := sweeps.after("full", seeds):
        return _full_sweep(data)
    arms, parent = {}, None
    for name, phase in PHASES.items():
        arms[name] = _arm(phase, parent)
        parent = name
    return sweeps.config(arms, seeds=seeds)


def _arm(phase: Phase, parent: str | None) -> dict[str, Any]:
    # The rate of the last phase falls to 0 at its limit, where a model that has not ended it needs small steps.
    falls = (
        "SCHEDULE=@schedules.linear()",
        "schedules.linear.peak=%LEARNING_RATE",
        "schedules.linear.total_steps=None",
        "schedules.linear.warmup_steps=100",
    )
    bindings = (
        f"TRAIN_STEPS={phase.limit}",
        f"TASK_FEATURE_LENGTHS={{'targets': {phase.length}}}",
        f"stream.make_stream.phases=((0, {dict(phase.shares)!r}),)",
        f"until_answered.UntilAnswered.kinds={phase.kinds!r}",
        f"until_answered.UntilAnswered.share={phase.share}",
        *(("INITIAL_SCOPE='phase'",) if parent else ()),
        *(falls if phase is PHASES[LAST] else ()),
    )
    return sweeps.arm(GIN, bindings=bindings, parent=parent)


# The runs of full size.

FULL_MODELS = (
    "LWM-Text-Chat-1M",
    "longchat-7b-v1.5-32k",
    "Mistral-7B-Instruct-v0.2",
    "Mixtral-8x7B-Instruct-v0.1",
)
MAX_LENGTH = 31_500 + 512  # with room for the longest answers
_FULL_SNAPKV = {"window": 32, "kernel": 7, "pooling": "max"}
POLICIES = {
    "full": ("full", {}),
    **{f"snapkv_{c}": ("snapkv", {"capacity": c, **_FULL_SNAPKV}) for c in (1024, 2048, 4096)},
    "h2o_4096": ("h2o", {"capacity": 4096, "window": 32}),
}


def _full_sweep(data: str) -> ml_collections.ConfigDict:
    arms = {_full_arm(model): _converted(f"{data}/models/{model}") for model in FULL_MODELS}
    evaluations = {
        name: _longbench(f"{data}/eval", model_args(*policy)) for name, policy in POLICIES.items()
    }
    return sweeps.config(arms, seeds=(0,), evaluations=evaluations)


def _full_arm(model: str) -> str:
    return model.lower().replace("-", "_").replace(".", "p")


def model_args(policy: str, settings: dict) -> str:
    """Returns the --model_args of an evaluation with a cache policy."""
    cache = {f"cache_{name}": value for name, value in settings.items()}
    words = {"max_length": MAX_LENGTH, "cut": "middle", "cache_policy": policy, **cache}
    return ",".join(f"{name}={value}" for name, value in words.items())


def _converted(checkpoint: str) -> dict:
    words = ("espalier.launch.convert", f"--from_hf={checkpoint}", "--to={run}")
    return sweeps.made(*words, evaluations=tuple(POLICIES))


def _longbench(folder: str, arguments: str) -> dict:
    words = (
        "espalier.launch.evaluate",
        "harness",
        "--suite=snapkv",
        "--checkpoint={run}",
        "--json={json}",
    )
    flags = (f"--data_dir={folder}", f"--model_args={arguments}")
    return {"command": ("{python}", "-m", *words, *flags)}


_FILES = (
    *("t5x_configs/models/llama2_7b.gin", "t5x_configs/runs/pretrain.gin"),
    "t5x_configs/partitioning/tp.gin",
)
_WITH_SNAPKV = ("--cache_policy=snapkv", "--cache=capacity=1024")


def _program(name: str, title: str, *flags: str, rows: int = 1) -> Row:
    return Row(
        name=name,
        title=title,
        files=_FILES,
        topology="v5e:2x4",
        bindings=(*tokens(rows, 131_072), "config.TransformerConfig.param_dtype='bfloat16'"),
        flags=flags,
    )


ROWS = (
    _program("decode_128k_full", "7B, one row of 131,072 tokens, whole cache", "--program=decode"),
    _program(
        "decode_128k_snapkv", "7B, one row, SnapKV of 1,024", "--program=decode", *_WITH_SNAPKV
    ),
    _program(
        "decode_128k_snapkv_64_rows",
        "7B, 64 rows, SnapKV of 1,024",
        *("--program=decode", *_WITH_SNAPKV),
        rows=64,
    ),
    _program(
        "prefill_128k_snapkv", "7B, reading one row, SnapKV", "--program=prefill", *_WITH_SNAPKV
    ),
)


# What is measured of the runs.

TITLE = "SnapKV, 2404.14469"
# Of retrieval models, whose training takes a quarter of an hour; haystacks, contexts and processes have their own numbers.
SEEDS = (3,)
EARLIER = (
    "retrieval models of seeds 12 to 16 and twelve haystacks, in each of which the last window of a prompt was compared with the "
    "best of seven others; exact answers judged; latency was of five repeats in one process",
)
PARTS = {
    "retrieval": "small trained models",
    "needles": "numbers of a chat model",
    "sentences": "sentences of a chat model",
    "latency": "the time of decoding, on idle cores",
}
SWEEPS = {"retrieval": "snapkv/experiment:{seeds}"}
PROMPTS = 256  # of each measurement of a retrieval model; every seed draws its own
LINES = 48
CAPACITIES = (16, 24, 32, 48, 96)
CAPACITY = 48  # about a fifth of the prompt of 247 tokens
SHORTER = {12: (24, 48), 24: (24, 48)}  # lines -> capacities, for the map of depths and lengths
POSITIONS = {"lines": 12, "capacity": 24}  # where both positions of the question are compared


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns all measurements by part; those made before are read.

    Args:
      model_dir: parent of the runs that are trained, of the converted chat model and of the results.
      seeds: number of retrieval models.
      parts: of PARTS.
      **options: `workers`, `minutes` and `further` of `sweeps.rows`.
    """
    folder = pathlib.Path(model_dir)
    stages = Stages(folder / "results")
    out: dict[str, Any] = {}
    if "retrieval" in parts:
        out["retrieval"] = _retrieval(folder / "retrieval", stages, seeds, **options)
    if {"needles", "sentences"} & set(parts):
        out |= _of_chat_model(folder, stages, parts)
    if "latency" in parts:  # last, and alone: it needs idle cores
        out["latency"] = _latency(stages)
    return out


def _latency(stages: Stages) -> dict[str, Any]:
    from espalier.launch.papers.snapkv import latency

    def measured(name: str, measure: Any) -> Any:
        return stages.get(f"latency_{name}", latency.SETTINGS, measure)

    processes = [
        measured(str(number), functools.partial(latency.apart, number))
        for number in sweeps.seeds(latency.PROCESSES)
    ]
    return {
        "settings": processes[0]["settings"],
        "seconds": [one["seconds"] for one in processes],
        "batches": latency.merged([one["result"] for one in processes]),
        **measured("sizes", latency.sizes)["result"],
    }


def _retrieval(folder: pathlib.Path, stages: Stages, seeds: int, **options: Any) -> dict[str, Any]:
    """Returns {'phases': a row for each phase of training, 'models': seed -> measurements} after training."""

    rows = sweeps.rows(folder, "snapkv/experiment", seeds, **options)
    last = {row["seed"]: row for row in rows if row["arm"] == LAST}
    return {
        "phases": [_phase(row, folder / row["directory"]) for row in rows],
        "models": {
            str(seed): _model(folder / row["directory"], stages, seed, row["digest"])
            for seed, row in sorted(last.items())
        },
    }


def _phase(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns the number of updates of a phase, and the shares of prompts that were answered at its end."""
    prefix = "answers/"
    reached = {
        name.removeprefix(prefix): value
        for line in sweeps.metrics(directory)
        for name, value in line.items()
        if name.startswith(prefix)
    }
    facts = {name: row[name] for name in ("arm", "seed", "step", "seconds")}
    return {**facts, "reached": reached}


def _model(directory: pathlib.Path, stages: Stages, seed: int, digest: str) -> dict[str, Any]:
    """Returns all measurements of one retrieval model; `digest` identifies its training."""
    from espalier.launch.papers.snapkv import accuracy, attention

    sizes = {"prompts": PROMPTS, "lines": LINES}
    at_fifth = {**sizes, "capacity": CAPACITY}
    positions = {"prompts": PROMPTS, **POSITIONS}
    measures: dict[str, tuple[Any, dict[str, Any]]] = {
        "accuracy": (accuracy.accuracy, {**sizes, "capacities": CAPACITIES}),
        **{
            f"accuracy_{lines}": (
                accuracy.depths,
                {"prompts": PROMPTS, "lines": lines, "capacities": capacities},
            )
            for lines, capacities in SHORTER.items()
        },
        "agnostic": (accuracy.question_agnostic, at_fifth),
        "positions": (accuracy.question_positions, positions),
        "hits": (attention.hit_rates, sizes),
        "overlaps": (attention.overlaps, at_fifth),
        "kept_last": (attention.kept_hits, {**positions, "question": "last"}),
        "kept_first": (attention.kept_hits, {**positions, "question": "first"}),
    }
    with _loaded(directory) as loaded:
        model = accuracy.Retriever.of_run(loaded)
        return {
            name: stages.get(
                f"retrieval_{seed}_{name}",
                {**settings, "seed": seed, "model": digest},
                lambda measure=measure, settings=settings: measure(model, **settings, seed=seed),
            )["result"]
            for name, (measure, settings) in measures.items()
        }


@contextlib.contextmanager
def _loaded(directory: pathlib.Path) -> Iterator[Any]:
    """Loads a run's newest checkpoint."""
    from espalier.launch.config import gin_config
    from espalier.launch.load import load_run

    config = gin_config.load(
        entry="espalier.launch.load.load_run:RunConfig",
        unused={"VOCABULARY": "None"},
        defaults=load_run.files_of(str(directory)),
    )
    with config.entry().load(str(directory)) as loaded:
        yield loaded


def _of_chat_model(folder: pathlib.Path, stages: Stages, parts: Sequence[str]) -> dict[str, Any]:
    """Returns the chat model's answers by part, after converting it."""
    from espalier.launch.convert import __main__ as convert
    from espalier.launch.papers.snapkv import needles, sentences

    directory = folder / "smollm2"
    if not directory.exists():
        source = sweeps.smollm2_weights(
            ", or choose the other parts with --parts retrieval latency"
        )
        if convert.main([f"--from_gguf={source}", f"--to={directory}"]):
            raise ValueError(f"{source} was not converted; see above.")
    measures = {"needles": needles.measure_all, "sentences": sentences.measure_all}
    with _loaded(directory) as loaded:
        return {
            part: measure(loaded, stages) for part, measure in measures.items() if part in parts
        }
