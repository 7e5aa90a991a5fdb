"""Students of a pool: predictions for the answers of each teacher, against its logits in float64, and runs."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest
import tokenizers
import yaml

from espalier.data import tasks
from espalier.data.chats import stream as chat_stream
from espalier.data.chats.tasks import register_chats
from espalier.data.distillation import alignment
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import vocabularies
from espalier.launch.aya_expanse import arbitrage, pool_teachers
from espalier.launch.aya_expanse.taught import StoredPool
from espalier.launch.aya_expanse.teachers import SamplingFlags
from espalier.launch.load import load_run
from espalier.launch.load.loaded_run import LoadedRun, LoadError
from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer
from espalier.trainers.distillation.on_policy import Sampled
from espalier.trainers.telemetry.metric_writers import read_jsonl
from tests.launch.load import hf_checkpoint_test

K, LENGTH = 5, 40
END = "<end>"


@pytest.fixture(scope="module")
def pool(branches, tmp_path_factory):
    """A pool of two runs, and the rows of an arbitrage that draws between them."""
    folder = tmp_path_factory.mktemp("pool")
    teachers = [
        {"name": name, "checkpoint": run}
        for name, run in zip(("one", "other"), branches.folders, strict=False)
    ]
    made = types.SimpleNamespace(folder=folder, teachers=teachers, path=str(folder / "pool.yaml"))
    pathlib.Path(made.path).write_text(yaml.safe_dump({"teachers": teachers}))
    prompts = [{"prompt": f"p{i}:", "language": ("tr", "uk")[i % 2]} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    arbitrage.arbitrage(
        arbitrage.ArbitrageFlags(
            pool=made.path,
            prompts=str(folder / "prompts.jsonl"),
            out=str(folder),
            routing="random",
            form="prompt",
            keep_cut=True,
        ),
        sampling=SamplingFlags(max_tokens=8),
    )
    made.file = folder / "sft.jsonl"
    made.rows = [json.loads(line) for line in made.file.read_text().splitlines()]
    assert {row["teacher"] for row in made.rows} == {"one", "other"}
    return made


@pytest.fixture
def read(pool, tmp_path):
    """Returns a stream of rows with the predictions of their teachers."""

    def run(
        vocabulary,
        *,
        size=264,
        file=pool.file,
        path=pool.path,
        store=tmp_path,
        start_token=None,
        **settings,
    ):
        register_chats(
            name="chats", files=str(file), vocabulary=vocabulary, validation_fraction=0.0
        )
        opened = chat_stream.make_stream(
            mixture_or_task_name="chats",
            task_feature_lengths={"targets": LENGTH},
            batch_size=4,
            seed=0,
            start_token=start_token,
            cache_dir=str(tmp_path / f"cache_{pathlib.Path(file).stem}"),
        )
        sizes = {"num_layers": 1, "embed_dim": 8, "num_heads": 1, "mlp_dim": 8}
        student = Transformer(config=TransformerConfig(vocab_size=size, **sizes))
        settings = {"top_k": K, "temperature": 2.0, **settings}
        stored = StoredPool(
            pool=path, student=student, vocabulary=vocabulary, store=str(store), **settings
        )
        stored.check()
        return stored.read(opened, steps=3)

    yield run
    tasks.clear()


@pytest.fixture(scope="module")
def expected(pool):
    """Log-probabilities at temperature 2 of each teacher at its own answers, [T, V] in float64, by prompt."""
    made = {}
    for teacher in pool.teachers:
        with load_run.config_of(teacher["checkpoint"]).load(teacher["checkpoint"]) as run:
            apply = jax.jit(run.model.apply)
            for row in (row for row in pool.rows if row["teacher"] == teacher["name"]):
                context = run.context(list(run.vocabulary.encode(row["prompt"])))
                ids = [*context, *run.vocabulary.encode(row["completion"])]
                padded = [*ids, *[0] * (24 - len(ids))]  # which nothing before reads
                logits_8TV = apply({"params": run.params}, np.array([padded] * 8, np.int32))
                own_TV = np.asarray(logits_8TV, np.float64)[0, len(context) - 1 : len(ids)] / 2.0
                own_TV -= own_TV.max(-1, keepdims=True)
                made[row["prompt"]] = own_TV - np.log(np.exp(own_TV).sum(-1, keepdims=True))
    return made


def conversations(stream, vocabulary, steps=3):
    """Yields prompt, targets, ids and log-probabilities of each answer of a stream, at its learnt tokens."""
    for step in range(steps):
        batch = stream.batch(step, 0, stream.batch_size)
        for b in range(stream.batch_size):
            row = {name: column[b] for name, column in batch.items()}
            for segment in range(1, row["decoder_segment_ids"].max() + 1):
                own = row["decoder_segment_ids"] == segment
                is_learnt = own & (row["decoder_loss_weights"] > 0)
                prompt = vocabulary.decode(row["decoder_input_tokens"][own].tolist())
                untaught = row["teacher_ids"][own & ~is_learnt]
                assert (untaught == -1).all()
                names = ("decoder_target_tokens", "teacher_ids", "teacher_log_probs")
                yield prompt.partition(":")[0] + ":", *(row[name][is_learnt] for name in names)


@pytest.mark.parametrize("start", [None, 0])
def test_a_student_of_the_same_vocabulary_learns_the_largest_of_its_teachers(
    start, pool, read, expected, tmp_path, capsys, monkeypatch
):
    bytes_ = vocabularies.byte()
    seen = set()
    for prompt, targets_T, ids_TK, log_p_TN in conversations(
        read(bytes_, start_token=start), bytes_
    ):
        log_p_TV = expected[prompt]
        assert len(targets_T) == len(log_p_TV)  # each token, and the end
        order_TK = np.argsort(-log_p_TV, axis=-1)[:, :K]
        np.testing.assert_array_equal(ids_TK, order_TK)
        top_TK = np.take_along_axis(log_p_TV, order_TK, axis=-1)
        np.testing.assert_allclose(log_p_TN[:, :K], top_TK, atol=1e-5)
        others_T = 1 - np.exp(top_TK).sum(-1)
        np.testing.assert_allclose(np.exp(log_p_TN[:, K]), others_T, atol=1e-5)
        seen.add(prompt)
    assert seen == {row["prompt"] for row in pool.rows}
    assert "TEACHER_POOL: 100.0% of" in capsys.readouterr().err

    def computes(*_, **__):
        raise AssertionError("predictions are computed again")

    monkeypatch.setattr("espalier.launch.aya_expanse.taught.predictions_of", computes)
    tasks.clear()
    read(bytes_, start_token=start)


def pieces_of(pool, folder):
    """A vocabulary of bytes, and of pairs of them that are frequent in the answers."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=265, special_tokens=[END], initial_alphabet=bpe.pre_tokenizer.alphabet()
    )
    bpe.train_from_iterator([row["completion"] for row in pool.rows], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return vocabularies.huggingface(path=folder)


def test_a_student_of_another_vocabulary_learns_tokens_of_the_same_text(
    pool, read, expected, tmp_path, capsys
):
    student, bytes_ = pieces_of(pool, tmp_path), vocabularies.byte()
    text_of, texts = alignment.texts_of(student), alignment.texts_of(bytes_) | {1: END}
    checked = partial = 0
    for prompt, targets_T, ids_TK, log_p_TN in conversations(read(student, size=512), student):
        (row,) = (row for row in pool.rows if row["prompt"] == prompt)
        ends = bytes_.encode(row["completion"])
        # Where each token of the student ends in bytes; special tokens have none.
        text = row["completion"].encode()
        place = 0
        for target, ids_K, log_p_N in zip(targets_T, ids_TK, log_p_TN, strict=True):
            own = END if target == student.eos_id else text_of.get(int(target))
            size = 0 if own in (END, None) else len(own.encode())
            taught = own == END or (size == 1 and text[place : place + 1] == own.encode())
            if own is None:
                break  # bytes within a character: what follows has another place
            assert (ids_K[0] >= 0) == taught
            if taught:
                p = np.exp(expected[prompt][place])
                largest = np.argsort(-p)[:K]
                sums = {texts[i]: p[i] for i in largest if i in texts}
                ours = {
                    END if i == student.eos_id else text_of[int(i)]: np.exp(x)
                    for i, x in zip(ids_K, log_p_N[:K], strict=True)
                    if i >= 0
                }
                known = {END, *text_of.values()}
                assert ours == pytest.approx(
                    {t: x for t, x in sums.items() if t in known}, rel=1e-3
                )
                assert np.exp(log_p_N[K]) == pytest.approx(1 - sum(ours.values()), abs=1e-5)
                checked += 1
            else:
                assert log_p_N[K] == 0
                partial += 1
            place += size
        assert place <= len(ends)
    assert checked > 24 and partial > 6  # the ends alone are 12 in an epoch
    assert "learnt tokens in" in capsys.readouterr().err


def changed(pool, path, **teacher):
    """A pool whose first teacher has other keys; those of None are removed."""
    first = {k: v for k, v in {**pool.teachers[0], **teacher}.items() if v is not None}
    path.write_text(yaml.safe_dump({"teachers": [first, *pool.teachers[1:]]}))
    return str(path)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"checkpoint": None, "url": "http://host/v1", "model": "m"},
            "line \\d+: the teacher 'one' is an endpoint, and gives no log-probabilities",
        ),
        ({"name": "third"}, "the teacher 'one' is not in the pool"),
        (
            {"chat_template": "command"},
            "the teacher 'one' of TEACHER_POOL did not write this.* unchanged$",
        ),
        (
            {"checkpoint": None, "hf": None},
            "'one' .* did not write this.* unchanged, or run espalier prepare arbitrage again",
        ),
    ],
)
def test_a_teacher_that_did_not_write_its_rows_is_refused(pool, read, tmp_path, teacher, message):
    if "hf" in teacher:
        teacher = {**teacher, "hf": str(hf_checkpoint_test.write_llama(tmp_path / "hf"))}
    path = changed(pool, tmp_path / "changed.yaml", **teacher)
    with pytest.raises(DataError, match=message):
        read(vocabularies.byte(), path=path)


