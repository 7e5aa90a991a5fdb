"""Writes earlier_runs/: small runs of two steps each, and what two further steps of each give.

  JAX_PLATFORMS=cpu python tests/launch/goldens/make_earlier_runs.py

A later commit continues them, whatever it has moved or renamed. Write them again only after a change that is meant
to alter numbers or stored files, and say in the commit which and why. They are of the devices of tests/conftest.py.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = HERE / "earlier_runs"
STEPS = 4

_COMMON = (
    "TRAIN_STEPS=2",
    "BATCH_SIZE=8",
    "LOG_PERIOD=1",
    "CHECKPOINT_PERIOD=2",
    "LEARNING_RATE=0.01",
    "schedules.cosine.warmup_steps=0",
    "schedules.cosine.total_steps=8",
    "train.train.eval_tasks=()",
)
_SMALL = tuple(
    f"config.TransformerConfig.{name}={size}"
    for name, size in {
        "num_layers": 2,
        "embed_dim": 16,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "mlp_dim": 16,
    }.items()
)
_ROWS = ("TASK_FEATURE_LENGTHS={'targets': 48}",)
_DOCUMENTS = (
    *_ROWS,
    "VOCABULARY=@vocabularies.byte()",
    "FILES='documents.jsonl'",
    "VALIDATION_FRACTION=0.1",
    "MIXTURE_OR_TASK_NAME='files'",
)
_EXAMPLES = (
    "TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 24}",
    "EXAMPLES='examples.jsonl'",
    "EXAMPLES_VALIDATION_FRACTION=0.1",
    "TOKENIZER='bytes'",
    "MIXTURE_OR_TASK_NAME='examples'",
)

# Name of a run -> gin files, bindings. A run may begin with an earlier one.
RUNS = {
    "pretrain": (
        ("models/tiny", "data/files", "runs/pretrain"),
        (
            *_DOCUMENTS,
            *_SMALL,
            "config.TransformerConfig.vocab_size=264",
            "recipe.Recipe.ema_decay=0.9",
        ),
    ),
    "mixture": (
        ("models/tiny", "data/files", "runs/pretrain", "mixture.gin"),
        (*_DOCUMENTS, *_SMALL, "config.TransformerConfig.vocab_size=264"),
    ),
    "lora": (
        ("pretrain/config.gin", "data/files", "runs/pretrain", "methods/adapters/lora"),
        (*_DOCUMENTS, "INITIAL_CHECKPOINT_PATH='pretrain'", "LORA_RANK=2"),
    ),
    "tr_dpo": (
        ("pretrain/config.gin", "data/preferences", "runs/preference", "methods/preference/tr_dpo"),
        (
            *_ROWS,
            "INITIAL_CHECKPOINT_PATH='pretrain'",
            "TOKENIZER='bytes'",
            "PAIRS='pairs.jsonl'",
            "REFERENCE_PERIOD=3",
        ),
    ),
    "t5": (
        ("models/t5_tiny", "data/examples", "runs/pretrain"),
        (*_EXAMPLES, *_SMALL),
    ),
    "mov": (
        ("t5/config.gin", "data/examples", "runs/pretrain", "methods/mov/mov"),
        (
            *_EXAMPLES,
            "INITIAL_CHECKPOINT_PATH='t5'",
            "ADAPTER_EXPERTS=3",
            "ADAPTER_ROUTER_INPUT='sentence'",
        ),
    ),
    "prompt": (
        ("t5/config.gin", "data/examples", "runs/pretrain", "methods/adapters/prompt"),
        (
            *_EXAMPLES,
            "INITIAL_CHECKPOINT_PATH='t5'",
            "PROMPT_LENGTH=3",
            "PROMPT_FIRST_ID=300",
        ),
    ),
}


def place(folder):
    """Copies all runs into a folder, in which the models that they refer to are."""
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    for file in pathlib.Path(folder).glob("*/reference.json"):
        file.write_text(file.read_text().replace("FOLDER", str(folder)))


def continuation(name):
    """Returns the flags that continue a run, in the folder of all runs."""
    return [f"--gin_file={name}/config.gin", f"--gin.TRAIN_STEPS={STEPS}"]


def numbers(run):
    """Returns what the steps after the second one gave: digests of the checkpoint's arrays, and metrics."""
    from etils import epath

    from espalier.trainers.checkpoints import step_dir
    from espalier.trainers.telemetry.metric_writers import measures_time, read_jsonl

    manifest = step_dir.read_manifest(epath.Path(run) / "checkpoints" / str(STEPS))
    rows = [row for row in read_jsonl(f"{run}/metrics.jsonl") if row["step"] > 2]
    return {
        "arrays": {name: f"{x.digest:016x}" for name, x in manifest.arrays.items()},
        "metrics": [{k: v for k, v in row.items() if not measures_time(k)} for row in rows],
    }


def processor():
    """Returns a digest of what the processor can do: on another one, sums are in another order."""
    flags = re.findall(r"^flags\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return hashlib.sha256(" ".join(sorted(set(flags))).encode()).hexdigest()


def main():
    """Makes all runs, and what continuing them gives."""
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        for file in FOLDER.iterdir():
            if file.is_file():
                shutil.copy(file, folder)
        for name, (files, bindings) in RUNS.items():
            files = [x if x.endswith(".gin") else f"t5x_configs/{x}.gin" for x in files]
            bindings = [f"MODEL_DIR={name!r}", *_COMMON, *bindings]
            _train(folder, [f"--gin_file={x}" for x in files] + [f"--gin.{x}" for x in bindings])
            for extra in ("tensorboard", ".lock", "lifetime.json"):
                path = pathlib.Path(folder, name, extra)
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            shutil.copytree(pathlib.Path(folder, name), FOLDER / name)
            for file in (FOLDER / name).glob("reference.json"):
                file.write_text(file.read_text().replace(folder, "FOLDER"))
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        place(folder)
        expected = {}
        for name in RUNS:
            _train(folder, continuation(name))
            expected[name] = numbers(pathlib.Path(folder, name))
    written = {"processor": processor(), "runs": expected}
    (FOLDER / "expected.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")


def _train(folder, flags):
    script = (
        "import sys; import conftest; from espalier.launch import cli; "
        "sys.exit(cli.main('Trains.', entry='espalier.launch.train:train', argv=sys.argv[1:]))"
    )
    paths = f"{HERE.parents[2]}{os.pathsep}{HERE.parents[1]}"
    environment = {**os.environ, "PYTHONPATH": paths, "ESPALIER_CACHE": f"{folder}/cache"}
    environment["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/programs"
    subprocess.run([sys.executable, "-c", script, *flags], cwd=folder, env=environment, check=True)
    for name in ("cache", "programs"):
        shutil.rmtree(f"{folder}/{name}", ignore_errors=True)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[2]))
    main()
