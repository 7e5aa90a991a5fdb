"""The vocabulary kept with a run: as it was, and preferred wherever the run's texts are read."""

import json
import pathlib
import random
import re
import shutil
import types

import pytest
import seqio
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from espalier.data.stream import rows
from espalier.data.text import document_files
from espalier.data.tokenizers import chat_template, vocabularies
from espalier.launch.config import model_file
from espalier.launch.run import model_record, run_vocabulary
from tests.drawn import drawn

WORDS = ["def", "return", "import", "naïve", "語", "while", "class", "yield", "lambda", "assert"]
TEXTS = [f"{a} {b}\n    {c}" for a in WORDS for b in WORDS for c in WORDS]
SIZE, EXTRA_IDS = 420, 3


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny model whose vocabulary was trained from files in `data` and the cache `cache`,

    the vocabulary, and the parameters.
    """
    import flax.linen as nn
    import jax.numpy as jnp

    from espalier.launch.config import gin_config
    from espalier.trainers.checkpoints.checkpoint import Checkpointer

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
            entry="espalier.launch.train:train",
        )
        (run / "config.gin").write_text(config.text)
        model_record.write(run)
        vocabulary = config.value("VOCABULARY")
        model = config.arguments()["recipe"].model
    params = nn.meta.unbox(drawn(model, jnp.zeros((1, 4), int)))
    with Checkpointer(run / "checkpoints") as checkpointer:
        meta = {"vocabulary": rows.vocabulary_digest(vocabulary), "add_bos": True}
        checkpointer.save(3, {"params": params}, meta=meta)
    run_vocabulary.save(run, vocabulary)
    return run, vocabulary, params


@pytest.fixture
def moved(run, tmp_path, monkeypatch):
    """The run on another machine: neither its data nor its cache are there."""
    path = tmp_path / "moved"
    for name in ("config.gin", model_file.NAME, run_vocabulary.MODEL, run_vocabulary.RECORD):
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
    path, vocabulary, _ = run
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
    run_vocabulary.save(tmp_path, other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "vocabulary", [vocabularies.byte(extra_ids=3), vocabularies.characters(symbols="añ\n'\"")]
)
def test_a_vocabulary_without_files_is_recorded_by_its_settings(tmp_path, vocabulary):
    run_vocabulary.save(tmp_path, vocabulary)
    assert [path.name for path in tmp_path.iterdir()] == [run_vocabulary.RECORD]
    loaded = run_vocabulary.load(folder=str(tmp_path))
    assert rows.vocabulary_digest(loaded) == rows.vocabulary_digest(vocabulary)
    assert (type(loaded), loaded.extra_ids) == (type(vocabulary), vocabulary.extra_ids)


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "../run/vocabulary.model"},
        {"path": ["vocabulary.model"]},
        {"extra_ids": 10**9},
        {"extra_ids": -1},
        {"extra_ids": "3"},
        {"files": 3},
        {"digest": None},
    ],
)
def test_a_changed_record_is_not_used(run, tmp_path, changes):
    run_vocabulary.copy(run[0], tmp_path)
    record = json.loads((tmp_path / run_vocabulary.RECORD).read_text())
    assert run_vocabulary.gin_files(tmp_path, run[0])
    (tmp_path / run_vocabulary.RECORD).write_text(json.dumps({**record, **changes}))
    assert not run_vocabulary.gin_files(tmp_path, run[0])


def test_a_copy_that_leads_elsewhere_is_not_used(run, tmp_path):
    run_vocabulary.copy(run[0], tmp_path)
    (tmp_path / run_vocabulary.MODEL).unlink()
    (tmp_path / run_vocabulary.MODEL).symlink_to(run[0] / run_vocabulary.MODEL)
    assert not run_vocabulary.gin_files(tmp_path, run[0])


def test_it_is_used_with_the_checkpoints_it_belongs_to_alone(run, tmp_path):
    (found,) = run_vocabulary.gin_files(run[0], run[0])
    assert repr(str(run[0])) in pathlib.Path(found).read_text()
    assert not run_vocabulary.gin_files(tmp_path, run[0])
    # Of another vocabulary, and not as it was written.
    run_vocabulary.save(tmp_path, vocabularies.from_file(path=run[0] / run_vocabulary.MODEL))
    assert not run_vocabulary.gin_files(tmp_path, run[0])
    run_vocabulary.save(tmp_path, run[1])
    assert run_vocabulary.gin_files(tmp_path, run[0])
    (tmp_path / run_vocabulary.MODEL).write_bytes(b"x")
    assert not run_vocabulary.gin_files(tmp_path, run[0])


@pytest.mark.parametrize(
    ("name", "damage", "named"),
    [
        (run_vocabulary.MODEL, lambda text: b"x" + text, "vocabulary.model is damaged"),
        (run_vocabulary.MODEL, None, "vocabulary.model is damaged or missing"),
        (run_vocabulary.RECORD, lambda text: b"\xff" + text, "vocabulary.json is damaged"),
        (run_vocabulary.RECORD, lambda text: b"[]", "vocabulary.json is damaged"),
        (run_vocabulary.RECORD, lambda text: text.replace(b'"path"', b'"qath"'), "json is damaged"),
        (run_vocabulary.RECORD, None, "vocabulary.json is damaged or missing, so vocabulary.model"),
    ],
)
def test_a_damaged_vocabulary_is_named_when_it_is_passed_over(
    run, tmp_path, caplog, name, damage, named
):
    run_vocabulary.save(tmp_path, run[1])
    path = tmp_path / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    assert not run_vocabulary.gin_files(tmp_path, run[0])
    [warning] = caplog.messages
    assert str(tmp_path) in warning and named in warning


def test_a_record_of_other_options_is_damaged(run, tmp_path):
    run_vocabulary.save(tmp_path, run[1])
    path = tmp_path / run_vocabulary.RECORD
    path.write_text(path.read_text().replace(f'"extra_ids": {EXTRA_IDS}', '"extra_ids": 1'))
    with pytest.raises(ValueError, match="vocabulary.json is damaged"):
        run_vocabulary.load(folder=str(tmp_path))


def test_a_config_read_in_a_runs_directory_has_the_runs_vocabulary(run, moved, tmp_path, gin_file):
    from espalier.launch.config import gin_config

    config = str(moved / "config.gin")
    needed = ["FILES='x'", "MODEL_DIR='/x'"]

    def load(*files, bindings=()):
        return gin_config.load([*files], [*needed, *bindings], entry="espalier.launch.train:train")

    loaded = load(config)
    assert repr(loaded.macros["VOCABULARY"]) == "@run_vocabulary.of()"
    assert loaded.warnings == ()
    tasks = loaded.arguments()["tasks"]
    assert tasks  # with the vocabulary, which is made when they are called
    assert loaded.value("run_vocabulary.of.path") == str(moved)
    # Later files and bindings win, and a run without tasks of its own reads none.
    later = gin_file("""
        from __gin__ import dynamic_registration

        from espalier.data.tokenizers import vocabularies

        VOCABULARY = @vocabularies.byte()
    """)
    assert repr(load(config, later).macros["VOCABULARY"]) == "@vocabularies.byte()"
    bound = load(config, bindings=["VOCABULARY=@vocabularies.byte()"]).macros["VOCABULARY"]
    assert repr(bound) == "@vocabularies.byte()"
    (moved / run_vocabulary.RECORD).unlink()
    assert repr(load(config).macros["VOCABULARY"]) == "@vocabularies.sentencepiece()"


def test_a_vocabulary_is_that_of_a_run_a_model_or_a_file(run, imported, tmp_path, capsys):
    path, vocabulary, _ = run
    digest = rows.vocabulary_digest
    for _ in range(2):  # named once
        assert digest(run_vocabulary.of(path=str(path))) == digest(vocabulary)
    assert capsys.readouterr().err == f"vocabulary of {vocabulary.vocab_size} ids: {path}\n"
    model = str(path / run_vocabulary.MODEL)
    assert digest(run_vocabulary.of(path=model, extra_ids=EXTRA_IDS)) == digest(vocabulary)
    own = digest(run_vocabulary.load(folder=str(imported)))
    for folder in (imported, imported / "hf", imported / run_vocabulary.TOKENIZER):
        assert digest(run_vocabulary.of(path=str(folder))) == own
    assert run_vocabulary.of(path="bytes", extra_ids=3) == vocabularies.byte(extra_ids=3)
    with pytest.raises(
        ValueError, match=f"extra_ids = {EXTRA_IDS}, not 5: give its vocabulary.model"
    ):
        run_vocabulary.of(path=str(path), extra_ids=5)
    run_vocabulary.of(path=str(path), extra_ids=EXTRA_IDS)
    with pytest.raises(FileNotFoundError, match="gone"):
        run_vocabulary.of(path=str(tmp_path / "gone"))


def test_texts_are_read_without_the_data(moved, run, score, command, capsys):
    ids = run[1].encode("return naïve")
    assert score(moved, {"text": "return naïve"}) == score(moved, {"tokens": [3, *ids]})
    flags = (f"--checkpoint={moved}", "--prompt=return", "--max_new_tokens=3")
    assert command("generate", *flags) == 0
    assert "error" not in capsys.readouterr().err


def test_a_vocabulary_that_is_named_is_the_one_that_is_used(moved, score, capsys, tmp_path):
    assert score(moved, {"text": "a"}, "--gin.VOCABULARY=@vocabularies.byte()") == 2
    assert "another vocabulary than this ByteVocabulary" in capsys.readouterr().err
    flags = ("--gin.VOCABULARY=@vocabularies.huggingface()", "--gin.vocabularies.huggingface.path")
    assert score(moved, {"text": "a"}, flags[0], f"{flags[1]}='{hf_files(tmp_path / 'hf')}'") == 2
    assert "another vocabulary than this HFTokenizerVocabulary of 260" in capsys.readouterr().err


def test_other_files_are_evaluated_with_it(moved, command, tmp_path):
    for name, texts in (("more.jsonl", ["class naïve"] * 9), ("held.jsonl", ["yield 語"])):
        write_texts(tmp_path / name, texts)
    report = tmp_path / "eval.json"
    flags = (f"--gin.FILES={tmp_path}/more.jsonl", f"--gin.VALIDATION_FILES={tmp_path}/held.jsonl")
    assert (
        command(
            "evaluate loss", "--trust_config", f"--checkpoint={moved}", f"--json={report}", *flags
        )
        == 0
    )
    vocabulary = run_vocabulary.load(folder=str(moved))
    count = len(vocabulary.encode("yield 語")) + 1
    assert json.loads(report.read_text())["tasks"]["files"]["tokens"] == count


def test_texts_begin_with_bos_as_the_run_did(moved, run, score):
    ids = run[1].encode("while")
    with_bos, without = (score(moved, {"tokens": tokens}) for tokens in ([3, *ids], ids))
    assert score(moved, {"text": "while"}) == with_bos
    assert score(moved, {"text": "while"}, "--gin.ADD_BOS=False") == without


def hf_files(folder, **more):
    """The tokenizer files of a checkpoint: bytes, special tokens 256 to 259, and a chat template."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({text: id for id, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE},
        "config": {"eos_token_id": [257, 259], "vocab_size": 512},
        **more,
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


