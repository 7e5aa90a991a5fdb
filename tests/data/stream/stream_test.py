"""The stream as a pure function of (seed, step), against arrays rebuilt by hand from the caches."""

import collections
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from espalier.data.cache import store
from espalier.data.stream import rows
from espalier.data.stream.row_stream import EvalStream
from espalier.data.stream.train_stream import Stream

VOCABULARY = 500
PHASES = ((0, {"a": 0.7, "b": 0.3}), (10, {"a": 0.2, "b": 0.3, "c": 0.5}), (25, {"c": 1.0}))
FIELDS = (
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
    "decoder_segment_ids",
    "decoder_positions",
    "source_ids",
)


def documents(name, count, mean):
    rng = np.random.default_rng(list(name.encode()))
    sizes = np.minimum(rng.lognormal(mean, 1.0, count).astype(int) + 1, 400)
    return [rng.integers(1, VOCABULARY, size) for size in sizes]


DOCUMENTS = {"a": documents("a", 150, 3), "b": documents("b", 80, 4), "c": documents("c", 60, 3.5)}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return {
        name: store.write(
            root / name,
            [{"targets": d, "document_id": f"{name}#{i}"} for i, d in enumerate(found)],
            features={"targets": VOCABULARY, "document_id": "text"},
        )
        for name, found in DOCUMENTS.items()
    }


@pytest.fixture
def make(caches):
    def build(phases=PHASES, length=64, batch_size=16, names="abc", packing="best_fit", **settings):
        sources = [
            rows.plan_source(name, caches[name], {"targets": length}, packing=packing)
            for name in names
        ]
        return Stream(sources, phases, batch_size=batch_size, **settings)

    return build