def test_what_cannot_be_carried_is_refused(pool, read, tmp_path, monkeypatch):
    bytes_ = vocabularies.byte()
    with pytest.raises(ValueError, match=r"TEACHER_TOP_K = 264 must lie in \[1, 263\]"):
        read(bytes_, top_k=264)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="line 1: no 'teacher'. TEACHER_POOL reads rows"):
        read(bytes_, file=rows)
    with monkeypatch.context() as patch:
        patch.setattr(LoadedRun, "vocabulary_or_none", None)
        with pytest.raises(LoadError, match="the teacher '.*' has no tokenizer beside its model"):
            read(bytes_)
    # Its template would write other texts.
    nothing = alignment.nothing(1, K, absent=-1e4)
    monkeypatch.setattr(StoredPool, "_carried", lambda self, run, answer, *_: nothing)
    with pytest.raises(ValueError, match="none of the .* learnt tokens has a prediction"):
        read(bytes_)


def test_a_prompt_of_a_region_has_the_teacher_of_its_language(tmp_path):
    path = tmp_path / "pool.yaml"
    path.write_text("""
teachers: [{name: a, checkpoint: x}, {name: b, checkpoint: y}]
fixed: {pt: b, default: a}
""")
    sampled = Sampled(
        prompt_length=1,
        completion_length=1,
        teachers=lambda: pool_teachers.by_language(pool=str(path)),
    )
    assert [sampled._teacher(tag) for tag in ("pt", "pt-BR", "tr", None)] == [1, 1, 0, 0]