BOS, USER, END = 256, 258, 259
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles take turns') }}{% endif %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %} {{ m.content }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %} {% endif %}"
)
SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture(scope="module")
def imported(run, tmp_path_factory):
    """The model of `run` with the tokenizer of a Hugging Face checkpoint, as an import leaves it."""
    from espalier.trainers.checkpoints.checkpoint import Checkpointer

    folder = tmp_path_factory.mktemp("imported")
    source = hf_files(folder / "hf")
    for name in ("config.gin", model_file.NAME):
        shutil.copy(run[0] / name, folder / name)
    digest = run_vocabulary.save_files(folder, source)
    meta = {"vocabulary": digest, "add_bos": True, "start_token": None}
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(0, {"params": run[2]}, meta=meta)
    return folder


@pytest.fixture(scope="module")
def ids(imported):
    vocabulary = run_vocabulary.load(folder=str(imported))
    return vocabulary.encode


def test_tokenizer_files_are_kept_as_they_were(imported, tmp_path):
    source, kept = imported / "hf", imported / run_vocabulary.TOKENIZER
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (kept / name).read_bytes() == (source / name).read_bytes()
    # The model's own configuration stays behind, and what it says of the end of texts does not.
    assert not (kept / "config.json").exists()
    loaded = run_vocabulary.load(folder=str(imported))
    assert loaded == vocabularies.huggingface(path=source)
    assert loaded.eos_ids == (257, 259)
    assert run_vocabulary.gin_files(imported, imported)
    # A run that is trained with it keeps it too, its settings with it.
    run_vocabulary.save(tmp_path, vocabularies.huggingface(path=kept, special_in_text=False))
    again = run_vocabulary.load(folder=str(tmp_path))
    assert (again.special_in_text, again.eos_ids) == (False, (257, 259))
    assert not run_vocabulary.gin_files(tmp_path, imported)  # another vocabulary
    run_vocabulary.save(tmp_path, loaded)
    assert run_vocabulary.gin_files(tmp_path, imported)
    written = (tmp_path / run_vocabulary.RECORD).stat().st_mtime_ns
    run_vocabulary.save(tmp_path, run_vocabulary.load(folder=str(tmp_path)))  # from itself
    assert (tmp_path / run_vocabulary.RECORD).stat().st_mtime_ns == written
    (tmp_path / run_vocabulary.TOKENIZER / "tokenizer_config.json").write_text("{}")
    assert not run_vocabulary.gin_files(tmp_path, imported)


