"""The experiment of dampings at tiny sizes: all of its rows are there, and its table is their mean."""

from launch.papers.influence import damping


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
    import numpy as np

    texts, asked, stated = damping.lines(np.random.default_rng(0))
    assert len(texts) == damping.FACTS + 2 * damping.EXAMPLES == len(set(texts))
    for (prompt, completion), at in zip(asked, stated, strict=False):
        assert texts[at] == prompt + completion
    assert not {p + c for p, c in asked[damping.ASKED :]} & set(texts)
