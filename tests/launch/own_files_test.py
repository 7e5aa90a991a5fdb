"""Runs on a user's own files: what they give to later runs, when they go on, and several sets of files in one run."""

import json
import pathlib
import random
import shlex
import shutil

import pytest

from espalier.trainers.checkpoints import step_dir

FILES = "--gin_file=t5x_configs/data/files.gin"
BASE = "--gin_file=t5x_configs/data/files_base.gin"
PRETRAIN = "--gin_file=t5x_configs/runs/pretrain.gin"
SIZES = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16}
TINY = (
    "--gin_file=t5x_configs/models/tiny.gin",
    *(f"--gin.config.TransformerConfig.{name}={size}" for name, size in SIZES.items()),
    "--gin.config.TransformerConfig.vocab_size=512",
    "--gin.config.TransformerConfig.scan_layers=False",
)
RUN = (
    "--gin.TASK_FEATURE_LENGTHS={'targets': 32}",
    "--gin.BATCH_SIZE=8",
    "--gin.SCHEDULE=1e-3",
    "--gin.MIXTURE_OR_TASK_NAME=files",
    "--gin.VALIDATION_FRACTION=0.1",
)
WORDS = {"tr": "ayşe bir kitap okudu ve güldü", "sw": "asha alisoma kitabu na kucheka"}


