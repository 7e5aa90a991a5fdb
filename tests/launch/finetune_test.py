"""An imported model is fine-tuned on conversations and then on preferences, by the documented commands, and answers."""

import functools
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.data.cache import store
from espalier.launch.load import load_run
from espalier.launch.load.load import load
from espalier.launch.preference import reference
from espalier.trainers import signals
from espalier.trainers.checkpoints import array_files, state_tree, step_dir
from espalier.trainers.telemetry.metric_writers import read_jsonl

GOLDENS = pathlib.Path(__file__).parents[1] / "data" / "goldens"
GOLDEN = json.loads((GOLDENS / "sft.json").read_bytes())
TEMPLATE = (GOLDENS / "chat_templates" / "cohere.jinja").read_text("utf-8")
# As in the config.gin of a run whose tasks a module of one's own registers.
OWN_MODULE = """
from __gin__ import dynamic_registration
from espalier.data.text import user_data
MIXTURES_MODULE = 'a_module_that_is_gone'
TASKS = [@user_data.import_mixtures]
user_data.import_mixtures.module = %MIXTURES_MODULE
"""


def messages(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture
def imported(folder, command):
    run = folder / "run"
    if not run.exists():
        model = runpy.run_path(str(GOLDENS / "sft_model.py"))
        model["write"](folder / "hf", GOLDEN["tokenizer"], TEMPLATE)
        assert command("convert", f"--from_hf={folder / 'hf'}", f"--to={run}") == 0
    return run


def start(train, imported, *files, path, **settings):
    settings |= {
        "TOKENIZER": f"{imported}/tokenizer",
        "INITIAL_CHECKPOINT_PATH": f"{imported}",
        "MODEL_DIR": f"{path}",
        "LOG_PERIOD": 1,
        "WARMUP_STEPS": 0,
    }
    flags = [f"--gin.{name}={value!r}" for name, value in settings.items()]
    return train(*(f"--gin_file={file}" for file in (imported / "config.gin", *files)), *flags)


@pytest.fixture
def tune(train, imported, folder):
    """Trains three epochs in a directory, or what is left of them."""
    rows = [{"messages": messages(f"{i}+{i}?", f"{2 * i}", "sure?", "yes")} for i in range(30)]
    rows[9:9] = [
        {"messages": messages("alone")},
        {"messages": messages("x" * 30, "y" * 60)},
        {"messages": messages("z" * 90, "y")},
    ]
    return functools.partial(
        start,
        train,
        imported,
        *("t5x_configs/data/chat.gin", "t5x_configs/runs/finetune.gin"),
        CHATS=str(write(folder / "chats.jsonl", rows)),
        CHATS_VALIDATION_FRACTION=0.1,
        TASK_FEATURE_LENGTHS={"targets": 64},
        BATCH_SIZE=8,
        LEARNING_RATE=1e-2,
    )


@pytest.fixture
def tuned(tune, folder):
    """A run of three epochs, and what it printed."""
    run = folder / "sft"
    if not run.exists():
        result = tune(path=run)
        assert result.status == 0, result.err
        (folder / "out").write_text(result.out)
    return run, (folder / "out").read_text()


def test_one_command_learns_conversations_and_counts_them(tuned):
    run, out = tuned
    rows = [row for row in read_jsonl(f"{run}/metrics.jsonl") if "loss" in row]
    facts = json.loads((run / "run.json").read_text())
    task, source = facts["tasks"]["chats"], facts["data"]["sources"]["chats"]
    assert task["documents"] == {"train": 29, "validation": 3}
    assert task["dropped"]["no_assistant"] == {"rows": 1, "first": "chats.jsonl:10"}
    assert source["truncated"] == 1 and source["nothing_learnt"] == 1
    assert len(rows) == -(-3 * source["rows"] // 8)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert facts["data"]["start_token"] is None
    tokens, learnt = source["tokens"], source["loss_tokens"]
    line = (
        f"chats: 28 conversations in {source['rows']} rows, {tokens:,} tokens, of which {learnt:,}"
    )
    assert f"chats      {line}" in out
    assert "1 cut at their ends (first: chats.jsonl:11)" in out
    assert "1 dropped, of which nothing that is learnt remains (first: chats.jsonl:12)" in out


def test_a_stopped_run_goes_on_exactly(tuned, tune, tmp_path, monkeypatch):
    run, _ = tuned
    monkeypatch.setattr(signals.StopRequest, "reached", lambda self, step: step == 4)
    assert tune(path=tmp_path).status == 75
    monkeypatch.undo()
    result = tune(path=tmp_path)
    assert result.status == 0 and "step 4 from" in result.out, (result.out, result.err)
    manifests = [step_dir.read_manifest(step_dir.resolve(str(path))) for path in (tmp_path, run)]
    assert manifests[0].arrays == manifests[1].arrays


def test_the_held_out_share_is_evaluated_in_training_and_after_it(tuned, command, tmp_path):
    run, _ = tuned
    flags = (f"--checkpoint={run}", "--trust_config", f"--json={tmp_path / 'x.json'}")
    assert command("evaluate loss", *flags) == 0
    loss = json.loads((tmp_path / "x.json").read_text())["tasks"]["chats"]["loss"]
    *_, last = (row for row in read_jsonl(f"{run}/metrics.jsonl") if "eval/chats/loss" in row)
    assert loss == pytest.approx(last["eval/chats/loss"], abs=1e-5)


def test_a_prompt_has_the_tokens_of_training(tuned, imported):
    run, _ = tuned
    directory = json.loads((run / "run.json").read_text())["data"]["sources"]["chats"]["cache"]
    column = store.open_cache(directory).columns
    for path in (run, imported):
        meta = step_dir.read_meta(path)
        assert meta["start_token"] is None and meta["add_bos"] is True
        with load_run.config_of(str(path)).load(str(path)) as loaded:
            row = {"messages": messages("3+3?", "6", "sure?", "yes")}
            context, targets = loaded.scored(row, "here")
            prompt = loaded.context(context)
            assert (
                loaded.context(loaded.tokens({"messages": row["messages"][:3]}, "here")) == prompt
            )
    ids = [
        (column["targets"].values(i).tolist(), column["loss_weights"].values(i).tolist())
        for i in range(len(column["targets"].lengths))
    ]
    whole, weights = next(x for x in ids if x[0] == [*prompt, *targets])
    assert weights[len(prompt) :] == [1.0] * len(targets) and weights[len(prompt) - 1] == 0
    assert whole[0] == loaded.vocabulary.bos_id and whole.count(whole[0]) == 1  # from the template


@pytest.fixture
def pairs(folder):
    rows = [
        {
            "prompt": messages(f"{i}?"),
            "chosen": messages("a", f"{i}")[1:],
            "rejected": messages("a", "no")[1:],
        }
        for i in range(8)
    ]
    return write(folder / "pairs.jsonl", rows)


@pytest.fixture
def narrow(folder, imported, command):
    """An import in bfloat16."""
    run = folder / "narrow"
    if not run.exists():
        flags = (f"--from_hf={folder / 'hf'}", f"--to={run}", "--dtype=bfloat16")
        assert command("convert", *flags) == 0
    return run


LITTLE = {
    "CHATS_VALIDATION_FRACTION": 0.1,
    "TRAIN_EPOCHS": None,
    "TRAIN_STEPS": 3,
    "LEARNING_RATE": 1e-5,
}
LORA = "t5x_configs/methods/adapters/lora.gin"


def little(train, narrow, folder, path, *files, **settings):
    """A few updates of an import on conversations."""
    rows = [{"messages": messages(f"{i}+{i}?", f"{2 * i}")} for i in range(20)]
    rows[2:2] = [{"messages": messages("x" * 30, "y" * 60)}]  # longer than a row
    settings = {
        "CHATS": str(write(folder / "few.jsonl", rows)),
        "TASK_FEATURE_LENGTHS": {"targets": 64},
        "BATCH_SIZE": 8,
        **LITTLE,
        **settings,
    }
    of_run = ("t5x_configs/data/chat.gin", "t5x_configs/runs/finetune.gin", *files)
    return start(train, narrow, *of_run, path=path, **settings)


def arrays(path, which="params/"):
    """Parameters as they are saved."""
    step = step_dir.resolve(str(path))
    entries = {n: e for n, e in step_dir.read_manifest(step).arrays.items() if n.startswith(which)}
    like = {n: np.zeros(e.shape, jnp.dtype(e.dtype)) for n, e in entries.items()}
    like = {n: jax.device_put(x) for n, x in like.items()}
    return {n: np.asarray(x) for n, x in array_files.read_arrays(step, like).items()}


def test_a_bfloat16_import_is_trained_in_float32_and_read_without_rounding(
    train, narrow, folder, command, monkeypatch
):
    run = folder / "wide"
    monkeypatch.setattr(signals.StopRequest, "reached", lambda self, step: step == 1)
    stopped = little(train, narrow, folder, run)
    assert stopped.status == 75, stopped.err
    assert (
        "dtype      the parameters are stored in float32, not in the model's bfloat16"
        in stopped.out
    )
    monkeypatch.undo()
    # Its own record continues it, as the command does.
    result = train(f"--gin_file={run}/config.gin")
    assert result.status == 0 and "step 1 from" in result.out, (result.out, result.err)
    assert "dtype  " not in result.out
    before, after = arrays(narrow), arrays(run)
    assert {x.dtype.name for x in after.values()} == {"float32"}
    moved = sum(int((after[n] != before[n].astype(np.float32)).sum()) for n in after)
    assert moved > 0.99 * sum(x.size for x in after.values())
    loaded = load(run)
    assert loaded.model.config.param_dtype == "float32"
    for name, values in state_tree.flatten({"params": loaded.params}).items():
        np.testing.assert_array_equal(values, after[name])
    flags = (f"--checkpoint={run}", "--trust_config", f"--json={folder / 'wide.json'}")
    assert command("evaluate loss", *flags) == 0
    loss = json.loads((folder / "wide.json").read_text())["tasks"]["chats"]["loss"]
    *_, last = (row for row in read_jsonl(f"{run}/metrics.jsonl") if "eval/chats/loss" in row)
    assert loss == pytest.approx(last["eval/chats/loss"], abs=1e-6)
    for dtype in ("float32", "bfloat16"):
        flags = (f"--from={run}", f"--to_hf={folder / dtype}", f"--dtype={dtype}")
        assert command("convert", *flags) == 0
        assert json.loads((folder / dtype / "config.json").read_text())["torch_dtype"] == dtype


def test_adapters_leave_a_bfloat16_base_as_it_is(train, narrow, folder, monkeypatch):
    run, apart = folder / "lora", folder / "apart"
    result = little(train, narrow, folder, run, LORA, LEARNING_RATE=1e-3)
    assert result.status == 0, result.err
    assert "dtype  " not in result.out and "WARNING" not in result.out
    assert load(run).model.config.param_dtype == "bfloat16"
    before, after = arrays(narrow), arrays(run)
    for name, values in before.items():
        # Norms are float32 in every model.
        dtype = jnp.dtype("float32" if name.endswith("norm/scale") else "bfloat16")
        assert after[name].dtype == dtype
        np.testing.assert_array_equal(after[name], values.astype(dtype))
    adapters = {n: x for n, x in after.items() if n not in before}
    assert adapters and {x.dtype.name for x in adapters.values()} == {"float32"}
    assert all(x.any() for x in adapters.values())
    # The same without the base in the checkpoints, which is read in the dtypes of the model, and resumed.
    monkeypatch.setattr(signals.StopRequest, "reached", lambda self, step: step == 1)
    result = little(train, narrow, folder, apart, LORA, LEARNING_RATE=1e-3, BASE_APART=True)
    assert result.status == 75, result.err
    monkeypatch.undo()
    result = little(train, narrow, folder, apart, LORA, LEARNING_RATE=1e-3, BASE_APART=True)
    assert result.status == 0 and "step 1 from" in result.out, result.err
    found = arrays(apart)
    assert found.keys() == adapters.keys()
    for name, values in adapters.items():
        np.testing.assert_array_equal(found[name], values)
    whole, parts = (state_tree.flatten(load(path).params) for path in (run, apart))
    for name, values in whole.items():
        np.testing.assert_array_equal(values, parts[name])


def test_a_run_may_keep_bfloat16_by_name(train, narrow, folder, tmp_path):
    rounding = {"recipe.Recipe.rounding": "stochastic"}
    result = little(train, narrow, folder, tmp_path / "a", **rounding)
    assert result.status == 0, result.err
    assert "dtype      bfloat16 parameters, whose updates are rounded stochastically" in result.out
    rounding = {"recipe.Recipe.rounding": "nearest"}
    result = little(train, narrow, folder, tmp_path / "b", **rounding, TRAIN_STEPS=1)
    assert result.status == 0 and "WARNING    updates of narrow parameters" in result.out
    # A run that began in bfloat16 is refused, by the name of what continues it, and then goes on.
    result = little(train, narrow, folder, tmp_path / "b")
    assert result.status == 2 and "Recipe.rounding = 'nearest' goes on so" in result.err
    result = little(train, narrow, folder, tmp_path / "b", **rounding)
    assert result.status == 0 and "step 1 from" in result.out, result.err


def test_the_losses_and_the_lengths_of_t5x_have_their_names(train, imported, folder, tmp_path):
    settings = {
        "LOSS_NORMALIZING_FACTOR": "AVERAGE_PER_SEQUENCE",
        "LABEL_SMOOTHING": 0.1,
        "Z_LOSS": 1e-4,
        "LONG_DOCUMENTS": "drop",
        "TRAIN_STEPS": 1,
    }
    result = little(train, imported, folder, tmp_path / "run", **settings)
    assert result.status == 0, result.err
    assert "1 dropped, which are longer (first: few.jsonl:3)" in result.out
    row, *_ = (row for row in read_jsonl(f"{tmp_path}/run/metrics.jsonl") if "loss" in row)
    assert row["z_loss"] > 0 and 0 < row["loss_per_sequence"] != row["loss"]
    result = little(train, imported, folder, tmp_path / "a", LOSS_NORMALIZING_FACTOR=233472)
    assert result.status == 2 and "NUM_TOTAL_TARGET_TOKENS" in result.err
    # An objective without such a loss does not read them.
    student = "t5x_configs/methods/distillation/distillation.gin"
    given = {"TEACHER": str(imported), "LABEL_SMOOTHING": 0.1}
    result = little(train, imported, folder, tmp_path / "b", student, **given)
    assert result.status == 2 and "LABEL_SMOOTHING" in result.err, result.err


DPO = ("t5x_configs/data/preferences.gin", "t5x_configs/runs/preference.gin")


def test_the_documented_preference_run_begins_as_the_imported_model(
    train, imported, tuned, pairs, folder, command, monkeypatch
):
    settings = {
        "PAIRS": str(pairs),
        "PAIRS_VALIDATION_FRACTION": 0.0,
        "TRAIN_STEPS": 1,
        "BATCH_SIZE": 8,
        "TASK_FEATURE_LENGTHS": {"targets": 64},
    }
    own = folder / "own.gin"
    own.write_text(OWN_MODULE)
    run = folder / "dpo"
    # After the config.gin of a run that has a budget in epochs and tasks of a module that no longer exists.
    files = (f"{tuned[0]}/config.gin", own, *DPO)
    result = start(train, imported, *files, path=run, **settings)
    assert result.status == 0, result.err
    meta = step_dir.read_meta(run)
    assert meta["start_token"] is None and meta["add_bos"] is True
    assert load_run.config_of(str(run)).vocabulary().bos_id == 1
    assert command("convert", f"--from={run}", f"--to_hf={folder / 'exported'}") == 0
    assert (folder / "exported" / "tokenizer.json").exists()

    def unasked(*_, **__):
        raise AssertionError("log-probabilities are computed before the check")

    monkeypatch.setattr(reference, "Scorer", unasked)
    for name, value in (("DOCUMENT_START", 0), ("PROMPT_BOS", False)):
        path = folder / f"dpo_{name}"
        for live in ((), ("t5x_configs/methods/preference/reference_live.gin",)):
            other = start(train, imported, *DPO, *live, path=path, **settings, **{name: value})
            assert other.status == 2 and f"set {name} = {meta[_KEYS[name]]}" in other.err
            assert "REFERENCE: documents of" in other.err


_KEYS = {"DOCUMENT_START": "start_token", "PROMPT_BOS": "add_bos"}
