"""Rows about configurations: wrong names, types and values, contradictions, and gin files that do not load."""

import functools
from collections.abc import Iterator

from tests.faults import calls, program
from tests.faults.table import Bench, Case, Row, Unclear

# Bindings -> what the error must name.
_BAD: dict[str, str] = {
    # names
    "TRAIN_STEP=8": "TRAIN_STEPS",
    "BATCHSIZE=8": "BATCH_SIZE",
    "recipe.Recipe.batchsize=8": "batch_size",
    "optimizers.adamv.b1=0.5": "adamw",
    "transformer.Block.mpl=@mlp.Mlp": "mlp",
    "recipe.Recipe.rules='fdsp'": "fsdp",
    "anomaly.Anomaly.action='halt'": "rollback",
    "stream.make_stream.packing='best'": "best_fit",
    "initial.InitialCheckpoint.scope='all'": "params",
    "config.TransformerConfig.remat='ful'": "full",
    "SCHEDULE=@schedules.cosin()": "cosine",
    "MIXTURE_OR_TASK_NAME='file'": "file",
    # types
    "TRAIN_STEPS=l00": "l00",
    "TRAIN_STEPS=1e3": "int",
    "TRAIN_STEPS='12'": "12",
    "TRAIN_STEPS=True": "True",
    "BATCH_SIZE=8.5": "8.5",
    "LEARNING_RATE='high'": "high",
    "TASK_FEATURE_LENGTHS={'targets': '64'}": "64",
    "TASK_FEATURE_LENGTHS=48": "48",
    "MESH={'fsdp': 'all'}": "all",
    "MESH=8": "8",
    "SCHEDULE=@schedules.cosine": "schedules.cosine",
    "MODEL=@config.TransformerConfig": "TransformerConfig",
    "train.train.hooks=[1]": "hooks",
    "SEED='zero'": "zero",
    # values
    "TRAIN_STEPS=0": "TRAIN_STEPS",
    "TRAIN_STEPS=-5": "TRAIN_STEPS",
    "BATCH_SIZE=0": "BATCH_SIZE",
    "BATCH_SIZE=-8": "BATCH_SIZE",
    "LOG_PERIOD=0": "LOG_PERIOD",
    "CHECKPOINT_PERIOD=-1": "CHECKPOINT_PERIOD",
    "EVAL_PERIOD=0": "EVAL_PERIOD",
    "EVAL_STEPS=0": "EVAL_STEPS",
    "LEARNING_RATE=-1.0": "-1",
    "LEARNING_RATE=1e400": "inf",
    "SEED=99999999999999999999": "99999999999999999999",
    "WARMUP_STEPS=50": "warmup_steps",
    "WARMUP_STEPS=-1": "warmup_steps",
    "config.TransformerConfig.num_heads=0": "num_heads",
    "config.TransformerConfig.num_heads=-2": "num_heads",
    "config.TransformerConfig.num_kv_heads=3": "num_kv_heads",
    "config.TransformerConfig.num_kv_heads=-2": "num_kv_heads",
    "config.TransformerConfig.head_dim=-16": "head_dim",
    "config.TransformerConfig.num_layers=0": "num_layers",
    "config.TransformerConfig.embed_dim=0": "embed_dim",
    "config.TransformerConfig.mlp_dim=-1": "mlp_dim",
    "config.TransformerConfig.vocab_size=0": "vocab_size",
    "config.TransformerConfig.vocab_size=100": "vocab_size",
    "config.TransformerConfig.dtype='float12'": "float12",
    "rope.Rope.base=0.0": "base",
    "rope.Rope.base=-1.0": "base",
    "optimizers.adamw.b1=1.5": "b1",
    "optimizers.adamw.b2=-0.1": "b2",
    "optimizers.adamw.weight_decay=-1.0": "weight_decay",
    "recipe.Recipe.ema_decay=1.5": "ema_decay",
    "recipe.Recipe.ema_decay=-0.1": "ema_decay",
    "recipe.Recipe.microbatches=3": "microbatches",
    "recipe.Recipe.microbatches=0": "microbatches",
    "anomaly.Anomaly.spike_sigmas=-1.0": "spike_sigmas",
    "anomaly.Anomaly.window=1": "window",
    "checkpoint.Checkpointer.keep_last=-1": "keep_last",
    "DOCUMENT_START=999": "999",
    "DOCUMENT_START=-1": "-1",
    "VALIDATION_FRACTION=2.0": "VALIDATION_FRACTION",
    "VALIDATION_FRACTION=-0.5": "VALIDATION_FRACTION",
    "TASK_FEATURE_LENGTHS={'targets': 0}": "0",
    "TASK_FEATURE_LENGTHS={'inputs': 8}": "targets",
    "TASK_FEATURE_LENGTHS={}": "TASK_FEATURE_LENGTHS",
    # contradictions
    "TRAIN_STEPS=None": "TRAIN_STEPS",
    "TRAIN_TOKENS=1000.0": "TRAIN_TOKENS",
    "TRAIN_STEPS=None  TRAIN_TOKENS=1e300": "TRAIN_TOKENS",
    "TRAIN_STEPS=None  TRAIN_TOKENS=-5.0": "TRAIN_TOKENS",
    "MESH={'data': 3}": "MESH",
    "MESH={'model': 1}": "tensor",
    "MESH={'fsdp': 0}": "MESH",
    "MESH={}  recipe.Recipe.rules='none'": "rule set",
    "stream.make_stream.batch_size=4": "batch",
    "stream.make_stream.task_feature_lengths={'targets': 32}": "32",
    "train.train.eval_tasks=('fils',)": "fils",
    "INITIAL_CHECKPOINT_PATH='/no/such/run'": "/no/such/run",
    "INITIAL_SCOPE='state'": "INITIAL",
    "checkpoint.Checkpointer.keep_best=2  checkpoint.Checkpointer.best_metric='los'": "los",
    "FILES='/no/such/*.jsonl'": "/no/such",
    "FILES=''": "files",
    "TEXT_KEY='txt'": "txt",
    "MODEL_DIR=''": "MODEL_DIR",
    "LEARNING_RATE=%LEARNING_RATE": "LEARNING_RATE",
    "LEARNING_RATE=%ABSENT": "ABSENT",
    "MODEL_DIR=null": "None",
    "mlp.GatedMlp.use_bias=1": "use_bias",
    "norm.RMSNorm.eps=1e-5": "norm.RMSNorm",
}


