"""Low-rank training (arXiv 2209.13569) of small models and at full size: the runs, and what is measured of them.

On language, a small character model: first values and ranks, decay of the factors and of their product with three weights, warm
starts, and two rates trained for three times as long. 21 runs for each seed, of about half a minute on one core; the number of
seeds after a colon, and `wide` before it for three arms of twice the width:

  espalier sweep --sweep launch/papers/low_rank/experiment.py:5 --out runs/low_rank/lm --workers 2
  espalier sweep --sweep launch/papers/low_rank/experiment.py:wide,5 --out runs/low_rank/wide --workers 2

On generated textures (`vision` and the number of seeds), a small residual network with batch normalisation and SGD. The scale of
normalised layers does not change their outputs, so that arguments by an effective step size apply. The dense network is decayed, and
so are all factors; the arms that are compared with it are trained at a rate and at half of it. 8 runs for each seed, of about a minute
on a core:

  espalier sweep --sweep launch/papers/low_rank/experiment.py:vision,5 --out runs/low_rank/vision --workers 2

Two tables of the paper: `ranks` trains the same network in factors of three ranks, and `decays` searches the best
weight of either decay, for language models that read a short text again and again. Both have seeds of their own, 3 where others have 5.

  espalier sweep --sweep launch/papers/low_rank/experiment.py:ranks,5 --out runs/low_rank/ranks --workers 2
  espalier sweep --sweep launch/papers/low_rank/experiment.py:decays,5 --out runs/low_rank/decays --workers 2

At full size (`full` and the folder in which TFDS has prepared all three data sets), GPT-2 on LM1B has three starts, three decays and
two learning rates, beside dense models and warm starts; ResNet-50 has two ranks, WRN-28-10 three. To see the runs and their commands,
which a cluster runs in the order of their parents:

  espalier sweep --sweep launch/papers/low_rank/experiment.py:full,/data/tfds --out /runs/low_rank --dry_run
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from espalier.launch.papers.shared import results, sweeps
from espalier.launch.precompile.table_rows import Row

PLACES = {
    "lm": "characters",
    "timing": "steps",
    "gpt2": "steps of GPT-2 small",
    "wide": "characters, twice as wide",
    "vision": "textures",
    "ranks": "textures, by rank",
    "decays": "characters, read often",
}

_CHANCE = 0.1  # of the textures' ten classes
# What a score is without learning, and what is attainable. Characters' frequencies alone give a perplexity of 23, guesses of
# a texture's class a loss of 2.3; classes overlap, and the dense network is right in 0.87.
_LIMITS = {"perplexity": (0.0, 20.0), "accuracy": (2 * _CHANCE, 0.95), "loss": (0.0, 2.2)}


class Results(results.Results):
    """Runs of a part, as `experiment.run` returns them."""

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns 'parameters', the held-out metrics, and the means of trainers/low_rank/spectrum.py at the end."""
        end = (row["spectrum"] or [{}])[-1]
        metrics = [value for values in row["held_out"].values() for value in values.items()]
        return {**end, **dict(reversed(metrics)), "parameters": row["parameters"]}

    def by_seed(self, score: str, *arms: str) -> dict[int, list[float]]:
        """Returns a score of arms, at the seeds that all of them have."""
        scores = [self.scores(arm, score) for arm in arms]
        seeds = set.intersection(*(set(one.index) for one in scores))
        return {int(seed): [float(one[seed]) for one in scores] for seed in sorted(seeds)}

    def limits(self, score: str) -> tuple[float, float] | None:
        return _LIMITS.get(score)

    def degenerate(self, row: Mapping[str, Any]) -> str:
        """Returns whether a network of images has learned nothing."""
        accuracy = self.row_scores(row).get("accuracy")
        return "it is at chance" if accuracy is not None and accuracy < 1.5 * _CHANCE else ""

    def lower_is_better(self, score: str) -> bool:
        return score in ("perplexity", "loss")

    def digits(self, score: str) -> int:
        return 3 if score in ("accuracy", "loss") else 2

    def label(self, arm: str) -> str:
        return arm_name(arm)