def assert_equal(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_batches_do_not_depend_on_the_number_of_hosts(make, hosts):
    whole, mine = make(), make()
    share = whole.batch_size // hosts
    for step in (0, 9, 10, 11, 24, 25, 1000):
        parts = [mine.batch(step, h * share, (h + 1) * share) for h in reversed(range(hosts))]
        joined = {f: np.concatenate([part[f] for part in parts[::-1]]) for f in parts[0]}
        assert_equal(joined, whole.batch(step, 0, 16))


def test_iterating_gives_the_batches_in_order_and_a_state_to_continue_at(make):
    stream = make()
    batches = iter(stream)
    for step in range(3):
        assert_equal(next(batches), stream.batch(step, 0, 16))
    state = json.loads(json.dumps(batches.get_state()))
    after = iter(make())  # as in another process
    after.set_state(state)
    assert after.step == 3
    assert_equal(next(after), next(batches))
    assert_equal(next(iter(stream)), stream[0])  # each iteration begins at step 0
    with pytest.raises(ValueError, match="belongs to another stream"):
        iter(make(seed=1)).set_state(state)


def test_iterating_ends_where_a_stream_ends(make, caches):
    source = rows.plan_source("a", caches["a"], {"targets": 64})
    split = EvalStream(source, batch_size=16)
    batches = list(split)
    assert len(batches) == split.num_steps > 1
    assert_equal(batches[-1], split[split.num_steps - 1])
    capped = make(((0, {"a": 1.0}),), max_epochs=2, on_cap="redistribute")
    assert len(list(capped)) == capped.num_steps
    assert make().num_steps is None


def test_seeking_equals_iterating(make):
    iterated = make()
    batches = [iterated.batch(step, 0, 16) for step in range(40)]
    for step in (39, 0, 17):
        assert_equal(make().batch(step, 0, 16), batches[step])
    far = make().batch(10**9 + 7, 0, 16)
    assert far["decoder_loss_weights"].sum() > 0


def test_resuming_on_other_hosts_sees_the_next_example_none_twice_none_lost(make):
    """Rows read by 2 hosts to step 7, then by 8 from there on, against one host throughout."""
    whole, before, after = make(), make(), make()

    def rows_of(reader, step, hosts):
        share = 16 // hosts
        return [
            (doc["source"], doc["epoch"], doc["row"])
            for host in range(hosts)
            for doc in reader.documents(step, host * share, (host + 1) * share)
        ]

    resumed = [row for step in range(7) for row in rows_of(before, step, 2)]
    resumed += [row for step in range(7, 30) for row in rows_of(after, step, 8)]
    assert resumed == [row for step in range(30) for row in rows_of(whole, step, 1)]
    assert len(set(resumed)) == len(resumed)
    for source, epochs in whole.epochs(30).items():
        read = sum(row[0] == source for row in resumed)
        assert read == round(
            epochs * next(s for s in whole._sources if s.name == source).plan.num_rows
        )


@pytest.mark.parametrize("packing", ["best_fit", "concat", "examples"])
def test_an_epoch_holds_every_token_of_every_document_once(make, packing):
    """Rebuilds the corpus from the batches alone, and checks the shift against it."""
    made = make(phases=((0, {"a": 1.0}),), names="a", packing=packing, batch_size=1, length=64)
    num_rows = made._sources[0].plan.num_rows
    for epoch in (0, 1):
        found = [np.zeros(len(d), int) for d in DOCUMENTS["a"]]
        weight = 0.0
        for step in range(epoch * num_rows, (epoch + 1) * num_rows):
            batch = {name: array[0] for name, array in made.batch(step, 0, 1).items()}
            (row,) = made.documents(step, 0, 1)
            assert row["epoch"] == epoch
            weight += batch["decoder_loss_weights"].sum()
            at = 0
            for segment, part in enumerate(row["documents"], 1):
                document = DOCUMENTS["a"][part["record"]]
                here = slice(at, at + part["length"])
                there = slice(part["offset"], part["offset"] + part["length"])
                assert part["id"] == f"a#{part['record']}"
                assert (batch["decoder_target_tokens"][here] == document[there]).all()
                assert (batch["decoder_segment_ids"][here] == segment).all()
                assert (batch["decoder_positions"][here] == np.arange(part["length"])).all()
                shifted = np.concatenate([[0], document])[there]  # the true predecessors
                assert (batch["decoder_input_tokens"][here] == shifted).all()
                found[part["record"]][there] += 1
                at = here.stop
            for field in FIELDS[:-1]:
                assert (batch[field][at:] == 0).all()
            assert (batch["decoder_loss_weights"][:at] == 1).all()
        assert all((count == 1).all() for count in found)
        assert weight == sum(map(len, DOCUMENTS["a"]))


def test_epochs_and_seeds_differ_in_order(make):
    def order_of(seed, epoch):
        made = make(phases=((0, {"b": 1.0}),), names="b", batch_size=1, seed=seed)
        n = made._sources[0].plan.num_rows
        return [made.documents(epoch * n + i, 0, 1)[0]["row"] for i in range(n)]

    orders = [tuple(order_of(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert len({tuple(sorted(rows)) for rows in orders}) == 1


def test_documents_repeat_equally_often(make):
    """No document twice within an epoch, and repeats that differ by at most one."""
    made = make(phases=((0, {"a": 0.5, "b": 0.5}),), names="ab", packing="examples", length=400)
    counts = {"a": collections.Counter(), "b": collections.Counter()}
    for step in range(30):
        for row in made.documents(step, 0, 16):
            counts[row["source"]].update(doc["record"] for doc in row["documents"])
    for name, count in counts.items():
        times = [count[i] for i in range(len(DOCUMENTS[name]))]
        assert max(times) - min(times) <= 1
        assert max(times) >= 2


def share_errors(made, shares, steps):
    """After every row: the worst error in sequences, and as a share of all tokens so far."""
    batches = [made.batch(step, 0, made.batch_size) for step in range(steps)]
    sources = np.concatenate([batch["source_ids"] for batch in batches])
    tokens = np.zeros((len(sources), len(shares)))
    tokens[np.arange(len(sources)), sources] = np.concatenate(
        [batch["decoder_loss_weights"].sum(axis=1) for batch in batches]
    )
    tokens = tokens.cumsum(axis=0)
    total = tokens.sum(axis=1, keepdims=True)
    error = np.abs(tokens - total * shares).max(axis=1)
    return error / made.length, error / total[:, 0]


def test_realised_token_share_is_within_one_sequence_where_rows_are_full(tmp_path):
    shares = np.array([0.5, 0.3, 0.2])
    sources = []
    for name, count in zip("abc", (40, 30, 90), strict=True):
        tokens = [np.full(1 + i % 50, 7) for i in range(count)]
        tokens.append(np.full(-sum(map(len, tokens)) % 32, 7))  # the last row is full, too
        opened = store.write(
            tmp_path / name, [{"targets": t} for t in tokens], features={"targets": 500}
        )
        sources.append(rows.plan_source(name, opened, {"targets": 32}, packing="concat"))
    phases = ((0, dict(zip("abc", shares, strict=True))),)
    sequences, points = share_errors(Stream(sources, phases, batch_size=64), shares, 100)
    assert sequences.max() <= 1
    assert points[1000:].max() <= 0.001


@pytest.mark.parametrize("packing", ["best_fit", "concat", "examples"])
def test_realised_token_share_is_right_where_rows_are_not_full(make, packing):
    """Row shares are corrected by how full the rows of each source are on average."""
    shares = np.array([0.5, 0.3, 0.2])
    phases = ((0, dict(zip("abc", shares, strict=True))),)
    made = make(phases=phases, packing=packing, length=32, batch_size=64)
    sequences, points = share_errors(made, shares, 100)
    if packing == "examples":
        fills = [source.plan.fill() for source in made._sources]
        assert max(fills) - min(fills) > 0.1
        assert points[1000:].max() < 0.005
    else:
        assert sequences.max() < 2  # one for the schedule, one for what rows leave empty


def test_realised_row_share_is_within_one_row_at_every_step(make):
    made = make(phases=((0, {"a": 0.61, "b": 0.3, "c": 0.09}),))
    used = np.array([made._schedule.used(step) for step in range(1, 2000)])
    wanted = np.outer(np.arange(1, 2000) * 16, made._schedule.shares(0))
    assert np.abs(used - wanted).max() <= 1


def test_token_budgets_are_met_to_one_batch(make):
    made = make(length=64, batch_size=16)
    for budget in (5_000, 40_000, 10**9):
        steps = made.steps_for_tokens(budget)
        if budget < 10**6:
            spent = sum(made.batch(s, 0, 16)["decoder_loss_weights"].sum() for s in range(steps))
            assert abs(spent - budget) <= 16 * 64
        else:
            assert abs(steps * made.tokens_per_step(25) - budget) < 1e-4 * budget
    # A budget for a later phase counts from its first step.
    steps = made.steps_for_tokens(20_000, first_step=25)
    spent = sum(made.batch(25 + s, 0, 16)["decoder_loss_weights"].sum() for s in range(steps))
    assert abs(spent - 20_000) <= 16 * 64


def test_a_source_of_weight_zero_changes_no_batch(make):
    phases = ((0, {"b": 0.6, "c": 0.4}),)
    without = make(phases=phases, names="bc")
    with_zero = make(phases=((0, {"a": 0.0, "b": 0.6, "c": 0.4}),), names="abc")
    assert with_zero.source_names == without.source_names
    assert with_zero.fingerprint == without.fingerprint
    for step in (0, 5, 500):
        assert_equal(with_zero.batch(step, 0, 16), without.batch(step, 0, 16))


def test_cross_document_attention_makes_each_row_one_segment(make):
    isolated, joined = make(packing="concat"), make(packing="concat", cross_document_attention=True)
    for step in (0, 12):
        one, other = isolated.batch(step, 0, 16), joined.batch(step, 0, 16)
        np.testing.assert_array_equal(other["decoder_target_tokens"], one["decoder_target_tokens"])
        real = one["decoder_segment_ids"] > 0
        np.testing.assert_array_equal(other["decoder_segment_ids"], real)
        np.testing.assert_array_equal(other["decoder_positions"], real * np.arange(64))
        np.testing.assert_array_equal(
            other["decoder_input_tokens"][:, 1:],
            other["decoder_target_tokens"][:, :-1] * real[:, 1:],
        )
        np.testing.assert_array_equal(
            other["decoder_input_tokens"][:, 0], one["decoder_input_tokens"][:, 0]
        )
    assert isolated.fingerprint != joined.fingerprint


def test_a_document_begins_with_the_start_token_and_its_continuation_does_not(make):
    plain, other = make(packing="concat"), make(packing="concat", start_token=7777)
    starts = 0
    for step in (0, 12):
        one, two = plain.batch(step, 0, 16), other.batch(step, 0, 16)
        changed = one["decoder_input_tokens"] != two["decoder_input_tokens"]
        starts += changed.sum()
        first = (one["decoder_positions"] == 0) & (one["decoder_segment_ids"] > 0)
        np.testing.assert_array_equal(changed, first & (one["decoder_input_tokens"] == 0))
        assert (two["decoder_input_tokens"][changed] == 7777).all()
        # Rows of a split document begin with the token before them.
        assert (first & ~changed).any()
        for name in set(one) - {"decoder_input_tokens"}:
            np.testing.assert_array_equal(one[name], two[name])
    assert starts
    assert (plain.summary()["start_token"], other.summary()["start_token"]) == (0, 7777)


def test_fingerprint_changes_with_everything_the_batches_depend_on(make, tmp_path, caches):
    base = {"phases": PHASES, "length": 64, "batch_size": 16}
    variants = [
        {},
        {"seed": 1},
        {"batch_size": 32},
        {"length": 65},
        {"packing": "concat"},
        {"cross_document_attention": True},
        {"start_token": 2},
        {"interleaving": "random"},
        {"phases": ((0, {"a": 0.7, "b": 0.3}), (11, {"c": 1.0}))},
        {"phases": ((0, {"a": 0.6, "b": 0.3}), *PHASES[1:])},
    ]
    names = {make(**{**base, **variant}).fingerprint for variant in variants}
    changed = store.write(
        tmp_path / "a", [{"targets": d[::-1]} for d in DOCUMENTS["a"]], features={"targets": 500}
    )
    for opened in (caches["a"], changed):
        source = rows.plan_source("a", opened, {"targets": 64})
        names.add(Stream([source], ((0, {"a": 1}),), batch_size=16).fingerprint)
    assert len(names) == len(variants) + 2
    # Weights are shares: a common factor changes nothing.
    assert make().fingerprint == make(phases=((0, {"a": 7, "b": 3}), *PHASES[1:])).fingerprint


def test_batches_do_not_change_between_versions(tmp_path):
    """A change here changes the data of every run that is resumed: raise `row_stream._VERSION`."""
    sources = []
    for name, step in (("a", 31), ("b", 57)):
        tokens = [np.arange(1 + i * step % 150) * (i + 7) % 499 for i in range(60)]
        opened = store.write(
            tmp_path / name, [{"targets": t} for t in tokens], features={"targets": 500}
        )
        sources.append(rows.plan_source(name, opened, {"targets": 64}))
    phases = ((0, {"a": 0.7, "b": 0.3}), (10, {"a": 0.2, "b": 0.8}))
    made, digest = Stream(sources, phases, batch_size=16, seed=3), hashlib.sha256()
    for step in (0, 10, 31, 10**9):
        for name, array in made.batch(step, 0, 16).items():
            digest.update(name.encode() + array.tobytes())
    assert digest.hexdigest()[:16] == "12d8bdf27c4f905c"


def test_summary_tells_what_was_planned(make, caches, tmp_path):
    made = make(length=64)
    summary = made.summary()
    assert summary["fingerprint"] == made.fingerprint
    assert summary["vocabulary"]["size"] == VOCABULARY
    assert summary["sources"]["a"]["tokens"] == sum(map(len, DOCUMENTS["a"]))
    assert summary["sources"]["a"]["long_records"] == sum(len(d) > 64 for d in DOCUMENTS["a"]) > 0
    assert summary["sources"]["a"]["dropped_tokens"] == 0
    assert summary["phases"][1]["token_shares"] == {"a": 0.2, "b": 0.3, "c": 0.5}
    np.testing.assert_allclose(sum(summary["phases"][1]["row_shares"].values()), 1)
    truncated = rows.plan_source("a", caches["a"], {"targets": 64}, long_documents="truncate")
    assert truncated.summary()["dropped_tokens"] > 0
    dropped = rows.plan_source("a", caches["a"], {"targets": 64}, long_documents="drop")
    assert dropped.plan.tokens() == sum(len(d) for d in DOCUMENTS["a"] if len(d) <= 64)
    records = caches["a"].columns["targets"].lengths
    for source in (truncated, dropped):
        first = source.summary()["first"]["long_records"]
        assert first == caches["a"].name_of(int(np.argmax(records > 64)))
    long = store.write(tmp_path / "long", [{"targets": np.arange(2)}], features={"targets": 500})
    with pytest.raises(ValueError, match="drops all of its records .*raise TASK_FEATURE_LENGTHS"):
        rows.plan_source("long", long, {"targets": 1}, long_documents="drop")


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_evaluation_reads_every_row_once(caches, batch_size):
    source = rows.plan_source("b", caches["b"], {"targets": 64})
    made = EvalStream(source, batch_size=batch_size)
    assert made.num_steps == -(-source.plan.num_rows // batch_size)
    weight, seen = 0.0, []
    for step in range(made.num_steps):
        batch = made.batch(step, 0, batch_size)
        parts = [made.batch(step, i, i + 1) for i in range(batch_size)]
        assert_equal({f: np.concatenate([p[f] for p in parts]) for f in batch}, batch)
        weight += batch["decoder_loss_weights"].sum()
        seen += [row["row"] for row in made.documents(step, 0, batch_size)]
    assert weight == sum(map(len, DOCUMENTS["b"]))
    real = source.plan.num_rows
    assert sorted(seen[:real]) == list(range(real))
    assert seen[real:] == [rows.NO_ROW] * (len(seen) - real)


def test_a_part_of_an_evaluation_is_no_sample_of_long_documents_alone(caches):
    source = rows.plan_source("b", caches["b"], {"targets": 64})
    made = EvalStream(source, batch_size=8)
    half = [row for step in range(made.num_steps // 2) for row in made.documents(step, 0, 8)]
    assert [row["row"] for row in half] == [
        row["row"]
        for step in range(made.num_steps // 2)
        for row in EvalStream(source, batch_size=8).documents(step, 0, 8)
    ]
    pieces = np.array([len(row["documents"]) for row in half])
    overall = len(source.plan.records) / source.plan.num_rows
    # In the order of the plan this half has one piece a row.
    assert abs(pieces.mean() - overall) < 4 * pieces.std() / np.sqrt(len(pieces))
    first = np.diff(source.plan.row_starts)[: len(half)]
    assert abs(first.mean() - overall) > 4 * pieces.std() / np.sqrt(len(pieces))
    with pytest.raises(ValueError, match="does not exist"):
        made.batch(made.num_steps, 0, 1)


@pytest.mark.parametrize("prefix", [(), (95, 96, 97)])
def test_encoder_decoder_rows_hold_whole_pairs(tmp_path, prefix):
    rng = np.random.default_rng(0)
    pairs = [
        {
            "inputs": rng.integers(1, 90, rng.integers(0, 40)),
            "targets": rng.integers(1, 90, 1 + i % 9),
        }
        for i in range(200)
    ]
    opened = store.write(
        tmp_path / "p", pairs, features={"inputs": 90, "targets": 90}, num_shards=3
    )
    pairs = [pair for shard in range(3) for pair in pairs[shard::3]]
    lengths = {"inputs": 64, "targets": 16}
    source = rows.plan_source("p", opened, lengths, inputs_prefix=prefix)
    made = EvalStream(source, batch_size=8)
    found = set()
    for step in range(made.num_steps):
        batch = made.batch(step, 0, 8)
        for row, documents in enumerate(made.documents(step, 0, 8)):
            for segment, part in enumerate(documents["documents"], 1):
                pair = pairs[part["record"]]
                encoder = batch["encoder_segment_ids"][row] == segment
                decoder = batch["decoder_segment_ids"][row] == segment
                inputs = [*prefix, *pair["inputs"]]
                assert batch["encoder_input_tokens"][row][encoder].tolist() == inputs
                assert (batch["encoder_positions"][row][encoder] == np.arange(encoder.sum())).all()
                assert batch["decoder_target_tokens"][row][decoder].tolist() == list(
                    pair["targets"]
                )
                shifted = [0, *pair["targets"][:-1]]
                assert batch["decoder_input_tokens"][row][decoder].tolist() == shifted
                found.add(part["record"])
    assert found == set(range(200))
    with pytest.raises(ValueError, match="cross_document_attention"):
        EvalStream(source, batch_size=8, cross_document_attention=True)


def test_a_prefix_of_inputs_needs_inputs_and_room(tmp_path):
    pairs = [{"inputs": [5, 6, 7, 8], "targets": [3]}]
    opened = store.write(tmp_path / "p", pairs, features={"inputs": 9, "targets": 9})
    with pytest.raises(ValueError, match="these rows are made of 'targets' alone"):
        rows.plan_source("p", opened, {"targets": 8}, inputs_prefix=(1, 2))
    with pytest.raises(ValueError, match="2 virtual tokens come before the inputs"):
        rows.plan_source("p", opened, {"inputs": 2, "targets": 8}, inputs_prefix=(1, 2))
    cut = rows.plan_source(
        "p", opened, {"inputs": 4, "targets": 8}, long_documents="truncate", inputs_prefix=(1, 2)
    )
    batch = EvalStream(cut, batch_size=1).batch(0, 0, 1)
    assert batch["encoder_input_tokens"].tolist() == [[1, 2, 5, 6]]


def test_what_cannot_be_streamed_is_refused(make, caches, tmp_path):
    with pytest.raises(ValueError, match="unknown source 'x'"):
        make(phases=((0, {"x": 1.0}),))
    with pytest.raises(ValueError, match="'b'.*round to zero"):
        make(phases=((0, {"a": 1.0, "b": 1e-8}),))
    with pytest.raises(ValueError, match="batch_size"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="not within a batch of 16"):
        make().batch(0, 0, 17)
    with pytest.raises(ValueError, match="must give 'targets'"):
        rows.plan_source("a", caches["a"], {"target": 64})
    with pytest.raises(ValueError, match="no feature 'inputs'"):
        rows.plan_source("a", caches["a"], {"inputs": 64, "targets": 64})
    empty = store.write(tmp_path / "e", [{"targets": []}], features={"targets": 500})
    with pytest.raises(ValueError, match="'e' is empty"):
        rows.plan_source("e", empty, {"targets": 64})
    other = store.write(tmp_path / "o", [{"targets": [1]}], features={"targets": 400})
    sources = [
        rows.plan_source("a", caches["a"], {"targets": 64}),
        rows.plan_source("o", other, {"targets": 64}),
    ]
    with pytest.raises(ValueError, match="different vocabularies"):
        Stream(sources, ((0, {"a": 0.5, "o": 0.5}),), batch_size=4)


def test_reading_needs_no_tensorflow_or_jax():
    code = (
        "import sys; from espalier.data.cache import store; from espalier.data.stream import rows, stream; "
        "print([m for m in ('tensorflow', 'seqio', 'jax') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__)))),
    )
    assert out.stdout.strip() == "[]"


def test_inputs_and_targets_of_different_vocabularies_are_refused(tmp_path):
    pairs = [{"inputs": [2, 7], "targets": [3]}]
    lengths = {"inputs": 8, "targets": 8}
    for inputs in (9, 11):
        opened = store.write(
            tmp_path / str(inputs), pairs, features={"inputs": inputs, "targets": 9}
        )
        if inputs == 9:
            made = rows.plan_source("pairs", opened, lengths)
            stream = Stream([made], ((0, {"pairs": 1.0}),), batch_size=1)
            assert stream.length == 16 and stream.batch(0, 0, 1)["encoder_input_tokens"].sum() == 9
        else:
            with pytest.raises(
                ValueError, match="inputs and targets were tokenised with different"
            ):
                rows.plan_source("pairs", opened, lengths)
