"""Data sets of Hugging Face: folders and caches that the library itself writes, and what is refused."""

import datetime
import json
import os
import pathlib
import shutil

import numpy as np
import pyarrow
import pytest

from espalier.data import pieces, tasks
from espalier.data.cache import task_cache
from espalier.data.chats import tasks as chats
from espalier.data.instructions import tasks as instructions
from espalier.data.pieces import Piece
from espalier.data.preference import tasks as preference
from espalier.data.prompts import tasks as prompts
from espalier.data.stream import mixing
from espalier.data.text import document_files, hf_datasets, tables, user_data
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import vocabularies

datasets = pytest.importorskip("datasets")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = f"hf://owner/MySet@{COMMIT}"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing is downloaded, and the cache of the library is empty."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets.disable_progress_bars()


def texts(count=6, start=0):
    return datasets.Dataset.from_dict({"text": [f"text {start + n}" for n in range(count)]})


def find(files, tmp_path, **settings):
    return document_files.find(name="x", files=files, cache_dir=tmp_path / "cache", **settings)


def read(path):
    return [row.content for row in tables.rows(Piece(str(path)), None)]


def test_rows_of_each_type_are_those_of_the_library(tmp_path):
    text, each = datasets.Value("string"), datasets.List
    turn = {"role": text, "content": text}
    features = datasets.Features(
        large=datasets.Value("large_string"),
        label=datasets.ClassLabel(names=["no", "yes"]),
        structs=each(turn),
        lists=datasets.Sequence(turn),
        nested=each(each(datasets.Value("int8"))),
        json=datasets.Json(),
        jsons=each({"of": datasets.Json(), "n": datasets.Value("float32")}),
        matrix=datasets.Array2D((2, 2), "int32"),
        day=datasets.Value("date32"),
        time=datasets.Value("timestamp[us, tz=UTC]"),
        raw=datasets.Value("binary"),
        nothing=datasets.Value("null"),
    )
    full = {
        "large": "ä",
        "label": "yes",
        "structs": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
        "lists": {"role": ["user"], "content": ["b"]},
        "nested": [[1, 2], []],
        "json": {"a": [1, None], "b": "c"},
        "jsons": [{"of": [1], "n": 0.5}],
        "matrix": [[1, 2], [3, 4]],
        "day": datetime.date(2020, 2, 29),
        "time": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        "raw": b"\0\xff",
        "nothing": None,
    }
    rows = [full, dict.fromkeys(full), {**full, "large": "", "structs": [], "json": [2]}]
    made = datasets.Dataset.from_list(rows, features=features)
    made.save_to_disk(tmp_path / "set", num_shards=2)
    found = [
        row for path in hf_datasets.files(str(tmp_path / "set"), "train") for row in read(path)
    ]
    assert found == list(datasets.load_from_disk(tmp_path / "set"))
    assert found[0]["json"] == full["json"] and found[1]["structs"] is None


def test_arrow_files_of_other_libraries_in_both_forms(tmp_path):
    dictionary = pyarrow.array(["a", "b", "a", None]).dictionary_encode()
    numbers = pyarrow.array([1, 2, 1, None]).dictionary_encode()
    table = pyarrow.table({"text": dictionary, "n": numbers})
    for name, opened in (("s", pyarrow.ipc.new_stream), ("f", pyarrow.ipc.new_file)):
        path = tmp_path / f"{name}.arrow"
        with opened(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        assert read(path) == table.to_pylist()
        assert [group.rows for group in tables.groups(Piece(str(path)))] == [4]
        plain = table.cast(pyarrow.schema({"text": "string", "n": "int64"}))
        with opened(path, plain.schema) as writer:
            writer.write_table(plain, max_chunksize=3)
        one, two = tables.groups(Piece(str(path)))
        assert (one.rows, two.rows) == (3, 1)
        parts = (Piece(str(path), 0, two.begin), Piece(str(path), two.begin, None, 4))
        for part, expected in zip(
            parts, (table.to_pylist()[:3], table.to_pylist()[3:]), strict=True
        ):
            assert [row.content for row in tables.rows(part, None)] == expected


def test_pieces_of_a_file_are_its_record_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 4)
    texts(18).save_to_disk(tmp_path / "set", num_shards=2)
    whole = find(str(tmp_path / "set"), tmp_path, validation_fraction=0)
    expected = list(whole.documents("x", "train"))
    assert len(whole.pieces("train")) == 2
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 64)
    divided = find(str(tmp_path / "set"), tmp_path, validation_fraction=0).pieces("train")
    assert [piece.first for piece in divided] == [1, 5, 9] * 2
    read_alone = [list(whole.read_piece(piece, "train")) for piece in reversed(divided)]
    assert sum(reversed(read_alone), []) == expected and len(expected) == 18


