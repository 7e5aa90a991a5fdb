"""Aya 23 (arXiv 2405.15032): small models on made languages, vocabularies, bytes of caches, and programs of full size.

The sweep asks what more languages cost, and what a base is worth. Fourteen runs for each seed, of about a minute on one core; the
number of seeds after a colon:

  espalier sweep --sweep launch/papers/aya23/experiment.py:5 --out runs/aya23/toy --workers 2

Vocabularies are trained on languages of unequal amounts of text: as they are, and in equal shares.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from espalier.data.text.documents import Document
from espalier.launch.papers.aya23 import answers
from espalier.launch.papers.shared import domains, results, sweeps
from espalier.launch.precompile.table_rows import Row, mesh, tokens

CPU = "t5x_configs/experiments/aya23/cpu/"
COUNTS = (4, 8, 16)  # languages
WIDTHS = {"narrow": (32, 96), "wide": (96, 288)}  # width, and hidden width of the FFN
KV_HEADS = (4, 1)  # the base has 2 of 4
TUNING_STEPS = 200
REQUESTS = 2048  # instructions of each kind and pair of languages in the full mixture
BASE = "base"  # eight languages, width 64


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    arms = {
        breadth(count, width): _arm(
            MIXTURE_OR_TASK_NAME=f"toy_mix_{count}", WIDTH=size, HIDDEN=hidden
        )
        for width, (size, hidden) in WIDTHS.items()
        for count in COUNTS
    }
    arms[BASE] = _arm()
    arms["sequential"] = _arm("transformer.Block.layout='sequential'")
    # As many parameters as three matrices of 192.
    arms["gelu"] = _arm("MLP=@mlp.Mlp", "mlp.Mlp.activation='gelu'", HIDDEN=288)
    arms |= {heads(count): _arm(KV_HEADS=count) for count in KV_HEADS}
    arms["scratch"] = _tuned(REQUESTS)
    arms["tuned"] = _tuned(REQUESTS // 4, parent=BASE)
    arms["tuned_full"] = _tuned(REQUESTS, parent=BASE)
    evaluations = {"answers": {"call": "espalier.launch.papers.aya23.answers:exact"}}
    return sweeps.config(arms, seeds=seeds, evaluations=evaluations)


def breadth(count: int, width: str) -> str:
    """Returns the name of the arm that trains on so many languages at a width of WIDTHS."""
    return f"languages{count}_{width}"


def heads(count: int) -> str:
    """Returns the name of the arm with so many heads of keys and values."""
    return f"kv{count}"


def _arm(*bindings: str, **macros: object) -> dict:
    settings = tuple(f"{name}={value!r}" for name, value in macros.items())
    return sweeps.arm(f"{CPU}toy.gin", bindings=(*settings, *bindings), evaluations=())


def _tuned(requests: int, parent: str | None = None) -> dict:
    """Returns an arm that is tuned on a mixture of this size, always for as many updates."""
    return sweeps.arm(
        f"{CPU}toy_instruct.gin",
        bindings=(f"TRAIN_STEPS={TUNING_STEPS}", f"REQUESTS={requests}"),
        evaluations=("answers",),
        parent=parent,
    )


LOSS, TURNS, PLAIN, FORMAT = "loss", "right answers", "right without turns", "gain by turns"
TUNED = ("scratch", "tuned", "tuned_full")
_LABELS = {
    "base": "base: parallel, SwiGLU, 2 heads",
    "sequential": "sequential blocks",
    "gelu": "GELU",
    "kv4": "4 heads of keys and values",
    "kv1": "1 head of keys and values",
    "scratch": "new model, full mixture",
    "tuned": "base, a quarter of the mixture",
    "tuned_full": "base, full mixture",
}
# A loss of uniform guesses over the words of a language is above 4 nats.
_UNTRAINED = 3.5


class Runs(results.Results):
    """Runs as `experiment.run` returns them."""

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns the mean loss of the common languages; of tuned models the share of right answers instead."""
        if row["arm"] not in TUNED:
            losses = row["held_out"]
            return {LOSS: sum(losses.values()) / len(losses) if losses else None}
        exact = (row.get("evaluations") or {}).get("answers")
        if not exact:
            return {TURNS: None, PLAIN: None}
        return {TURNS: answers.mean(exact, "turns"), PLAIN: answers.mean(exact, "plain")}

    def lower_is_better(self, score: str) -> bool:
        return score == LOSS

    def digits(self, score: str) -> int:
        return 3

    def limits(self, score: str) -> tuple[float, float] | None:
        return None if score == LOSS else (0.0, 1.0)

    def degenerate(self, row: Mapping[str, Any]) -> str:
        loss = self.row_scores(row).get(LOSS)
        return "it has not learned" if loss is not None and not loss < _UNTRAINED else ""

    def label(self, arm: str) -> str:
        if arm.startswith("languages"):
            count, width = arm.removeprefix("languages").split("_")
            return f"{count} languages, {width}"
        return _LABELS[arm]


