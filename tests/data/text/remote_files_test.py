"""Files of texts in a store, read where they are: by several hosts, by pieces, and when they change."""

import gzip
import itertools
import json
import pathlib

import pyarrow
import pytest
from pyarrow import parquet

from espalier.common.storage import mirror, paths, ranges
from espalier.data import pieces, tasks
from espalier.data.cache import cache_dir, pool, task_cache
from espalier.data.stream import mixing
from espalier.data.text import document_files, user_data
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import vocabularies

KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "txt")
# Each kind of file in one store, and one of them in the other.
in_stores = pytest.mark.parametrize(
    ("store", "kind"), [*(("s3", kind) for kind in KINDS), ("gs", "parquet")], indirect=["store"]
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces and requests of a few lines; one process, but where a test takes more."""
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 600)
    monkeypatch.setattr(ranges, "_FIRST", 64)
    monkeypatch.setattr(ranges, "_MOST", 512)
    monkeypatch.setattr(ranges, "_BUFFER", 256)
    monkeypatch.setattr(ranges, "_PAUSE_SECONDS", 0.01)
    with pool.limited(1):
        yield


@pytest.fixture
def host(store, tmp_path, monkeypatch):
    """Makes this process a host with folders of its own, whose caches are in the store."""

    def become(name):
        tasks.clear()
        monkeypatch.setenv(mirror.COPIES, str(tmp_path / name))
        monkeypatch.setenv(cache_dir.VARIABLE, f"{store.address}/cache")

    become("a")
    return become


def texts(count=60):
    return [f"text {n} {'é' * (n % 30)}" for n in range(count)]


def write(path, values):
    """Writes texts into a file of the kind that its name says."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in values).encode()
    table = pyarrow.table({"text": values})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=8)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=8)
    elif path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(values))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def upload(folder, address):
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            paths.write(f"{address}/{path.relative_to(folder)}", path.read_bytes())


def register(files):
    user_data.register_files(
        name="x",
        files=files,
        vocabulary=vocabularies.byte(),
        document_per="paragraph",
        validation_fraction=0.2,
    )
    ((task,), _) = mixing.find_tasks("x")
    return task


def cached(task):
    """Returns the bytes of all files of a task's caches, and their fingerprints."""
    found = {}
    for split in sorted(task.splits):
        cache = task_cache.open_task_cache(task, split, changed="build")
        for path in cache.directory.iterdir():
            found[split, path.name] = path.read_bytes()
        found[split] = (cache.fingerprint, cache.content)
    return found


def read_texts(store):
    """Returns the requests that read texts, or parts of them."""
    return [
        (method, path)
        for method, path in store.requests
        if method == "GET" and "/texts/" in path and path.endswith(KINDS)
    ]


@in_stores
def test_caches_are_those_of_local_files_and_other_hosts_read_no_text(
    store, host, tmp_path, monkeypatch, kind
):
    folder = tmp_path / "texts"
    for name, values in {"a": texts(), "sub/b": texts(200)[60:]}.items():
        write(folder / f"{name}.{kind}", values)
    upload(folder, f"{store.address}/texts")
    pattern = f"{store.address}/texts/**/*.{kind}"
    built = register(pattern)
    assert set(built.source.objects) == set(built.source.files["train"])
    with pool.limited(2 if kind == "jsonl" else None):
        made, count = cached(built), built.source.num_input_examples("train")
    assert read_texts(store)
    divided = built.source.pieces("train")
    assert len(divided) > 2 if kind in ("jsonl", "parquet", "arrow") else len(divided) == 2

    host("b")
    store.requests.clear()
    opened = register(pattern)
    assert opened.source.num_input_examples("train") == count
    assert cached(opened) == made and opened.source.pieces("train") == divided
    assert read_texts(store) == []
    assert not list(tmp_path.glob(f"b/**/*.{kind}"))  # nor copies

    monkeypatch.setenv(cache_dir.VARIABLE, str(tmp_path / "local"))
    tasks.clear()
    local = register(f"{folder}/**/*.{kind}")
    assert cached(local) == made


