"""Streams of pairs, against batches that plain Python lays out pair by pair from the cached ids."""

import numpy as np
import pytest

from espalier.data.cache import store
from espalier.data.preference import pair_plan, pair_rows
from espalier.data.preference.pair_rows import PairSource
from espalier.data.preference.stream import PairEvalStream, PairStream
from tests.data.cache import reading_in_place

VOCABULARY = 300
LENGTH, MAX_LENGTH = 64, 24
IDS = ("prompt", "chosen", "rejected")


def draw(seed, count, unpaired=False):
    rng = np.random.default_rng(seed)
    sizes = {"prompt": (1, 12), "chosen": (1, 20), "rejected": (1, 20)}
    number = "labels" if unpaired else "margin"
    return [
        {
            **{f: rng.integers(2, VOCABULARY, rng.integers(*sizes[f])) for f in IDS},
            number: [float(rng.integers(2))],
            "document_id": f"{seed}:{i}",
        }
        for i in range(count)
    ]


EXAMPLES = {"a": draw(1, 50), "b": draw(2, 23)}
PHASES = ((0, {"a": 0.7, "b": 0.3}), (6, {"b": 1.0}))


def write(root, examples, unpaired=False):
    number = "labels" if unpaired else "margin"
    features = {**dict.fromkeys(IDS, VOCABULARY), number: "float32", "document_id": "text"}
    return store.write(root, examples, features=features, num_shards=2)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return {name: write(root / name, found) for name, found in EXAMPLES.items()}


def source(
    name,
    opened,
    *,
    start_token=0,
    length=LENGTH,
    max_length=MAX_LENGTH,
    packing="examples",
    read_last=False,
):
    planned = pair_plan.plan_pairs(
        name,
        opened,
        row_length=length,
        max_length=max_length,
        packing=packing,
        read_only=int(start_token is None),
        read_last=int(read_last),
    )
    return PairSource(name, opened, planned)


@pytest.fixture
def make(caches):
    def build(names="ab", phases=PHASES, batch_size=8, start_token=0, **settings):
        names_of_layout = ("length", "max_length", "packing", "read_last")
        layout = {k: settings.pop(k) for k in names_of_layout if k in settings}
        sources = [source(n, caches[n], start_token=start_token, **layout) for n in names]
        phases = tuple(
            (at, {n: w for n, w in shares.items() if n in names}) for at, shares in phases
        )
        return PairStream(
            sources, phases, batch_size=batch_size, start_token=start_token, **settings
        )

    return build


def example_of(name, record):
    """The example at a record of a cache of two shards."""
    found = EXAMPLES[name]
    return [*found[0::2], *found[1::2]][record]


def laid_out(stream, step, start_token, length, max_length=MAX_LENGTH):
    """The batch of a step, token by token."""
    rows = stream.documents(step, 0, stream.batch_size)
    names = ("input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions")
    out = {name: np.zeros((len(rows), length)) for name in names}
    weights = np.zeros((len(rows), stream.slots))
    margins = np.zeros((len(rows), stream.slots))
    chosen_tokens = 0
    for i, row in enumerate(rows):
        at = 0
        for k, part in enumerate(row["documents"]):
            pair = example_of(row["source"], part["record"])
            assert part["id"] == pair["document_id"]
            weights[i, k], margins[i, k] = 1, pair["margin"][0]
            for turn, which in enumerate(("chosen", "rejected")):
                ids = [*pair["prompt"], *pair[which]][:max_length]
                is_completion = [j >= len(pair["prompt"]) for j in range(len(ids))]
                chosen_tokens += sum(is_completion) if which == "chosen" else 0
                before = [start_token, *ids[:-1]]
                if start_token is None:
                    before, ids, is_completion = ids[:-1], ids[1:], is_completion[1:]
                for j, (read, predicted, weight) in enumerate(
                    zip(before, ids, is_completion, strict=True)
                ):
                    values = (read, predicted, weight, 2 * k + turn + 1, j)
                    for name, value in zip(names, values, strict=True):
                        out[name][i, at] = value
                    at += 1
    batch = {f"decoder_{name}": array for name, array in out.items()}
    mean = np.float32(chosen_tokens / weights.sum())
    return {
        **batch,
        "source_ids": np.array([stream.source_names.index(row["source"]) for row in rows]),
        "pair_weights": weights,
        "pair_margins": margins,
        "chosen_tokens_per_pair": np.full(len(rows), mean),
    }