LANGUAGES = (
    "ar",
    "cs",
    "de",
    "el",
    "en",
    "es",
    "fa",
    "he",
    "hi",
    "id",
    "ja",
    "ko",
    "ru",
    "tr",
    "vi",
    "uk",
)
SHARES = {"raw": 1.5, "balanced": 0.0}  # exponent of a language's rank, by which its bytes fall
SIZE = 4096  # pieces
TOTAL = 160_000  # bytes of all languages
SENTENCES = 300
FERTILITY = {
    "languages": LANGUAGES,
    "shares": SHARES,
    "size": SIZE,
    "total": TOTAL,
    "sentences": SENTENCES,
}


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The corpus of installed packages, of which the language of rank r has a share proportional to r ** -exponent."""

    corpus: Any
    order: tuple[str, ...]  # tasks, the one with most text first
    exponent: float

    @property
    def digest(self) -> str:
        return f"{self.corpus.digest} {TOTAL} {self.exponent} {' '.join(self.order)}"

    @property
    def sources(self) -> tuple[str, ...]:
        return self.order

    def size(self, source: str) -> int:
        weights = {name: rank**-self.exponent for rank, name in enumerate(self.order, start=1)}
        return round(TOTAL * weights[source] / sum(weights.values()))

    def sample(self, source: str, num_bytes: float) -> Iterator[Document]:
        return self.corpus.sample(source, num_bytes)


def measure_fertility(seeds: Sequence[int]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns {seed: {'raw' or 'balanced': {language: parity, 'spread': ...}}}; a seed decides which language has most text.

    A language's parity is its tokens over those of the same messages in English; 'spread' is the highest parity over the
    lowest. Both vocabularies of a seed read as many bytes.
    """
    import numpy as np

    from espalier.data.languages import parallel, table, tokenizer_report
    from espalier.data.text import corpus as corpus_lib
    from espalier.data.tokenizers import vocabularies

    sources = [table.LANGUAGES[code].sources[0] for code in LANGUAGES]
    corpus = corpus_lib.assemble(sources=sources, bytes_per_source=TOTAL)
    pairs = parallel.read(parallel.PACKAGES, LANGUAGES, limit=SENTENCES)
    out: dict[str, dict[str, dict[str, float]]] = {}
    for seed in seeds:
        order = tuple(np.random.default_rng(seed).permutation(sources).tolist())
        out[str(seed)] = {}
        for name, exponent in SHARES.items():
            vocabulary = vocabularies.sentencepiece(
                corpus=Ranked(corpus, order, exponent), size=SIZE, balance=1.0, sample_bytes=TOTAL
            )
            report = tokenizer_report.measure(vocabulary, pairs)
            parity = {code: one["parity"] for code, one in report["languages"].items()}
            out[str(seed)][name] = {**parity, "spread": report["parity_spread"]}
    return out


# The runs of full size.

_FULL = "t5x_configs/experiments/aya23/full/"
_DATA = ("INITIAL_CHECKPOINT_PATH=run", "TOKENIZER=tokenizer", "INSTRUCTIONS_DIR=data")
_35B = ("t5x_configs/models/aya23_35b.gin", "t5x_configs/runs/pretrain.gin")

