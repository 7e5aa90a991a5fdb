"""The vocabulary kept with a run: as it was, and preferred wherever the run's texts are read."""

import json
import pathlib
import shutil

import pytest
import seqio

from data import rows, vocabularies
from launch import run_vocabulary

WORDS = ["def", "return", "import", "naïve", "語", "while", "class", "yield", "lambda", "assert"]
TEXTS = [f"{a} {b}\n    {c}" for a in WORDS for b in WORDS for c in WORDS]
SIZE, EXTRA_IDS = 420, 3
READS = "t5x_configs/runs/load_run.gin"


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny model whose vocabulary was trained from files in `data` and the cache `cache`."""
    import flax.linen as nn
    import gin
    import jax
    import jax.numpy as jnp

    from launch import gin_config
    from trainers.checkpoint import Checkpointer

    run = tmp_path_factory.mktemp("run")
    (run / "data").mkdir()
    write_texts(run / "data" / "train.jsonl", TEXTS)
    write_texts(run / "data" / "held_out.jsonl", TEXTS[::50])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPALIER_CACHE", str(run / "cache"))
        config = gin_config.load(
            [f"t5x_configs/{name}.gin" for name in ("models/tiny", "data/files", "runs/pretrain")],
            [
                f"MODEL_DIR={str(run)!r}",
                f"FILES={str(run / 'data' / 'train.jsonl')!r}",
                f"VALIDATION_FILES={str(run / 'data' / 'held_out.jsonl')!r}",
                "MIXTURE_OR_TASK_NAME='files'",
                f"VOCAB_SIZE={SIZE}",
                f"vocabularies.sentencepiece.extra_ids={EXTRA_IDS}",
                "TASK_FEATURE_LENGTHS={'targets': 48}",
                "BATCH_SIZE=8",
                "config.TransformerConfig.num_layers=1",
                "config.TransformerConfig.embed_dim=16",
                "config.TransformerConfig.num_heads=2",
                "config.TransformerConfig.num_kv_heads=1",
                "config.TransformerConfig.mlp_dim=16",
                "config.TransformerConfig.vocab_size=512",
            ],
            entry="launch.train:train",
        )
        (run / "config.gin").write_text(config.text)
        vocabulary = gin.get_configurable(vocabularies.sentencepiece)()
        model = config.arguments()["recipe"].model
    params = nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    with Checkpointer(run / "checkpoints") as checkpointer:
        meta = {"vocabulary": rows.vocabulary_digest(vocabulary), "add_bos": True}
        checkpointer.save(3, {"params": params}, meta=meta)
    run_vocabulary.save(run, vocabulary)
    return run, vocabulary


@pytest.fixture
def moved(run, tmp_path, monkeypatch):
    """The run on another machine: neither its data nor its cache are there."""
    path = tmp_path / "moved"
    for name in ("config.gin", run_vocabulary.MODEL, run_vocabulary.RECORD):
        path.mkdir(exist_ok=True)
        shutil.copy(run[0] / name, path / name)
    shutil.copytree(run[0] / "checkpoints", path / "checkpoints")
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    (run[0] / "data").rename(run[0] / "gone")
    yield path
    (run[0] / "gone").rename(run[0] / "data")


@pytest.fixture
def score(command, tmp_path):
    def call(checkpoint, row, *flags):
        inputs, output = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
        inputs.write_text(json.dumps(row) + "\n")
        files = (f"--inputs={inputs}", f"--output={output}", f"--checkpoint={checkpoint}")
        status = command("score", *files, *flags)
        return status or json.loads(output.read_text())["logprobs"]

    return call


def test_it_comes_back_as_it_was(run):
    path, vocabulary = run
    kept = run_vocabulary.load(folder=str(path))
    assert rows.vocabulary_digest(kept) == rows.vocabulary_digest(vocabulary)
    assert kept.vocab_size == SIZE + EXTRA_IDS and kept.extra_ids == EXTRA_IDS
    assert (kept.pad_id, kept.eos_id, kept.unk_id, kept.bos_id) == (0, 1, 2, 3)
    for text in ("def return", "\t  ünknöwn 🙂\n\n", "assert <extra_id_0> yield <extra_id_2>"):
        assert kept.encode(text) == vocabulary.encode(text)
        assert kept.decode(kept.encode(text)) == vocabulary.decode(vocabulary.encode(text))


def test_only_what_can_be_made_again_is_kept(run, tmp_path):
    other = seqio.SentencePieceVocabulary(
        str(run[0] / run_vocabulary.MODEL), extra_ids=3, reverse_extra_ids=False
    )
    for vocabulary in (vocabularies.byte(), other):
        run_vocabulary.save(tmp_path, vocabulary)
        assert list(tmp_path.iterdir()) == []


def test_it_is_used_with_the_checkpoints_it_belongs_to_alone(run, tmp_path):
    (found,) = run_vocabulary.gin_files(run[0], run[0], before=[READS])
    assert repr(str(run[0])) in pathlib.Path(found).read_text()
    assert not run_vocabulary.gin_files(tmp_path, run[0], before=[READS])
    assert not run_vocabulary.gin_files(run[0], run[0], before=["t5x_configs/runs/evaluate.gin"])
    # Of another vocabulary, and not as it was written.
    run_vocabulary.save(tmp_path, vocabularies.from_file(path=run[0] / run_vocabulary.MODEL))
    assert not run_vocabulary.gin_files(tmp_path, run[0], before=[READS])
    run_vocabulary.save(tmp_path, run[1])
    assert run_vocabulary.gin_files(tmp_path, run[0], before=[READS])
    (tmp_path / run_vocabulary.MODEL).write_bytes(b"x")
    assert not run_vocabulary.gin_files(tmp_path, run[0], before=[READS])


def test_texts_are_read_without_the_data(moved, run, score, command, capsys):
    ids = run[1].encode("return naïve")
    assert score(moved, {"text": "return naïve"}) == score(moved, {"tokens": [3, *ids]})
    flags = (f"--checkpoint={moved}", "--prompt=return", "--max_new_tokens=3")
    assert command("generate", *flags) == 0
    assert "error" not in capsys.readouterr().err


def test_a_vocabulary_that_is_named_is_the_one_that_is_used(moved, score, capsys):
    assert score(moved, {"text": "a"}, "--gin.VOCABULARY=@vocabularies.byte()") == 2
    assert "another vocabulary than this ByteVocabulary" in capsys.readouterr().err


def test_other_files_are_evaluated_with_it(moved, command, tmp_path):
    for name, texts in (("more.jsonl", ["class naïve"] * 9), ("held.jsonl", ["yield 語"])):
        write_texts(tmp_path / name, texts)
    report = tmp_path / "eval.json"
    flags = (f"--gin.FILES={tmp_path}/more.jsonl", f"--gin.VALIDATION_FILES={tmp_path}/held.jsonl")
    assert command("evaluate", f"--checkpoint={moved}", f"--json={report}", *flags) == 0
    vocabulary = run_vocabulary.load(folder=str(moved))
    count = len(vocabulary.encode("yield 語")) + 1
    assert json.loads(report.read_text())["tasks"]["files"]["tokens"] == count


def test_texts_begin_with_bos_as_the_run_did(moved, run, score):
    ids = run[1].encode("while")
    with_bos, without = (score(moved, {"tokens": tokens}) for tokens in ([3, *ids], ids))
    assert score(moved, {"text": "while"}) == with_bos
    assert score(moved, {"text": "while"}, "--gin.ADD_BOS=False") == without