_NAMES = {"he": "He", "l2": "L2", "frobenius": "Frobenius"}


def arm_name(name: str) -> str:
    """Returns the name of an arm or score in the report."""
    return " ".join(_NAMES.get(word, word) for word in name.split("_"))


ARMS = "t5x_configs/experiments/low_rank/cpu/"
INITS = ("he", "spectral", "spectral_ones")
RANKS = (0.62, 0.3)  # shares of the smaller side of each matrix
MAIN = 0.62
DECAYS = ("l2", "frobenius")
WEIGHTS = ("1e-4", "1e-3", "1e-2")
RATES = {"full": 3e-3, "half": 1.5e-3}
LONG = 4500  # updates
WIDE = 128  # the second size of the main effect
RANK_RULES = {"": {}, "_ratio": {"RANK_RULE": "param_ratio"}}  # what arms are named by -> settings
_CURVE = {"EVAL_PERIOD": 250}  # of arms whose course is drawn; others are evaluated at their end


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    if images := sweeps.after("vision", seeds):
        return _image_sweep(images)
    if wide := sweeps.after("wide", seeds):
        settings = {name: {"FACTOR_INIT": name} for name in INITS[:2]} | {"dense": {}}
        arms = {
            name: _arm("low_rank" if init else "base", **init, WIDTH=WIDE, MLP_WIDTH=4 * WIDE)
            for name, init in settings.items()
        }
        return sweeps.config(arms, seeds=wide)
    if number := sweeps.after("ranks", seeds):
        return _rank_sweep(number)
    if number := sweeps.after("decays", seeds):
        return _decay_sweep(number)
    if data := sweeps.after("full", seeds):
        return _full_sweep(data)
    arms = {"dense": _arm("base", **_CURVE)}
    for rank, init in itertools.product(RANKS, INITS):
        drawn = _CURVE if arm(init, rank) == spectral("full") else {}
        arms[arm(init, rank)] = _arm("low_rank", FACTOR_INIT=init, RANK=rank, **drawn)
    for kind, weight in itertools.product(DECAYS, WEIGHTS):
        settings = {"FACTOR_DECAY": kind, "FACTOR_DECAY_WEIGHT": float(weight)}
        arms[decayed(kind, weight)] = _arm("low_rank", **settings)
    arms[spectral("half")] = _arm("low_rank", LEARNING_RATE=RATES["half"], **_CURVE)
    for rate, value in RATES.items():
        arms[long(rate)] = _arm("low_rank", TRAIN_STEPS=LONG, LEARNING_RATE=value)
    arms["dense_start"] = _arm("dense_start")
    arms[spectral("full", "_ratio")] = _arm("low_rank", **RANK_RULES["_ratio"], **_CURVE)
    for rate, ranks in (("full", ""), ("full", "_ratio"), ("half", "")):
        # The paper halves the rate of a warm start; the schedule is the dense start's.
        settings = {"RATE_SCALE": RATES[rate] / RATES["full"], **RANK_RULES[ranks]}
        arms[warm(rate, ranks)] = _arm("warm_start", parent="dense_start", **settings)
    return sweeps.config(arms, seeds=seeds)


def arm(init: str, rank: float = MAIN) -> str:
    """Returns the name of an arm without decay."""
    return init if rank == MAIN else f"{init}_rank{round(100 * rank)}"


def spectral(rate: str, ranks: str = "") -> str:
    """Returns the name of an arm of spectral factors without decay, at a rate; `ranks` is of RANK_RULES."""
    return f"spectral{ranks}" if rate == "full" else f"spectral{ranks}_{rate}"


def decayed(kind: str, weight: str) -> str:
    """Returns the name of an arm of spectral factors with a decay."""
    return f"spectral_{kind}_{weight}"


def long(rate: str) -> str:
    """Returns the name of an arm of spectral factors that is trained for longer."""
    return f"spectral_long_{rate}"