def test_the_template_that_rendered_the_data_is_kept_with_the_run(imported, tmp_path):
    vocabulary = run_vocabulary.load(folder=str(imported))
    template = chat_template.ChatTemplate({"default": "{{ messages[0].content }}", "tool_use": "x"})
    run_vocabulary.save(tmp_path / "same", vocabulary, vocabulary.chat_template)
    assert not (tmp_path / "same" / run_vocabulary.TOKENIZER / chat_template.FILE).exists()
    run_vocabulary.save(tmp_path / "other", vocabulary, template)
    again = run_vocabulary.load(folder=str(tmp_path / "other"))
    assert again.chat_template.templates == template.templates
    exported = tmp_path / "exported"
    exported.mkdir()
    assert run_vocabulary.export_files(tmp_path / "other", exported) is None
    assert (exported / chat_template.FILE).read_text() == template.templates["default"]


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor tokenizer.model"):
        run_vocabulary.save_files(tmp_path / "run", tmp_path)


@pytest.mark.parametrize("path", ["bytes", "x.model"])
def test_a_vocabulary_without_a_tokenizer_json_spells_no_special_tokens(path):
    with pytest.raises(ValueError, match=f"{path}: special_in_text = True needs a tokenizer.json"):
        run_vocabulary.of(path=path, special_in_text=True)


