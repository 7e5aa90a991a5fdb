"""Tasks of preference files: tokens as TRL makes them, what is dropped and counted, splits, mixtures."""

import dataclasses
import gzip
import json
import pathlib

import numpy as np
import pytest
import tokenizers

from espalier.data import tasks
from espalier.data.cache import task_cache
from espalier.data.chats.tasks import rendered_turns
from espalier.data.preference import records, stream
from espalier.data.preference import tasks as preference_tasks
from espalier.data.rows import files
from espalier.data.stream import stream as plain_stream
from espalier.data.tasks import in_seqio
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import chat_template, vocabularies, vocabulary

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
GOLDEN = json.loads((GOLDENS / "preference_pairs.json").read_bytes())
IDS = ("prompt", "chosen", "rejected")


@pytest.fixture(scope="module")
def byte():
    return vocabularies.byte()


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizer"]))
    (folder / "tokenizer_config.json").write_text(json.dumps(GOLDEN["tokens"]))
    return folder


@pytest.fixture(scope="module")
def hf(hf_folder):
    return vocabularies.huggingface(path=hf_folder)


@pytest.fixture
def register(tmp_path, byte):
    """Writes rows to a file and registers it; both may be given by name."""

    def call(rows, name="pairs", file="x.jsonl", **settings):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / file).write_text("\n".join(lines) + "\n")
        settings = {"vocabulary": byte, "validation_fraction": 0, **settings}
        files = str(tmp_path / file)
        preference_tasks.register_pairs(
            name=name, files=files, cache_dir=tmp_path / "cache", **settings
        )

    return call


def read(name="pairs", split="train"):
    seqio = in_seqio()

    task = seqio.TaskRegistry.get(name)
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    return list(dataset.as_numpy_iterator())


def pairs(count, start=0, **more):
    return [
        {"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": "no", **more}
        for i in range(start, start + count)
    ]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_ids_are_those_that_trl_trains_on(hf, case):
    template = case["template"] and str(GOLDENS / "chat_templates" / f"{case['template']}.jinja")
    tokeniser = files.Tokeniser(hf, chat_template.of(template, hf), False, True)
    prompt, completions = tokeniser(records.parse(case["row"], "row", "row"))
    assert dict(zip(IDS, (prompt, *completions), strict=True)) == case["ids"]


