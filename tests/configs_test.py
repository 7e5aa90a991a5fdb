"""Every gin file parses, binds only what exists, and the models it describes have the published size."""

import pathlib

import gin
import jax
import pytest

from launch import gin_config
from trainers import initialise

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / "t5x_configs"
FILES = sorted(str(path.relative_to(ROOT)) for path in CONFIGS.rglob("*.gin"))
MODELS = sorted(path.stem for path in (CONFIGS / "models").glob("*.gin") if "base" not in path.stem)

# Exact counts: closed forms of the shapes, and the published ones where those are exact (GPT-2, Llama,
# BAM's seed, SmolLM2).
COUNTS = {
    "tiny": 384 * 64 + 2 * (2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 192 + 64) + 64,
    "quickstart": 4096 * 192 + 4 * (4 * 192**2 + 3 * 192 * 512 + 192) + 192,
    "bench_llama": 8192 * 256 + 6 * (4 * 256**2 + 3 * 256 * 704 + 512) + 256,
    "code_mix_470m": 256_000 * 1024 + 16 * (4 * 1024**2 + 3 * 1024 * 2816 + 1024) + 1024,
    "code_mix_2p8b": 256_000 * 2560 + 27 * (4 * 2560**2 + 3 * 2560 * 6912 + 2560) + 2560,
    "bam_590m": 587_209_728,
    "bam_2b": 1_991_000_000,
    "aya23_8b": 8_028_033_024,
    "aya23_35b": 34_980_831_232,
    "gpt2": 124_439_808,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "smollm_135m": 134_515_008,
}
# Published to a few digits only.
ROUNDED = {"bam_2b": 1e6}


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config(clear_constants=True)


@pytest.mark.smoke
@pytest.mark.parametrize("file", FILES)
def test_file_has_no_problems(file):
    assert [str(problem) for problem in gin_config.problems([file], fragment=True)] == []


def load_model(name):
    files = [f"t5x_configs/models/{name}.gin", "t5x_configs/runs/pretrain.gin"]
    unset = ["MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='x'", "TASKS=()"]
    config = gin_config.load(files, unset, entry="launch.train:train")
    return config.arguments()["recipe"].model


@pytest.mark.parametrize("name", MODELS)
def test_model_initialises_abstractly_with_its_size(name):
    params = initialise.abstract_variables(load_model(name))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == pytest.approx(COUNTS[name], abs=ROUNDED.get(name, 0), rel=0)


def test_every_model_has_a_count():
    assert set(MODELS) == set(COUNTS)


@pytest.mark.parametrize("arm", ["text", "balanced", "code_then_text"])
def test_arms_of_the_quickstart_share_everything_but_their_phases(arm):
    def bindings(name):
        file = f"t5x_configs/experiments/code_mix/quickstart_{name}.gin"
        gin_config.load([file], ["MODEL_DIR='/tmp/x'"], entry="launch.train:train")
        text = gin_config.config_str()
        gin.clear_config()
        return {line for line in text.splitlines() if "phases" not in line and "'" not in line}

    assert bindings(arm) == bindings("text")
