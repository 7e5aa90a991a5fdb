"""Addresses, objects, locks and copies in object stores, and the errors of stores that fail."""

import concurrent.futures
import itertools
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from espalier.common.storage import lock, mirror, paths


def test_addresses_are_split_and_joined():
    assert paths.split("gs://bucket/a/b/") == ("gs", "bucket", "a/b")
    assert paths.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert paths.join("s3://bucket/a", "b", "c") == "s3://bucket/a/b/c"
    assert not paths.is_remote("runs/gs/x") and not paths.is_remote("http://x/y")


@pytest.mark.parametrize("address", ["gs://", "s3:///key", "s3://bucket/a//b", "gs://bucket/../x"])
def test_what_is_no_address_is_an_error(address):
    with pytest.raises(paths.StoreError, match="is no address: give"):
        paths.split(address)


def test_an_address_with_credentials_is_refused_without_showing_them():
    with pytest.raises(paths.StoreError, match="must not have credentials") as caught:
        paths.split("s3://KEY:hush@bucket/x")  # pragma: allowlist secret
    assert "hush" not in str(caught.value)


def test_paths_of_this_machine_import_no_client():
    code = "import sys\nfrom espalier.common.storage import paths, mirror, lock\nmirror.local('/tmp/x')\npaths.kvstore('/tmp')\n"
    code += "print([name for name in ('fsspec', 'gcsfs', 's3fs', 'aiohttp', 'botocore') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_objects_are_written_listed_read_and_deleted(store):
    base = f"{store.address}/run"
    assert paths.names(base) == [] and paths.entries(base) == {}
    paths.write(f"{base}/a.txt", b"one")
    paths.write(f"{base}/b/c.txt", b"three")
    assert paths.names(base) == ["a.txt", "b"]
    assert {name: entry.size for name, entry in paths.entries(base).items()} == {
        "a.txt": 3,
        "b/c.txt": 5,
    }
    assert list(paths.entries(base, "b")) == ["b/c.txt"]
    assert list(paths.entries(store.address, "ru")) == ["run/a.txt", "run/b/c.txt"]
    version = paths.entry(f"{base}/a.txt").version
    paths.write(f"{base}/a.txt", b"two")
    assert paths.entry(f"{base}/a.txt").version != version  # of a length that did not change
    assert paths.read(f"{base}/a.txt") == b"two"
    matching = [f"{base}/a.txt", f"{base}/b/c.txt"]
    assert paths.matches(f"{base}/**/*.txt") == {each: paths.entry(each) for each in matching}
    paths.delete(f"{base}/a.txt", f"{base}/none")
    assert not paths.exists(f"{base}/a.txt")
    with pytest.raises(FileNotFoundError):
        paths.read(f"{base}/a.txt")


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\n\r", b"\x85", b" "])
def test_the_last_bytes_of_an_object_are_those_written(store, end):
    paths.write(f"{store.address}/x", b"\x00\n\xff" + end)
    assert paths.read(f"{store.address}/x") == b"\x00\n\xff" + end


def test_epath_reaches_the_store_after_a_path_of_this_machine(store, tmp_path):
    epath.Path(tmp_path).exists()  # makes epath decide on its client
    paths.write(f"{store.address}/x", b"1")
    assert epath.Path(f"{store.address}/x").read_bytes() == b"1"


def test_of_several_creators_one_succeeds(store):
    address = f"{store.address}/one"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda i: paths.create(address, b"%d" % i), range(4)))
    assert sum(made) == 1
    assert paths.read(address) == b"%d" % made.index(True)


def test_a_bucket_that_does_not_exist_is_named(store):
    address = f"{store.scheme}://nobody-has-this/run"
    for call in (
        paths.entries,
        paths.names,
        lambda a: paths.write(f"{a}/x", b""),
        lambda a: lock.StoreLock(a),
    ):
        with pytest.raises(paths.StoreError, match="there is no bucket 'nobody-has-this'"):
            call(address)