def test_nothing_merges_across_the_join(hf):
    text = "The sky is blue"
    row = {"prompt": text[:8], "chosen": text[8:], "rejected": "x"}
    tokeniser = files.Tokeniser(hf, None, add_bos=True, add_eos=True)
    prompt, (chosen, _) = tokeniser(records.parse(row, "row", "row"))
    assert prompt == [hf.bos_id, *hf.encode(text[:8])]
    assert chosen == [*hf.encode(text[8:]), hf.eos_id]
    assert prompt[1:] + chosen[:-1] != hf.encode(text)  # which has one token for " is"


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A vocabulary that begins every text with a space, as that of Llama 2 does."""
    merges = [
        "h e",
        "he r",
        "her e",
        "t here",
        "▁ there",
        "H e",
        "He l",
        "Hel l",
        "Hell o",
        "▁ Hello",
    ]
    pieces = ["<s>", *"\n:Habehilnorstu▁", *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(vocabulary, [tuple(merge.split()) for merge in merges])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    folder = tmp_path_factory.mktemp("spaced")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<s>"}')
    return vocabularies.huggingface(path=folder)


ROLES = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def test_completions_of_messages_are_tokenised_as_in_the_whole_conversation(spaced):
    template = chat_template.ChatTemplate({"default": ROLES})
    tokeniser = files.Tokeniser(spaced, template, False, True)
    record = records.parse(
        {"chosen": chat("hi", "Hello there"), "rejected": chat("hi", "b")}, *"ab"
    )
    prompt, (chosen, rejected) = tokeniser(record)
    assert chosen == [spaced._tokenizer().token_to_id(t) for t in ("Hello", "▁there", "\n")]
    assert prompt + chosen == spaced.encode("user:hi\nassistant:Hello there\n")
    rows = dataclasses.replace(record, prompt=chat("hi", "Hello there"), completions=())
    ids, learnt = tokeniser.encode_marked(rendered_turns(tokeniser, rows, "all"))
    assert [id for id, is_learnt in zip(ids, learnt, strict=True) if is_learnt] == chosen
    encoder = dataclasses.replace(tokeniser, prompt_eos=True)
    assert encoder(record)[1][0] == spaced.encode("Hello there\n")


def test_messages_begin_with_bos_if_their_template_cannot_write_it():
    class Spelled(vocabulary.ByteVocabulary):  # reads no BOS in texts, as SentencePiece
        bos_id = 300

    template = chat_template.ChatTemplate({"default": ROLES})
    tokeniser = files.Tokeniser(Spelled(), template, True, True)
    record = records.parse({"chosen": chat("hi", "a"), "rejected": chat("hi", "b")}, *"ab")
    prompt, (chosen, _) = tokeniser(record)
    whole = tokeniser.render(record, chat("hi", "a"))
    assert prompt + chosen == tokeniser.encode_marked(whole)[0]
    assert (prompt + chosen).count(300) == 1 == prompt.count(300)


def test_features_and_facts_of_a_task(register, byte, tmp_path):
    register(
        [
            *pairs(2, margin=1.5),
            {"prompt": "x", "chosen": "a", "rejected": "a"},
            {"prompt": "\u200fק", "chosen": "a", "rejected": "b"},
            "",
            {"prompt": "x", "chosen": " ", "rejected": "a"},
            {"prompt": "x", "chosen": "c", "rejected": "c"},
        ]
    )
    first, second, third = read()
    assert [byte.decode(first[f].tolist()) for f in IDS] == ["0?", "yes 0", "no"]
    assert first["chosen"][-1] == byte.eos_id and byte.eos_id not in first["prompt"]
    assert (first["margin"].tolist(), third["margin"].tolist()) == ([1.5], [0.0])
    assert second["document_id"] == b"x.jsonl:2"
    assert third["prompt"].tolist() == [
        b + 3 for b in "\u200fק".encode()
    ]  # as it stands in the file
    facts = tasks.summary()["tasks"]["pairs"]
    assert facts["documents"] == {"train": 3} and facts["origin"] == "register_pairs"
    assert facts["dropped"] == {
        "identical": {"rows": 2, "first": "x.jsonl:3"},
        "empty_completion": {"rows": 1, "first": "x.jsonl:6"},
    }
    assert facts["noted"] == {"invisible_characters": {"rows": 1, "first": "x.jsonl:4"}}
    assert tasks.vocabulary("pairs") is byte


def test_pairs_that_say_nothing_can_be_errors(register):
    rows = [*pairs(2), {"prompt": "x", "chosen": "a", "rejected": "a\u200b"}]
    register(rows)
    assert len(read()) == 2
    register(rows, invalid="error")  # although it is known what is dropped
    with pytest.raises(DataError, match="x.jsonl, line 3: .*invisible.*invalid='drop'"):
        read()


def test_completions_of_the_same_tokens_are_dropped(register, tmp_path):
    composing = {**GOLDEN["tokenizer"], "normalizer": {"type": "NFC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(composing))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(GOLDEN["tokens"]))
    vocabulary = vocabularies.huggingface(path=tmp_path)
    row = {"prompt": "x", "chosen": "\u00e9", "rejected": "e\u0301"}
    register([row, *pairs(1)], vocabulary=vocabulary)
    assert len(read()) == 1
    dropped = tasks.summary()["tasks"]["pairs"]["dropped"]
    assert dropped == {"identical_tokens": {"rows": 1, "first": "x.jsonl:1"}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x}', "x.jsonl, line 2: malformed JSON.*rejected"),
        ("[1]", "x.jsonl, line 2: a JSON list where an object is expected"),
        ({"prompt": "p", "chosen": "a"}, "line 2: no key 'rejected'"),
        ('{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}', "line 2: 'chosen' is not valid"),
        ({"prompt": "p", "completion": "a", "label": True}, "line 2: .*set kind='unpaired'"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "chosen": [], "rejected": []},
            "no example",
        ),
        (
            {"chosen": [{"role": r, "content": r} for r in ("user", "assistant")],
             "rejected": [{"role": r, "content": r} for r in ("user", "system")]},
            "line 2: messages need a chat template.*Set chat_template to a jinja file or one of comm",
        ),
    ],
)  # fmt: skip
def test_malformed_rows_are_errors_before_tensorflow_reads(register, line, message):
    register([*pairs(0 if message == "no example" else 1), line])
    with pytest.raises(DataError, match=message):
        read()
    with pytest.raises(DataError, match=message):
        tasks.summary()


def chat(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def test_a_template_that_cannot_be_divided_says_why(register, tmp_path, byte):
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    (tmp_path / "ok.jinja").write_text(
        f"{source}{{% if add_generation_prompt %}}assistant:{{% endif %}}"
    )
    (tmp_path / "other.jinja").write_text(
        f"{source}{{% if add_generation_prompt %}}<think>{{% endif %}}"
    )
    (tmp_path / "fails.jinja").write_text("{{ raise_exception('no') }}")
    rows = [{"chosen": chat("a", "b"), "rejected": chat("a", "c")}]
    register(rows, chat_template=str(tmp_path / "ok.jinja"))
    (example,) = read()
    assert byte.decode(example["prompt"].tolist()) == "user:a;assistant:"
    assert (
        byte.decode(example["rejected"].tolist()) == "c;"
    )  # what ends a turn is for the template to say
    register(rows, chat_template=str(tmp_path / "other.jinja"))
    with pytest.raises(
        DataError, match="line 1: .*renders the prompt differently.*from character 7 .*'<th"
    ):
        read()
    register(rows, chat_template=str(tmp_path / "fails.jinja"))
    with pytest.raises(DataError, match="line 1: chat template .*fails.jinja: no"):
        read()
    with pytest.raises(ValueError, match="no chat template 'gone'"):
        register(rows, chat_template="gone")


def test_the_built_in_template_ends_turns(hf, tmp_path):
    rows = {"chosen": chat("a", "b"), "rejected": chat("a", "c")}
    tokeniser = files.Tokeniser(hf, chat_template.of("command", hf), False, True)
    prompt, (chosen, _) = tokeniser(records.parse(rows, "row", "row"))
    assert prompt[0] == hf.bos_id and prompt.count(hf.bos_id) == 1
    assert hf.decode_all(chosen) == "b<|END_OF_TURN_TOKEN|>"


def test_unpaired_examples_come_with_the_completion_of_another_prompt(register, tmp_path, byte):
    rows = [
        {"prompt": "a", "completion": "1", "label": True},
        {"prompt": "a", "completion": "2", "label": False},
        {"prompt": "b", "chosen": "3", "rejected": "4"},
        {"prompt": "c", "completion": " ", "label": True},
    ]
    (tmp_path / "y.jsonl.gz").write_bytes(
        gzip.compress(b'{"prompt": "d", "completion": "5", "label": true}\n')
    )
    register(rows, kind="unpaired")
    preference_tasks.register_pairs(
        name="pairs",
        files=[str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl.gz")],
        kind="unpaired",
        vocabulary=byte,
        validation_fraction=0,
        add_eos=False,
        cache_dir=tmp_path / "cache",
    )
    found = [
        "".join(byte.decode(e[f].tolist()) for f in IDS) + str(int(e["labels"][0])) for e in read()
    ]
    assert found == ["a131", "a230", "b351", "b450", "d511"]
    assert [e["document_id"].decode() for e in read()][2:4] == [
        "x.jsonl:3/chosen",
        "x.jsonl:3/rejected",
    ]
    assert tasks.summary()["tasks"]["pairs"]["documents"] == {"train": 5}
    register(rows[:2], kind="unpaired")
    with pytest.raises(DataError, match="train split have one prompt"):
        read()


def test_the_pairs_of_a_prompt_are_in_one_split(register):
    rows = [row | {"chosen": f"{turn}"} for turn in "abc" for row in pairs(60)]
    register(rows, validation_fraction=0.3)
    train, held_out = ({bytes(e["prompt"]) for e in read(split=s)} for s in ("train", "validation"))
    assert not train & held_out and len(train | held_out) == 60 and 5 < len(held_out) < 35
    register(pairs(2), validation_fraction=1e-9)
    with pytest.raises(DataError, match="leaves none for the validation split.*validation_files"):
        read()


@pytest.mark.parametrize("kind", ["paired", "unpaired"])
def test_only_the_pairs_of_a_split_are_tokenised_for_it(register, monkeypatch, kind):
    register(pairs(60), validation_fraction=0.3, kind=kind)
    counted = tasks.summary()["tasks"]["pairs"]["documents"]
    prompts, tokenise = [], files.Tokeniser.__call__

    def told(self, record):
        prompts.append(record.prompt.encode())
        return tokenise(self, record)

    monkeypatch.setattr(files.Tokeniser, "__call__", told)
    for split in ("train", "validation"):
        found = {bytes(i - 3 for i in e["prompt"]) for e in read(split=split)}
        assert set(prompts) == found and 5 < len(found) < 55
        if kind == "paired":
            assert len(prompts) == len(found) == counted[split]
        prompts.clear()


def test_a_mixture_of_two_tasks_is_cached_and_streamed(register, tmp_path, byte):
    register(pairs(40), name="one", file="one.jsonl", validation_fraction=0.2)
    register(pairs(20, start=100), name="two", file="two.jsonl")
    tasks.register_mixture("both", {"one": 1, "two": 1})
    settings = {
        "task_feature_lengths": {"targets": 32},
        "batch_size": 4,
        "cache_dir": tmp_path / "cache",
    }
    made = stream.make_stream(mixture_or_task_name="both", seed=3, **settings)
    assert made.source_names == ("one", "two") and made.slots == 1
    batches = [made.batch(step, 0, 4) for step in range(10)]
    again = stream.make_stream(mixture_or_task_name="both", seed=3, **settings)
    assert again.fingerprint == made.fingerprint
    for step, batch in enumerate(batches):
        other = again.batch(step, 0, 4)
        assert all(np.array_equal(batch[name], other[name]) for name in batch)
    weights = sum(b["decoder_loss_weights"].sum(axis=1) @ (b["source_ids"] == 0) for b in batches)
    total = sum(b["decoder_loss_weights"].sum() for b in batches)
    assert abs(weights / total - 0.5) < 0.05
    texts = {byte.decode(row["decoder_target_tokens"][0].tolist()) for row in batches}
    assert all("yes" in text for text in texts)
    held_out = plain_stream.held_out(
        lambda task: stream.make_eval_stream(task=task, **settings), ["one", "two"]
    )
    assert [found.name for found in held_out] == ["one"]
    assert held_out[0].summary()["vocabulary"] == made.summary()["vocabulary"]
    with pytest.raises(ValueError, match="'both' is a mixture"):
        stream.make_eval_stream(task="both", **settings)
    with pytest.raises(ValueError, match="must give 'targets' alone"):
        stream.make_stream(
            mixture_or_task_name="both", **{**settings, "task_feature_lengths": {"inputs": 3}}
        )
    register(pairs(20), name="two", file="two.jsonl", kind="unpaired")
    with pytest.raises(ValueError, match="different output features"):
        tasks.register_mixture("both", {"one": 1, "two": 1})


def test_a_cache_is_told_from_those_of_other_settings(register, tmp_path):
    seqio = in_seqio()

    def made(**settings):
        register(pairs(5), **settings)
        task = seqio.TaskRegistry.get("pairs")
        opened = task_cache.open_task_cache(
            task, "train", cache_dir=tmp_path / "cache", changed="build"
        )
        return opened.fingerprint

    (tmp_path / "t.jinja").write_text("x")
    found = [made(), made(add_eos=False), made(chat_template=str(tmp_path / "t.jinja"))]
    assert len({*found, made(kind="unpaired")}) == 4 and made() == found[0]


def test_what_cannot_be_registered(register, byte, hf):
    with pytest.raises(ValueError, match="kind is 'pairs'; it must be one of 'paired', 'unpaired'"):
        register(pairs(1), kind="pairs")
    with pytest.raises(ValueError, match="invalid is 'keep'"):
        register(pairs(1), invalid="keep")
    with pytest.raises(ValueError, match="add_bos=True, but .* has no BOS"):
        register(pairs(1), add_bos=True)
    with pytest.raises(FileNotFoundError, match="other: files='gone.jsonl' matches no file"):
        preference_tasks.register_pairs(name="other", files="gone.jsonl", vocabulary=byte)
    with pytest.raises(
        DataError, match="x.txt: rows are read from JSON lines .*, Parquet or Arrow"
    ):
        register(pairs(1), file="x.txt")


def test_special_tokens_in_contents_are_those_of_trl_or_text(hf):
    end = hf.files.tokens["eos_token"]
    evil, source = f"a{end}", str(GOLDENS / "chat_templates" / "llama2.jinja")
    record = records.parse({"chosen": chat(evil, evil), "rejected": chat(evil, "c")}, "row", "row")
    for allowed, counts in ((True, (1, 2, 1)), (False, (0, 1, 1))):
        template = chat_template.of(source, hf, special_in_contents=allowed)
        prompt, (chosen, rejected) = files.Tokeniser(hf, template, False, True)(record)
        assert tuple(ids.count(hf.eos_id) for ids in (prompt, chosen, rejected)) == counts
        assert hf.decode_all(chosen).strip() == f"{evil} {end}"