def warm(rate: str, ranks: str = "") -> str:
    """Returns the name of an arm that starts dense, with a rate after it; `ranks` is of RANK_RULES."""
    return f"warm_start{ranks}_{rate}"


def _arm(file: str, *, parent: str | None = None, **macros: object) -> dict:
    bindings = tuple(f"{name}={value!r}" for name, value in macros.items())
    return sweeps.arm(f"{ARMS}{file}.gin", bindings=bindings, parent=parent)


IMAGE_RATES = {"full": 0.1, "half": 0.05}
# (start, decay) of the factors -> their rates.
IMAGE_FACTORS = {
    ("he", "frobenius"): ("full", "half"),
    ("spectral", "frobenius"): ("full", "half"),
    ("spectral", "l2"): ("full",),
}


def _image_sweep(seeds: str) -> ml_collections.ConfigDict:
    arms = {
        image_dense(rate): _arm("textures", LEARNING_RATE=value)
        for rate, value in IMAGE_RATES.items()
    }
    arms["narrow"] = _arm("textures_narrow")
    for (init, decay), rates in IMAGE_FACTORS.items():
        settings = {"FACTOR_INIT": init, "FACTOR_DECAY": decay}
        for rate in rates:
            arms[image_arm(init, decay, rate)] = _arm(
                "textures_low_rank", **settings, LEARNING_RATE=IMAGE_RATES[rate]
            )
    return sweeps.config(arms, seeds=seeds)


def image_dense(rate: str) -> str:
    """Returns the name of a dense arm."""
    return "dense" if rate == "full" else f"dense_{rate}"


def image_arm(init: str, decay: str, rate: str) -> str:
    """Returns the name of an arm in factors."""
    return f"{init}_{decay}_{rate}"


# The paper's tables by rank and by weight of decay. Runs with the seeds below chose these designs, so that others judge them.
LATER = ("ranks", "decays")
_FIRST_LATER_SEED = 40
_FEWER = {5: 3, 8: 6}  # numbers of seeds of other parts -> of these
IMAGE_RANKS = (0.1, 0.3, 0.5)  # of spectral starts
HE_RANK = 0.3  # of a He start; `vision` has one of 0.1
GRIDS = {"l2": ("3e-5", "1e-4", "3e-4", "1e-3"), "frobenius": ("3e-4", "1e-3", "3e-3")}


def looks(part: str) -> tuple[int, ...]:
    """Returns the numbers of seeds at which the claims of a sweep are judged."""
    return tuple(_FEWER.get(number, number) if part in LATER else number for number in SEEDS)


def _later_seeds(number: str) -> tuple[int, ...]:
    count = _FEWER.get(int(number), int(number))
    return tuple(range(_FIRST_LATER_SEED, _FIRST_LATER_SEED + count))


def _rank_sweep(number: str) -> ml_collections.ConfigDict:
    arms = {"dense": _arm("textures")}
    for init, rank in (*(("spectral", rank) for rank in IMAGE_RANKS), ("he", HE_RANK)):
        arms[arm(init, rank)] = _arm("textures_low_rank", RANK=rank, FACTOR_INIT=init)
    return sweeps.config(arms, seeds=_later_seeds(number))


def _decay_sweep(number: str) -> ml_collections.ConfigDict:
    arms = {spectral("full"): _arm("read_often")}
    for kind, weights in GRIDS.items():
        for weight in weights:
            settings = {"FACTOR_DECAY": kind, "FACTOR_DECAY_WEIGHT": float(weight)}
            arms[decayed(kind, weight)] = _arm("read_often", **settings)
    return sweeps.config(arms, seeds=_later_seeds(number))


# The runs of full size.

_FULL = "t5x_configs/experiments/low_rank/full/"
FULL_DECAYS = ("none", "l2", "frobenius")
FULL_RATES = {"full": 1e-3, "half": 5e-4}
FULL_RANKS = {"resnet50": (0.3, 0.5), "wrn28_10": (0.1, 0.2, 0.3)}


