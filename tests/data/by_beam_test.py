"""Token caches that Apache Beam builds, against those of this process, byte for byte (`make test-beam`)."""

import datetime
import json
from collections import Counter

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from espalier.common.pipelines import PipelineError
from espalier.common.storage import paths
from espalier.data import by_beam, counting, pieces, tasks
from espalier.data.cache import pool, task_cache
from espalier.data.chats import tasks as chats
from espalier.data.rows import files as row_counts
from espalier.data.stream import mixing
from espalier.data.text import user_data
from espalier.data.text.row_files import BadRow
from espalier.data.tokenizers import vocabularies
from tests.common.pipelines_test import PROCESSES, job_server  # noqa: F401
from tests.data import task_kinds
from tests.data.clean.documents_test import KilledAt

LAST = "the last document of all"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files of JSON lines, of which the first is divided and all are five shards."""
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 5_000)
    monkeypatch.setattr(pieces, "_SHARD_BYTES", (6_000, 6_000))
    rng = np.random.default_rng(0)
    folder = tmp_path / "source"
    folder.mkdir()
    for number, count in enumerate((300, 100)):
        texts = ["".join(rng.choice(list("abcdé \n"), rng.integers(1, 90))) for _ in range(count)]
        texts += [LAST] * number
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (folder / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    yield folder
    tasks.clear()


def build(files, root, options, filters=(), **settings):
    """Builds the cache of the files in `root`; returns the content of its files by name."""
    user_data.register_files(
        name="files",
        files=str(files / "*.jsonl"),
        vocabulary=vocabularies.byte(),
        validation_fraction=0.0,
        filters=filters,
        cache_dir=root,
        **settings,
    )
    (task,), _ = mixing.find_tasks("files")
    with by_beam.used(options, root):
        if "on_bad_row" in settings:
            assert tasks.summary()["tasks"]["files"]["bad_rows"]["rows"] == 1
        cache = task_cache.open_task_cache(task, "train", cache_dir=root)
    return {path.name: path.read_bytes() for path in cache.directory.iterdir()}


def test_without_options_nothing_is_changed(files, tmp_path):
    found = build(files, tmp_path / "one", [])
    assert sum(name.endswith("targets.bin") for name in found) >= 4


def test_the_counts_of_every_kind_of_rows_are_sent(tmp_path):
    names = task_kinds.register(tmp_path / "kinds", vocabularies.byte())
    path, when = str(tmp_path / "dated.parquet"), [datetime.datetime(2024, 1, 1)] * 2
    columns = {"prompt": ["a", "b"], "completion": ["x", "y"], "when": when}
    parquet.write_table(pyarrow.table({**columns, "sentence_embedding": [[0.5]] * 2}), path)
    chats.register_chats(
        name="dated", files=path, vocabulary=vocabularies.byte(), with_sentences=True
    )
    counted = []
    for source in (tasks.find(name).source for name in [*names, "dated"]):
        if hasattr(source, "_count_piece"):
            piece = source.pieces(next(iter(source.files)))[0]
            read = source._count_piece(piece, source._bad_rows())
            assert by_beam.from_json(json.loads(json.dumps(by_beam.to_json(read)))) == read
            counted.append(source.name)
    assert {"chats", "pairs", "prompts", "examples", "dated"} <= {*counted}
    tasks.clear()


def test_results_are_sent_as_json_that_runs_no_code():
    dropped = tasks.Tally(no_answer={"rows": 2, "first": "a:1"})
    rows = row_counts._Rows(("é", "w"), [2**70, 0], dropped)
    read = counting._Read([(rows, [BadRow("p", 1, None, "r")]), (Counter(train=1), None)])
    sent = json.dumps(by_beam.to_json(read))
    found = by_beam.from_json(json.loads(sent))
    assert found == read and found.sums == read.sums and type(found[0][0].dropped) is tasks.Tally
    for name in ("builtins:eval", "os:system", "subprocess:Popen", "espalier.data.by_beam:used"):
        with pytest.raises(PipelineError, match=name):
            by_beam.from_json([name, "1"])
    with pytest.raises(PipelineError, match="numpy:int64, which workers do not send back"):
        by_beam.to_json([np.int64(1)])


@pytest.mark.beam
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of Beam's
def test_processes_of_the_direct_runner_also_after_a_worker_was_killed(files, tmp_path, capfd):

    kill = KilledAt(text=LAST, seen=str(tmp_path / "seen"), spared=2)  # counted, probed
    with pytest.raises(PipelineError, match="the same command goes on after it"):
        build(files, tmp_path / "beam", [PROCESSES], [kill])
    assert (tmp_path / "seen").read_bytes() == b"..."
    found = build(files, tmp_path / "beam", [PROCESSES], [kill])
    said = capfd.readouterr().err
    values = json.loads(found["manifest.json"])["body"]["values"]["targets"]
    assert f"pipeline done, 401 records, {values:,} tokens" in said
    assert found == build(files, tmp_path / "one", [], [kill])


@pytest.mark.beam
def test_a_job_server(files, tmp_path, job_server, capfd):  # noqa: F811
    options = f"--runner=PortableRunner,--job_endpoint={job_server},--environment_type=LOOPBACK"
    with open(files / "0.jsonl", "a") as file:
        file.write("{\n")
    found = build(files, tmp_path / "beam", [options], on_bad_row="skip")
    said = capfd.readouterr().err
    assert "pipeline done, 1 rows skipped" in said
    assert list((tmp_path / "beam" / "pipelines").iterdir()) == []
    assert found == build(files, tmp_path / "one", [], on_bad_row="skip")


@pytest.mark.beam
@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_workers_write_into_a_store(files, tmp_path, store):
    root = f"{store.address}/cache"
    copied = build(files, root, ["--runner=DirectRunner"])
    written = paths.entries(f"{root}/tokens/files/train")
    assert {name.partition("/")[2] for name in written} == copied.keys()
    assert paths.entries(f"{root}/pipelines") == {}
    assert copied == build(files, tmp_path / "one", [])


@pytest.mark.beam
def test_what_cannot_be_sent_to_workers_is_refused(tmp_path):
    with by_beam.used(["--runner=DirectRunner"], tmp_path):
        with pytest.raises(PipelineError, match="counting: it cannot be sent to workers"):
            pool.run(lambda item, report: item, [1], what=str, bar=None, title="counting")
        assert pool.run(len, [], what=str, bar=None) == []