def assert_equal(one, other):
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("packing", ["examples", "best_fit"])
@pytest.mark.parametrize("start_token", [0, 5, None])
def test_batches_are_those_laid_out_token_by_token(make, packing, start_token):
    length = 112 if packing == "best_fit" else LENGTH
    stream = make(packing=packing, start_token=start_token, length=length)
    assert (stream.slots > 1) == (packing == "best_fit")
    for step in (0, 1, 5, 6, 40):
        batch = stream.batch(step, 0, 8)
        assert_equal(laid_out(stream, step, start_token, length), batch)
        floats = {"decoder_loss_weights", "pair_weights", "pair_margins", "chosen_tokens_per_pair"}
        for name, array in batch.items():
            assert array.dtype == (np.float32 if name in floats else np.int32)


@pytest.mark.parametrize("read_last", [0, 1])
@pytest.mark.parametrize("packing", ["examples", "best_fit"])
def test_an_encoder_reads_the_prompts_beside_both_completions(caches, packing, read_last):
    """With `read_last`, the last token of each completion is read at a place of its own, which predicts nothing."""
    lengths = {"row_length": LENGTH, "max_length": 6, "inputs_length": 32}
    planned = pair_plan.plan_pairs(
        "a", caches["a"], packing=packing, read_last=read_last, **lengths
    )
    filled = sum(len(pair[which][:6]) + read_last for pair in EXAMPLES["a"] for which in IDS[1:])
    assert planned.positions() == filled
    made = PairStream(
        [PairSource("a", caches["a"], planned)], ((0, {"a": 1.0}),), batch_size=4, start_token=1
    )
    pairs = 0
    for step in range(3):
        batch = made.batch(step, 0, 4)
        for i, row in enumerate(made.documents(step, 0, 4)):
            segments = 0
            for part in row["documents"]:
                pair, pairs = example_of("a", part["record"]), pairs + 1
                for which in ("chosen", "rejected"):
                    segments += 1
                    read = batch["encoder_segment_ids"][i] == segments
                    learnt = batch["decoder_segment_ids"][i] == segments
                    ids = list(pair[which][:6])
                    of = {name: array[i] for name, array in batch.items()}
                    assert of["encoder_input_tokens"][read].tolist() == list(pair["prompt"])
                    assert of["encoder_positions"][read].tolist() == [*range(read.sum())]
                    count, places = len(ids), len(ids) + read_last
                    assert of["decoder_target_tokens"][learnt][:count].tolist() == ids
                    assert of["decoder_input_tokens"][learnt].tolist() == [1, *ids][:places]
                    assert of["decoder_positions"][learnt].tolist() == [*range(places)]
                    weights = [1] * count + [0] * read_last
                    assert of["decoder_loss_weights"][learnt].tolist() == weights
                    if read_last:
                        assert of["decoder_ends"][learnt].tolist() == [0] * count + [1]
            for side in ("encoder", "decoder"):
                ids = batch[f"{side}_segment_ids"][i]
                assert ids.max() == segments and (np.diff(ids[ids > 0]) >= 0).all()
    assert pairs >= 12 + 4 * (packing == "best_fit")
    assert planned.row_lengths == {"targets": LENGTH, "inputs": 32}


