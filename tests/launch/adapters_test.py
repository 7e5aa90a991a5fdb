"""A preference run that trains LoRA alone: the base model is its start and reference, and stays what it was."""

import json

import numpy as np
import pytest

from espalier.launch.convert import __main__ as convert
from espalier.launch.load import load_run
from espalier.model.adapters.adapter import is_adapter
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.telemetry.metric_writers import read_jsonl

RUN = """
from __gin__ import dynamic_registration
from espalier.data.tokenizers import vocabularies
include 't5x_configs/models/tiny.gin'
include 't5x_configs/data/preferences_base.gin'
include 't5x_configs/runs/preference.gin'
include 't5x_configs/methods/adapters/lora.gin'
VOCABULARY = @vocabularies.byte()
"""


@pytest.fixture(scope="module")
def flags(unrolled_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"prompt": f"{a} + {b} = ", "chosen": str(a + b), "rejected": str(a + b + 1)}
        for a in range(6)
        for b in range(6)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.gin").write_text(RUN)
    sizes = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16}
    bindings = (
        f"INITIAL_CHECKPOINT_PATH={unrolled_run.path!r}",
        f"PAIRS={str(folder / 'pairs.jsonl')!r}",
        "PAIRS_VALIDATION_FRACTION=0.3",
        "TASK_FEATURE_LENGTHS={'targets': 32}",
        "BATCH_SIZE=8",
        "TRAIN_STEPS=3",
        "WARMUP_STEPS=0",
        "LEARNING_RATE=1e-2",
        "LOG_PERIOD=1",
        "LORA_RANK=2",
        "LORA_ALPHA=3.0",
        "config.TransformerConfig.vocab_size=264",
        "config.TransformerConfig.scan_layers=False",
        *(f"config.TransformerConfig.{name}={size}" for name, size in sizes.items()),
    )
    return [f"--gin_file={folder / 'run.gin'}", *(f"--gin.{binding}" for binding in bindings)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--gin.LORA_RANK=17"], "the rank 17 is larger than the smaller side of its matrix [16, "),
        (["--gin.LORA_A_INIT=@jax.nn.initializers.zeros"], "a_init and b_init are both zeros"),
        (["--gin.LORA_LAYERS=['.*/nothing']"], "'.*/nothing' of its `layers` matches no layer"),
        (
            ["--gin_file=t5x_configs/methods/adapters/ia3.gin"],
            "would have two adapters, adapter.named.ia3 and adapter.named.lora",
        ),
    ],
)
def test_adapters_that_cannot_be_are_one_error(train, flags, tmp_path, more, words):
    result = train(*flags, *more, f"--gin.MODEL_DIR={str(tmp_path / 'run')!r}")
    assert result.status == 2 and words in result.err
    assert result.err.count("error:") == 1 and "Traceback" not in result.err


def test_a_preference_run_learns_adapters_against_its_base(train, flags, unrolled_run, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    result = train(*flags, f"--gin.MODEL_DIR={str(run)!r}")
    assert result.status == 0, result.err
    assert "adapter lora: Lora at 7 projections of one layer" in result.out
    losses = [row["loss"] for row in read_jsonl(f"{run}/metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[-1] < losses[0]
    ours, theirs = (
        step_dir.read_manifest(step_dir.resolve(path)).arrays for path in (run, unrolled_run.path)
    )
    base = {
        name: x for name, x in ours.items() if name.startswith("params/") and not is_adapter(name)
    }
    assert base and all(x.digest == theirs[name].digest for name, x in base.items())
    meta = step_dir.read_meta(run)
    assert meta["adapters"]["lora"]["alpha"] == 3.0
    # The run records where its base is.
    assert convert.main([f"--from={run}", f"--to_adapter={alone}"]) == 0
    assert step_dir.read_meta(alone)["adapters"] == meta["adapters"]
    restored = []
    for path in (run, alone):
        with load_run.config_of(str(path)).load(str(path)) as loaded:
            restored.append(loaded.params["layers"]["block_0"]["mlp"]["up"])
    np.testing.assert_array_equal(restored[0]["kernel"], restored[1]["kernel"])
    for name in ("lora_a", "lora_b"):
        np.testing.assert_array_equal(*(node["adapter_lora"][name] for node in restored))
    # Its adapters go on only with the same settings.
    more = [f"--gin.INITIAL_CHECKPOINT_PATH={str(alone)!r}", f"--gin.REFERENCE={str(alone)!r}"]
    other = train(*flags, *more, f"--gin.MODEL_DIR={str(tmp_path / 'b')!r}", "--gin.LORA_ALPHA=4.0")
    assert other.status == 2 and "alpha of adapter.named.lora is 3.0 there and 4.0" in other.err


def test_checkpoints_without_the_base_go_on_as_with_it(train, flags, unrolled_run, tmp_path):
    def run(name, *more):
        return train(
            *flags, "--gin.CHECKPOINT_PERIOD=2", *more, f"--gin.MODEL_DIR={str(tmp_path / name)!r}"
        )

    def arrays(name):
        return step_dir.read_manifest(step_dir.resolve(tmp_path / name)).arrays

    assert run("whole").status == 0
    apart = "--gin.BASE_APART=True"
    assert run("alone", apart).status == 0
    last = step_dir.resolve(tmp_path / "alone")
    step_dir.remove(last)  # as of a run that is stopped in its third update
    result = run("alone", apart)
    assert result.status == 0 and step_dir.resolve(tmp_path / "alone") == last, result.err
    whole, alone = arrays("whole"), arrays("alone")
    base = {name for name in whole if name.startswith("params/") and not is_adapter(name)}
    assert base and set(alone) == set(whole) - base
    assert all(x.digest == whole[name].digest for name, x in alone.items())
    with load_run.config_of(str(last)).load(str(last)) as loaded:
        up = loaded.params["layers"]["block_0"]["mlp"]["up"]
    assert set(up) == {"kernel", "adapter_lora"}

    moved = tmp_path / "alone" / "base.json"
    moved.write_text(json.dumps({"path": "/no/such/run"}))
    result = run("alone", apart)
    assert result.status == 2 and "/no/such/run is missing" in result.err
    moved.unlink()
    for name, more, words in (
        ("whole", (apart,), "BASE_APART was False there and is True now"),
        ("b", (apart, "--gin.TRAINED=['.*']"), "train all adapters and nothing else"),
        ("c", (apart, "--gin.INITIAL_CHECKPOINT_PATH=None"), "BASE_APART reads the base model"),
        ("d", (apart, "--gin.recipe.Recipe.ema_decay=0.9"), "moving averages"),
    ):
        result = run(name, *more)
        assert result.status == 2 and words in result.err, result.err