def write(path, words, count, seed=0):
    draw = random.Random(seed)
    texts = (" ".join(draw.choices(words.split(), k=12)) for _ in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def rows_of(run):
    return [
        json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").read_text().splitlines()
    ]


def losses(run):
    names = ("loss", "grad_norm", "eval/files/loss")
    found: dict[int, dict[str, float]] = {}
    for row in rows_of(run):
        found.setdefault(row["step"], {}).update({n: row[n] for n in names if n in row})
    return found


def vocabulary(run):
    return step_dir.read_meta(run)["vocabulary"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "corpus").mkdir()
    for name, words in WORDS.items():
        write(folder / "corpus" / f"{name}.jsonl", words, 60)
    return folder


@pytest.fixture(scope="module")
def first(folder):
    """The flags of the first run, which trains a vocabulary, without its length and directory."""
    size = "--gin.VOCAB_SIZE=400"
    return (*TINY, FILES, PRETRAIN, *RUN, f"--gin.FILES='{folder}/corpus/*.jsonl'", size)


@pytest.fixture(scope="module")
def mine(train, folder, first):
    ended = train(*first, f"--gin.MODEL_DIR={folder}/mine", "--gin.TRAIN_STEPS=2")
    assert ended.status == 0, ended.err
    return folder / "mine"


def test_a_run_that_has_moved_gives_its_vocabulary_to_later_runs(train, mine, folder, monkeypatch):
    monkeypatch.setenv("ESPALIER_CACHE", str(folder / "another_cache"))
    moved = shutil.copytree(mine, folder / "elsewhere" / "moved")
    (folder / "corpus").rename(folder / "gone")
    try:
        write(folder / "more.jsonl", WORDS["tr"], 30, seed=1)
        ended = train(
            *(f"--gin_file={moved}/config.gin", BASE, f"--gin.FILES={folder}/more.jsonl"),
            *(f"--gin.INITIAL_CHECKPOINT_PATH={moved}", f"--gin.MODEL_DIR={folder}/on"),
        )
        assert ended.status == 0, ended.err
        assert ended.err.count(f"vocabulary of 400 ids: {moved}") == 1
        shutil.rmtree(moved)
        # The run after it has the vocabulary too, and macros of the first, which no file of the third reads.
        rows = ({"prompt": f"ayşe {i}", "completion": " güldü"} for i in range(40))
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = ("data/chat_base.gin", "runs/finetune.gin")
        chats = (f"--gin.CHATS={folder}/chats.jsonl", "--gin.TRAIN_EPOCHS=None")
        for start, target in (("on", "sft"), ("sft", "sft2")):
            ended = train(
                f"--gin_file={folder}/{start}/config.gin",
                *(f"--gin_file=t5x_configs/{file}" for file in files),
                *(*chats, *RUN[:3], "--gin.TRAIN_STEPS=1"),
                f"--gin.INITIAL_CHECKPOINT_PATH={folder}/{start}",
                f"--gin.MODEL_DIR={folder}/{target}",
            )
            assert ended.status == 0, ended.err
            # Prompts begin as the documents of the first run do.
            assert step_dir.read_meta(folder / target)["start_token"] == 0
    finally:
        (folder / "gone").rename(folder / "corpus")
    assert vocabulary(mine) == vocabulary(folder / "on") == vocabulary(folder / "sft2")


def test_a_run_goes_on_by_its_own_config_bit_for_bit(train, mine, folder, first):
    run = shutil.copytree(mine, folder / "again")
    whole = train(*first, f"--gin.MODEL_DIR={folder}/whole", "--gin.TRAIN_STEPS=4")
    assert whole.status == 0, whole.err
    on = (f"--gin_file={run}/config.gin", f"--gin.MODEL_DIR={run}")
    ended = train(*on, "--gin.TRAIN_STEPS=3")
    assert ended.status == 0 and "tokenising" not in ended.err, ended.err
    # And by the command that began it, whose vocabulary is the one in the cache.
    ended = train(*first, f"--gin.MODEL_DIR={run}", "--gin.TRAIN_STEPS=4")
    assert ended.status == 0 and "tokenising" not in ended.err, ended.err
    assert losses(folder / "whole")[4] == losses(run)[4]


def test_a_corpus_that_has_grown_ends_a_run_before_it_is_tokenised(train, mine, folder, first):
    run = shutil.copytree(mine, folder / "grown")
    write(folder / "corpus" / "more.jsonl", "yeni kelimeler de var", 60)
    try:
        ended = train(*first, f"--gin.MODEL_DIR={run}", "--gin.TRAIN_STEPS=4")
        assert ended.status == 2 and "tokenising" not in ended.err
        assert f"MODEL_DIR: {run}/checkpoints was trained with another vocabulary" in ended.err
        remedy = (f"--gin_file={run}/config.gin", f"--gin.INITIAL_CHECKPOINT_PATH='\"{run}\"'")
        assert " ".join(remedy) in ended.err
        ended = train(f"--gin_file={run}/config.gin", f"--gin.MODEL_DIR={run}")
        assert ended.status == 2 and "The data of the run" in ended.err
        assert " ".join(remedy) in ended.err
        ended = train(*shlex.split(" ".join(remedy)), f"--gin.MODEL_DIR={folder}/on_more")
        assert ended.status == 0, ended.err
    finally:
        (folder / "corpus" / "more.jsonl").unlink()
    assert vocabulary(folder / "on_more") == vocabulary(mine)


def test_another_vocabulary_than_the_initial_models_is_named_with_the_remedy(
    train, mine, folder, first
):
    write(folder / "other.jsonl", "yeni kelimeler de var", 60)
    flags = (
        *(f"--gin.FILES={folder}/other.jsonl", f"--gin.INITIAL_CHECKPOINT_PATH={mine}"),
        *(f"--gin.MODEL_DIR={folder}/other", "--gin.TRAIN_STEPS=1"),
    )
    ended = train(*first, *flags)
    assert ended.status == 2 and "tokenising" not in ended.err
    assert f"INITIAL_CHECKPOINT_PATH: {mine}/checkpoints/2 was trained with another" in ended.err
    tokenizer = f"--gin.TOKENIZER='\"{mine}\"'"
    assert tokenizer in ended.err and "data/hf_files.gin" in ended.err
    hf_files = "--gin_file=t5x_configs/data/hf_files.gin"
    ended = train(*TINY, hf_files, PRETRAIN, *RUN, *flags, *shlex.split(tokenizer))
    assert ended.status == 0, ended.err
    assert vocabulary(folder / "other") == vocabulary(mine)


def test_branches_on_own_files_become_a_mixture_of_their_tasks(train, command, mine, folder):
    sets = {name: f"{folder}/corpus/{name}.jsonl" for name in WORDS}
    for name, files in sets.items():
        ended = train(
            *(f"--gin_file={mine}/config.gin", f"--gin.FILES={files}"),
            *(f"--gin.INITIAL_CHECKPOINT_PATH={mine}", f"--gin.MODEL_DIR={folder}/{name}"),
        )
        assert ended.status == 0, ended.err
    experts = [f"{name}={folder}/{name}" for name in ("mine", *WORDS)]
    mixture = f"{folder}/mixture"
    assert command("upcycle", "--method=bam", "--experts", *experts, f"--to={mixture}") == 0
    ended = train(
        *(f"--gin_file={mixture}/config.gin", BASE, PRETRAIN, *RUN),
        *(f"--gin.FILES={sets}", "--gin.FILE_SHARES={'tr': 0.75, 'sw': 0.25}"),
        *(f"--gin.INITIAL_CHECKPOINT_PATH={mixture}", f"--gin.MODEL_DIR={folder}/trained"),
        "--gin.TRAIN_STEPS=4",
    )
    assert ended.status == 0, ended.err
    rows = rows_of(folder / "trained")
    assert all(rows[-1][f"eval/{name}/loss"] > 0 for name in WORDS)
    data = json.loads((folder / "trained" / "run.json").read_text())
    assert data["mixtures"] == {"files": {"tr": 0.75, "sw": 0.25}}
    assert set(data["epochs"]) == set(WORDS)