def test_messages_are_scored_as_their_tokens(imported, score, ids):
    prompt = [BOS, USER, *ids("hi ")]
    answer = [*ids("yo"), END]  # without the line end after it
    expected = score(imported, {"tokens": prompt, "targets": answer})
    assert len(expected) == 3
    assert score(imported, {"messages": SAID}) == expected
    # Without an answer all are, but for the first, which nothing precedes.
    whole = score(imported, {"messages": SAID[:1]})
    assert whole == score(imported, {"tokens": [BOS, USER, *ids("hi")]}) and len(whole) == 3
    started = score(imported, {"messages": SAID[:1]}, "--gin.START_TOKEN=0")
    assert len(started) == 4 and started[1:] != whole


def test_there_is_never_a_second_bos(imported, score, ids):
    expected = score(imported, {"tokens": [BOS, *ids("a")]})
    assert score(imported, {"text": "a"}) == expected
    assert score(imported, {"text": "<s>a"}) == expected
    assert score(imported, {"text": "a"}, "--gin.ADD_BOS=False") == score(
        imported, {"tokens": ids("a")}
    )


def test_messages_are_continued_after_a_generation_prompt(imported, ids):
    from espalier.launch.load.load_run import LoadedRun, RunConfig

    def loaded(vocabulary, **config):
        return LoadedRun(
            config=RunConfig(
                model=types.SimpleNamespace(
                    output="logits", config=types.SimpleNamespace(vocab_size=512)
                ),
                vocabulary=lambda: vocabulary,
                **config,
            ),
            params=None,
            meta={"add_bos": True},
            row_sharding=None,
            row_shards=1,
        )

    vocabulary = run_vocabulary.load(folder=str(imported))
    found = loaded(vocabulary, start_token=None)
    tokens = found.tokens({"messages": SAID[:1]}, "x")
    assert found.context(tokens) == tokens == [BOS, USER, *ids("hi ")]
    assert found.eos_ids == (257, 259)
    assert loaded(vocabularies.byte()).eos_ids == (1,) and loaded(None).eos_ids == ()
    # Words that spell special tokens: text in texts if that is asked for, never in templates.
    strict = vocabularies.huggingface(path=imported / "hf", special_in_text=False)
    assert loaded(strict).tokens({"messages": SAID[:1]}, "x") == tokens
    assert loaded(strict).tokens({"text": "<s>"}, "x") == [BOS, *strict.encode("<s>")]
    command = loaded(vocabulary, chat_template="command")
    text = "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|>"
    assert vocabulary.decode(command.tokens({"messages": SAID[:1]}, "x")).startswith(text)