def test_a_store_that_refuses_says_so_and_shows_no_secret(store):
    store.fault = lambda method, path: 403
    for call in (paths.names, lambda a: paths.write(f"{a}/x", b"")):
        with pytest.raises(
            paths.StoreError, match="the store refuses.*Let these credentials"
        ) as caught:
            call(f"{store.address}/run")
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        "Cannot connect to host; GET gs://b/runs/a/checkpoints/4030/params",
        "GET https://h/b/o/runs%2F403/permission-credentials timed out",
        "Timeout of b/runs/403/params",
        "Timeout of runs/a-401",
    ],
)
def test_words_and_numbers_in_keys_are_no_refusal(message):
    error = paths._error("gs://b/runs/403", ConnectionError(message))
    assert "the store failed or cannot be reached" in str(error) and message in str(error)


@pytest.mark.parametrize(
    "message",
    [
        "403, message='', url='http://h/b/x'",
        "An error occurred (403) when calling the HeadObject operation",
        "Error reading gs://b/x: HTTP response code: 401.",
        "<Error xmlns='http://h/2006-03-01'><Code>AccessDenied</Code>",
    ],
)
def test_a_refusal_is_recognised(message):
    assert "the store refuses" in str(paths._error("gs://b/x", OSError(message)))


def test_requests_that_fail_now_and_then_are_tried_again(store):
    numbers = itertools.count()
    store.fault = lambda method, path: 503 if next(numbers) % 3 == 0 else None
    for number in range(4):
        paths.write(f"{store.address}/{number}", b"x" * number)
        assert paths.read(f"{store.address}/{number}") == b"x" * number


def test_the_lock_is_held_by_one_and_given_back(store):
    address = f"{store.address}/run"
    held = lock.StoreLock(address, beat_seconds=0.1)
    with pytest.raises(lock.HeldError, match=f"process {os.getpid()} on"):
        lock.StoreLock(address, stale_seconds=5.0)
    held.check()
    held.close()
    assert paths.names(address) == []
    lock.StoreLock(address).close()


def test_the_lock_of_a_dead_process_of_another_host_is_taken_and_the_old_one_notices(store):
    address = f"{store.address}/run"
    old = lock.StoreLock(address, beat_seconds=3600)  # like a process that hangs
    new = lock.StoreLock(address, beat_seconds=0.1, stale_seconds=0.5)
    old._beat_seconds = 0.0
    old._closed.set()
    old._closed.clear()
    for _ in range(100):
        if old._lost is None and not old._thread.is_alive():
            old._beat()
        time.sleep(0.05)
        if old._lost:
            break
    with pytest.raises(lock.LostLockError, match="has taken this run"):
        old.check()
    new.check()
    new.close()


@pytest.mark.parametrize("again", [False, True])
def test_a_lock_that_was_taken_and_given_back_is_lost(store, again):
    address = f"{store.address}/run"
    old = lock.StoreLock(address, beat_seconds=3600)  # like a process that is suspended
    lock.StoreLock(address, beat_seconds=0.1, stale_seconds=0.2).close()
    new = lock.StoreLock(address, beat_seconds=3600) if again else None
    old._beat_seconds = 0.0
    threading.Thread(target=old._beat, daemon=True).start()
    until = time.monotonic() + 30
    while old._lost is None and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(lock.LostLockError, match="has taken this run"):
        old.check()
    old.close()
    assert paths.names(address) == ([".lock.1"] if again else [])
    if new is not None:
        assert new._is_held()
        new.close()


def test_the_lock_of_another_process_is_not_given_back(store):
    address = f"{store.address}/run"
    old = lock.StoreLock(address, beat_seconds=3600)
    lock.StoreLock(address, beat_seconds=0.1, stale_seconds=0.2).close()
    new = lock.StoreLock(address, beat_seconds=3600)
    old.close()
    assert paths.names(address) == [".lock.1"]
    new.close()


def test_a_copy_is_read_again_only_if_its_object_changed(store):
    base = f"{store.address}/set"
    paths.write(f"{base}/a", b"1")
    paths.write(f"{base}/sub/b", b"2")
    copy = mirror.local(base)
    assert pathlib.Path(copy, "sub", "b").read_bytes() == b"2"
    paths.write(f"{base}/sub/b", b"3")
    paths.delete(f"{base}/a")
    store.requests.clear()
    assert mirror.local(base) == copy
    assert pathlib.Path(copy, "sub", "b").read_bytes() == b"3" and not os.path.exists(f"{copy}/a")
    store.requests.clear()
    mirror.local(base)
    assert not [path for method, path in store.requests if path.endswith("/b")]
    with open(f"{copy}/sub/b", "wb") as file:
        file.write(b"!")  # a copy that was changed is put right
    mirror.local(base)
    assert pathlib.Path(copy, "sub", "b").read_bytes() == b"3"
    with pytest.raises(FileNotFoundError, match="no such object or folder"):
        mirror.local(f"{store.address}/nothing")