def test_packing_changes_no_pair(make):
    """Invariants 6 and 7 of the losses: a pair is the same tokens wherever it lies and whatever is beside it."""

    def pairs_of(stream, steps):
        found = {}
        for step in range(steps):
            batch = stream.batch(step, 0, 8)
            for i, names in enumerate(stream.row_ids(step, 0, 8)):
                for k, name in enumerate(names):
                    assert bool(name) == bool(batch["pair_weights"][i, k])
                    for turn in (1, 2) if name else ():
                        here = batch["decoder_segment_ids"][i] == 2 * k + turn
                        cut = [
                            batch[f"decoder_{column}"][i][here].tolist()
                            for column in (
                                "input_tokens",
                                "target_tokens",
                                "loss_weights",
                                "positions",
                            )
                        ]
                        assert found.setdefault((name, turn), cut) == cut
        return found

    alone = pairs_of(make(names="a", phases=((0, {"a": 1.0}),)), 7)
    packed = make(names="a", phases=((0, {"a": 1.0}),), packing="best_fit", length=200)
    assert packed.slots > 2
    beside = pairs_of(packed, 7)
    assert alone == beside and len(alone) == 2 * len(EXAMPLES["a"])


@pytest.mark.parametrize("start_token", [0, None])
def test_last_tokens_are_read_at_a_place_of_their_own(make, start_token):
    """Where a row's segments are one place longer, each has its EOS among what is read, and nothing else changes."""
    once = {"phases": ((0, {"a": 1.0}),), "names": "a", "start_token": start_token}
    plain, whole = make(**once), make(**once, read_last=True)
    assert plain.fingerprint != whole.fingerprint
    one, other = plain.batch(3, 0, 8), whole.batch(3, 0, 8)
    for b, row in enumerate(plain.documents(3, 0, 8)):
        assert whole.documents(3, 0, 8)[b] == row
        for segment in (1, 2):
            here, there = (x["decoder_segment_ids"][b] == segment for x in (one, other))
            assert there.sum() == here.sum() + 1
            read = other["decoder_input_tokens"][b][there]
            targets = one["decoder_target_tokens"][b][here]
            np.testing.assert_array_equal(read[:-1], one["decoder_input_tokens"][b][here])
            assert read[-1] == targets[-1]
            np.testing.assert_array_equal(
                other["decoder_positions"][b][there], np.arange(there.sum())
            )
            weights = other["decoder_loss_weights"][b][there]
            np.testing.assert_array_equal(weights[:-1], one["decoder_loss_weights"][b][here])
            ends = other["decoder_ends"][b][there]
            np.testing.assert_array_equal(ends, np.arange(len(ends)) == len(ends) - 1)
            assert weights[-1] == 0
    assert other["decoder_ends"].sum() == 16
    with pytest.raises(ValueError, match="2 x \\(max_length \\+ 1"):
        make(**once, length=48, read_last=True)


def test_completions_are_read_to_their_last_end_token_as_the_first_of_these(caches):
    """Against plain Python; `MAX_LENGTH` cuts some completions before their ends."""
    ends = (7, *range(100, 130))
    sizes = {"row_length": 2 * MAX_LENGTH, "max_length": MAX_LENGTH - 1, "read_last": 1}
    planned = pair_plan.plan_pairs("a", caches["a"], ends=ends, **sizes)
    made = PairEvalStream(PairSource("a", caches["a"], planned), batch_size=8, start_token=0)
    read = shortened = 0
    for step in range(made.num_steps):
        batch, documents = made.batch(step, 0, 8), made.documents(step, 0, 8)
        for b, row in enumerate(documents):
            for part in row["documents"]:
                pair = example_of("a", part["record"])
                for segment, which in enumerate(IDS[1:], 1):
                    ids = pair[which].tolist()
                    last = max((i for i, id in enumerate(ids) if id in ends), default=len(ids) - 1)
                    expected = [*pair["prompt"].tolist(), *ids[: last + 1]][: MAX_LENGTH - 1]
                    expected[-1] = 7 if expected[-1] in ends else expected[-1]
                    here = batch["decoder_segment_ids"][b] == segment
                    assert batch["decoder_input_tokens"][b][here].tolist() == [0, *expected]
                    assert batch["decoder_ends"][b][here].tolist() == [0] * len(expected) + [1]
                    read, shortened = read + 1, shortened + (last + 1 < len(ids))
    assert read == 2 * len(planned.records) and 10 < shortened < read
    without = sum(
        not all(set(ends) & {*pair[w].tolist()} for w in IDS[1:]) for pair in EXAMPLES["a"]
    )
    assert planned.counts["unended"] == without
    notices = [text for name, text in made.notices() if name == "WARNING"]
    assert (
        f"of 50 pairs, {without} ({without / 50:.1%}) have a completion without an end"
        in notices[0]
    )


