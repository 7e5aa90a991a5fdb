"""`espalier train` from gin to checkpoint on real text, its numbers, and what it says to bad input."""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import runpy
import types

import flax.linen as nn
import pytest

from espalier.common import stages
from espalier.data import tasks
from espalier.launch.run import run_messages
from espalier.model.config import TransformerConfig
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.transformer import Block, Transformer
from espalier.trainers.initialise import abstract_variables
from espalier.trainers.inputs import PackedTokens
from espalier.trainers.recipe import Program
from espalier.trainers.telemetry.metric_writers import read_jsonl
from tests import transcripts

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FILES = ("models/tiny", "data/files", "runs/pretrain")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sources of the Python standard library as JSON lines."""
    library = pathlib.Path(os.__file__).parent
    path = tmp_path_factory.mktemp("text") / "library.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for name in ("abc", "bisect", "heapq", "keyword", "queue", "sched", "stat", "textwrap"):
            source = (library / f"{name}.py").read_text(encoding="utf-8")
            for start in range(0, min(len(source), 12_000), 1000):
                file.write(json.dumps({"text": source[start : start + 1000]}) + "\n")
    return path


@pytest.fixture(scope="module")
def flags(text):
    """Flags of a tiny run over the text; more bindings win."""

    def make(path, *bindings, files=FILES, data=text):
        given = (
            f"MODEL_DIR={str(path)!r}",
            f"FILES={str(data)!r}",
            "VALIDATION_FRACTION=0.1",
            "VOCABULARY=@vocabularies.byte()",
            "MIXTURE_OR_TASK_NAME='files'",
            "TASK_FEATURE_LENGTHS={'targets': 64}",
            "BATCH_SIZE=16",
            "TRAIN_STEPS=40",
            "WARMUP_STEPS=4",
            "LEARNING_RATE=1e-2",
            "EVAL_PERIOD=20",
            "EVAL_STEPS=2",
            "CHECKPOINT_PERIOD=20",
            # Tests over other files of the same name each build their own cache.
            "stream.make_stream.changed_cache='build'",
            "stream.make_eval_stream.changed_cache='build'",
        )
        return [
            *(f"--gin_file=t5x_configs/{file}.gin" for file in files),
            *(f"--gin.{binding}" for binding in (*given, *bindings)),
        ]

    return make


@pytest.fixture(scope="module")
def trained(train, flags, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    result = train(*flags(path))
    assert result.status == 0, result.err
    return path, result


# ---- A run.


def test_a_start_describes_itself_before_it_restores_and_compiles(
    train, flags, command, tmp_path, monkeypatch
):
    """The log of a real command: a header first, and every stage."""

    class Spoken(list):
        """Says each stage when it begins: a thread that waits for silence may miss a short one."""

        def append(self, newest):
            super().append(newest)
            stages._say(newest)

    monkeypatch.setattr(stages, "_stages", Spoken())
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            given = ("TRAIN_STEPS=2", "EVAL_PERIOD=2", "EVAL_STEPS=1", "WARMUP_STEPS=1")
            assert command("train", *flags(tmp_path, *given)) == 0
    finally:
        tasks.clear()
    lines = log.getvalue().splitlines()
    assert lines[0].endswith("train: starting")
    begins = (
        *("reading the configuration, ", "opening the data, ", "mesh  ", "parameters ", "data  "),
        *("compiling the step, ", "start  ", "estimate ", "training, ", "done at step 2"),
    )
    places = [next(i for i, x in enumerate(lines) if x.startswith(begin)) for begin in begins]
    assert places == sorted(places)
    # "compiling" is said with the time that it takes.
    assert re.fullmatch(r"compiling the step, \d+ s", lines[places[5]])
    assert "training, 0 of 2 updates made, 0 s" in lines


@pytest.mark.smoke
def test_loss_falls_on_real_text(trained):
    path, _ = trained
    rows = read_jsonl(f"{path}/metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(losses) == [1, 10, 20, 30, 40]
    # An untrained model knows nothing of 384 rows; text in bytes has about 4.5 bits by frequency
    # alone (3.1 nats), which is what a few dozen steps learn.
    assert losses[1] == pytest.approx(5.95, abs=0.1)
    assert losses[40] < 3.5
    held_out = [row["eval/files/loss"] for row in rows if "eval/files/loss" in row]
    assert len(held_out) == 2 and held_out[1] < held_out[0] < 5


def test_a_run_says_what_it_will_do_and_did(trained):
    path, result = trained
    lines = dict(re.findall(r"^(\w+) +(.*)$", result.out, re.MULTILINE))
    assert (
        lines["mesh"] == "data 1 x fsdp 8 x expert 1 x context 1 x tensor 1 (8 x cpu), rules fsdp"
    )
    assert lines["parameters"] == "123,072, of which 123,072 are trained"
    fill = json.loads((path / "run.json").read_text())["data"]["sources"]["files"]["fill"]
    assert 0.5 < fill <= 1
    assert lines["tokens"] == (
        f"1,024 positions a step, about {1024 * fill:,.0f} tokens ({fill:.0%} full); 40,960 positions in 40 steps"
    )
    assert lines["start"] == "new parameters, step 0"
    assert lines["estimate"].startswith("about ")
    assert f"done at step 40; the run is in {path}" in result.out
    # Parts of less than half a second are not named; making the state can be one where its program is compiled already.
    assert re.search(r"time: init .*; \d+% in steps", result.out)
    parts = {"time/init": 2.0, "time/restore": 61.0, "time/data": 0.4, "time/goodput": 0.5}
    goodput = types.SimpleNamespace(metrics=lambda: parts)
    assert run_messages.time_split(goodput) == "time: init 2 s, state 61 s; 50% in steps"


@pytest.mark.parametrize("page", transcripts.pages())
def test_pages_show_what_a_run_prints_in_its_order(trained, page):
    _, result = trained
    order = list(dict.fromkeys(transcripts.stages(result.out)))
    assert " ".join(order) == (
        "mesh parameters data tokens epochs start estimate step held done loss time life read"
    )
    for block in transcripts.transcripts(page):
        omitted = transcripts.omitted_stages(block, order)
        assert not omitted, (
            f"{page}:{block.line}: a run also prints lines that begin with {', '.join(omitted)}: show them, "
            f"or a line '...' in their place. The order is {', '.join(order)}."
        )
        other = transcripts.other_words(block, result.out)
        assert not other, (
            f"{page}:{block.line}: a run's lines do not have the words {', '.join(other)}: show what it prints today"
        )


def test_losses_are_lines_where_there_is_no_terminal(trained):
    path, result = trained
    rows = read_jsonl(f"{path}/metrics.jsonl")
    trained_losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    held_out = {row["step"]: row["eval/files/loss"] for row in rows if "eval/files/loss" in row}
    lines = result.out.splitlines()
    for step, loss in held_out.items():
        assert any(x.startswith(f"held out at step {step}: files {loss:.3f} (") for x in lines)
    row = re.compile(
        rf"step 30 of 40  loss {trained_losses[30]:.3f}  held out {held_out[20]:.3f}  [\d,]+ tokens/s  ETA \d+ s"
    )
    assert sum(bool(row.fullmatch(line)) for line in lines) == 1
    assert [x for x in lines if x.startswith("step 1 of")] == [
        f"step 1 of 40  loss {trained_losses[1]:.3f}"
    ]
    (closing,) = (line for line in lines if line.startswith("loss: "))
    assert closing.startswith(
        f"loss: training {trained_losses[40]:.3f}; held out files {held_out[40]:.3f} ("
    )
    assert closing.endswith("bits per byte) nats per token")
    assert "\r" not in result.out + result.err


def test_a_run_leaves_its_record(trained):
    path, _ = trained
    for name in ("config.gin", "operative_config.gin", "parameters.txt", "tensorboard"):
        assert (path / name).exists()
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["20", "40"]
    facts = json.loads((path / "run.json").read_text())
    assert facts["parameters"] == 123_072
    assert facts["mesh"]["axes"] == {
        "data": 1,
        "fsdp": 8,
        "expert": 1,
        "context": 1,
        "tensor": 1,
    }
    assert facts["data"]["sources"]["files"]["long_records"] > 50
    assert facts["tasks"]["files"]["documents"]["train"] > 50 and facts["corpora"] == {}
    assert facts["data_fingerprint"] == facts["data"]["fingerprint"]
    row = [row for row in read_jsonl(f"{path}/metrics.jsonl") if "loss" in row][-1]
    assert row["source_loss/files"] == pytest.approx(row["loss"], rel=1e-5)
    assert row["tokens_per_second"] > 0 and row["model_flops_per_second"] > 0
    assert "mfu" not in row  # nobody knows this CPU's peak
    parts = ("init", "compile", "data_wait", "step", "checkpoint", "evaluation", "other")
    assert all(row[f"time/{part}"] >= 0 for part in parts)
    # Programs may have been compiled before.
    assert row["time/compile"] > 0.02 and row["time/step"] > 0.02


def test_a_finished_run_started_again_has_nothing_to_do(train, flags, trained):
    path, _ = trained
    before = (path / "metrics.jsonl").read_text()
    result = train(*flags(path))
    assert result.status == 0
    assert re.search(r"start +step 40 from ", result.out)
    assert (path / "metrics.jsonl").read_text() == before


def test_the_numbers_of_the_first_updates(train, tmp_path):
    script = runpy.run_path(str(GOLDENS / "make_train_step.py"))
    given = (f"MODEL_DIR={str(tmp_path)!r}", f"DIRECTORY={train.cache + '/text'!r}")
    result = train(
        f"--gin_file={train.programs}/local_text.gin",
        *(f"--gin.{binding}" for binding in (*given, *script["BINDINGS"])),
    )
    assert result.status == 0, result.err
    found = script["numbers"](tmp_path / "metrics.jsonl")
    want = json.loads((GOLDENS / "train_step.json").read_text())
    # Float32 sums of a few thousand terms in the order of another mesh or processor differ by about
    # 1e-6, and Adam's first updates pass that on; wrong numbers differ by far more.
    assert len(found) == 3
    for step, (row, golden) in enumerate(zip(found, want, strict=True), 1):
        assert row == pytest.approx(golden, rel=1e-5), (
            f"step {step}: if this was meant, see make_train_step.py"
        )


def test_what_was_used_is_written_before_training_and_writers_are_made_after_the_checks(
    train, tmp_path
):
    import local_text

    def run(*bindings):
        given = (
            f"MODEL_DIR={str(tmp_path)!r}",
            f"DIRECTORY={train.cache + '/text'!r}",
            f"local_text.Witness.directory={str(tmp_path)!r}",
            "train.train.writers=[@local_text.Witness]",
            "TRAIN_STEPS=2",
        )
        file = f"--gin_file={train.programs}/small_text.gin"
        return train(file, *(f"--gin.{binding}" for binding in (*given, *bindings)))

    local_text.WITNESSED.clear()
    assert run("config.TransformerConfig.vocab_size=128").status == 2
    assert local_text.WITNESSED == []
    result = run()
    assert result.status == 0, result.err
    made, written, *_ = local_text.WITNESSED
    assert made == "" and "cosine.peak = " in written and "vocab_size" in written


def test_a_mixture_counts_its_router_and_the_experts_a_token_uses():
    config = TransformerConfig(vocab_size=11, num_layers=3, embed_dim=8, num_heads=2, mlp_dim=5)
    counts = {}
    for top_k, shared in ((1, None), (2, None), (1, GatedMlp)):
        mlp = functools.partial(MoeMlp, num_experts=4, top_k=top_k, shared=shared)
        model = Transformer(config=config, block=functools.partial(Block, mlp=mlp))
        params = nn.meta.unbox(abstract_variables(model)["params"])
        program = types.SimpleNamespace(
            recipe=types.SimpleNamespace(model=model, inputs_spec=PackedTokens(1)),
            abstract_state=types.SimpleNamespace(params=params, variables={}),
            mask=None,
        )
        counts[top_k, shared] = Program.train_flops_per_unit.fget(program)
    # Six for each weight that a token meets: 8 x 8 projections, 8 x 4 router, 8 x 5 per matrix of an
    # expert; a query's scores and weighted sum over the one key it sees.
    weights = 3 * (4 * 8 * 8 + 8 * 4 + 3 * 8 * 5) + 11 * 8
    assert counts[1, None] == 6 * weights + 3 * 3 * 4 * 8
    assert counts[2, None] - counts[1, None] == 6 * 3 * 3 * 8 * 5
    assert counts[1, GatedMlp] == counts[2, None]


# ---- Bad input: one error, status 2, and nothing lost.


def error(result):
    """The one message of a run that was refused."""
    assert result.status == 2, result.err
    assert result.err.count("\nerror: ") == 1 and "Traceback" not in result.err
    return result.err.partition("\nerror: ")[2]


@pytest.mark.parametrize(
    ("bindings", "parts"),
    [
        (["recipe.Recipe.batchsize=8"], ["recipe.Recipe.batchsize", "batch_size"]),
        (["TRAIN_STEP=8"], ["TRAIN_STEP", "TRAIN_STEPS"]),
        (["optimizers.adamv.b1=0.5"], ["adamv", "adamw"]),
        (
            ["recipe.Recipe.batchsize=8", "TRAIN_STEP=8"],
            ["2 problems", "batch_size", "TRAIN_STEPS"],
        ),
        (["BATCH_SIZE=12"], ["BATCH_SIZE", "= 12", "8 shards", "'act_batch'"]),
        (["MESH={'data': 3}"], ["MESH = {'data': 3}", "8 available devices"]),
        (["MESH={'model': 8}"], ["unknown axes ['model']", "'tensor'"]),
        (
            ["MESH={'tensor': 8}", "recipe.Recipe.rules='tp'"],
            ["num_heads = 4", "num_kv_heads = 2", "8 shards"],
        ),
        (["recipe.Recipe.rules='fdsp'"], ["'fdsp'", "choose from", "'fsdp'"]),
        (["recipe.Recipe.microbatches=3"], ["BATCH_SIZE = 16", "3 microbatches"]),
        (["config.TransformerConfig.num_kv_heads=3"], ["num_kv_heads = 3", "num_heads = 4"]),
        (["TASK_FEATURE_LENGTHS={'inputs': 8}"], ["TASK_FEATURE_LENGTHS", "lacks 'targets'"]),
        (
            [
                "BATCH_SIZE=-8",
                "EVAL_PERIOD=0",
                "EVAL_STEPS=0",
                "CHECKPOINT_PERIOD=-1",
                "LOG_PERIOD=0",
            ],
            [
                "--gin.BATCH_SIZE=-8: 'espalier.trainers.recipe.Recipe.batch_size' is -8",
                "--gin.EVAL_PERIOD=0: 'espalier.launch.train.train.eval_period' is 0",
                "--gin.EVAL_STEPS=0: 'espalier.launch.train.train.eval_steps' is 0",
                "--gin.CHECKPOINT_PERIOD=-1: 'espalier.launch.train.train.checkpoint_period' is -1",
                "--gin.LOG_PERIOD=0: 'espalier.launch.train.train.log_period' is 0",
                "a number that is at least 1",
            ],
        ),
        (
            [
                "TRAIN_STEPS=0",
                "recipe.Recipe.learning_rate=@schedules.rsqrt()",
                "schedules.rsqrt.peak=%LEARNING_RATE",
                "schedules.rsqrt.warmup_steps=%WARMUP_STEPS",
            ],
            [
                "'espalier.launch.train.train.total_steps' is 0, but takes a number that is at least 1"
            ],
        ),
        (
            [
                "stream.make_stream.packing='best'",
                "stream.make_stream.interleaving='errors'",
                "anomaly.Anomaly.action='halt'",
                "config.TransformerConfig.remat='ful'",
                "transformer.Block.layout='paralel'",
                "initial.InitialCheckpoint.scope='all'",
            ],
            ["6 problems", "'best_fit'", "'rollback'", "Nearest: 'full'", "Nearest: 'parallel'"],
        ),
        (["WARMUP_STEPS=50"], ["warmup_steps = 50", "total_steps = 40"]),
        (["INITIAL_CHECKPOINT_PATH=''"], ["INITIAL_CHECKPOINT_PATH is ''"]),
        (["config.TransformerConfig.mlp_dim=1000000000"], ["optimiser state need", "GB"]),
        (
            [
                "VOCABULARY=@vocabularies.sentencepiece()",
                "VOCAB_SIZE=2000",
                "config.TransformerConfig.vocab_size=384",
            ],
            ["2000 entries", "384 rows", "VOCAB_SIZE"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_touched(
    train, flags, tmp_path, bindings, parts
):
    message = error(train(*flags(tmp_path / "run", *bindings)))
    for part in parts:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_an_unknown_file_is_named(train, flags, tmp_path):
    files = (*FILES[:2], "runs/pretrian")
    message = error(train(*flags(tmp_path / "run", files=files)))
    assert "t5x_configs/runs/pretrian.gin" in message


def test_unset_macros_are_all_named(train):
    message = error(train(*(f"--gin_file=t5x_configs/{file}.gin" for file in FILES)))
    for name in ("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "FILES"):
        assert f"--gin.{name}=" in message


@pytest.mark.parametrize(
    ("binding", "parts"),
    [
        ("config.TransformerConfig.vocab_size=128", ["259 entries", "128 rows", "vocab_size"]),
        ("MIXTURE_OR_TASK_NAME='file'", ["'file'", "files"]),
        ("DOCUMENT_START=999", ["DOCUMENT_START = 999 is no token", "rows"]),
        ("stream.make_stream.batch_size=8", ["recipe's batch_size is 16", "stream's is 8"]),
        (
            "stream.make_stream.task_feature_lengths={'targets': 32}",
            ["recipe's length is 64", "stream's is 32"],
        ),
        ("train.train.eval_tasks=('fils',)", ["'fils'", "files"]),
    ],
)
def test_data_that_does_not_fit_is_refused_and_the_corrected_start_works_on(
    train, flags, trained, tmp_path, binding, parts
):
    message = error(train(*flags(tmp_path, binding)))
    for part in parts:
        assert part in message
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "metrics.jsonl").exists()
    # What the failed start left does not stand in the way of the next one.
    other = error(train(*flags(tmp_path, "config.TransformerConfig.vocab_size=128")))
    assert "another configuration" not in other


@pytest.mark.parametrize(
    ("binding", "parts"),
    [
        (
            "config.TransformerConfig.mlp_dim=128",
            ["mlp/down/kernel", "[2, 192, 64]", "[2, 128, 64]"],
        ),
        ("config.TransformerConfig.num_layers=4", ["layers/block_0", "[2, ", "[4, "]),
        (
            "vocabularies.byte.extra_ids=8",
            ["another vocabulary", "take that of its run, --gin.TOKENIZER="],
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(train, flags, trained, tmp_path, binding, parts):
    start = f"INITIAL_CHECKPOINT_PATH={str(trained[0])!r}"
    message = error(train(*flags(tmp_path, start, binding)))
    for part in [str(trained[0] / "checkpoints" / "40"), *parts]:
        assert part in message
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_checkpoint_that_is_not_there_is_named(train, flags, tmp_path):
    start = f"INITIAL_CHECKPOINT_PATH={str(tmp_path / 'nowhere')!r}"
    message = error(train(*flags(tmp_path / "run", start)))
    assert f"{tmp_path / 'nowhere'}: there is no such directory" in message


def test_the_directory_of_another_run_is_refused_by_the_first_difference(train, flags, trained):
    path, _ = trained
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    message = error(train(*flags(path, "LEARNING_RATE=1e-3")))
    page = "docs/reference/configuration_errors.md"
    shown = transcripts.transcripts(page)[-1].text.partition(" now. ")[2]
    assert shown and message.strip().endswith(shown), "show the message of today in " + page
    for part in (str(path), "LEARNING_RATE was 0.01 there and is 0.001 now", "another MODEL_DIR"):
        assert part in message
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_data_that_changed_under_a_run_is_refused(train, flags, trained, text, tmp_path):
    path, _ = trained
    content = text.read_bytes()
    try:
        text.write_bytes(content + b'{"text": "one more document"}\n')
        message = error(train(*flags(path)))
    finally:
        text.write_bytes(content)
    assert "The data of the run" in message and "has changed" in message
    assert train(*flags(path)).status == 0


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no-such-*.jsonl", "matches no file"]),
        (b"", ["data.jsonl", "no document"]),
        (b'{"text": "a"}\n{"text": \n', ["data.jsonl", "2"]),
        (b'{"text": "a"}\n{"txt": "b"}\n', ["data.jsonl", "2", "'text'", "TEXT_KEY|text_key"]),
        (b'{"text": "a"}\n{"text": "\xff\xfe"}\n', ["data.jsonl", "2", "UTF-8|utf-8"]),
    ],
)
def test_bad_files_are_named_with_their_line(train, flags, tmp_path, content, parts):
    data = tmp_path / ("no-such-*.jsonl" if content is None else "data.jsonl")
    if content is not None:
        data.write_bytes(content)
    message = error(train(*flags(tmp_path / "run", data=data)))
    for part in parts:
        assert any(choice in message for choice in part.split("|")), message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("policy", ["split", "truncate"])
def test_documents_longer_than_a_row_are_split_or_truncated_and_counted(
    train, flags, trained, tmp_path, policy
):
    data = tmp_path / "data.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for index in range(60):
            length = 150 if index < 50 else 20
            file.write(json.dumps({"text": f"{index:03d}" + "x" * (length - 3)}) + "\n")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"text": "held out"}\n')
    bindings = (
        f"stream.make_stream.long_documents={policy!r}",
        f"VALIDATION_FILES={str(held_out)!r}",
        # The data is recorded before any parameter is restored; no step is needed.
        f"INITIAL_CHECKPOINT_PATH={str(trained[0])!r}",
        "config.TransformerConfig.mlp_dim=128",
    )
    message = error(train(*flags(tmp_path / "run", *bindings, data=data)))
    assert "of another model" in message
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    source = facts["sources"]["files"]
    assert facts["long_documents"] == policy
    assert (source["records"], source["long_records"]) == (60, 50)
    # 150 bytes and the end are 151 tokens; a row has 64.
    assert source["tokens"] == {"split": 50 * 151, "truncate": 50 * 64}[policy] + 10 * 21
