"""An encoder-decoder from the command line: trained on corrupted texts, cut short, continued, scored and evaluated."""

import json

import numpy as np
import pytest
from etils import epath

from espalier.data.tasks import in_seqio
from espalier.trainers import signals
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.telemetry.metric_writers import read_jsonl

SMALL = (
    "config.TransformerConfig.num_layers=1",
    "config.TransformerConfig.embed_dim=16",
    "config.TransformerConfig.num_heads=2",
    "config.TransformerConfig.head_dim=4",
    "config.TransformerConfig.mlp_dim=16",
    "config.TransformerConfig.vocab_size=280",
    "DROPOUT_RATE=0.1",
)
TEXTS = [
    "def f(x):\n    return x\n",
    "import os\n",
    "naïve text, twice as long as the others\n",
] * 4


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """Trains on TEXTS; returns the result of `train`."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("train", "held_out"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
        (folder / f"{name}.jsonl").write_text(lines)

    def start(path, *bindings, steps=4, status=0):
        given = (
            f"MODEL_DIR={str(path)!r}",
            f"FILES='{folder}/train.jsonl'",
            f"VALIDATION_FILES='{folder}/held_out.jsonl'",
            "MIXTURE_OR_TASK_NAME='files'",
            "VOCABULARY=@vocabularies.byte()",
            "vocabularies.byte.extra_ids=20",
            "TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 12}",
            "BATCH_SIZE=8",
            f"TRAIN_STEPS={steps}",
            "EVAL_PERIOD=4",
            "EVAL_STEPS=1",
            "LOG_PERIOD=1",
            *SMALL,
            *bindings,
        )
        result = train(
            *(f"--gin_file=t5x_configs/{name}.gin" for name in ("models/t5_tiny", "data/files")),
            "--gin_file=t5x_configs/runs/denoise.gin",
            *(f"--gin.{binding}" for binding in given),
        )
        assert result.status == status, result.err
        return result

    return start


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def of_step(path, step):
    return step_dir.read_manifest(epath.Path(path) / "checkpoints" / str(step)).arrays


def losses(path):
    return [
        (row["step"], row["loss"]) for row in read_jsonl(f"{path}/metrics.jsonl") if "loss" in row
    ]


def test_a_run_that_is_cut_short_ends_as_one_that_is_not(run, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(signals.StopRequest, "reached", lambda self, step: step == 2)
    run(tmp_path, status=75)
    monkeypatch.undo()
    run(tmp_path)
    assert of_step(tmp_path, 4) == of_step(whole, 4)
    assert losses(tmp_path) == losses(whole) and len(losses(whole)) == 4
    (evaluated,) = (row for row in read_jsonl(f"{whole}/metrics.jsonl") if "eval/files/loss" in row)
    assert np.isfinite(evaluated["eval/files/loss"])


def test_too_few_sentinels_are_an_error(run, tmp_path):
    result = run(tmp_path, "vocabularies.byte.extra_ids=1", status=2)
    assert "A row needs 2 sentinels, but the vocabulary has 1" in result.err


def test_continuations_scores_and_tasks_agree(whole, command, tmp_path):
    from espalier.data import cpu_tensorflow
    from espalier.data.tokenizers import vocabularies

    cpu_tensorflow.load()
    seqio = in_seqio()
    import tensorflow as tf

    inputs = ["os.path", "a much longer input than the other one"]
    source, made = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    source.write_text("".join(json.dumps({"inputs": text}) + "\n" for text in inputs))
    flags = [f"--checkpoint={whole}", "--max_new_tokens=6", "--temperature=0"]
    assert command("generate", *flags, f"--inputs={source}", f"--output={made}") == 0
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == inputs

    pairs = [{"inputs": row["prompt"], "targets": row["tokens"]} for row in rows]
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = [f"--checkpoint={whole}", f"--inputs={source}", f"--output={made}"]
    assert command("score", *flags) == 0
    scored = [json.loads(line) for line in made.read_text().splitlines()]
    for row, again in zip(rows, scored, strict=True):
        np.testing.assert_allclose(row["logprobs"], again["logprobs"], atol=1e-4)

    vocabulary = vocabularies.byte(extra_ids=20)
    features = {"inputs": seqio.Feature(vocabulary), "targets": seqio.Feature(vocabulary)}
    texts = {"inputs": inputs, "targets": ["x", "y"]}

    def same(targets, predictions):
        return {"same": float(predictions == [row["text"] for row in rows])}

    def lowest(targets, scores):
        return {"lowest": min(scores)}

    seqio.TaskRegistry.add(
        "encoded",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(texts),
            splits=("validation",),
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=features,
        metric_fns=[same, lowest],
    )
    try:
        flags = [f"--checkpoint={whole}", "--task=encoded", "--max_new_tokens=6"]
        assert command("evaluate seqio", *flags, f"--json={made}") == 0
    finally:
        seqio.TaskRegistry.remove("encoded")
    metrics = json.loads(made.read_text())["tasks"]["encoded"]["metrics"]
    assert metrics["same"] == 1.0 and metrics["lowest"] < 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_policy=snapkv", "--cache=window=8"], "remove cache_policy (SnapKV)"),
        (["--cache_policy=streaming_llm"], "remove cache_policy (StreamingLLM)"),
        (["--prefill_chunk=8"], "reads its inputs whole: remove prefill_chunk"),
        (["--token_healing"], "whose last token stays: remove token_healing"),
    ],
)
def test_settings_of_prompts_are_refused(whole, command, capsys, flags, message):
    run = [f"--checkpoint={whole}", "--prompt=os.path", "--max_new_tokens=2"]
    assert command("generate", *run, *flags) == 2
    assert message in capsys.readouterr().err


def test_its_whole_cache_is_narrowed(whole, command, capsys):
    def cache_bytes(*flags):
        run = [f"--checkpoint={whole}", "--prompt=os.path", "--max_new_tokens=2"]
        assert command("generate", *run, *flags) == 0
        said = capsys.readouterr().err
        return int(said.rpartition(") ")[2].partition(" bytes")[0].replace(",", ""))

    # A float32 scale for 4 numbers of a head: half of the bytes; both caches, and what is neither.
    assert cache_bytes("--cache_dtype=int8") < 0.6 * cache_bytes()


def test_the_harness_refuses_settings_of_prompts_before_it_asks(whole):
    from espalier.launch.lm_eval.model import EspalierLM

    with pytest.raises(ValueError, match=r"remove cache_policy \(SnapKV\)"):
        EspalierLM(checkpoint=str(whole), cache_policy="snapkv")
    with pytest.raises(ValueError, match="remove prefill_chunk"):
        EspalierLM(checkpoint=str(whole), prefill_chunk=4)


def test_commands_of_decoders_refuse_it(whole, command, capsys, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "os.path"}\n')
    files = [f"--inputs={tmp_path}/x.jsonl", f"--output={tmp_path}/y.jsonl"]
    assert command("score", f"--checkpoint={whole}", *files) == 2
    assert 'an encoder-decoder scores "targets" after "inputs"' in capsys.readouterr().err
