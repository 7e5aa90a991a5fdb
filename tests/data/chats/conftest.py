"""The tokenizer and the templates of goldens/sft.json."""

import json
import pathlib
import runpy

import pytest

from espalier.data.tokenizers import vocabularies

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="session")
def golden():
    return json.loads((GOLDENS / "sft.json").read_bytes())


@pytest.fixture(scope="session")
def plain():
    """The templates without `{% generation %}`, by name."""
    return {path.stem: path.read_text("utf-8") for path in (GOLDENS / "chat_templates").iterdir()}


@pytest.fixture(scope="session")
def model():
    """The functions of goldens/sft_model.py."""
    return runpy.run_path(str(GOLDENS / "sft_model.py"))


@pytest.fixture(scope="session")
def vocabulary(golden, plain, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "toy"
    model["write"](folder, golden["tokenizer"], plain["chatml"])
    return vocabularies.huggingface(path=folder)
