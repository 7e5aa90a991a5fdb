"""The map of the documentation has every page, links lead to files, and the names of the Python API exist."""

import importlib
import pathlib
import re

import pytest

from espalier.launch import cli, reproduce

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture
def site(monkeypatch):
    """The module that builds the site."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("build")


def test_each_page_is_in_one_chapter(site):
    front = DOCS / "README.md"
    names = site.page_names(front.read_text("utf-8"))
    listed = re.findall(r"^(?!:)(\S+\.(?:md|ipynb))$", site.first_page("", names), re.MULTILINE)
    generated = set(re.findall("<!-- page: (.*?) -->", front.read_text("utf-8")))
    assert sorted(set(listed) - generated) == sorted(set(names.values()) - {"index.md"})
    assert len(listed) == len(set(listed))


def test_links_are_those_of_the_site(site, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "DOCS", tmp_path / "docs")
    paper = tmp_path / "paper" / "README.md"
    for path in (tmp_path / "docs/use/a.md", paper, tmp_path / "code.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = {tmp_path / "docs/use/a.md": "use/a.md", paper: "papers/paper.md"}
    paper.write_text(
        "[a](../docs/use/a.md#b) [a.md](../docs/use/a.md) [code](../code.py) [x](https://x.y)\n"
        "```\n[a](../docs/use/a.md)\n```\n"
    )
    shown = (
        "[a](../use/a.md#b) [](../use/a.md) {} [x](https://x.y)\n```\n[a](../docs/use/a.md)\n```\n"
    )
    assert site.relinked(paper, names, "") == shown.format("code")
    assert site.relinked(paper, names, "https://h/c") == shown.format("[code](https://h/c/code.py)")
    paper.write_text("[a](../docs/b.md)")
    with pytest.raises(site.DocumentationError, match="paper/README.md links ../docs/b.md"):
        site.relinked(paper, names, "")


def test_names_of_the_api_have_docstrings(site):
    names = [
        name for _, _, names in importlib.import_module("api_names").API.values() for name in names
    ]
    assert len(names) == len(set(names))
    for module, _, name in (name.partition(":") for name in names):
        value = getattr(importlib.import_module(f"espalier.{module}"), name)
        assert value.__doc__ and value.__module__ == f"espalier.{module}", (module, name)


def test_each_metric_that_a_recorded_run_logs_has_a_row(site, monkeypatch):
    generated_pages, metric_names = map(
        importlib.import_module, ("generated_pages", "metric_names")
    )
    assert "| `LAYER/router_load/EXPERT` | share |" in generated_pages.metrics()
    monkeypatch.delitem(metric_names.METRICS["Every run"], "grad_norm")
    with pytest.raises(ValueError, match="grad_norm to docs/metric_names.py"):
        generated_pages.metrics()
    read = {"eval/a/loss": "loss", "mlp/router_load/3": "LAYER/router_load/EXPERT", "losses": None}
    assert {name: metric_names.general(name) for name in read} == read


def test_the_picture_of_the_architecture_shows_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    architecture = importlib.import_module("architecture")
    shown = architecture.PICTURE.read_text("utf-8")
    assert shown == architecture.draw(), "run python docs/architecture.py"
    for seam in (seam for seams in architecture.SEAMS.values() for seam in seams):
        assert any(architecture.uses(paper, seam) for paper in architecture.papers()), seam


SECTIONS = ["Claim", "Equations", "Files", "Commands", "Design", "Result", "Deviations"]
SECTIONS += ["Beyond the paper", "Status"]


@pytest.mark.parametrize("paper", reproduce.slugs())
def test_pages_of_papers_have_one_order(paper):
    text = (ROOT / "launch" / "papers" / paper / "README.md").read_text("utf-8")
    shown = re.findall("^## (.*)", text, re.MULTILINE)
    assert shown == [name for name in SECTIONS if name in shown]
    assert {*SECTIONS} - {*shown} <= {"Design", "Beyond the paper"}
    assert re.match(r"# .*\n\n\[arXiv [\d.]+\]\(https://arxiv.org/abs/", text)


def expanded(pattern):
    """The alternatives of a path with {a,b}."""
    if not (braces := re.search(r"\{(.*?)\}", pattern)):
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [path for one in braces[1].split(",") for path in expanded(before + one + after)]


def test_the_page_of_papers_names_what_exists():
    text = (ROOT / "PAPERS.md").read_text("utf-8")
    folders = "data|docs|launch|model|t5x_configs|tests|trainers"
    for path in re.findall(rf"`((?:{folders})/[^ `:]+)[`:]", text):
        assert all(list(ROOT.glob(one.replace("NAME", "*"))) for one in expanded(path)), path
    for command, name in re.findall(r"`espalier (\w+)(?: ([a-z]\w+))?", text):
        inner = reproduce.slugs() if command == "reproduce" else cli.sub_commands(command)
        assert command in cli.command_names() and (not name or name in inner), (command, name)
    sections = dict(re.findall(r"^## (\w+): .*\n((?:(?!## ).*\n)+)", text, re.MULTILINE))
    assert sorted(sections) == reproduce.slugs()
    for slug, section in sections.items():
        experiment, report = (
            importlib.import_module(f"espalier.launch.papers.{slug}.{name}")
            for name in ("experiment", "report")
        )
        listed = re.findall(r"claims? ([A-Z]\w+(?:, [A-Z]\w+)*) \(part `(\w+)`\)", section)
        parts = {claim: part for claims, part in listed for claim in claims.split(", ")}
        assert parts == {claim.name: claim.part for claim in report.REPORT.claims}, slug
        assert set(re.findall("parts? `(.*?)`", section)) <= set(experiment.PARTS), slug
        assert ("full size" in section.lower()) == hasattr(experiment, "_full_sweep"), slug
