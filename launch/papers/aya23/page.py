"""The report of the reproduction."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.aya23 import claims, figures, sweep
from launch.papers.aya23.arms import LOSS, PLAIN, TURNS, Runs
from launch.papers.aya23.fertility import LANGUAGES, SHARES, SIZE, TOTAL
from launch.papers.shared import claim, page

_SCORES = (LOSS, TURNS, PLAIN)


def _setup(parts: Mapping[str, Any]) -> list[str]:
    out = []
    runs = parts.get("toy")
    if runs:
        out = [
            "- *made languages*: Cohere decoders of two layers (width 64; 32 narrow, 96 wide) read made languages of one "
            "grammar (data/aya23/toy_languages.py), 800 updates of 32 rows of 64 symbols. Every language has its own words "
            "for 60 concepts, from one stock; languages of a family share half of them, and differ in order and case. Half of "
            "the documents in the four common languages say each sentence again in one of these. The "
            f"loss is of the four languages that every mixture has. {runs.amount()}.",
            f"- *instructions*: to say a sentence again or in another of the four languages, as turns, {sweep.TUNING_STEPS} updates on "
            f"{sweep.REQUESTS:,} of each kind and pair of languages, or on a quarter of them. An answer is right if all of its symbols are; answers are greedy.",
        ]
    out.append(
        f"- *real languages*: SentencePiece BPE of {SIZE:,} pieces on text of installed packages in {len(LANGUAGES)} languages, "
        f"{TOTAL // 1000} kB in all: in equal shares, or of the one of rank r in proportion to r ** -{SHARES['raw']}; a seed draws "
        "the ranks. Parity is of messages of Django and Sphinx with their translations."
    )
    out.append(
        "- *where it falls short*: the paper compares finished models of other makers, so that its first claim has no "
        "controlled twin there; here all but the number of languages is the same. The time of parallel blocks is not measured: "
        "at this size a step is overhead."
    )
    missing = runs.missing(list(sweep.get_config().arms), runs.seeds) if runs else []
    return [*out, *page.missing(missing, tuple(claims.PLACES), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    runs = parts.get("toy")
    if not runs:
        return []
    rows = [
        (
            f"{runs.label(arm)} (`{arm}`)",
            *(
                runs.mean(values, score) if (values := runs.values(arm, score)).size else ""
                for score in _SCORES
            ),
        )
        for arm in runs.arms
    ]
    return page.table(("arm", *_SCORES), rows, "All arms")


def _shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the measurements with arms, formats of the answers and vocabularies exchanged at random."""
    out = claim.shuffle_arms(measured, rng)
    out["toy"] = [_formats_exchanged(row, rng) for row in out.get("toy", [])]
    if trained := out.get("fertility"):
        out["fertility"] = {
            seed: dict(
                zip(one, [list(one.values())[i] for i in rng.permutation(len(one))], strict=True)
            )
            for seed, one in trained.items()
        }
    if cached := out.get("caches"):
        values = list(cached.values())
        order = rng.permutation(len(values))
        out["caches"] = dict(zip(cached, [values[i] for i in order], strict=True))
    return out


def _formats_exchanged(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    answers = (row.get("evaluations") or {}).get("answers")
    if not answers or rng.random() < 0.5:
        return dict(row)
    other = {"turns": "plain", "plain": "turns"}
    turned = {
        f"{kind}_{other[name]}": value
        for (kind, name), value in ((key.split("_"), value) for key, value in answers.items())
    }
    return {**row, "evaluations": {**row["evaluations"], "answers": turned}}


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    runs = {"toy": Runs(measured["toy"])} if measured.get("toy") else {}
    return runs | {name: measured[name] for name in ("fertility", "caches") if measured.get(name)}


REPORT = page.Report(
    slug="aya23",
    title="Aya 23: the paper's claims on small models",
    source="[Aya 23: Open Weight Releases to Further Multilingual Progress, arXiv 2405.15032](https://arxiv.org/abs/2405.15032)",
    claims=claims.CLAIMS,
    places=claims.PLACES,
    read=_read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=_shuffle,
)
