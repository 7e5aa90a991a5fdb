"""The full-size recipes of 'To Code, or Not To Code?' (arXiv 2408.10914) against the paper's own numbers."""

import json
import math
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
import tokenizers
from pyarrow import parquet
from tokenizers import models, pre_tokenizers

from espalier.data import tasks
from espalier.launch.config import gin_config
from espalier.launch.precompile import precompile, programs, tpu_topology
from espalier.launch.sweep import file
from espalier.trainers.objectives import lm
from espalier.trainers.optim import schedules

ROOT = pathlib.Path(__file__).parents[4]
FOLDER = "t5x_configs/experiments/code_mix/full"
STEP = 512 * 8192
B = 1e9

# Billions of tokens by source, section 2.2 and 2.3 of the recipe.
ARMS = {
    "text_only": {"text": 400},
    "balanced_only": {"text": 200, "web_code": 200},
    "share_0": {"text": 200},
    "share_25": {"text": 150, "web_code": 50},
    "share_50": {"text": 100, "web_code": 100},
    "share_75": {"text": 50, "web_code": 150},
    "share_90": {"text": 20, "web_code": 180},
    "share_100": {"web_code": 200},
    "code_markup": {"web_code": 160, "markup": 40},
    "code_adjacent": {"web_code": 170, "commits": 10, "notebooks": 10, "stackexchange": 10},
    "code_synth": {"web_code": 180, "synth": 20},
    "balanced_synth": {"text": 100, "web_code": 90, "synth": 10},
    "balanced_to_text": {"text": 180, "web_code": 20},
    "balanced_to_text_cooldown": {"hq_text": 16, "math": 8, "instruct": 8, "web_code": 8},
    "balanced_to_text_cooldown_without_code": {"hq_text": 20, "math": 10, "instruct": 10},
}
PHASES = tuple(arm for arm in ARMS if arm.startswith("balanced_to_text"))
RUNS = {
    run.arm: run
    for run in file.read("launch/papers/code_mix/experiment.py:full,/data")
    if run.size == "470m"
}
SIZES = {
    "470m": (256_000 * 1024 + 16 * (4 * 1024**2 + 3 * 1024 * 2816 + 1024) + 1024, 3e-4),
    "2p8b": (256_000 * 2560 + 27 * (4 * 2560**2 + 3 * 2560 * 6912 + 2560) + 2560, 2e-4),
}


@pytest.fixture(autouse=True)
def clean():
    yield
    tasks.clear()


def load(arm, size="470m", *bindings, data=("DATA_ROOT='/d'", "TOKENIZER='/t'", "MBPP='/m'")):
    sized = [f"{FOLDER}/size_2p8b.gin"] if size == "2p8b" else []
    files = [*RUNS[arm].gin_files, *sized]
    given = [*RUNS[arm].bindings, "MODEL_DIR='/run'", *data, *bindings]
    if arm in PHASES:
        given.append("INITIAL_CHECKPOINT_PATH='/before'")
    return gin_config.load(files, given, entry="espalier.launch.train:train")