def test_rows_of_completions_that_all_end_with_eos_are_as_without_other_ends(tmp_path):
    """Their order too, which is drawn from the plan's policy."""
    examples = [{**pair, **{w: [*pair[w], 1] for w in IDS[1:]}} for pair in draw(3, 4)]
    opened = write(tmp_path / "ended", examples)
    sizes = {"row_length": 2 * MAX_LENGTH, "max_length": 20, "read_last": 1}
    plain, ended = (pair_plan.plan_pairs("a", opened, ends=e, **sizes) for e in ((), (1, 7)))
    assert plain.policy == ended.policy and ended.ends == () and ended.counts["unended"] == 0
    other = pair_plan.plan_pairs("a", opened, ends=(7, 1), **sizes)
    assert other.policy != plain.policy and other.ends == (7, 1)


def test_completions_that_are_equal_to_their_ends_are_no_pair(tmp_path):
    prompt = np.array([3, 4])
    pairs = [([5, 6, 7], [5, 6, 100]), ([5, 6, 7], [5, 6, 100, 9]), ([5, 6, 7], [5, 8, 7])]
    names = IDS[1:]
    examples = [{"prompt": prompt} | dict(zip(names, map(np.array, x), strict=True)) for x in pairs]
    opened = write(tmp_path / "same", examples)
    sizes = {"row_length": 24, "max_length": 10, "read_last": 1}
    planned = pair_plan.plan_pairs("a", opened, ends=(7, 100), **sizes)
    rejected = [opened.columns["rejected"].values(record).tolist() for record in planned.records]
    assert rejected == [[5, 8, 7]] and planned.counts["same_when_truncated"] == 2
    assert len(pair_plan.plan_pairs("a", opened, **sizes).records) == 3


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_batches_do_not_depend_on_the_number_of_hosts(make, hosts):
    whole, mine = make(packing="best_fit", length=112), make(packing="best_fit", length=112)
    share = 8 // hosts
    for step in (0, 5, 6, 1000):
        ranges = [(h * share, (h + 1) * share) for h in reversed(range(hosts))]
        parts = [mine.batch(step, *here) for here in ranges][::-1]
        joined = {f: np.concatenate([part[f] for part in parts]) for f in parts[0]}
        assert_equal(joined, whole.batch(step, 0, 8))
        names = [ids for here in reversed(ranges) for ids in mine.row_ids(step, *here)]
        assert names == whole.row_ids(step, 0, 8)
        assert mine.batch(step, 3, 3)["pair_weights"].shape == (0, whole.slots)


def test_every_pair_is_listed_once_with_its_digest(caches, make, tmp_path):
    stream = make(start_token=None, phases=((0, {"a": 0.5, "b": 0.5}),))
    listed = {name: ids for name, *ids in stream.pairs()}
    assert len(stream.pairs()) == len(listed) == 73
    read = {name for step in range(30) for ids in stream.row_ids(step, 0, 8) for name in ids}
    assert read == set(listed)
    cut = []
    for example in EXAMPLES["a"] + EXAMPLES["b"]:
        prompt, *completions = (example[f].tolist() for f in IDS)
        cut.append([prompt, *(ids[: MAX_LENGTH - len(prompt)] for ids in completions)])
    assert sorted([part.tolist() for part in ids] for ids in listed.values()) == sorted(cut)
    # Another start token or cut is another digest; the same pairs in another cache are not.
    assert not set(listed) & {name for name, *_ in make(start_token=0).pairs()}
    shorter = {name for name, *_ in make(start_token=None, max_length=23).pairs()}
    assert 0 < len(shorter & set(listed)) < 73
    twice = write(tmp_path / "twice", EXAMPLES["a"] + EXAMPLES["a"])
    both = PairEvalStream(source("twice", twice, start_token=None), batch_size=8, start_token=None)
    assert {name for name, *_ in both.pairs()} < set(listed) and len(both.pairs()) == 50


