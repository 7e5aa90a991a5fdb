"""The token cache: round trips, killed builds, damage, and what its fingerprint sees."""

import hashlib
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from espalier.data.cache import build, fingerprint, store
from espalier.data.cache.cache_files import CacheCorruptError, canonical

ROOT = pathlib.Path(__file__).parents[3]
FEATURES = {"targets": 1000, "inputs": 70_000, "weights": "float32", "document_id": "text"}


def records(count=50, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "targets": rng.integers(0, 1000, rng.integers(0, 40)),
            "inputs": rng.integers(0, 70_000, rng.integers(0, 10)),
            "weights": rng.random(3, np.float32),
            "document_id": f"dok-{i}-é",
            "targets_pretokenized": b"x" * i,
        }
        for i in range(count)
    ]


def verified(directory):
    """The files that are verified when a folder is opened; those of blocks are when a cache is read in place."""
    return [path for path in sorted(directory.iterdir()) if "blocks" not in path.name]


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(directory).iterdir())}


@pytest.mark.parametrize(("count", "num_shards"), [(50, 1), (50, 3), (4, 6)])
def test_reads_back_what_was_written(tmp_path, count, num_shards):
    written = records(count)
    made = store.write(tmp_path / "c", written, features=FEATURES, num_shards=num_shards)
    in_order = [record for shard in range(num_shards) for record in written[shard::num_shards]]
    assert made.num_records == count
    assert made.tokens() == sum(len(record["targets"]) for record in written)
    assert made.text_bytes() == sum(range(count))
    for i, record in enumerate(in_order):
        for feature in ("targets", "inputs", "weights"):
            np.testing.assert_array_equal(made.columns[feature].values(i), record[feature])
        assert made.columns["document_id"].text(i) == record["document_id"]
    assert made.columns["targets"].values(0).dtype == np.uint16
    assert made.columns["inputs"].values(0).dtype == np.uint32


def test_gather_copies_ranges_of_any_shard(tmp_path):
    made = store.write(tmp_path / "c", records(), features=FEATURES, num_shards=4)
    column = made.columns["targets"]
    flat = np.concatenate([column.values(i) for i in range(50)])
    begins = column.starts[column.lengths > 0]
    sizes = column.lengths[column.lengths > 0].astype(int)
    out = np.zeros(sizes.sum(), np.int32)
    column.gather(begins, sizes, out, np.cumsum(sizes) - sizes)
    np.testing.assert_array_equal(out, flat)


def test_gather_takes_an_empty_range_where_all_values_end(tmp_path):
    """As the last record of an encoder-decoder task has, when its inputs are empty."""
    pairs = [{"inputs": [1, 2], "targets": [3]}, {"inputs": [], "targets": [4]}]
    made = store.write(tmp_path / "c", pairs, features={"inputs": 9, "targets": 9}, num_shards=2)
    column = made.columns["inputs"]
    out = np.zeros(2, np.int32)
    column.gather(column.starts, column.lengths, out, np.array([0, 2]))
    np.testing.assert_array_equal(out, [1, 2])


def test_ids_that_are_numbers_are_their_digits(tmp_path):
    ids = [np.int64(12345), 10**9, np.float32(0.5), b"bytes", "é"]
    records = [{"targets": [1], "document_id": id} for id in ids]
    features = {"targets": 9, "document_id": "text"}
    made = store.write(tmp_path / "c", records, features=features)
    texts = [made.columns["document_id"].text(i) for i in range(len(ids))]
    assert texts == ["12345", "1000000000", "0.5", "bytes", "é"]
    for bad, name in (
        (np.array([1, 2]), r"ndarray of shape \(2,\)"),
        ([7], "list"),
        (None, "None"),
    ):
        record = {"targets": [1], "document_id": bad}
        with pytest.raises(ValueError, match=f"'document_id' is a {name}.*one string or number"):
            store.write(tmp_path / name[:4], [record], features=features)


@pytest.mark.parametrize(
    ("texts", "size"),
    [
        (["é", b"ab"], 4),
        (["é", np.array([5, 6, 7])], None),
        (["é", np.int64(3)], None),
        (["é", None], None),
    ],
)
def test_text_bytes_are_those_of_texts_or_unknown(tmp_path, texts, size):
    records = [{"targets": [1, 2], "targets_pretokenized": text} for text in texts]
    records = [{k: v for k, v in record.items() if v is not None} for record in records]
    for num_shards in (1, 2):
        made = store.write(
            tmp_path / str(num_shards), records, features={"targets": 9}, num_shards=num_shards
        )
        assert made.text_bytes() == size == store.open_cache(made.directory).text_bytes()


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    for bad in (1000, -1):
        with pytest.raises(ValueError, match=f"token {bad}, outside its vocabulary of 1000"):
            store.write(tmp_path / str(bad), [{"targets": [1, bad]}], features={"targets": 1000})
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        store.write(tmp_path / "m", [{"targets": [[1, 2]]}], features={"targets": 1000})
    with pytest.raises(FileNotFoundError, match="no token cache"):
        store.open_cache(tmp_path / "none")