def _full_sweep(data: str) -> ml_collections.ConfigDict:
    text, images = (f"TFDS_DATA_DIR={data!r}",), (f"DATA_DIR={data!r}",)
    arms = {}
    for rate, value in FULL_RATES.items():
        of_rate = (*text, f"LEARNING_RATE={value}")
        arms[f"gpt2_dense_{rate}"] = _full_arm("gpt2_lm1b", *of_rate)
        for init, decay in itertools.product(INITS, FULL_DECAYS):
            factors = (f"FACTOR_INIT={init!r}", f"FACTOR_DECAY={decay!r}")
            arms[f"gpt2_{init}_{decay}_{rate}"] = _full_arm(
                "gpt2_lm1b_low_rank", *of_rate, *factors
            )
    arms["gpt2_dense_start"] = _full_arm("gpt2_lm1b_dense_start", *text)
    for rate, value in FULL_RATES.items():
        scale = f"RATE_SCALE={value / FULL_RATES['full']}"
        arms[f"gpt2_warm_start_{rate}"] = _full_arm(
            "gpt2_lm1b_warm_start", *text, scale, parent="gpt2_dense_start"
        )
    for network, ranks in FULL_RANKS.items():
        arms[f"{network}_dense"] = _full_arm(f"{network}_dense", *images)
        for rank, init in itertools.product(ranks, INITS):
            arms[f"{network}_{init}_rank{round(100 * rank)}"] = _full_arm(
                network, *images, f"RANK={rank}", f"FACTOR_INIT={init!r}"
            )
    return sweeps.config(arms)


def _full_arm(file: str, *bindings: str, parent: str | None = None) -> dict:
    return sweeps.arm(f"{_FULL}{file}.gin", bindings=bindings, parent=parent)


def _image_program(name: str, title: str, topology: str) -> Row:
    return Row(
        name=name,
        title=title,
        files=(f"{_FULL}{name}.gin",),
        topology=topology,
    )


ROWS = (
    Row(
        name="gpt2_lm1b",
        title="GPT-2 on LM1B, dense",
        files=(f"{_FULL}gpt2_lm1b.gin",),
        topology="v5e:4x4",
    ),
    Row(
        name="gpt2_lm1b_low_rank",
        title="GPT-2 on LM1B in factors of 0.62",
        files=(f"{_FULL}gpt2_lm1b_low_rank.gin",),
        topology="v5e:4x4",
        bindings=("RANK_MULTIPLE=16",),
        hbm_gb=8.92,
        bounds_from="8.494 GB in docs/scale/precompile_report.md, and 5 %",
    ),
    _image_program("wrn28_10_dense", "WRN-28-10 on CIFAR-100, dense", "v5e:2x2"),
    _image_program("wrn28_10", "WRN-28-10 on CIFAR-100, factors of 0.3", "v5e:2x2"),
    _image_program("resnet50_dense", "ResNet-50 on ImageNet, dense", "v5e:4x4"),
    _image_program("resnet50", "ResNet-50 on ImageNet, factors of 0.5", "v5e:4x4"),
)


ROUNDS, TIMED_STEPS = 15, 10
# Products of matrices are most of a step from about this width on; the arms that are trained are too narrow to gain by factors.
TIMED_WIDTH = 256
SEED = 0


# Arms whose factors are smaller than every matrix they replace; at a rank of 0.62 of the smaller side those of square
# matrices are larger.
SMALLER = (arm("spectral", min(RANKS)), spectral("full", "_ratio"))


def timed_arms() -> dict[str, dict[str, Any]]:
    """Returns gin files and bindings of the arms that differ in size, by name."""
    named = get_config("1").arms
    wide = (f"WIDTH={TIMED_WIDTH}", f"MLP_WIDTH={4 * TIMED_WIDTH}")
    return {
        name: {
            "gin_files": list(named[name].gin_files),
            "bindings": [*named[name].bindings, *wide],
        }
        for name in ("dense", spectral("full"), *SMALLER)
    }


GPT2_ROWS, GPT2_ROUNDS, GPT2_STEPS = 4, 9, 2


