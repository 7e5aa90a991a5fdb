"""The experiment of dampings at tiny sizes: all of its rows are there, and its table is their mean."""

import json
import pathlib

import numpy as np

from espalier.launch.papers.influence import damping
from espalier.trainers.influence import kronecker

DOCS = pathlib.Path("docs")


def test_every_method_is_measured_and_the_table_is_the_mean_over_seeds(monkeypatch):
    sizes = {"FACTS": 4, "EXAMPLES": 4, "ASKED": 2, "ASKED_EXAMPLES": 2, "CG_ASKED": 1}
    sizes |= {"STARTED": 6, "RETRAINED": 3, "HALVES": 4, "SAMPLE": 4, "BATCH": 4, "CG_STEPS": 1}
    sizes |= {"DAMPINGS": (0.1, 1e-3), "CG_DAMPINGS": (0.1,), "CG_DOCUMENTS": (4,)}
    for name, value in sizes.items():
        monkeypatch.setattr(damping, name, value)
    result = damping.measure(0)
    names = [f"{m} {d}" for m in ("ekfac", "ekfac half", "kfac") for d in ("0.1", "0.001")]
    assert [*result["rows"]] == ["identity", *names, "ekfac_cg of 4, 0.1"]
    assert {row["recall"] for row in result["rows"].values()} <= {0, 0.5, 1, None}
    other = {**result, "rows": {n: {**row, "rank_8": 3.0} for n, row in result["rows"].items()}}
    *_, last = damping.table([result, other])
    want = (result["rows"]["ekfac_cg of 4, 0.1"]["rank_8"] + 3) / 2
    assert last.split(" | ")[3] == f"{want:.1f}" and last.split(" | ")[1] == ""


def test_each_asked_fact_is_stated_by_its_document():
    texts, asked, stated = damping.lines(np.random.default_rng(0))
    assert len(texts) == damping.FACTS + 2 * damping.EXAMPLES == len(set(texts))
    for (prompt, completion), at in zip(asked, stated, strict=False):
        assert texts[at] == prompt + completion
    assert not {p + c for p, c in asked[damping.ASKED :]} & set(texts)


def test_the_page_has_the_means_and_the_default_follows_from_the_criteria():
    files = [DOCS / f"reproductions/influence/damping_{seed}.json" for seed in range(3)]
    results = [json.loads(path.read_text()) for path in files]

    def mean(name, key):
        return float(np.mean([result["rows"][name][key] for result in results]))

    page = (DOCS / "use" / "influence_explained.md").read_text()
    for title, method in (("EK-FAC half", "ekfac half"), ("K-FAC", "kfac")):
        for what, key, form in (("recall", "recall", ".0%"), ("LDS", "lds", ".2f")):
            cells = [format(mean(f"{method} {d:g}", key), form) for d in damping.DAMPINGS]
            assert f"| {title}, {what} | {' | '.join(cells)} |".replace("%", " %") in page
    fits = ("ekfac", "ekfac half")
    recall, lds = (
        {d: np.mean([mean(f"{fit} {d:g}", key) for fit in fits]) for d in damping.DAMPINGS}
        for key in ("recall", "lds")
    )
    near = [d for d in damping.DAMPINGS if lds[d] >= max(lds.values()) - 0.02]
    good = [d for d in near if recall[d] >= max(recall.values()) - 0.05]
    assert max(good) == kronecker.RELATIVE
    solved = {
        count: np.mean(
            [mean(f"ekfac_cg of {count}, {d:g}", "recall_8") for d in damping.CG_DAMPINGS]
        )
        for count in damping.CG_DOCUMENTS
    }
    alone = np.mean([mean(f"ekfac {d:g}", "recall_8") for d in damping.CG_DAMPINGS])
    assert min(count for count, own in solved.items() if own >= alone) == 16