def test_a_copy_of_some_files_leaves_the_copies_of_the_others(store):
    base = f"{store.address}/model"
    for name in ("config.json", "model.safetensors", "more/x.safetensors"):
        paths.write(f"{base}/{name}", name.encode())
    copy = mirror.local(base)
    store.requests.clear()
    mirror.local(base, without=("more",), suffixes=(".json",))
    mirror.local(base)
    assert not [path for _, path in store.requests if path.endswith(("config.json", "safetensors"))]
    assert pathlib.Path(copy, "more", "x.safetensors").read_bytes() == b"more/x.safetensors"
    paths.delete(f"{base}/model.safetensors", f"{base}/more/x.safetensors")
    mirror.local(base, suffixes=(".json",))
    assert [name for _, _, names in os.walk(copy) for name in names] == ["config.json"]


class _SlowClient:
    """A client whose first reader of an object waits until `go_on`."""

    def __init__(self):
        self.started, self.go_on = threading.Event(), threading.Event()

    def get_file(self, address, target):
        if not self.started.is_set():
            self.started.set()
            assert self.go_on.wait(30)
        pathlib.Path(target).write_bytes(b"{}")


def test_processes_that_copy_the_same_files_at_once_all_succeed(tmp_path, monkeypatch):
    monkeypatch.setenv(mirror.COPIES, str(tmp_path))
    client = _SlowClient()
    monkeypatch.setattr(paths, "entries", lambda *_: {"tokenizer.json": paths.Entry(2, "1")})
    monkeypatch.setattr(paths, "exists", lambda _: False)
    monkeypatch.setattr(paths, "filesystem", lambda _: client)
    left = tmp_path / "copies" / "gs" / "bucket" / "model" / "x.0123.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"{")
    os.utime(left, (0, 0))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(mirror.local, "gs://bucket/model")
        assert client.started.wait(30)
        try:
            copy = mirror.local("gs://bucket/model")
        finally:
            client.go_on.set()
        assert first.result() == copy
    assert os.listdir(copy) == ["tokenizer.json"]  # not the half copy of a process that was killed


def test_an_object_that_is_replaced_after_it_was_listed_is_copied(store, monkeypatch):
    base = f"{store.address}/run"
    paths.write(f"{base}/run.json", b"old")
    listed = paths.entries(base)
    paths.write(f"{base}/run.json", b"longer")
    with monkeypatch.context() as patch:
        patch.setattr(paths, "entries", lambda *_: listed)
        copy = mirror.local(base)
    assert pathlib.Path(copy, "run.json").read_bytes() == b"longer"
    wrong = paths.Entry(3, "version")
    monkeypatch.setattr(paths, "entries", lambda *_: {"run.json": wrong})
    monkeypatch.setattr(paths, "entry", lambda *_: wrong)
    with pytest.raises(paths.StoreError, match="run.json: 6 of 3 bytes were read"):
        mirror.local(base)


def test_a_mirror_copies_what_changed_in_the_order_of_writing(store, tmp_path):
    base = f"{store.address}/run"
    paths.write(f"{base}/old", b"old")
    paths.write(f"{base}/checkpoints/1/x", b"big")
    files = mirror.Mirror(base, writer=True, without=("checkpoints",))
    assert os.listdir(files.path) == ["old"]
    for number, name in enumerate(("z", "y", ".half.tmp")):
        path = os.path.join(files.path, name)
        with open(path, "wb") as file:
            file.write(name.encode())
        os.utime(path, (number, number))
    os.unlink(os.path.join(files.path, "old"))
    store.requests.clear()
    files.push()
    assert sorted(paths.entries(base)) == ["checkpoints/1/x", "y", "z"]
    store.requests.clear()
    files.push()
    assert store.requests == []