def test_splits_are_those_of_the_set_by_name(tmp_path):
    whole = {"train": texts(20), "validation": texts(2, 20), "test": texts(1, 22)}
    datasets.DatasetDict(whole).save_to_disk(tmp_path / "set")
    source = find(str(tmp_path / "set"), tmp_path)
    for split in source.splits:
        found = [document.text for document in source.documents("x", split)]
        assert found == whole[split]["text"]
    assert source.splits == ("train", "validation") and source.validation_fraction == 0
    tested = find("set", tmp_path, data_root=str(tmp_path), validation_files="set/test")
    assert [d.text for d in tested.documents("x", "validation")] == ["text 22"]
    assert [d.id for d in tested.documents("x", "validation")][0].endswith(".arrow:0")
    # Without a split of its own, a share is held out.
    del whole["validation"]
    datasets.DatasetDict(whole).save_to_disk(tmp_path / "other")
    source = find(str(tmp_path / "oth*"), tmp_path, validation_fraction=0.5)
    assert sum(source.num_input_examples(split) for split in source.splits) == 20
    with pytest.raises(
        DataError, match="has the splits train, test, and none 'validation'; give one"
    ):
        find(str(tmp_path / "set"), tmp_path, validation_files=str(tmp_path / "other"))
    # The folder of one split is one split.
    assert find(str(tmp_path / "other" / "test"), tmp_path, validation_fraction=0).size("x") == 7


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_a_folder_says_is_obeyed_or_refused(tmp_path):
    folder = tmp_path / "set"
    texts(8).save_to_disk(folder, num_shards=2)
    first, state = folder / "data-00000-of-00002.arrow", folder / "state.json"
    for inside in ("*", "*.arrow"):
        with pytest.raises(
            DataError, match=r"is a part of a data set that .*: give its folder, .*set$"
        ):
            find(str(folder / inside), tmp_path)
    two = datasets.Dataset.from_dict({"text": ["a"], "n": [1]})
    two.with_format("numpy", columns=["text"]).save_to_disk(tmp_path / "format")
    with pytest.raises(
        DataError, match=r"shows only the columns \['text'\], .*with_format\(None\)"
    ):
        find(str(tmp_path / "format"), tmp_path)
    before = state.read_text()
    change(state, _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(
        DataError, match=r"state.json: the set is a selection .*flatten_indices\(\)"
    ):
        find(str(folder), tmp_path)
    change(state, _indices_data_files=None, _data_files=[{"filename": "../data.arrow"}])
    with pytest.raises(DataError, match="state.json: no list of files"):
        find(str(folder), tmp_path)
    state.write_text(before[:-9])
    with pytest.raises(DataError, match="state.json: not JSON"):
        find(str(folder), tmp_path)
    state.write_text(before)
    first.rename(tmp_path / "away")
    with pytest.raises(
        FileNotFoundError, match="data-00000-of-00002.arrow does not exist, which .*state"
    ):
        find(str(folder), tmp_path)
    with pytest.raises(
        DataError, match="arrow, columns: no key 'body'; present are 'text'. Correct text_key"
    ):
        shutil.copy(tmp_path / "away", first)
        find(str(folder), tmp_path, text_key="body").counts  # noqa: B018
    # A selection that was not written as such has its own rows.
    texts(8).select([3, 1]).save_to_disk(tmp_path / "chosen")
    found = find(str(tmp_path / "chosen"), tmp_path, validation_fraction=0)
    assert [document.text for document in found.documents("x", "train")] == ["text 3", "text 1"]


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "x.arrow"
    table = pyarrow.table({"text": ["first text", "second text"] * 50})
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    whole = path.read_bytes()
    for damaged in (
        whole[:-8],  # cut off between batches, which Arrow does not notice
        whole[: len(whole) // 2],
        b"",
        b"\0" * 64,
        whole.replace(b"first", b"\xff\xfe\xfd\xfc\xfb"),
        whole.replace(np.int32([0, 10, 21]).tobytes(), np.int32([0, 10**9, 21]).tobytes()),
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"x.arrow.*(not a readable Arrow file|not UTF-8)"):
            read(path)


def test_media_are_refused_only_where_they_are_read(tmp_path):
    features = datasets.Features(
        text=datasets.Value("string"), photos=datasets.List(datasets.Image())
    )
    made = datasets.Dataset.from_dict({"text": ["a"] * 3, "photos": [[]] * 3}, features=features)
    made.save_to_disk(tmp_path / "set")
    source = find(str(tmp_path / "set"), tmp_path, validation_fraction=0)
    assert source.counts["train"]["documents"] == 3
    with pytest.raises(DataError, match=r"'photos' holds Image, .*remove_columns\(\['photos'\]\)"):
        read(source.files["train"][0])


def prepare(tmp_path, config="default", commit=COMMIT, count=4):
    """Prepares a set as the library does with one of the hub at a commit."""
    from datasets.packaged_modules.json.json import Json

    for split in ("train", "validation"):
        rows = [json.dumps({"text": f"{config} {split} {n}"}) for n in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    builder = Json(
        cache_dir=os.environ["HF_DATASETS_CACHE"],
        dataset_name="MySet",
        data_files={x: str(tmp_path / f"{x}.jsonl") for x in ("train", "validation")},
    )
    builder.download_and_prepare()
    # A set of the hub has its owner, its configuration and its commit in this place.
    root = pathlib.Path(os.environ["HF_DATASETS_CACHE"], "owner___my_set", config, "0.0.0")
    root.mkdir(parents=True, exist_ok=True)
    return pathlib.Path(builder.cache_dir).rename(root / commit)


def test_sets_of_the_hub_are_read_from_the_cache_of_the_library(tmp_path, monkeypatch):
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("not needed"))
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    folder = prepare(tmp_path)
    prepare(tmp_path, "other")
    source = find(HUB, tmp_path)
    assert [d.text for d in source.documents("x", "train")] == [
        f"default train {n}" for n in range(4)
    ]
    assert [d.text for d in source.documents("x", "validation")][0] == "default validation 0"
    with monkeypatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        own = load("owner/MySet", "default")
    assert own["train"].cache_files == [{"filename": path} for path in source.files["train"]]
    one = find(f"hf://owner/MySet/other@{COMMIT}:validation", tmp_path, validation_fraction=0)
    assert [d.text for d in one.documents("x", "train")][0] == "other validation 0"
    with pytest.raises(DataError, match=r"the splits train, validation, and none 'test'; .*:SPLIT"):
        find(f"{HUB}:test", tmp_path)
    (arrow,) = folder.glob("*-train.arrow")
    arrow.rename(arrow.with_name("my_set-train-00000-of-00002.arrow"))
    with pytest.raises(DataError, match="has 1 files of the split 'train', of 2"):
        find(HUB, tmp_path)


def test_what_is_not_in_the_cache_is_one_error_that_says_what_to_run(tmp_path, monkeypatch):
    run = r"""Where there is network, run\n  python -c "import datasets; datasets.load_dataset\('owner/MySet', """
    prepare(tmp_path, commit="f" * 40)
    with pytest.raises(
        FileNotFoundError, match=f"HF_DATASETS_OFFLINE is set. {run}revision='{COMMIT}'"
    ):
        find(HUB, tmp_path)
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    asked = []

    def load(*arguments, **named):
        asked.append((*arguments, named))
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match=r"\(ConnectionError: Couldn't reach the Hub\)"):
        find(f"hf://owner/MySet/de@{COMMIT}:train", tmp_path)
    assert asked == [("owner/MySet", "de", {"revision": COMMIT})]
    # The library falls back to what it has, which is another commit.
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: None)
    with pytest.raises(FileNotFoundError, match="has prepared no such commit"):
        find(HUB, tmp_path)
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(
        FileNotFoundError, match="3.6.0 of the package datasets runs code .*'datasets>=4'"
    ):
        find(HUB, tmp_path)
    prepare(tmp_path, "de")
    with pytest.raises(DataError, match=r"has the configuration de .*, not 'default'; name it"):
        find(HUB, tmp_path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://owner/MySet", "the revision is not given, and the set may change .*/owner/MySet/commits/main"),
        ("hf://owner/MySet@main", r"the revision is main.*40 hexadecimal digits \(hf://owner/MySet@COMMIT\)"),
        (f"hf://owner/MySet@{COMMIT[:12]}:train", "the revision is 0123456789ab,"),
        (f"hf://MySet@{COMMIT}", "is no set of the hub; write hf://OWNER/NAME@REVISION"),
        (f"{HUB}:train[:10%]", "is no set of the hub"),
    ],
)  # fmt: skip
def test_addresses_that_name_no_commit_or_set(tmp_path, address, message):
    with pytest.raises(ValueError, match=message):
        find(address, tmp_path)


TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SPOKEN = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
LISTS = {"role": ["user", "assistant"], "content": ["Why?", "So."]}
OTHER = [TURNS[0], {"role": "assistant", "content": "No."}]
TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
YAML = """
templates:
- {name: say, jinja: '{{text}}? ||| {{answer_choices[label]}}', answer_choices: no ||| yes}
"""
# A row of a data set, the columns by which it is read, and the row of JSON lines that it stands for.
KINDS = {
    "texts": (user_data.register_files, {"body": "Why?", "n": 1}, {"text_key": "body"}, {"text": "Why?"}),
    "messages": (chats.register_chats, {"messages": TURNS}, {}, {"messages": TURNS}),
    "spoken": (
        chats.register_chats,
        {"conversations": SPOKEN, "text": "other"},
        {"columns": {"messages": "conversations"}},
        {"messages": TURNS},
    ),
    "lists": (chats.register_chats, {"messages": LISTS}, {}, {"messages": TURNS}),
    "alpaca": (
        chats.register_chats,
        {"instruction": "Why?", "input": "Now.", "output": "So.", "text": "Below ..."},
        {"columns": {"prompt": ["instruction", "input"], "completion": "output"}},
        {"prompt": "Why?\n\nNow.", "completion": "So."},
    ),
    "pairs": (
        preference.register_pairs,
        {"question": "Why?", "chosen": "So.", "rejected": None, "worse": "No."},
        {"columns": {"prompt": "question", "chosen": "chosen", "rejected": "worse"}},
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    ),
    "ultrafeedback": (
        preference.register_pairs,
        {"prompt": "Why?", "messages": TURNS, "chosen": TURNS, "rejected": OTHER, "score_chosen": 8.0},
        {},
        {"chosen": TURNS, "rejected": OTHER},
    ),
    "prompts": (
        prompts.register_prompts,
        {"question": "Why?", "answer": "So.", "id": 3},
        {"columns": {"prompt": "question", "answer": "answer"}},
        {"prompt": "Why?", "answer": "So."},
    ),
    "instructions": (
        instructions.register_instructions,
        {"sentence": "Why?", "label": "yes"},
        {"columns": {"set": {"text": "sentence", "label": "label"}}},
        {"text": "Why?", "label": 1},
    ),
}  # fmt: skip


