"""Row plans: every token in exactly one place, rows never overfull, fill near the best possible."""

import hashlib
import itertools

import numpy as np
import pytest

from espalier.data.stream import plan

PACKINGS = ("best_fit", "concat", "examples")


def random_lengths(count, seed=0, mean=4.0):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(mean, 1.3, count).astype(int), 3000)
    lengths[rng.random(count) < 0.05] = 0
    return lengths


def segments_of(made, row):
    part = slice(*made.row_starts[row : row + 2].tolist())
    return list(
        zip(
            made.records[part].tolist(),
            made.offsets[part].tolist(),
            made.lengths["targets"][part].tolist(),
            strict=True,
        )
    )


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("length", [1, 7, 64, 512])
def test_segments_partition_the_records(packing, length):
    lengths = random_lengths(300)
    made = plan.make_plan({"targets": lengths}, {"targets": length}, packing=packing)
    covered = [np.zeros(n, int) for n in lengths]
    for row in range(made.num_rows):
        segments = segments_of(made, row)
        assert 1 <= len(segments) <= plan.MAX_SEGMENTS
        assert sum(size for _, _, size in segments) <= length
        for record, offset, size in segments:
            assert size > 0
            covered[record][offset : offset + size] += 1
    assert all((c == 1).all() for c in covered)
    assert made.tokens() == lengths.sum()
    assert made.counts == {
        "records": 300,
        "empty_records": int((lengths == 0).sum()),
        "long_records": int((lengths > length).sum()),
        "cut_segments": int((made.offsets > 0).sum()),
        "dropped_tokens": 0,
    }


@pytest.mark.parametrize("packing", PACKINGS)
def test_truncation_keeps_beginnings_and_counts_what_it_drops(packing):
    lengths = random_lengths(300)
    made = plan.make_plan(
        {"targets": lengths}, {"targets": 64}, packing=packing, long_documents="truncate"
    )
    kept = np.zeros(len(lengths), int)
    np.add.at(kept, made.records, made.lengths["targets"].astype(int))
    assert kept.tolist() == np.minimum(lengths, 64).tolist()
    assert made.counts["dropped_tokens"] == int(np.maximum(lengths - 64, 0).sum()) > 0
    assert made.counts["long_records"] == int((lengths > 64).sum())


def naive_best_fit_rows(sizes, length):
    """Best-fit decreasing by trying every row."""
    rows = []
    for size in sorted(sizes, reverse=True):
        fitting = [r for r in rows if r[0] >= size and r[1] < plan.MAX_SEGMENTS]
        if fitting:
            best = min(fitting, key=lambda r: r[0])
        else:
            best = [length, 0]
            rows.append(best)
        best[0] -= size
        best[1] += 1
    return len(rows)


@pytest.mark.parametrize("mean", [1.0, 3.0, 5.0])
def test_best_fit_equals_trying_every_row(mean):
    sizes = np.minimum(random_lengths(800, seed=3, mean=mean), 200)
    made = plan.make_plan({"targets": sizes}, {"targets": 200})
    # The two may choose other rows of equal room, but never need another number of rows.
    assert made.num_rows == naive_best_fit_rows(sizes[sizes > 0].tolist(), 200)


def test_fill_and_cuts_are_those_of_the_design():
    lengths = np.random.default_rng(0).lognormal(6.0, 1.3, 20_000).astype(int) + 1
    best_fit, concat = (
        plan.make_plan({"targets": lengths}, {"targets": 2048}, packing=packing)
        for packing in ("best_fit", "concat")
    )
    assert best_fit.fill() > 0.999
    assert concat.fill() > 0.9999
    # What the better fit is for: documents keep their beginning in the row they are in.
    assert best_fit.counts["cut_segments"] < 0.6 * concat.counts["cut_segments"]


