"""Arbitrage of 1,000 prompts over three local teachers, over the time in which the teachers alone generate the same answers.

The teachers have the sizes of the generation benchmark with half of its layers, random weights and a vocabulary of bytes. Both
sides load each teacher, compile its programs and write 32 tokens for each prompt; arbitrage also writes the answers with
their provenance, rewards them, routes, and writes the training data.
"""

import contextlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.benchmarks import compare
from tests.benchmarks.case import DECODE

PROMPTS, TEACHERS, NEW, BATCH = 1_000, 3, 32, 64
SIZES = {name: DECODE[name] for name in ("embed_dim", "num_heads", "num_kv_heads", "mlp_dim")}
LAYERS = DECODE["num_layers"] // 2
_LANGUAGES = ("ar", "de", "en", "fr", "tr")


def run(*, rounds: int = 3) -> dict[str, Any]:
    """Alternates the teachers alone and arbitrage."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [_write_run(os.path.join(folder, f"teacher{i}"), seed=i) for i in range(TEACHERS)]
        prompts = _write_prompts(os.path.join(folder, "prompts.jsonl"))
        pool = os.path.join(folder, "pool.yaml")
        teachers = [
            {"name": f"teacher{i}", "checkpoint": run, "batch_size": BATCH}
            for i, run in enumerate(runs)
        ]
        pathlib.Path(pool).write_text(json.dumps({"teachers": teachers}))  # JSON is YAML
        numbers = iter(range(10**6))
        calls = {
            "teachers": lambda: _generate(runs, prompts, folder),
            "arbitrage": lambda: _arbitrage(
                pool, prompts, os.path.join(folder, f"out{next(numbers)}")
            ),
        }
        seconds = compare.alternate(calls, rounds)
    return {
        "case": {"prompts": PROMPTS, "teachers": TEACHERS, "new": NEW, "layers": LAYERS, **SIZES},
        "time_over_teachers": compare.ratio(seconds["arbitrage"], seconds["teachers"]),
        "seconds": seconds,
    }


def _write_run(folder: str, *, seed: int) -> str:
    """Writes a run of random weights; returns its directory."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from espalier.data.stream import rows
    from espalier.data.tokenizers import vocabularies
    from espalier.launch.config import gin_writer
    from espalier.launch.run import model_record, run_vocabulary
    from espalier.launch.run.model_record import CONFIG
    from espalier.model.config import TransformerConfig
    from espalier.model.transformer import Transformer
    from espalier.trainers.checkpoints.checkpoint import Checkpointer

    os.mkdir(folder)
    vocabulary = vocabularies.byte()
    config = TransformerConfig(vocab_size=vocabulary.vocab_size, num_layers=LAYERS, **SIZES)
    model = Transformer(config=config)
    pathlib.Path(folder, CONFIG).write_text(gin_writer.write(model))
    model_record.write(folder)
    run_vocabulary.save(folder, vocabulary)
    made = jax.jit(lambda key: model.init(key, jnp.zeros((1, 4), jnp.int32)))(jax.random.key(seed))
    with Checkpointer(os.path.join(folder, "checkpoints")) as checkpointer:
        meta = {"vocabulary": rows.vocabulary_digest(vocabulary)}
        checkpointer.save(1, {"params": nn.meta.unbox(made)["params"]}, meta=meta)
    return folder


def _write_prompts(path: str) -> str:
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(PROMPTS):
            words = rng.integers(0, 10**6, rng.integers(2, 8))
            text = f"{i} {' '.join(map(str, words))}"
            language = _LANGUAGES[i % len(_LANGUAGES)]
            file.write(json.dumps({"prompt": text, "language": language, "answer": "1"}) + "\n")
    return path


def _generate(runs: Sequence[str], prompts: str, folder: str) -> float:
    """Returns the seconds in which launch.generate writes the answers of all teachers."""
    from espalier.launch.inference.generate import generate_file
    from espalier.launch.load import load_run
    from espalier.trainers.decoding.settings import Sampling, Settings

    settings = Settings(max_new_tokens=NEW, sampling=Sampling(temperature=0.8, top_p=0.95))
    begin = time.perf_counter()
    for run in runs:
        output = os.path.join(folder, "generated.jsonl")
        options = {"settings": settings, "batch_size": BATCH, "checkpoint": run}
        generate_file(load_run.config_of(run), inputs=prompts, output=output, **options)
    return time.perf_counter() - begin


def _arbitrage(pool: str, prompts: str, out: str) -> float:
    """Returns the seconds of arbitrage by an exact reward."""
    from espalier.launch.aya_expanse.arbitrage import ArbitrageFlags, arbitrage
    from espalier.launch.aya_expanse.teachers import SamplingFlags
    from espalier.launch.prepare.best_of_n import RewardFlags

    flags = ArbitrageFlags(pool=pool, prompts=prompts, out=out, keep_cut=True, form="prompt")
    begin = time.perf_counter()
    with contextlib.redirect_stdout(None):
        arbitrage(
            flags,
            sampling=SamplingFlags(max_tokens=NEW),
            reward=RewardFlags(reward="exact_answer"),
        )
    return time.perf_counter() - begin