def varied(row, number):
    return json.loads(json.dumps(row).replace("Why?", f"Why {number}?"))


def cached(register, files, tmp_path, **settings):
    """Returns the bytes of the columns of a task's caches, but for the names of its records."""
    if register is instructions.register_instructions:
        files = {"data_dir": str(files), "train": {"all": ["set"]}, "form": "decoder", **settings}
        settings = {"templates_dir": str(tmp_path / "templates")}
    else:
        files = {"files": str(files)}
    if register is not user_data.register_files and "form" not in files:
        settings["chat_template"] = str(tmp_path / "template.jinja")
    register(
        name="x",
        vocabulary=vocabularies.byte(),
        validation_fraction=0.25,
        cache_dir=tmp_path / "cache",
        **{**files, **settings},
    )
    ((task,), _) = mixing.find_tasks("x")
    found = {}
    for split in sorted(task.splits):
        opened = task_cache.open_task_cache(task, split, cache_dir=tmp_path, changed="build")
        for path in opened.directory.iterdir():
            if path.suffix in (".bin", ".len") and "document_id" not in path.name:
                found[split, path.name] = path.read_bytes()
    tasks.clear()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_caches_equal_those_of_the_same_rows_as_json_lines(tmp_path, kind):
    register, row, settings, line = KINDS[kind]
    templates = tmp_path / "templates" / "set"
    templates.mkdir(parents=True)
    (templates / "templates.yaml").write_text(YAML)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    rows = [varied(row, n) for n in range(12)]
    made = datasets.Dataset.from_list(rows)
    if "label" in row:
        made = made.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    saved = tmp_path / "saved"
    made.save_to_disk(saved, num_shards=2)
    json_lines = tmp_path / "lines" / "set" / "train.jsonl"
    json_lines.parent.mkdir(parents=True)
    json_lines.write_text("".join(json.dumps(varied(line, n)) + "\n" for n in range(12)))
    expected = cached(register, json_lines, tmp_path) if "label" not in row else None
    if expected is None:
        expected = cached(register, tmp_path / "lines", tmp_path)
        settings = {**settings, "hf_sets": {"set": str(saved)}}
    assert cached(register, saved, tmp_path, **settings) == expected
    assert {split for split, _ in expected} == {"train", "validation"}
    assert all(map(len, expected.values()))