def _bindings(seed: int) -> Iterator[Case]:
    del seed
    for text, word in _BAD.items():
        yield Case(text, functools.partial(_binding, text, word))


def _binding(text: str, word: str, bench: Bench) -> None:
    run = bench.folder / "run"
    calls.refused("train", program.train_flags(bench, run, *text.split("  ")), word)
    # The names of metrics are known when the first step is saved.
    if (run / "checkpoints").exists() and "best_metric" not in text:
        raise Unclear("refused only after training had begun")


_HEAD = "from __gin__ import dynamic_registration\n"
_MODULES = f"{_HEAD}from espalier.trainers import recipe\nfrom espalier.model import mlp\nfrom espalier.launch import train\n"
_FILES: dict[str, tuple[str, str]] = {
    "no registration": ("import jax\n", "dynamic_registration"),
    "a module that is not there": (f"{_HEAD}from espalier.trainers import schedule\n", "schedule"),
    "a package that is not there": (f"{_HEAD}import no_such_package\n", "no_such_package"),
    "an import of a class": (f"{_HEAD}from espalier.model.mlp import Mlp\n", "modules"),
    "a name that is not there": (f"{_MODULES}mlp.GatedMLP.activation = 'silu'\n", "GatedMlp"),
    "an argument that is not there": (f"{_MODULES}recipe.Recipe.sed = 1\n", "seed"),
    "a module that is not imported": (f"{_HEAD}mlp.Mlp.use_bias = True\n", "mlp"),
    "a macro that nothing reads": (f"{_HEAD}DROPOUT = 0.1\n", "DROPOUT"),
    "a macro that is not set": (f"{_MODULES}recipe.Recipe.seed = %SED\n", "SED"),
    "a macro of itself": (f"{_MODULES}SEED = %SEED\n", "SEED"),
    "macros in a circle": (f"{_MODULES}SEED = %A\nA = %SEED\n", "leads back"),
    "no value": (f"{_HEAD}SEED = gelu\n", "gelu"),
    "an open string": (f"{_HEAD}SEED = 'open\n", ":2"),
    "an open list": (f"{_HEAD}SEED = [1, 2\nBATCH_SIZE = 8\n", ":2"),
    "two equals signs": (f"{_HEAD}SEED = = 2\n", ":2"),
    "an include that is not there": (f"{_HEAD}include 'no_such.gin'\n", "no_such.gin"),
    "an include of itself": (f"{_HEAD}include 'x.gin'\n", "x.gin"),
    "a wrong type": (f"{_MODULES}recipe.Recipe.seed = 'one'\n", "seed"),
    "code": (f"{_HEAD}SEED = __import__('os').system('true')\n", ":2"),
    "a call of a private function": (f"{_MODULES}train._check_lengths.x = 1\n", "_check_lengths"),
    "a constant bound": (f"{_MODULES}mlp.Arrays.x = 1\n", "mlp"),
    "not text": (f"{_HEAD}SEED = '\udcff'\n", "x.gin"),
    "NUL": (f"{_HEAD}SEED = 1\0\n", "x.gin"),
    "5,000 nested lists": (f"{_HEAD}SEED = {'[' * 5000}{']' * 5000}\n", "x.gin"),
    "a scope that nothing uses": (f"{_MODULES}a/recipe.Recipe.seed = 1\n", "recipe.Recipe.seed"),
}


def _gin_files(seed: int) -> Iterator[Case]:
    del seed
    for name, (text, word) in _FILES.items():
        yield Case(name, functools.partial(_gin_file, text, word))


def _gin_file(text: str, word: str, bench: Bench) -> None:
    path = bench.folder / "x.gin"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    flags = program.train_flags(bench, bench.folder / "run", "TRAIN_STEPS=1")
    flags.insert(3, f"--gin_file={path}")
    flags.append(f"--gin_search_paths={bench.folder}")
    calls.refused("train", flags, word)
    if (bench.folder / "run" / "checkpoints").exists():
        raise Unclear("refused only after training had begun")


ROWS = (
    Row(
        12,
        "configurations: unknown names, wrong types and values, contradictions",
        "one error that names the setting, status 2, before training",
        _bindings,
        sample=4,
    ),
    Row(
        13,
        "gin files: unused, unknown, circular or damaged statements",
        "one error that names file, line or statement",
        _gin_files,
        sample=4,
    ),
)