def test_what_is_wrong_with_messages_is_said_with_file_and_line(imported, run, score, capsys):
    for row, message in (
        ({"messages": SAID[:1] * 2}, "x.jsonl, line 1: chat template of .*: roles take turns"),
        ({"messages": []}, "x.jsonl, line 1: messages must be a list of at least one message"),
        ({"messages": SAID, "text": "a"}, 'expected either "tokens", "text" or "messages"'),
    ):
        assert score(imported, row) == 2
        assert re.search(message, capsys.readouterr().err)
    assert score(imported, {"messages": SAID}, "--gin.CHAT_TEMPLATE='x.jinja'") == 2
    assert "CHAT_TEMPLATE: there is no chat template 'x.jinja'" in capsys.readouterr().err
    assert score(run[0], {"messages": SAID}) == 2
    assert "has no chat template" in capsys.readouterr().err
    path = imported / "plain.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    found = score(run[0], {"messages": SAID[:1]}, f"--gin.CHAT_TEMPLATE='{path}'")
    assert found == score(run[0], {"text": "user: hi\n"})


def test_files_are_evaluated_with_an_imported_tokenizer(imported, command, tmp_path):
    write_texts(tmp_path / "more.jsonl", ["class"] * 9)
    write_texts(tmp_path / "held.jsonl", ["yield 語"])
    report = tmp_path / "eval.json"
    flags = (f"--gin.FILES={tmp_path}/more.jsonl", f"--gin.VALIDATION_FILES={tmp_path}/held.jsonl")
    assert (
        command(
            "evaluate loss",
            "--trust_config",
            f"--checkpoint={imported}",
            f"--json={report}",
            *flags,
        )
        == 0
    )
    # As many bytes, and EOS.
    assert (
        json.loads(report.read_text())["tasks"]["files"]["tokens"] == len("yield 語".encode()) + 1
    )


def test_exported_files_are_those_that_were_imported(imported, tmp_path):
    assert run_vocabulary.export_files(imported, tmp_path) is None
    exported = vocabularies.huggingface(path=tmp_path)
    assert exported == run_vocabulary.load(folder=str(imported))
    assert exported.chat_template.templates == {"default": TEMPLATE}


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_a_trained_vocabulary_is_exported_with_the_same_ids(run, tmp_path, algorithm):
    path = run[0] / run_vocabulary.MODEL
    if algorithm == "unigram":
        texts = [pathlib.Path(module.__file__).read_text() for module in (json, random, re, shutil)]
        write_texts(
            tmp_path / "code.jsonl", [part for text in texts for part in text.split("\n\n")]
        )
        files = document_files.find(name="files", files=str(tmp_path / "code.jsonl"))
        found = vocabularies.sentencepiece(
            corpus=files, size=700, algorithm=algorithm, cache_dir=tmp_path / "cache"
        )
        path = pathlib.Path(found.sentencepiece_model_file)
    folder, to = tmp_path / "run", tmp_path / "to"
    folder.mkdir(), to.mkdir()
    vocabulary = vocabularies.from_file(path=path)
    run_vocabulary.save(folder, vocabulary)
    said = run_vocabulary.export_files(folder, to)
    assert said is None if algorithm == "bpe" else "divides some runs of line ends" in said
    assert (to / "tokenizer.model").read_bytes() == path.read_bytes()
    ids = {"bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}
    assert json.loads((to / "generation_config.json").read_bytes()) == ids
    exported = vocabularies.huggingface(path=to)
    assert exported.encode("</s>") == vocabulary.encode("</s>") != [vocabulary.eos_id]
    assert not exported.special_in_text
    run_vocabulary.save_files(tmp_path / "again", to)
    assert run_vocabulary.load(folder=str(tmp_path / "again")) == exported
    assert exported.vocab_size == vocabulary.vocab_size
    for name in ("pad_id", "eos_id", "unk_id", "bos_id"):
        assert getattr(exported, name) == getattr(vocabulary, name)
    assert not exported.adds_bos
    rng = random.Random(0)
    alphabet = [
        " ",
        "  ",
        "   ",
        "\n",
        "\t",
        "\r\n",
        "a",
        "x",
        "0",
        "9",
        "<",
        "/",
        "s>",
        "é",
        "e\u0301",
    ]
    alphabet += [
        "def ",
        "return",
        "語",
        "日本",
        "🙂",
        "\u00a0",
        "ﬁ",
        "</s>",
        "<0x0A>",
        "<unk>",
        "\x00",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 20)))
        # Runs that a unigram model can divide in several ways equally well.
        if algorithm == "bpe" or not re.search("\n{3}|\t{4}| {17}", text):
            assert exported.encode(text) == vocabulary.encode(text), repr(text)
        assert exported.decode(exported.encode(text)) == text


def test_what_cannot_be_exported_is_said(run, tmp_path):
    assert "has no vocabulary" in run_vocabulary.export_files(tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "3 extra ids" in run_vocabulary.export_files(run[0], tmp_path)