def test_concat_fills_every_row_but_the_last_unless_segments_run_out():
    lengths = np.full(1000, 10)
    made = plan.make_plan({"targets": lengths}, {"targets": 128}, packing="concat")
    sums = np.add.reduceat(made.lengths["targets"].astype(int), made.row_starts[:-1])
    assert (sums[:-1] == 128).all()
    tiny = plan.make_plan({"targets": np.ones(1000, int)}, {"targets": 128}, packing="concat")
    assert np.diff(tiny.row_starts).max() == plan.MAX_SEGMENTS
    assert tiny.num_rows == -(-1000 // plan.MAX_SEGMENTS)


def test_pairs_stay_whole_and_within_both_capacities():
    rng = np.random.default_rng(1)
    lengths = {"inputs": rng.integers(0, 100, 2000), "targets": rng.integers(1, 30, 2000)}
    capacity = {"inputs": 256, "targets": 64}
    made = plan.make_plan(lengths, capacity)
    assert sorted(made.records.tolist()) == list(range(2000))
    for feature in capacity:
        of_record = np.zeros(2000, int)
        of_record[made.records] = made.lengths[feature]
        assert of_record.tolist() == lengths[feature].tolist()
        cumulated = np.concatenate([[0], np.cumsum(made.lengths[feature].astype(int))])
        assert np.diff(cumulated[made.row_starts]).max() <= capacity[feature]
    assert max(made.fill("inputs"), made.fill("targets")) > 0.85


def test_long_pairs_are_refused_or_truncated():
    lengths = {"inputs": np.array([5, 300]), "targets": np.array([3, 4])}
    capacity = {"inputs": 256, "targets": 64}
    with pytest.raises(ValueError, match="record 1.*LONG_DOCUMENTS.*'truncate'.*'drop'"):
        plan.make_plan(lengths, capacity)
    made = plan.make_plan(lengths, capacity, long_documents="truncate")
    assert made.counts["dropped_tokens"] == 44
    assert made.lengths["inputs"].tolist() == [5, 256]


@pytest.mark.parametrize("prefix", [(), (1, 2)])
@pytest.mark.parametrize("packing", ["best_fit", "examples"])
def test_long_pairs_are_left_out_whole_and_counted(packing, prefix):
    lengths = {"inputs": np.array([5, 300, 256, 7]), "targets": np.array([3, 4, 4, 65])}
    capacity = {"inputs": 256, "targets": 64}
    made = plan.make_plan(
        lengths, capacity, packing=packing, long_documents="drop", inputs_prefix=prefix
    )
    # With two tokens before them, 256 inputs do not fit.
    kept = [0] if prefix else [0, 2]
    assert sorted(made.records.tolist()) == kept
    assert made.counts["long_records"] == 4 - len(kept)
    inputs = lengths["inputs"] + len(prefix)
    assert made.counts["dropped_tokens"] == sum(
        inputs[i] + lengths["targets"][i] for i in range(4) if i not in kept
    )
    assert made.policy[2] == "drop"


@pytest.mark.parametrize("packing", PACKINGS)
def test_long_documents_are_left_out_whole(packing):
    lengths = random_lengths(300)
    made = plan.make_plan(
        {"targets": lengths}, {"targets": 64}, packing=packing, long_documents="drop"
    )
    kept = np.zeros(len(lengths), int)
    np.add.at(kept, made.records, made.lengths["targets"].astype(int))
    assert kept.tolist() == np.where(lengths > 64, 0, lengths).tolist()
    assert made.counts["dropped_tokens"] == int(lengths[lengths > 64].sum()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": "first"}, "packing is 'first'"),
        ({"long_documents": "skip"}, "long_documents is 'skip'"),
    ],
)
def test_unknown_policies_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan.make_plan({"targets": np.ones(3, int)}, {"targets": 4}, **settings)
    with pytest.raises(ValueError, match="must be positive"):
        plan.make_plan({"targets": np.ones(3, int)}, {"targets": 0})


def test_no_tokens_make_no_rows():
    for packing in PACKINGS:
        made = plan.make_plan({"targets": np.zeros(3, int)}, {"targets": 8}, packing=packing)
        assert made.num_rows == 0


def test_plans_do_not_change_between_versions():
    """A change here changes the rows of every run that is resumed, and of plans that are stored."""
    checksum = hashlib.sha256()
    for seed, length, packing in itertools.product(range(3), (7, 64, 513), PACKINGS):
        lengths = random_lengths(700, seed)
        for long_documents in ("split", "truncate", "drop"):
            made = plan.make_plan(
                {"targets": lengths},
                {"targets": length},
                packing=packing,
                long_documents=long_documents,
            )
            arrays = (made.row_starts, made.records, made.offsets, made.lengths["targets"])
            for array in arrays:
                checksum.update(array.tobytes())
    lengths = {"inputs": random_lengths(700, 3), "targets": random_lengths(700, 4)}
    made = plan.make_plan(lengths, {"inputs": 300, "targets": 200}, long_documents="truncate")
    checksum.update(made.row_starts.tobytes() + made.records.tobytes())
    assert checksum.hexdigest()[:32] == "8831200dbc46018405125ae4e5f14188"