def test_flipped_bits_are_caught_everywhere(tmp_path):
    made = store.write(tmp_path / "c", records(), features=FEATURES, num_shards=2)
    rng = np.random.default_rng(0)
    for path in verified(made.directory):
        raw = path.read_bytes()
        for at in rng.choice(len(raw), min(12, len(raw)), replace=False):
            damaged = bytearray(raw)
            damaged[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(CacheCorruptError, match=path.name):
                store.open_cache(made.directory)
        path.write_bytes(raw)
    assert store.open_cache(made.directory).content == made.content


def test_missing_truncated_and_foreign_files_are_refused(tmp_path):
    made = store.write(tmp_path / "c", records(), features=FEATURES)
    other = store.write(tmp_path / "d", records(seed=1), features=FEATURES)
    for path in verified(made.directory):
        raw = path.read_bytes()
        for damage in (
            lambda p=path: p.unlink(),
            lambda p=path, r=raw: p.write_bytes(r[:-1]),
            lambda p=path: p.write_bytes(b""),
        ):
            damage()
            with pytest.raises(CacheCorruptError, match=f"(?s){path.name}.*Delete"):
                store.open_cache(made.directory)
            if path.suffix != ".json":  # sizes are checked even when checksums are not
                with pytest.raises(CacheCorruptError):
                    store.open_cache(made.directory, verify=False)
        path.write_bytes(raw)
    for name in ("00000.targets.bin", store.MANIFEST):
        raw = (made.directory / name).read_bytes()
        (made.directory / name).write_bytes((other.directory / name).read_bytes())
        with pytest.raises(CacheCorruptError):
            store.open_cache(made.directory)
        (made.directory / name).write_bytes(raw)
    store.open_cache(made.directory)


def test_build_does_not_replace_a_cache(tmp_path):
    store.write(tmp_path / "c", records(), features=FEATURES)
    with pytest.raises(FileExistsError, match="exists already"):
        store.write(tmp_path / "c", records(), features=FEATURES)


BUILDER = """
import sys, time
import numpy as np
sys.path.insert(0, {root!r})
from espalier.data import pieces
from espalier.data.cache import build

class Reader:
    def records(self, split, parts):
        shard = parts[0].begin
        print("shard", shard, flush=True)
        for i in range(40):
            if shard == 2 and i == 20 and "slow" in sys.argv:
                print("waiting", flush=True)
                time.sleep(60)
            rng = np.random.default_rng([shard, i])
            yield {{"targets": rng.integers(0, 1000, 200), "document_id": f"{{shard}}-{{i}}"}}

shards = tuple((part,) for part in pieces.parts("", 5))
made = build.Build({directory!r}, Reader(), "", {{"targets": 1000, "document_id": "text"}},
                   {{"source": {source!r}}}, shards)
made.start()
for shard in range(5):
    made.write_shard(shard)
made.finish()
"""


def start_builder(directory, *, slow, source="a"):
    code = BUILDER.format(root=str(ROOT), directory=str(directory), source=source)
    command = [sys.executable, "-c", code, *["slow"] * slow]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill_in_third_shard(directory):
    process = start_builder(directory, slow=True)
    for line in process.stdout:
        if line == "waiting\n":
            break
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_build_resumes_to_the_same_bytes(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = start_builder(tmp_path / "whole" / "c", slow=False)
    assert whole.communicate()[0].splitlines() == [f"shard {i}" for i in range(5)]
    (tmp_path / "killed").mkdir()
    directory = tmp_path / "killed" / "c"
    kill_in_third_shard(directory)
    assert not directory.exists()
    # Damage a finished shard: it is built again, the intact one is kept.
    damaged = directory.with_name("c.building") / "00001.targets.bin"
    raw = bytearray(damaged.read_bytes())
    raw[100] ^= 4
    damaged.write_bytes(raw)
    resumed = start_builder(directory, slow=False)
    assert resumed.communicate()[0].splitlines() == [f"shard {i}" for i in range(1, 5)]
    assert files(directory) == files(tmp_path / "whole" / "c")
    assert sorted(p.name for p in directory.parent.iterdir()) == ["c"]


def test_a_partial_build_of_something_else_is_not_continued(tmp_path):
    kill_in_third_shard(tmp_path / "c")
    other = start_builder(tmp_path / "c", slow=False, source="b")
    assert other.communicate()[0].count("shard") == 5
    store.open_cache(tmp_path / "c")


def test_a_second_builder_waits_for_the_first(tmp_path):
    code = textwrap.dedent(f"""
        import sys, time, pathlib
        sys.path.insert(0, {str(ROOT)!r})
        from espalier.data.cache import store as cache
        with cache.building_lock(pathlib.Path({str(tmp_path / "c")!r})):
            print("locked", flush=True)
            time.sleep(0.5)
            print(time.monotonic(), flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with store.building_lock(tmp_path / "c"):
        entered = time.monotonic()
    assert entered >= float(process.communicate()[0])


def test_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match="token cache .*c cannot be written .No space.*ESPALIER_CACHE"
    ):
        store.write(tmp_path / "c", records(), features=FEATURES)


def test_fingerprint_covers_format_features_shards_and_description(monkeypatch):
    def name(description={"source": "a"}, features={"targets": 10}, shards=1):  # noqa: B006
        return build.fingerprint(description, features, shards)

    names = {
        name(),
        name(description={"source": "b"}),
        name(features={"targets": 11}),
        name(features={"targets": 10, "inputs": 10}),
        name(shards=2),
    }
    monkeypatch.setattr(build, "FORMAT", build.FORMAT + 1)
    names.add(name())
    assert len(names) == 6


def module(text):
    """Functions defined by source text, as a module would hold them."""
    import importlib.util
    import tempfile

    path = pathlib.Path(tempfile.mkdtemp()) / "user_tasks.py"
    path.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location("user_tasks", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


PREPROCESSOR = """
    import functools
    import re

    LIMIT = 3
    WORDS = ["the", "a"]
    TABLE = {"x": 1, 7: {"y": (2,)}}
    STOP = {"p", "q", "r"}
    SPACES = re.compile("[ ]+")
    CALLS = {}

    def helper(x):
        return x + 1

    @functools.cache
    def remembered(x):
        return x - 1

    class Cleaner:
        MARKS = [".", ","]

        def __init__(self, words):
            self.words = words

        def __call__(self, ds):
            return self.clean(ds)

        def clean(self, ds):
            CALLS[ds] = ds in CALLS
            if SPACES.match(ds) or ds in STOP:
                return remembered(TABLE["x"])
            return self.replaced(ds)

        @staticmethod
        def replaced(ds):
            return ds.replace("b", "c") if ds in Cleaner.MARKS else helper(ds)

    cleaner = Cleaner(WORDS)

    def made_of(ds):
        return cleaner(ds), [word for word in WORDS if word in ds]

    def made_inside(ds):
        return Cleaner(WORDS)(ds)

    def make(k):
        def inner(ds, n=2, *, scale=1.0):
            '''Documented.'''
            return helper(ds) * n * k * LIMIT * scale  # a comment
        return inner

    step = functools.partial(make(5), n=4)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("* n *", "+ n *"),  # the source
        ("make(5)", "make(6)"),  # a closure
        ("n=4", "n=3"),  # a partial argument
        ("scale=1.0", "scale=2.0"),  # a keyword default
        ("n=2", "n=1"),  # a default
        ("LIMIT = 3", "LIMIT = 4"),  # a global constant
        ("return x + 1", "return x + 2"),  # a global helper of the same module
    ],
)
def test_description_of_a_preprocessor_sees_every_input(old, new):
    assert old in PREPROCESSOR
    before = fingerprint.describe(module(PREPROCESSOR).step)
    after = fingerprint.describe(module(PREPROCESSOR.replace(old, new)).step)
    assert canonical(before) != canonical(after)


@pytest.mark.parametrize("entry", ["made_of", "made_inside", "cleaner", "cleaner.clean"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('["the", "a"]', '["the", "an"]'),  # a list, of the module and of an object
        ("(2,)", "(3,)"),  # deep in a dict
        ("7: {", "'7': {"),  # a key
        ('"r"}', '"s"}'),  # a set
        ("[ ]+", "[ \\t]+"),  # a pattern
        ("return x + 1", "return x + 2"),  # a helper of a helper of a method
        ("return x - 1", "return x - 2"),  # a helper in a wrapper
        ('"c"', '"d"'),  # a static method
        ("ds in STOP", "ds not in STOP"),  # a method
        ('[".", ","]', '["."]'),  # a constant of a class
    ],
)
def test_description_sees_containers_methods_and_objects(entry, old, new):
    def described(text):
        value = module(text)
        for name in entry.split("."):
            value = getattr(value, name)
        return canonical(fingerprint.describe(value))

    assert PREPROCESSOR.count(old) == 1
    assert described(PREPROCESSOR) == described(PREPROCESSOR)
    assert described(PREPROCESSOR) != described(PREPROCESSOR.replace(old, new))


def test_description_does_not_see_what_the_code_remembers():
    made = module(PREPROCESSOR)
    before = canonical(fingerprint.describe(made.cleaner))
    made.CALLS["x"] = True
    assert canonical(fingerprint.describe(made.cleaner)) == before


def test_description_of_long_constants_is_short_and_that_of_dicts_has_no_order():
    words = [f"word {i}" for i in range(10_000)]
    described = canonical(fingerprint.describe([words, set(words)]))
    assert len(described) < 500
    assert described != canonical(fingerprint.describe([words[::-1], set(words)]))
    both = ({"a": store.write, "b": store.write}, {"b": store.write, "a": store.write})
    assert fingerprint.describe(both[0]) == fingerprint.describe(both[1])


def test_description_ignores_layout_comments_and_docstrings():
    before = fingerprint.describe(module(PREPROCESSOR).step)
    changed = PREPROCESSOR.replace("# a comment", "").replace("Documented.", "Explained.")
    assert canonical(before) == canonical(fingerprint.describe(module(changed).step))


def test_description_does_not_depend_on_the_process(tmp_path):
    code = textwrap.dedent(f"""
        import sys, hashlib, functools, pathlib
        sys.path.insert(0, {str(ROOT)!r})
        from espalier.data.cache import cache_files, store as cache, fingerprint
        from espalier.data.stream import plan
        value = [functools.partial(plan.make_plan, x={{"b", "a", "c"}}), {{"k": object}}, 1.5, b"x",
                 pathlib.Path("p"), cache.write]
        print(hashlib.sha256(cache_files.canonical(fingerprint.describe(value))).hexdigest())
    """)
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(seen) == 1


def test_names_of_this_project_are_those_that_older_caches_have():
    for module in ("data.text.reader", "espalier.data.text.reader"):
        reader = type("Reader", (), {"__module__": module})
        assert fingerprint.describe(reader) == {"class": "data.text.reader.Reader"}


def test_file_digests_remember_but_notice_changes(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("one")
    digests = fingerprint.FileDigests(tmp_path / "memory.json")
    first = digests.digest(str(file))
    assert first == hashlib.sha256(b"one").hexdigest()
    digests.save()
    with monkeypatch.context() as patch:  # remembered: the file is not read again
        patch.setattr(hashlib, "file_digest", None)
        assert fingerprint.FileDigests(tmp_path / "memory.json").digest(str(file)) == first
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert fingerprint.FileDigests(tmp_path / "memory.json").digest(str(file)) != first
    # The same size, and the time set back.
    os.utime(file, ns=(1, 1))
    digests = fingerprint.FileDigests(tmp_path / "memory.json")
    digests.digest(str(file))
    digests.save()
    file.write_text("six")
    os.utime(file, ns=(1, 1))
    now = fingerprint.FileDigests(tmp_path / "memory.json").digest(str(file))
    assert now == hashlib.sha256(b"six").hexdigest()
    (tmp_path / "memory.json").write_text("[not json")
    assert fingerprint.FileDigests(tmp_path / "memory.json").digest(str(file)) != first


@pytest.mark.parametrize("how", ["from {} import clean", "import {}"])
def test_helpers_of_other_user_modules_are_followed(how, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    seen = []
    for version, body in enumerate(("x + DEEP", "x - DEEP", "x + DEEP")):
        helper, user = (f"{kind}_{how[:4]}_{version}" for kind in ("helper", "user"))
        call = "clean" if "from" in how else f"{helper}.clean"
        (tmp_path / f"{helper}.py").write_text(
            f"import json\nDEEP = 3\ndef clean(x):\n    json.dumps(x)\n    return {body}\n"
        )
        (tmp_path / f"{user}.py").write_text(
            f"{how.format(helper)}\ndef step(data):\n    return data.map(lambda x: {call}(x))\n"
        )
        importlib.invalidate_caches()
        found = canonical(fingerprint.describe(importlib.import_module(user).step))
        seen.append(found.replace(f"_{version}".encode(), b""))
        assert b"json" not in found.replace(b"json.dumps(x)", b"")  # installed: by name only
    assert seen[0] == seen[2] != seen[1]