def test_only_changed_objects_are_digested_anew(store, host, tmp_path, monkeypatch):
    for name in "abc":
        write(tmp_path / "texts" / f"{name}.jsonl", [f"{name} {text}" for text in texts(20)])
    upload(tmp_path / "texts", f"{store.address}/texts")
    pattern = f"{store.address}/texts/*.jsonl"

    def digests():
        source = document_files.find(name="x", files=pattern)
        store.requests.clear()
        found = source.checksums
        names = {path.rpartition("/")[2].partition("?")[0] for _, path in read_texts(store)}
        return list(found.values()), {name for name in names if name.endswith(".jsonl")}

    first, read = digests()
    assert read == {"a.jsonl", "b.jsonl", "c.jsonl"} and digests() == (first, set())
    host("b")
    assert digests() == (first, set())
    # The same content at the same address is another version, and its digest the same one.
    paths.write(f"{store.address}/texts/c.jsonl", b'{"text": "other"}\n')
    second, read = digests()
    assert second[:2] == first[:2] and second[2] != first[2] and read == {"c.jsonl"}
    host("a")
    assert digests() == (second, set())
    # A cache on this machine remembers for this machine.
    monkeypatch.setenv(cache_dir.VARIABLE, str(tmp_path / "local"))
    assert digests()[0] == second and digests() == (second, set())


@in_stores
def test_an_object_that_is_replaced_after_its_digest_is_named(store, host, tmp_path, kind):
    path = tmp_path / "texts" / f"a.{kind}"
    write(path, texts())
    upload(path.parent, f"{store.address}/texts")
    address = f"{store.address}/texts/a.{kind}"
    source = document_files.find(name="x", files=address, validation_fraction=0)
    (piece, *_) = source.pieces("train")
    write(path, texts(61))
    paths.write(address, path.read_bytes())
    with pytest.raises(ranges.ChangedError, match=f"{address} was replaced since"):
        list(source.read_piece(piece, "train"))
    with pytest.raises(Exception, match=f"{address} was replaced since"):
        source.counts  # noqa: B018
    paths.delete(address)
    with pytest.raises(ranges.ChangedError, match=f"{address} was deleted"):
        list(source.read_piece(piece, "train"))


@pytest.mark.parametrize("kind", ["jsonl.zst", "parquet"])
def test_nothing_is_lost_if_requests_fail(store, host, tmp_path, kind):
    path = tmp_path / "texts" / f"a.{kind}"
    write(path, texts())
    upload(path.parent, f"{store.address}/texts")
    numbers = itertools.count(1)
    store.fault = lambda method, path: 503 if next(numbers) % 10 == 0 else None
    source = document_files.find(name="x", files=f"{store.address}/texts/*", validation_fraction=0)
    assert [document.text for document in source.documents("x", "train")] == texts()
    store.fault = None
    paths.write(f"{store.address}/texts/a.{kind}", path.read_bytes()[:-40])
    cut = document_files.find(name="x", files=f"{store.address}/texts/*", validation_fraction=0)
    with pytest.raises(DataError, match=f"{store.address}/texts/a.{kind}"):
        list(cut.documents("x", "train"))


def test_a_folder_of_save_to_disk_in_a_store(store, host, tmp_path):
    datasets = pytest.importorskip("datasets")
    made = {
        split: datasets.Dataset.from_dict({"text": texts(count)})
        for split, count in (("train", 30), ("validation", 3))
    }
    datasets.DatasetDict(made).save_to_disk(
        tmp_path / "set", num_shards={"train": 2, "validation": 1}
    )
    upload(tmp_path / "set", f"{store.address}/set")
    source = document_files.find(name="x", files=f"{store.address}/set")
    for split in ("train", "validation"):
        assert [d.text for d in source.documents("x", split)] == made[split]["text"]
    with pytest.raises(DataError, match=f"give its folder, {store.address}/set/test"):
        paths.write(f"{store.address}/set/test/state.json", b"{}")
        paths.write(f"{store.address}/set/test/dataset_info.json", b"{}")
        paths.write(f"{store.address}/set/test/x.arrow", b"")
        document_files.find(name="x", files=f"{store.address}/set/test/*.arrow")
    assert pathlib.Path(source.root).as_posix().startswith(f"/{store.scheme}/")