def start(train, pool, path, *files, **settings):
    settings |= {
        "TEACHER_POOL": settings.pop("given", pool.path),
        "TOKENIZER": pool.teachers[0]["checkpoint"],
        "INITIAL_CHECKPOINT_PATH": pool.teachers[0]["checkpoint"],
        "MODEL_DIR": str(path),
        "LOG_PERIOD": 1,
        "TRAIN_STEPS": 2,
        "WARMUP_STEPS": 0,
    }
    model = f"{pool.teachers[0]['checkpoint']}/model.json"
    names = [model, *(f"t5x_configs/{file}.gin" for file in files)]
    flags = [f"--gin.{name}={value!r}" for name, value in settings.items()]
    return train(*(f"--gin_file={name}" for name in names), *flags)


def trained(path):
    return [row for row in read_jsonl(f"{path}/metrics.jsonl") if "divergence" in row]


def test_a_run_learns_from_the_pool_beside_its_data(pool, train, tmp_path):
    files = ("data/chat", "runs/finetune", "methods/distillation/distillation_pool")
    settings = {
        "CHATS": str(pool.file),
        "CHATS_VALIDATION_FRACTION": 0.2,
        "TASK_FEATURE_LENGTHS": {"targets": LENGTH},
        "BATCH_SIZE": 8,
        "EVAL_PERIOD": 2,
        "TEACHER_TOP_K": 4,
        "TEACHER_STORE": str(tmp_path / "store"),
    }
    result = start(train, pool, tmp_path / "run", *files, TRAIN_EPOCHS=None, **settings)
    assert result.status == 0, result.err
    assert "TEACHER_POOL: 100.0% of" in result.err
    for row in trained(tmp_path / "run"):
        total = 0.9 * row["divergence"] + 0.1 * row["loss"]
        np.testing.assert_allclose(row["distillation_loss"], total, rtol=1e-5)


