"""The files that tools and visitors look for at the root, and what they refer to."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def packaging(monkeypatch):
    """The arguments of setup.py."""
    monkeypatch.chdir(ROOT)
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path("setup.py")
    return setup.call_args.kwargs


def test_types_of_each_package_are_shipped(packaging):
    for package in {name.partition(".")[0] for name in packaging["packages"]}:
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in packaging["package_data"][package]


def test_the_citation_is_valid_and_of_this_version(packaging):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {
        "cff-version",
        "message",
        "title",
        "authors",
    } <= citation.keys()  # required by the format
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["authors"] == [{"name": "Espalier developers"}]
    assert citation["version"] == packaging["version"]
    assert citation["license"] == packaging["license"]


def test_the_public_names_are_imported_when_they_are_used(packaging):
    code = (
        "import sys, espalier\n"
        "assert not {'jax', 'gin', 'numpy'} & set(sys.modules)\n"
        "print(espalier.__version__, *(getattr(espalier, name).__name__ for name in espalier.__all__))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [packaging["version"], "Recipe", "Run", "load", "train"], (
        done.stderr
    )


def test_hosted_ci_runs_the_script_of_the_repository():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert {"push", "pull_request"} <= workflow[True].keys()  # YAML 1.1 reads `on` as true
    (job,) = workflow["jobs"].values()
    uses = {step["uses"].partition("@")[0]: step for step in job["steps"] if "uses" in step}
    assert list(uses) == ["actions/checkout", "actions/setup-python"]
    python = uses["actions/setup-python"]["with"]
    assert python["cache"] == "pip"
    for version in python["python-version"].split():
        assert (ROOT / f"constraints/py{version.replace('.', '')}.txt").is_file()
    for pattern in python["cache-dependency-path"].split():
        assert list(ROOT.glob(pattern))
    assert job["steps"][-1]["run"] == ".ci/run"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def pins(name):
    """Package -> version in a file of constraints."""
    lines = (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_minimum_that_is_tested_is_the_declared_one(packaging):
    requirements = [*packaging["install_requires"], *packaging["extras_require"]["test"]]
    declared = dict(re.fullmatch(r"([\w.-]+)>=([\d.]+)", text).groups() for text in requirements)
    assert pins("minimum.txt") == declared
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "CONSTRAINTS=constraints/minimum.txt" in script


def test_the_environment_of_beam_differs_where_beam_asks_for_it(packaging):
    beam, main = pins("beam.txt"), pins("py311.txt")
    different = {name for name in beam.keys() & main.keys() if beam[name] != main[name]}
    assert different == {"pillow", "protobuf", "pyarrow", "sentencepiece"}
    for requirement in packaging["extras_require"]["beam"]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert name in beam
    assert "constraints/beam.txt" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_environments_that_benchmarks_compare_with_are_pinned():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    torch = set()
    for name in ("peers", "peers_kvpress", "peers_lm_eval"):
        assert f"pip install -q -c constraints/{name}.txt" in makefile
        torch.add(pins(f"{name}.txt")["torch"])
        assert "espalier-lm" not in pins(f"{name}.txt")
    assert len(torch) == 1


def test_the_supported_versions_are_those_that_are_tested(packaging):
    oldest = packaging["python_requires"].removeprefix(">=")
    rows = [
        [oldest, pins("minimum.txt")],
        [oldest, pins(f"py{oldest.replace('.', '')}.txt")],
        ["3.13", pins("py313.txt")],
    ]
    page = (ROOT / "docs/start/install.md").read_text(encoding="utf-8")
    for python, versions in rows:
        names = ("jax", "flax", "orbax-checkpoint", "numpy", "tensorflow")
        cells = " | ".join([python, *(versions[name] for name in names)])
        assert f"| {cells} |" in page, cells


# `python -m venv FOLDER`, with a pip that only writes what it is asked for; else this Python.
PYTHON = """#!/bin/sh
[ "$1" = -m ] || exec {python} "$@"
mkdir -p "$3/bin" && ln -sf {python} "$3/bin/python"
echo '#!/bin/sh' >"$3/bin/pip" && echo 'echo "$@" >>pip.log' >>"$3/bin/pip" && chmod +x "$3/bin/pip"
"""


def test_make_installs_again_what_is_asked_for_and_only_then(tmp_path):
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    python, other = tmp_path / "python", tmp_path / "other"
    python.write_text(PYTHON.format(python=sys.executable))
    other.write_text("#!/bin/sh\ncase $2 in *version_info*) exit 0;; *) echo another;; esac\n")
    for file in (python, other):
        file.chmod(0o755)
    # A make that runs this test hands its own variables on.
    given = re.compile("MAKE.*|MFLAGS|VENV|PYTHON|EXTRAS|CONSTRAINTS")
    own = {k: v for k, v in os.environ.items() if not given.fullmatch(k)}

    def make(*words):
        """What make says, and what pip is asked to install."""
        log = tmp_path / "pip.log"
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["make", *words], cwd=tmp_path, env=own, capture_output=True, text=True, timeout=120
        )
        asked = log.read_text().splitlines()[1:] if log.exists() else []
        return done.stdout + done.stderr, asked

    pinned = f"install -c constraints/py{sys.version_info[0]}{sys.version_info[1]}.txt -e "
    assert make("venv", f"PYTHON={python}")[1] == [f"{pinned}.[test,test_stores]"]
    assert make("venv")[1] == make("venv", f"PYTHON={python}", "EXTRAS=test,test_stores")[1] == []
    assert make("venv", "EXTRAS=docs")[1] == [f"{pinned}.[docs]"]
    assert make("venv", "EXTRAS=docs")[1] == make("venv")[1] == []
    assert make("venv", "CONSTRAINTS=")[1] == ["install -e .[docs]"]
    assert make("venv", "CONSTRAINTS=")[1] == make("venv")[1] == []
    assert "install" not in make("-n", "test")[0]
    os.utime(tmp_path / "setup.py")  # a newer setup.py: with the values that it has
    assert make("venv")[1] == ["install -e .[docs]"]
    said, asked = make("venv", f"PYTHON={other}")
    assert f".venv has another Python than {other}: remove it" in said and asked == []
    assert make("venv")[1] == []
    # An environment of the user's own, which counts as installed.
    (tmp_path / ".venv/.settings").unlink()
    assert make("venv", f"PYTHON={other}")[1] == make("venv", "EXTRAS=docs")[1] == []


def test_the_container_installs_the_locked_environment():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    version = re.search(r"^FROM python:(\d)\.(\d+)-", dockerfile, re.MULTILINE)
    assert (ROOT / f"constraints/py{version[1]}{version[2]}.txt").is_file()
    copied = re.search(r"^COPY (.*) \./$", dockerfile, re.MULTILINE)[1].split()
    before = dockerfile[: dockerfile.index("RUN make venv")]
    assert "COPY constraints constraints" in before and " ".join(copied) in before
    assert "COPY espalier espalier" in before  # else pip would not know the package
    read = {"Makefile", "README.md", "pyproject.toml", "setup.py"}  # by `make venv` and setup.py
    assert set(copied) == read and all((ROOT / name).is_file() for name in read)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "PAPERS.md",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("launch/papers/*/README.md")),
    ],
)
def test_links_of_pages_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    folder = (ROOT / page).parent
    lost = [x for x in links if not re.match("[a-z]+:", x) and not (folder / x).exists()]
    assert lost == []


def test_contributing_leads_to_the_steps_of_a_method():
    assert "docs/extend/add_a_method.md" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
