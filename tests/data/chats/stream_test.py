"""Streams of supervised data, against batches that plain Python lays out token by token."""

import functools
import re

import numpy as np
import pytest

from espalier.data.cache import store
from espalier.data.chats import stream as chats
from espalier.data.stream.row_stream import EvalStream
from espalier.launch.convert import model_card
from tests.data.cache import reading_in_place

VOCABULARY, LENGTH = 300, 32
TOKENS, WEIGHTS = "targets", "loss_weights"
COLUMNS = ("input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions")


def draw(seed, count):
    """Conversations of turns that are learnt and turns that are not; some are longer than a row."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        turns = rng.integers(1, 14, 2 * rng.integers(1, 4))
        learnt = np.repeat(np.arange(len(turns)) % 2, turns).astype(np.float32)
        ids = rng.integers(2, VOCABULARY, len(learnt))
        made.append({TOKENS: ids, WEIGHTS: learnt, "document_id": f"{seed}:{i}"})
    # Nothing that is learnt is in the first row of this one, and only its first token in that.
    for i, (learnt, size) in enumerate(((np.arange(40) >= LENGTH, 40), (np.arange(5) == 0, 5))):
        ids = rng.integers(2, VOCABULARY, size)
        made.append(
            {TOKENS: ids, WEIGHTS: learnt.astype(np.float32), "document_id": f"{seed}:x{i}"}
        )
    return made


EXAMPLES = {"a": draw(1, 60), "b": draw(2, 25)}
DROPPED = 2  # of each set


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    features = {TOKENS: VOCABULARY, WEIGHTS: "float32", "document_id": "text"}
    return {
        name: store.write(root / name, made, features=features, num_shards=2)
        for name, made in EXAMPLES.items()
    }


@pytest.fixture
def make(caches):
    def build(
        packing="best_fit",
        length=LENGTH,
        shares=(("a", 0.7), ("b", 0.3)),
        start_token=None,
        bos_id=None,
        batch_size=8,
        **settings,
    ):
        rows = {"feature_lengths": {TOKENS: length}, "packing": packing}
        rows |= {"start_token": start_token, "bos_id": bos_id}
        sources = [chats.plan_chats(name, caches[name], **rows) for name, _ in shares]
        return chats._training_stream(
            sources, ((0, dict(shares)),), batch_size=batch_size, **settings
        )

    return build


def example_of(name, record):
    made = EXAMPLES[name]
    return [*made[0::2], *made[1::2]][record]  # the order of two shards


@pytest.mark.parametrize(
    ("packing", "start"), [("best_fit", None), ("examples", None), ("best_fit", 7), ("examples", 0)]
)
def test_a_conversation_has_the_same_columns_packed_and_alone(make, packing, start):
    stream = make(packing, start_token=start)
    assert stream.summary()["start_token"] == start
    read = {"a": set(), "b": set()}
    for step in range(12):
        batch = stream.batch(step, 0, 8)
        for b, row in enumerate(stream.documents(step, 0, 8)):
            at = 0
            wanted = {name: np.zeros(LENGTH) for name in COLUMNS}
            for k, part in enumerate(row["documents"], 1):
                example = example_of(row["source"], part["record"])
                read[row["source"]].add(example["document_id"])
                ids, learnt = example[TOKENS][:LENGTH], example[WEIGHTS][:LENGTH]
                # Without a start token, the first token is read and not predicted.
                inputs, first = (ids[:-1], 1) if start is None else ([start, *ids[:-1]], 0)
                here = slice(at, at + len(inputs))
                columns = (inputs, ids[first:], learnt[first:], k, np.arange(len(inputs)))
                for name, values in zip(COLUMNS, columns, strict=True):
                    wanted[name][here] = values
                at = here.stop
            assert packing == "best_fit" or len(row["documents"]) == 1
            for name in COLUMNS:
                np.testing.assert_array_equal(batch[f"decoder_{name}"][b], wanted[name], name)
    for name, made in EXAMPLES.items():
        unlearnt = ("x0", "x1") if start is None else ("x0",)  # the first token of x1 is learnt
        assert read[name] == {
            x["document_id"] for x in made if not x["document_id"].endswith(unlearnt)
        }


def test_a_start_token_is_not_put_before_bos(make):
    first = int(example_of("a", 0)[TOKENS][0])
    assert first != example_of("b", 0)[TOKENS][0]
    one = make(shares=(("a", 1.0),), start_token=0, bos_id=first)
    assert one.summary()["start_token"] is None
    assert one.fingerprint == make(shares=(("a", 1.0),)).fingerprint
    (_, text), *_ = one.notices()
    assert "; they begin with BOS, and not with DOCUMENT_START = 0" in text
    with pytest.raises(ValueError, match=r"\{'a': None, 'b': 0\}.*DOCUMENT_START = None"):
        make(start_token=0, bos_id=first)


def test_what_is_cut_dropped_and_learnt_is_counted(make):
    (facts, _) = make().summary()["sources"].values()
    made = EXAMPLES["a"]
    long = [x for x in made[:-DROPPED] if len(x[TOKENS]) > LENGTH]
    learnt = [x[WEIGHTS][1:LENGTH].sum() for x in made]
    assert 0 < len(long) < len(made)
    assert facts["records"] == len(made) and facts["nothing_learnt"] == DROPPED
    assert facts["conversations"] == len(made) - DROPPED
    assert facts["truncated"] == len(long)
    assert facts["truncated_tokens"] == sum(len(x[TOKENS]) - LENGTH for x in long)
    assert facts["tokens"] == sum(min(len(x[TOKENS]), LENGTH) - 1 for x in made[:-DROPPED])
    assert facts["loss_tokens"] == sum(learnt)
    assert facts["first"]["nothing_learnt"].startswith("1:x")
    one = make(shares=(("a", 1.0),))
    assert one.steps_for_epochs(2.5) == -(-5 * facts["rows"] // 16)


@pytest.mark.parametrize("start", [None, 0])
def test_token_budgets_and_model_cards_count_what_is_learnt(make, start):
    one = make(start_token=start)
    budget = 40_000
    steps = one.steps_for_tokens(budget)
    spent = np.cumsum([one[step]["decoder_loss_weights"].sum() for step in range(steps)])
    assert abs(spent[-1] - budget) <= 8 * LENGTH
    (phase,) = one.summary()["phases"]
    assert phase["tokens_per_step"] == pytest.approx(spent[-1] / steps, rel=2e-3)
    text = model_card._trained({"data": one.summary()}, steps)
    counted = float(re.search(r"on about (\S+) tokens with a loss", text)[1].replace(",", ""))
    assert counted == pytest.approx(spent[-1], rel=2e-3)


def test_a_batch_with_the_same_row_twice_is_named(make):
    one = make(shares=(("a", 1.0),))
    rows = one.summary()["sources"]["a"]["rows"]
    for size, name in ((rows, None), (rows + 1, "repeats"), (3 * rows, "WARNING")):
        found = make(shares=(("a", 1.0),), batch_size=size).notices()[1:]
        assert [kind for kind, _ in found] == [name] * (name is not None)
    ((_, text),) = found
    assert f"has the same rows 3 times, because the data fill {rows}: BATCH_SIZE = {rows} " in text
    batch = make(shares=(("a", 1.0),), batch_size=3 * rows).documents(0, 0, 3 * rows)
    assert sorted(x["row"] for x in batch) == sorted([*range(rows)] * 3)


def test_long_conversations_are_left_out_by_name(caches):
    plan = functools.partial(
        chats.plan_chats, "a", caches["a"], feature_lengths={TOKENS: LENGTH}, packing="best_fit"
    )
    source = plan(long_documents="drop")
    facts, made = source.summary(), EXAMPLES["a"]
    whole = [x for x in made[:-DROPPED] if len(x[TOKENS]) <= LENGTH]
    short = 1  # in which nothing is learnt
    assert facts["too_long"] == len(made) - len(whole) - short > 1
    assert (facts["nothing_learnt"], facts["truncated"], facts["truncated_tokens"]) == (1, 0, 0)
    assert facts["conversations"] == len(whole)
    assert facts["tokens"] == sum(len(x[TOKENS]) - 1 for x in whole)
    assert facts["loss_tokens"] == sum(x[WEIGHTS][1:].sum() for x in whole)
    assert facts["first"]["too_long"] in {x["document_id"] for x in made}
    ids = {row["id"] for r in range(source.plan.num_rows) for row in source.documents(r)}
    assert ids == {x["document_id"] for x in whole}
    assert source.plan.policy != plan().plan.policy  # and so the fingerprint
    with pytest.raises(ValueError, match="but for 62 longer ones, which are dropped"):
        plan(feature_lengths={TOKENS: 3}, long_documents="drop")
    with pytest.raises(ValueError, match="long_documents is 'split'"):
        plan(long_documents="split")


def test_hosts_and_resuming_change_nothing(make):
    whole, parts = make(), make()
    for step in (0, 5, 1000):
        batch = whole.batch(step, 0, 8)
        for hosts in (2, 4):
            size = 8 // hosts
            pieces = [parts.batch(step, h * size, (h + 1) * size) for h in range(hosts)]
            for name, array in batch.items():
                np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), array)
    later = make(positions=whole.positions(7))
    for name, array in later.batch(0, 0, 8).items():
        if name != "source_ids":  # the schedule begins anew, each source continues
            assert array.shape == whole.batch(7, 0, 8)[name].shape
    assert later.epochs(0) == whole.epochs(7)


def test_shares_are_of_tokens_and_none_reads_all_equally_often(make):
    stream = make()
    read = {"a": 0, "b": 0}
    for step in range(40):
        for row in stream.documents(step, 0, 8):
            read[row["source"]] += sum(part["length"] for part in row["documents"])
    assert read["a"] / sum(read.values()) == pytest.approx(0.7, abs=0.02)


def test_held_out_rows_are_read_once(caches):
    source = chats.plan_chats("b", caches["b"], feature_lengths={TOKENS: 64}, packing="best_fit")
    stream = EvalStream(source, batch_size=4, start_token=None)
    names = [
        part["id"]
        for step in range(stream.num_steps)
        for row in stream.documents(step, 0, 4)
        for part in row["documents"]
    ]
    # In rows of 64, the end of the long one is learnt.
    assert sorted(names) == sorted(x["document_id"] for x in EXAMPLES["b"][:-1])
    assert stream.bytes_per_token == 0


@pytest.mark.parametrize(
    ("lengths", "packing", "message"),
    [
        ({TOKENS: 1}, "best_fit", "at least 2"),
        ({TOKENS: 8, "inputs": 8}, "best_fit", "'targets' alone"),
        ({TOKENS: 8}, "concat", "packing"),
    ],
)
def test_settings_are_checked(caches, lengths, packing, message):
    with pytest.raises(ValueError, match=message):
        chats.plan_chats("a", caches["a"], feature_lengths=lengths, packing=packing)


def test_a_row_length_in_which_nothing_is_learnt_is_one_error(tmp_path):
    features = {TOKENS: VOCABULARY, WEIGHTS: "float32"}
    examples = [{TOKENS: np.arange(9), WEIGHTS: (np.arange(9) > 6).astype(np.float32)}]
    opened = store.write(tmp_path / "c", examples, features=features)
    with pytest.raises(ValueError, match="its first 4 tokens. Raise task_feature_lengths"):
        chats.plan_chats("c", opened, feature_lengths={TOKENS: 4}, packing="best_fit")


def test_rows_of_caches_that_are_read_in_place_are_the_same(make, caches, monkeypatch):
    reading_in_place.check(make, caches, monkeypatch)