def gpt2_arms() -> dict[str, dict[str, Any]]:
    """Returns gin files and bindings of GPT-2 small, dense and in factors by both rules of ranks, in float32."""
    common = ("TFDS_DATA_DIR=''", f"BATCH_SIZE={GPT2_ROWS}", "DTYPE='float32'")
    arms = {
        "dense": ("gpt2_lm1b",),
        **{
            spectral("full", rule): (
                *("gpt2_lm1b_low_rank", "FACTOR_INIT='spectral'"),
                *(f"{name}={value!r}" for name, value in settings.items()),
            )
            for rule, settings in RANK_RULES.items()
        },
    }
    return {
        name: {"gin_files": [f"{_FULL}{file}.gin"], "bindings": [*bindings, *common]}
        for name, (file, *bindings) in arms.items()
    }


# Part -> what it measures.
TIMING: Mapping[str, Mapping[str, Any]] = {
    "timing": {"rounds": ROUNDS, "steps": TIMED_STEPS, "arms": timed_arms()},
    "gpt2": {"rounds": GPT2_ROUNDS, "steps": GPT2_STEPS, "arms": gpt2_arms()},
}


def measure_times(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the seconds of a step by arm and round, the median of `steps`: {'seconds': {arm: [...]}}.

    All are compiled before the first round. Every arm has its turn in a round, so that ratios within a round compare
    the same moment.

    Args:
      settings: of a part of TIMING.
    """
    sides = {name: _Side.of(arm) for name, arm in settings["arms"].items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(settings["rounds"]):
        for name, side in sides.items():
            seconds[name].append(side.median(settings["steps"]))
    return {"seconds": seconds}


def time_ratios(measured: Mapping[str, Any], arm: str, base: str = "dense") -> np.ndarray:
    """Returns an arm's time divided by another's, for each round."""
    return np.array(measured["seconds"][arm]) / np.array(measured["seconds"][base])


@dataclasses.dataclass
class _Side:
    """A compiled step and the state that it continues with."""

    step: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batch: Any

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "_Side":
        import jax

        from espalier.launch.config import gin_config
        from espalier.trainers import partitioning

        bindings = (*settings["bindings"], "MODEL_DIR=''")
        config = gin_config.load(
            settings["gin_files"], bindings, entry="espalier.launch.train:train"
        )
        recipe = config.arguments()["recipe"]
        program = recipe.program()
        batch = _batch(recipe, program)
        with partitioning.use_mesh(program.mesh, program.rules):
            state = program.init()
            step = program.steps(1).train.lower(state, batch).compile()
            state, _ = step(state, batch)
        return cls(step, jax.block_until_ready(state), batch)

    def median(self, steps: int) -> float:
        """Returns the median time of so many steps, each run to its end."""
        import jax

        taken = []
        for _ in range(steps):
            began = time.perf_counter()
            self.state, _ = self.step(self.state, self.batch)
            jax.block_until_ready(self.state)
            taken.append(time.perf_counter() - began)
        return float(np.median(taken))


def _batch(recipe: Any, program: Any) -> dict[str, Any]:
    """Returns rows of one document each: random tokens, all with a loss."""
    import jax

    draw = np.random.default_rng(SEED)
    rows = (recipe.batch_size, recipe.length)
    tokens = draw.integers(3, recipe.model.config.vocab_size, size=rows).astype(np.int32)
    arrays = {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": np.roll(tokens, -1, axis=1),
        "decoder_loss_weights": np.ones(rows, np.float32),
        "decoder_segment_ids": np.ones(rows, np.int32),
        "decoder_positions": np.broadcast_to(np.arange(rows[1], dtype=np.int32), rows),
        "source_ids": np.zeros(rows[0], np.int32),
    }
    return {name: jax.device_put(array, program.batch_sharding) for name, array in arrays.items()}


# What is measured of the runs.

TITLE = "low-rank training, 2209.13569"
SEEDS = (5, 8, 12)
EARLIER = (
    "seeds 10 to 14, 170 runs: each claim was judged by all of its comparisons, causes by their order in pairs of runs, a dense "
    "start at another rate than that of factors, and images by factors of 0.3 within two points of the dense network",
)
# In the order of their measurement.
PARTS = {
    "lm": "characters",
    "timing": "the time of steps",
    "gpt2": "the time of GPT-2 small's steps",
    "wide": "the main effect at twice the width",
    "vision": "textures",
    "ranks": "ranks on textures",
    "decays": "the best weights of both decays",
}
SWEEPS = {
    "lm": "low_rank/experiment:{seeds}",
    "wide": "low_rank/experiment:wide,{seeds}",
    "vision": "low_rank/experiment:vision,{seeds}",
    "ranks": "low_rank/experiment:ranks,{seeds}",
    "decays": "low_rank/experiment:decays,{seeds}",
}
_SPECTRUM = "spectrum/"
_READINGS = ("step", "effective_rank", "effective_step")
_HELD_OUT = ("perplexity", "accuracy", "loss")
_KEYS = ("run", "arm", "size", "seed", "parents", "step", "seconds", "evaluations", "digest")


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of both sweeps and the times of steps, by part.

    Args:
      model_dir: parent of the sweeps' folders and of other measurements.
      seeds: of each sweep.
      parts: of PARTS.
      **options: `workers`, `minutes` and `further` of `sweeps.rows`.
    """
    measured: dict[str, Any] = {}
    for part in PARTS:
        if part not in parts:
            continue
        if part in SWEEPS:
            name, _, argument = SWEEPS[part].format(seeds=seeds).partition(":")
            measured |= sweeps.parts(model_dir, {part: (name, argument)}, with_course, **options)
        else:  # between sweeps: nothing of this command runs beside it
            stages, settings = sweeps.Stages(pathlib.Path(model_dir, "measured")), TIMING[part]
            stage = stages.get(part, settings, functools.partial(measure_times, settings))
            measured[part] = {**stage["result"], "took": stage["seconds"]}
    return measured


def with_course(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what the page needs of a row of results, with the course of its run.

    Adds 'parameters'; 'curve', [(step, perplexity)] of its held-out task; 'spectrum', for each reading its step and two
    means of trainers/low_rank/spectrum.py; and 'first_profile' and 'last_profile' (see `profile`). They are empty for a
    run that has no such readings.
    """
    from espalier.trainers.low_rank import spectrum

    metrics = sweeps.metrics(directory)
    curve = [
        (line["step"], round(value, 4))
        for line in metrics
        for name, value in line.items()
        if name.startswith("eval/") and name.endswith("/perplexity")
    ]
    spectra = spectrum.read(directory) if (directory / spectrum.FILE).exists() else []
    steps = {line["step"] for line in spectra}
    readings = [
        {key: line["step"] if key == "step" else line[_SPECTRUM + key] for key in _READINGS}
        for line in metrics
        if line["step"] in steps and _SPECTRUM + _READINGS[-1] in line
    ]
    held_out = {
        task: {name: values[name] for name in _HELD_OUT if name in values}
        for task, values in row["held_out"].items()
    }
    return {
        **{key: row.get(key) for key in _KEYS},
        "held_out": held_out,
        "parameters": json.loads((directory / "run.json").read_text())["parameters"],
        "curve": curve,
        "spectrum": readings,
        "first_profile": profile(spectra[0]["layers"]) if spectra else [],
        "last_profile": profile(spectra[-1]["layers"]) if spectra else [],
    }


def profile(layers: Mapping[str, Sequence[Sequence[float]]]) -> list[float]:
    """Returns singular values over the largest, mean over matrices; zeros for a matrix that is zero.

    It is empty if the matrices have different ranks.

    Args:
      layers: by layer the singular values of each stacked matrix.
    """
    rows = [np.array(values) / (values[0] or 1.0) for stack in layers.values() for values in stack]
    same = len({len(row) for row in rows}) == 1
    return np.mean(rows, axis=0).round(4).tolist() if same else []