def test_an_epoch_of_evaluation_holds_every_pair_once_and_then_nothing(caches):
    stream = PairEvalStream(source("b", caches["b"]), batch_size=5)
    assert (stream.num_steps, stream.bytes_per_token, stream.length) == (5, 0.0, LENGTH)
    batches = [stream.batch(step, 0, 5) for step in range(5)]
    assert sum(batch["pair_weights"].sum() for batch in batches) == 23
    last = batches[-1]
    assert last["pair_weights"].sum() == 3 and not last["decoder_segment_ids"][3:].any()
    here = last["decoder_loss_weights"] * (last["decoder_segment_ids"] == 1)
    np.testing.assert_allclose(last["chosen_tokens_per_pair"], here.sum() / 3, rtol=1e-6)
    assert stream.row_ids(4, 3, 5) == [[""], [""]]
    assert len({name for step in range(5) for [name] in stream.row_ids(step, 0, 5)} - {""}) == 23
    with pytest.raises(ValueError, match="Batch 5 of 'b' does not exist: it has 5 batches"):
        stream.batch(5, 0, 5)


def pair(prompt, chosen, rejected, id=""):
    sizes = zip(IDS, (prompt, chosen, rejected), (10, 50, 90), strict=True)
    return {**{f: np.arange(n) + at for f, n, at in sizes}, "margin": [0.0], "document_id": id}


def test_truncation_and_drops_are_counted_with_the_first_record(tmp_path):
    same = {**pair(4, 9, 9, "same"), "rejected": [*range(50, 54), 1, 2, 3, 4, 5]}
    examples = [
        pair(4, 4, 4, "fits"),
        pair(8, 1, 1, "prompt of all"),
        pair(7, 3, 1, "one token left"),
        same,
        pair(9, 1, 1, "longer still"),
        pair(4, 5, 9, "both cut"),
    ]
    opened = store.write(
        tmp_path / "x",
        examples,
        features={**dict.fromkeys(IDS, VOCABULARY), "margin": "float32", "document_id": "text"},
    )
    stream = PairEvalStream(source("x", opened, length=16, max_length=None), batch_size=3)
    facts = stream.summary()
    assert facts["max_length"] == 8 and facts["pairs_per_row"] == 1 and facts["kind"] == "paired"
    counted = facts["sources"]["x"]
    assert counted["first"] == {
        "prompt_too_long": "prompt of all",
        "same_when_truncated": "same",
        "truncated": "one token left",
    }
    names = ("records", "pairs", "prompt_too_long", "same_when_truncated", "truncated")
    assert [counted[name] for name in names] == [6, 3, 2, 1, 2]
    assert counted["truncated_tokens"] == 2 + 1 + 5
    kept = [[part.tolist() for part in ids] for _, *ids in stream.pairs()]
    # All of the prompts, the starts of completions; the third pair is the first one, once it is cut.
    assert kept == [
        [[10, 11, 12, 13], [50, 51, 52, 53], [90, 91, 92, 93]],
        [[10, 11, 12, 13, 14, 15, 16], [50], [90]],
    ]
    assert "pair_margins" not in stream.batch(0, 0, 3)


def test_unpaired_examples_have_labels(tmp_path):
    examples = draw(3, 12, unpaired=True)
    examples[0]["rejected"] = examples[0]["chosen"]  # another example's completion may be the same
    opened = write(tmp_path / "u", examples, unpaired=True)
    stream = PairEvalStream(source("u", opened), batch_size=12)
    batch = stream.batch(0, 0, 12)
    assert stream.summary()["kind"] == "unpaired" and "pair_margins" not in batch
    order = [int(row["documents"][0]["id"].partition(":")[2]) for row in stream.documents(0, 0, 12)]
    assert sorted(order) == list(range(12))
    assert batch["pair_labels"][:, 0].tolist() == [examples[i]["labels"][0] for i in order]