ROWS = (
    Row(
        name="aya23_8b",
        title="8B, instruction tuning, the paper's batch",
        files=(f"{_FULL}8b.gin",),
        topology="v5e:16x16",
        bindings=_DATA,
    ),
    Row(
        name="aya23_35b",
        title="35B, instruction tuning, the paper's batch",
        files=(f"{_FULL}35b.gin",),
        topology="v5e:16x16",
        bindings=_DATA,
    ),
    Row(
        name="aya23_35b_fsdp",
        title="35B, rows of 2,048, without a tensor axis",
        files=_35B,
        topology="v5e:16x16",
        bindings=tokens(256, 2048),
        note="Every chip receives all weights three times: its links are busy longer than its matrix units.",
        hbm_gb=6.23,
        bounds_from="5.929 GB in docs/precompile.md, and 5 %",
    ),
    Row(
        name="aya23_35b_tensor4",
        title="35B, rows of 2,048, a tensor axis of 4",
        files=_35B,
        topology="v5e:16x16",
        bindings=(*tokens(256, 2048), *mesh("fsdp_tp_sp", fsdp=64, tensor=4)),
        note="Weights, vocabulary and the residual stream's length are split over `tensor`.",
        sent_gb=200,
        bounds_from="two thirds of what is sent without a tensor axis, 303 GB in docs/precompile.md",
    ),
    Row(
        name="aya23_35b_tensor4_v5p",
        title="35B, rows of 2,048, a tensor axis of 4 on v5p",
        files=_35B,
        topology="v5p:4x4x4",
        bindings=(*tokens(64, 2048), *mesh("fsdp_tp_sp", fsdp=16, tensor=4)),
    ),
    Row(
        name="aya23_35b_two_slices",
        title="35B, rows of 2,048, two slices",
        files=_35B,
        topology="2xv5e:16x16",
        bindings=(*tokens(512, 2048), *mesh("fsdp_tp_sp", data=2, fsdp=64, tensor=4)),
        note="Slices are copies (`data`), which exchange gradients alone.",
        hbm_gb=6.06,
        bounds_from="5.77 GB when first compiled, and 5 %; a whole table of tokens on every chip would add 14 GB",
    ),
    Row(
        name="aya23_35b_lora",
        title="35B, LoRA of rank 16, instruction tuning",
        files=(f"{_FULL}35b.gin", "t5x_configs/methods/adapters/lora.gin"),
        topology="v5e:8x8",
        bindings=(*_DATA, *mesh("fsdp_tp_sp", fsdp=16, tensor=4)),
    ),
)


# What is measured of the runs.

TITLE = "Aya 23, 2405.15032"
SEEDS = 5
PARTS = {
    "toy": "made languages",
    "fertility": "vocabularies of real languages",
    "caches": "the bytes of caches",
}
HEADS, CACHED_KV = 4, (4, 2, 1)
_KEYS = ("run", "arm", "seed", "parents", "step", "tokens", "seconds", "evaluations", "digest")


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep, the parities of vocabularies by seed and the bytes of caches, by part.

    Args:
      model_dir: parent of the sweep's folder and of other measurements.
      seeds: number of seeds.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
    """
    measured: dict[str, Any] = {}
    if "toy" in parts:
        measured |= sweeps.parts(
            model_dir, {"toy": ("aya23/experiment", seeds)}, with_losses, **options
        )
    stages = sweeps.Stages(pathlib.Path(model_dir, "measured"))
    if "fertility" in parts:
        chosen = sweeps.seeds(seeds)
        settings = {**FERTILITY, "seeds": chosen}
        trained = stages.get("fertility", settings, lambda: measure_fertility(chosen))
        measured["fertility"] = trained["result"]
    if "caches" in parts:
        measured["caches"] = cache_bytes()
    return measured


def with_losses(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what the page needs of a row: with 'held_out', its losses by task, and 'curve', [(step, mean loss)]."""
    curve: dict[int, list[float]] = {}
    for line in sweeps.metrics(directory):
        for key, value in line.items():
            if key.startswith("eval/") and key.endswith("/loss"):
                curve.setdefault(line["step"], []).append(value)
    return {
        **{key: row.get(key) for key in _KEYS},
        "held_out": domains.held_out({**row, "evaluations": {}}),
        "curve": [(step, sum(some) / len(some)) for step, some in sorted(curve.items())],
    }


def cache_bytes() -> dict[str, int]:
    """Returns the bytes of keys and values of 64 tokens by the number of their heads, as decoding allocates them."""
    import jax

    from espalier.model.attention import Attention
    from espalier.model.config import TransformerConfig
    from espalier.model.kv_cache.full import FullCache
    from espalier.model.transformer import Block, Transformer
    from espalier.trainers.decoding import prefill

    out = {}
    for count in CACHED_KV:
        config = TransformerConfig(
            vocab_size=48,
            num_layers=2,
            embed_dim=64,
            num_heads=HEADS,
            num_kv_heads=count,
            mlp_dim=128,
            scan_layers=False,
        )
        model = Transformer(config=config, block=functools.partial(Block, attention=Attention))
        caches = jax.eval_shape(
            lambda model=model: prefill.empty_caches(model, FullCache(), batch=1, length=64)
        )
        arrays = [array for cache in caches for array in (cache.slots.k_BKSH, cache.slots.v_BKSH)]
        out[str(count)] = sum(array.size * array.dtype.itemsize for array in arrays)
    return out
