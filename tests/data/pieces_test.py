"""Every kind of task, read by pieces in several processes: the counts and the records of a reading of whole files."""

import json
import pathlib

import numpy as np
import pytest

from espalier.data import pieces, tasks
from espalier.data.cache import pool, task_cache
from espalier.data.cache.store import Cache
from espalier.data.tokenizers.vocabulary import ByteVocabulary
from tests.data import task_kinds

KINDS = ["text", "chats", "pairs", "unpaired", "prompts", "examples", "instructions"]


@pytest.fixture(autouse=True)
def clear():
    tasks.clear()
    yield
    tasks.clear()


def records(opened: Cache) -> list:
    return [
        {name: column.values(i).tobytes() for name, column in opened.columns.items()}
        for i in range(opened.num_records)
    ]


def read(folder: pathlib.Path, kind: str, workers: int) -> tuple[dict, dict, int]:
    """The counts and the records of all tasks and splits, and the most shards of one."""
    found, counts, shards = {}, {}, 0
    with pool.limited(workers):
        names = task_kinds.register(folder, ByteVocabulary(), [kind])
        for name in names:
            task = tasks._TASKS[name]["task"]
            counts[name] = json.loads(json.dumps(task.source._counted))
            for split in task.splits:
                opened = task_cache.open_task_cache(task, split, cache_dir=folder / "cache")
                found[name, split] = records(opened)
                shards = max(shards, len(opened.manifest["shards"]))
    tasks.clear()
    return counts, found, shards


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_counts_and_records_of_the_files(tmp_path, monkeypatch, capfd, kind):
    whole = read(tmp_path / "whole", kind, 1)
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 300)
    monkeypatch.setattr(pieces, "_SHARD_BYTES", (900, 4000))
    divided = read(tmp_path / "divided", kind, 2)
    assert whole[2] == 1 < divided[2]
    assert divided[:2] == whole[:2] and np.all([len(x) for x in whole[1].values()])
    assert "in one process" not in capfd.readouterr().err
