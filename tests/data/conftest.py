"""Installed packages made of given files, so that sources can be tested without any installed."""

import importlib.metadata
import pathlib
from collections.abc import Callable, Mapping

import pytest

from espalier.data import tasks
from espalier.data.text.sources import environment


@pytest.fixture(autouse=True)
def no_tasks_left():
    """Tasks that a test registers are gone after it."""
    yield
    tasks.clear()


@pytest.fixture
def fake_environment(tmp_path: pathlib.Path) -> Callable[..., environment.Environment]:
    """A function of {package: {file: text}} and {file: text} of the standard library."""

    def make(
        packages: Mapping[str, Mapping[str, str]] | None = None,
        stdlib: Mapping[str, str] | None = None,
    ) -> environment.Environment:
        site = tmp_path / "site"
        distributions = {}
        for package, files in (packages or {}).items():
            info = site / f"{package}-1.0.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            (info / "METADATA").write_text(f"Name: {package}\nVersion: 1.0\n\n{files.get('', '')}")
            names = [name for name in files if name]
            (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))
            for name in names:
                _write(site / name, files[name])
            distributions[package] = importlib.metadata.PathDistribution(info)
        library = None
        if stdlib is not None:
            library = tmp_path / "stdlib"
            library.mkdir(exist_ok=True)
            for name, text in stdlib.items():
                _write(library / name, text)
        return environment.Environment(stdlib=library, include=None, find=distributions.get)

    return make


def _write(path: pathlib.Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