def test_a_policy_learns_from_the_teacher_of_each_language(pool, train, tmp_path):
    both = tmp_path / "both.yaml"
    content = {"teachers": pool.teachers, "fixed": {"tr": "one", "uk": "other"}}
    both.write_text(yaml.safe_dump(content))
    files = ("data/prompts", "runs/online", "methods/distillation/on_policy_pool")
    settings = {
        "PROMPT_FILES": str(pool.folder / "prompts.jsonl"),
        "MAX_PROMPT_LENGTH": 8,
        "MAX_NEW_TOKENS": 4,
        "PROMPTS": 8,
    }
    result = start(train, pool, tmp_path / "run", *files, given=str(both), **settings)
    assert result.status == 0, result.err
    rows = trained(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    # The policy is the first teacher, so only the other teaches it anything.
    assert all(row["distillation_loss"] == row["divergence"] > 0 for row in rows)
    steps = [json.loads((tmp_path / f"run/teacher_pool_{i}.json").read_text()) for i in range(2)]
    assert [
        step["teacher_pool_0" if not i else "teacher_pool_1"] for i, step in enumerate(steps)
    ] == [teacher["checkpoint"] for teacher in pool.teachers]
    alone = tmp_path / "alone.yaml"
    alone.write_text(yaml.safe_dump({"teachers": pool.teachers[:1]}))
    result = start(train, pool, tmp_path / "same", *files, given=str(alone), **settings)
    assert result.status == 0, result.err
    assert abs(trained(tmp_path / "same")[0]["divergence"]) < 1e-5
    for fixed, message in (
        ({"tr": "one"}, "A prompt has the language 'uk', for which no teacher is named"),
        ({}, "several teachers and no 'fixed'"),
    ):
        both.write_text(yaml.safe_dump({"teachers": pool.teachers, "fixed": fixed}))
        result = start(train, pool, tmp_path / "none", *files, given=str(both), **settings)
        assert result.status == 2 and message in result.err
