"""Held-out documents: shares, whole documents, stability."""

import subprocess
import sys

import numpy as np
import pytest

from espalier.data.text import splits


def test_stable_hash_is_the_same_in_another_process_and_has_a_known_value():
    code = (
        "from espalier.data.text import splits; print(splits.stable_hash('a/b.py', salt='split'))"
    )
    for seed in ("0", "1"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(out.stdout) == splits.stable_hash("a/b.py", salt="split") == 8501124105459645657


def test_fraction_of_a_stream():
    held_out = sum(splits.in_validation(f"document {i}", 0.1) for i in range(20_000))
    assert abs(held_out - 2000) < 4 * np.sqrt(20_000 * 0.1 * 0.9)
    assert not any(splits.in_validation(f"document {i}", 0.0) for i in range(1000))


@pytest.mark.parametrize("seed", range(10))
def test_whole_source_holds_out_about_the_fraction(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(9, 1.2, size=300).astype(int).tolist()
    keys = [f"{seed}/{i}" for i in range(300)]
    choice = splits.split_whole_source(keys, sizes, fraction=0.05, assigned={})
    held_out = sum(size for size, split in zip(sizes, choice, strict=True) if split != "train")
    assert 0.05 <= held_out / sum(sizes) <= 0.075
    # One document more changes little: nearly all keep their split.
    more = splits.split_whole_source([*keys, "new"], [*sizes, 9000], fraction=0.05, assigned={})
    assert sum(a != b for a, b in zip(choice, more, strict=False)) <= 3


def test_few_large_documents_still_give_a_validation_split():
    keys = [str(i) for i in range(12)]
    choice = splits.split_whole_source(keys, [20_000] * 12, fraction=0.05, assigned={})
    assert choice.count("validation") == 1
    # But not half of the source.
    assert "validation" not in splits.split_whole_source(
        ["a", "b"], [50_000, 50_000], fraction=0.05, assigned={}
    )


def test_no_single_large_document_fills_the_split():
    keys = [str(i) for i in range(101)]
    sizes = [50_000, *[10_000] * 100]
    for offset in range(5):
        named = [f"{offset}-{key}" for key in keys]
        choice = splits.split_whole_source(named, sizes, fraction=0.05, assigned={})
        assert choice[0] == "train" and choice.count("validation") == 6


def test_keys_keep_their_split_across_sources():
    keys = [str(i) for i in range(50)]
    first = splits.split_whole_source(keys, [2000] * 50, fraction=0.1, assigned={})
    assigned = dict(zip(keys, first, strict=True))
    second = splits.split_whole_source(
        [*keys, "x", "y"], [100] * 52, fraction=0.1, assigned=assigned
    )
    assert second[:50] == first


def test_zero_fraction_holds_out_nothing():
    assert set(splits.split_whole_source("abc", [1, 2, 3], fraction=0, assigned={})) == {"train"}