def test_columns_that_are_wrong_are_named(tmp_path):
    texts(4).save_to_disk(tmp_path / "set")

    def register(columns, files="set"):
        prompts.register_prompts(
            name="x",
            files=str(tmp_path / files),
            vocabulary=vocabularies.byte(),
            columns=columns,
            cache_dir=tmp_path / "cache",
        )
        ((task,), _) = mixing.find_tasks("x")
        return task.source.num_input_examples("train")

    assert register({"prompt": "text"}) == 4
    with pytest.raises(
        DataError, match="arrow, columns: no key 'body'; present are 'text'. Correct columns"
    ):
        register({"prompt": "body"})
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(
        DataError, match="x.jsonl, line 2: no key 'text'; present are 'body'. Correct columns"
    ):
        register({"prompt": "text"}, "x.jsonl")
    with pytest.raises(ValueError, match="x: columns maps 'text' more than once"):
        register({"prompt": "text", "answer": ["other", "text"]})
    for wrong in ({}, {"prompt": 1}, {"prompt": []}):
        with pytest.raises(ValueError, match="x: columns is .*; write {'key of a row'"):
            register(wrong)
    datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(DataError, match="'n' is a int; only texts are joined to 'prompt'"):
        register({"prompt": ["text", "n"]}, "numbers")


def test_messages_in_other_words_are_read_or_named(tmp_path):
    from espalier.data.rows.records import text_of

    assert text_of(SPOKEN, "m", "row") == text_of(LISTS, "m", "row") == tuple(TURNS)
    for value, message in (
        ([{"from": "narrator", "value": "x"}], "message 1 of 'm' is from 'narrator', .* known are texts"),
        ([*SPOKEN, {"from": "gpt", "value": None}], "message 3 of 'm' is from 'gpt', with a NoneType"),
        ([{"from": "gpt"}], "message 1 of 'm' is not of the form"),
        ({"role": ["user"], "content": []}, "row: 'm' is a dict; write a text, or a list"),
        ({"role": "user", "content": "x"}, "row: 'm' is a dict"),
        ({}, "row: 'm' is a dict"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            text_of(value, "m", "row")
