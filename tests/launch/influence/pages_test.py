"""The viewer: one file whose texts cannot execute."""

import base64
import hashlib
import html.parser
import json
import re
import types

import numpy as np
import pytest

from espalier.launch.influence import labels, pages

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> & \u2028 \ud800"


class Elements(html.parser.HTMLParser):
    """The elements of a page, and the texts of its scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.scripts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)


def data():
    item = {"document": 0, "score": 1.5, "per_nat": 0.5, "per_norm": None, "spurious": False}
    query = {"prompt": HOSTILE, "completion": HOSTILE, "task": HOSTILE, "kind": "", "correct": None}
    return {
        **{"method": "ekfac", "count": 1, "rank_by": "score", "per_norm": False},
        "queries": [{**query, "nats": 3.0, "top": [item], "bottom": [item]}],
        "documents": {"0": {"text": HOSTILE, "cut": False, "source": HOSTILE}},
        "tokens": {"0:0": {"texts": [HOSTILE], "scores": [1.0]}},
        **{"tables": [{"title": HOSTILE, "text": "", "header": [HOSTILE], "rows": [[HOSTILE]]}]},
        "omitted": [HOSTILE],
    }


def test_hostile_texts_stay_data():
    page = pages.page(data())
    parsed = Elements(page)
    assert parsed.tags.count("script") == 2 and "img" not in parsed.tags
    embedded, script = parsed.scripts
    assert json.loads(embedded) == data()
    assert page.count("</script>") == 2 and "<!--" not in page
    assert not [a for a in parsed.attributes if a[1].startswith("on")]
    # Nothing is loaded, and nothing but this script and style is admitted.
    assert not [a for a in parsed.attributes if a[1] in ("src", "href")]
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    for text in (script, style):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_the_script_shows_texts_as_text_only():
    page = pages.page(data())
    script = page[page.rindex("<script>") :]
    for name in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "fetch(",
    ):
        assert name not in script


def test_markdown_shows_texts_as_text_of_one_line():
    cell = pages._cell("a|b\n<img src=x>" + "x" * 200)
    assert cell.startswith("a\\|b &lt;img src=x>") and cell.endswith("...") and "\n" not in cell


def test_a_nearly_certain_completion_is_divided_by_the_least_nats_and_marked():
    item = {"document": 0, "score": 2.0, "value": 2.0}
    unknown = np.full(2, np.nan)
    made = pages.Made(
        record={"method": "cosine"},
        tops={"documents": 1, "queries": [{"top": [item], "bottom": []}] * 2},
        prepared=types.SimpleNamespace(kept=unknown, pearson=unknown, nats=[0.01, 0.5]),
        given=types.SimpleNamespace(
            queries=[labels.Query(prompt="p", completion="c")] * 2,
            nats=[0.1, 0.5],
            tokens=[],
            sources=None,
        ),
        texts={0: "text"},
        analyses={"omitted": []},
        norms_N=None,
        rank_by="score",
        top=1,
    )
    table = pages.table(made)
    assert [q["top"][0]["per_nat"] for q in table["queries"]] == pytest.approx([20, 4])
    assert [q["nearly_certain"] for q in table["queries"]] == [True, False]
    first, second = (x for x in pages.markdown(table, bottom=False) if x.startswith("## Query"))
    assert "nearly certain: divided by 0.1 nats" in first and "nearly" not in second