def test_budgets_epochs_and_positions_count_what_is_trained_on(make):
    stream = make(phases=((0, {"a": 0.5, "b": 0.5}),), packing="best_fit", length=112)
    steps = stream.steps_for_tokens(3000)
    spent = sum(stream.batch(s, 0, 8)["decoder_loss_weights"].sum() for s in range(steps))
    assert abs(spent - 3000) <= 8 * 112
    later = make(
        phases=((0, {"a": 0.5, "b": 0.5}),),
        packing="best_fit",
        length=112,
        positions=stream.positions(5),
    )
    assert later.epochs(0) == stream.epochs(5)

    def rows_of(made, steps):
        rows = [row for step in steps for row in made.documents(step, 0, 8)]
        return [(row["source"], row["epoch"], row["row"]) for row in rows]

    both = rows_of(stream, range(5)) + rows_of(later, range(3))
    assert len(set(both)) == len(both)
    with pytest.raises(ValueError, match="'a' cannot continue"):
        make(packing="best_fit", length=112, max_length=20, positions=stream.positions(5))
    with pytest.raises(ValueError, match="max_epochs allows 1.00"):
        make(names="b", phases=((0, {"b": 1.0}),), max_epochs=1).check_repeats(4)


def test_fingerprints_tell_what_changes_batches(make):
    different = [
        make(),
        make(start_token=None),
        make(start_token=7),
        make(max_length=20),
        make(packing="best_fit"),
        make(seed=1),
    ]
    assert len({stream.fingerprint for stream in different}) == len(different)
    assert make().fingerprint == make().fingerprint


def test_what_cannot_be_streamed_is_refused(caches, tmp_path):
    with pytest.raises(ValueError, match="2 x \\(max_length\\) positions"):
        source("a", caches["a"], max_length=33)
    with pytest.raises(
        ValueError, match="packing is 'concat'; it must be one of 'examples', 'best_fit'"
    ):
        source("a", caches["a"], packing="concat")
    same = {**pair(1, 3, 3), "rejected": [50, 90, 91]}
    for found, counts in (
        ([pair(5, 1, 2)], (1, 0)),
        ([same], (0, 1)),
        ([same, pair(2, 1, 1)], (1, 1)),
    ):
        message = (
            "max_length=2. .* {} have prompts without room for a completion, and {} have equal"
        )
        with pytest.raises(ValueError, match=message.format(*counts)):
            source("long", write(tmp_path / f"long{counts}", found), max_length=2)
    empty = write(tmp_path / "empty", [pair(1, 1, 2), pair(0, 1, 2, "x.jsonl:9")])
    with pytest.raises(ValueError, match="prompt of x.jsonl:9 is empty, and start_token=None"):
        source("empty", empty, start_token=None)
    documents = store.write(tmp_path / "d", [{"targets": [1]}], features={"targets": 9})
    with pytest.raises(
        ValueError, match="'d' has no feature 'prompt'; it has targets.*register_pairs"
    ):
        source("d", documents)


def test_after_an_empty_prompt_all_is_predicted(tmp_path):
    opened = write(tmp_path / "x", [pair(0, 1, 2)])
    batch = PairEvalStream(source("x", opened), batch_size=1, start_token=7).batch(0, 0, 1)
    assert batch["decoder_input_tokens"][0, :4].tolist() == [7, 7, 90, 0]
    assert batch["decoder_target_tokens"][0, :4].tolist() == [50, 90, 91, 0]
    assert batch["decoder_loss_weights"][0, :4].tolist() == [1, 1, 1, 0]
    assert batch["decoder_segment_ids"][0, :4].tolist() == [1, 2, 2, 0]


def test_digests_depend_on_where_the_prompt_ends():
    ids = [np.array(part) for part in ([1, 2], [3], [4])]
    other = [np.array(part) for part in ([1], [2, 3], [4])]
    assert pair_rows.digest(*ids, 0) == pair_rows.digest(*ids, 0) != pair_rows.digest(*other, 0)


def test_rows_of_caches_that_are_read_in_place_are_the_same(make, caches, monkeypatch):
    reading_in_place.check(make, caches, monkeypatch)