def byte_tokenizer(folder):
    """The directory of a tokenizer of bytes."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({text: id for id, text in enumerate(alphabet)}, [])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return str(folder)


def steps_of(tokens):
    """Of rows that are full, as those of `packing = 'concat'` are but for the last."""
    return math.ceil(tokens / STEP)


def test_every_file_is_of_an_arm_of_the_study():
    found = {str(path.relative_to(ROOT)) for path in (ROOT / FOLDER).glob("*.gin")}
    assert found == {name for arm in ARMS for name in RUNS[arm].gin_files} | {
        f"{FOLDER}/size_2p8b.gin"
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_resolves_to_the_papers_budget_and_model(arm, size):
    config = load(arm, size)
    arguments = config.arguments()
    recipe, total = arguments["recipe"], sum(ARMS[arm].values()) * B
    assert arguments["total_tokens"] == total and arguments["total_steps"] is None
    shares = config.value("user_data.register_sources.shares")
    trained = {name: share * total / B for name, share in shares.items() if share}
    assert trained == pytest.approx(ARMS[arm], abs=1e-9)
    assert {"text", "web_code"} <= shares.keys()  # of which all arms report the held-out loss
    follows = arm in PHASES
    assert arguments["initial"].scope == ("phase" if follows else "params")
    assert arguments["initial"].data == ("continue" if follows else "restart")
    assert (recipe.batch_size, recipe.length) == (512, 8192)
    parameters, peak = SIZES[size]
    recipe = recipe.with_span(schedules.Span(steps_of(total), 0.1 * peak))
    program = recipe.program()
    assert program.num_params() == parameters
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(program.abstract_state.params)}
    assert dtypes == {jnp.dtype("float32")} and recipe.model.config.dtype == "bfloat16"


@pytest.mark.parametrize(("tokens", "steps"), [(200, 47_684), (400, 95_368), (40, 9_537)])
def test_budgets_in_steps(tokens, steps):
    assert steps_of(tokens * B) == steps


@pytest.mark.parametrize(("arm", "size"), [("text_only", "470m"), ("balanced_to_text", "2p8b")])
def test_rates_of_a_pre_training_phase(arm, size):
    arguments = load(arm, size).arguments()
    steps, peak = steps_of(arguments["total_tokens"]), SIZES[size][1]
    rate = arguments["recipe"].with_span(schedules.Span(steps)).learning_rate
    values = np.asarray(jax.vmap(rate)(jnp.arange(steps + 1)))
    assert values[0] == 0 and values[1325] == pytest.approx(peak, abs=1e-7)
    np.testing.assert_allclose(values[:1326], peak * np.arange(1326) / 1325, atol=1e-9)
    assert np.all(np.diff(values[1325:]) <= 0)
    # Half a cosine down to a tenth, in float64.
    place = np.arange(steps + 1 - 1325) / (steps - 1325)
    wanted = peak * (0.1 + 0.9 * (1 + np.cos(np.pi * place)) / 2)
    np.testing.assert_allclose(values[1325:], wanted, atol=1e-7, rtol=0)
    assert values[-1] == pytest.approx(0.1 * peak, abs=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_rates_of_a_cooldown(size):
    arguments = load("balanced_to_text_cooldown", size).arguments()
    steps, start = steps_of(40 * B), 0.1 * SIZES[size][1]
    rate = arguments["recipe"].with_span(schedules.Span(steps, start)).learning_rate
    values = np.asarray(jax.vmap(rate)(jnp.arange(steps)))
    wanted = start + (1e-6 - start) * np.arange(steps) / steps
    np.testing.assert_allclose(values, wanted, atol=1e-9, rtol=0)
    assert values[-1] == pytest.approx(1e-6, abs=1e-7)


def test_kernels_and_table_are_glorot_normal_and_the_first_loss_is_the_log_of_the_vocabulary():
    """One layer of the 470M model, beside a table large enough that its rows matter."""
    rows, layer = 16_384, ("config.TransformerConfig.num_layers=1",)
    small = (f"config.TransformerConfig.vocab_size={rows}", "DTYPE='float32'", *layer)
    model = load("share_0", "470m", *small).arguments()["recipe"].model
    params = nn.meta.unbox(jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), int)))())
    params = params["params"]
    table = np.asarray(params["token_embed"]["embedding"])
    assert table.std() == pytest.approx(math.sqrt(2 / (rows + 1024)), rel=0.01)
    block = params["layers"]["block_0"]
    for part, name in (
        ("attention", "query"),
        ("attention", "out"),
        ("mlp", "up"),
        ("mlp", "down"),
    ):
        kernel = np.asarray(block[part][name]["kernel"])
        assert kernel.std() == pytest.approx(math.sqrt(2 / sum(kernel.shape[-2:])), rel=0.01)
    ids = jax.random.randint(jax.random.key(1), (8, 65), 0, rows)
    batch = {
        "decoder_input_tokens": ids[:, :-1],
        "decoder_target_tokens": ids[:, 1:],
        "decoder_loss_weights": jnp.ones((8, 64)),
        "decoder_segment_ids": jnp.ones((8, 64), int),
        "decoder_positions": jnp.tile(jnp.arange(64), (8, 1)),
    }
    out = jax.jit(lm.language_modelling(model=model, num_sources=0))(params, batch, None)
    assert float(out.sum / out.weight) == pytest.approx(math.log(rows), abs=0.1)


def test_sources_are_read_as_they_are_published(tmp_path):
    """Files in the layout of the public sets: one document of each kind, and those that are left out."""

    def write(path, records):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(records), path)
        else:
            text = "".join(json.dumps(record) + "\n" for record in records).encode()
            path.write_bytes(
                pyarrow.compress(text, "zstd", asbytes=True) if ".zst" in path.name else text
            )

    kinds = ("CommonCrawl", "C4", "Book", "ArXiv", "Wikipedia", "Github", "StackExchange")
    pajama = [{"text": k, "meta": {"redpajama_set_name": f"RedPajama{k}"}} for k in kinds]
    write("SlimPajama-627B/train/chunk1/example_train_0.jsonl.zst", pajama)
    stack = ["Python", "C++", "C#", "JSX", "Markdown", "SCSS", "Ada", "Assembly"]
    for name in stack:
        row = {"content": name, "lang": name, "max_stars_repo_licenses": ["MIT"], "size": 1}
        write(f"the-stack-dedup/data/{name.lower()}/data-00000-of-00001.parquet", [row])
    write("starcoderdata/git-commits-cleaned/train-00000.parquet", [{"content": "commit"}])
    write("starcoderdata/jupyter-structured-clean-dedup/a.parquet", [{"content": "notebook"}])
    write("synth/0.jsonl", [{"text": "problem"}])
    write("open-web-math/data/train-0.parquet", [{"text": "sum", "url": "x"}])
    row = {"instruction": "Say.", "context": "", "response": "Said.", "category": "open_qa"}
    write("databricks-dolly-15k/databricks-dolly-15k.jsonl", [row])

    words = " ".join(f"word{i}" for i in range(13))
    write("mbpp.jsonl", [{"text": "Say it.", "code": f"print('{words}')", "task_id": 1}])
    write("synth/1.jsonl", [{"text": f"never {words} again"}])
    row = {"content": "x = 0xFF", "lang": "Python"}
    write("the-stack-dedup/data/python/data-00001-of-00002.parquet", [row])

    sources = ("text", "web_code", "markup", "synth", "commits", "notebooks", "stackexchange")
    sources += ("hq_text", "math", "instruct")
    shares = {name: 0.1 for name in sources}
    config = load(
        "share_0",
        "470m",
        f"SHARES={shares}",
        "VALIDATION_FRACTION=0.0",
        f"user_data.register_files.cache_dir={str(tmp_path / 'cache')!r}",
        data=(
            f"DATA_ROOT={str(tmp_path)!r}",
            f"MBPP={str(tmp_path / 'mbpp.jsonl')!r}",
            f"TOKENIZER={byte_tokenizer(tmp_path / 'tokenizer')!r}",
        ),
    )
    for register in config.arguments()["tasks"]:
        register()
    found = {
        name: {document.text for document in source.documents(name, "train")}
        for name, source in tasks.sources().items()
    }
    assert found == {
        "text": set(kinds) - {"Github", "StackExchange"},
        "web_code": {"Python", "C++", "C#", "JSX"},
        "markup": {"Markdown", "SCSS"},
        "synth": {"problem"},
        "commits": {"commit"},
        "notebooks": {"notebook"},
        "stackexchange": {"StackExchange"},
        "hq_text": {"Wikipedia", "Book", "ArXiv"},
        "math": {"sum"},
        "instruct": {"Say.\n\nSaid."},
    }
    facts = tasks.summary()["tasks"]
    dropped = {
        name: {
            by: count["documents"] for by, count in fact["dropped"].items() if count["documents"]
        }
        for name, fact in facts.items()
    }
    assert dropped["web_code"] == {"lang": 4, "Hexadecimal": 1}
    assert dropped["synth"] == {"overlap with MBPP": 1}
    assert dropped["text"] == {"meta.redpajama_set_name": 2}
    assert set(facts["math"]["dropped"]) == {"overlap with humaneval", "overlap with MBPP"}


@pytest.mark.tpu
@pytest.mark.skipif(bool(tpu_topology.missing()), reason=tpu_topology.missing() or "libtpu is here")
@pytest.mark.timeout(1200)  # a compilation for 256 chips takes minutes of one core
def test_the_smaller_size_fits_the_papers_chips(monkeypatch):
    for name in list(os.environ):
        monkeypatch.setenv(name, os.environ[name])  # so that it is put back
    tpu_topology.prepare_environment()
    topology = tpu_topology.parse("v5e:16x16")
    recipe = load("text_only", "470m").arguments()["recipe"].with_span(schedules.Span(95_368))
    program = recipe.program(devices=tpu_topology.devices(topology))
    hbm = topology.chip.hbm_bytes
    # As started from the command line, without the tests' exact products.
    with jax.default_matmul_precision("default"), jax.numpy_rank_promotion("allow"):
        report = precompile.compile_work(programs.train(program), program, hbm_bytes=hbm)[0]
    assert report.fits and report.memory.peak <= 2.9e9
