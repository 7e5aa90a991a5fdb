"""What a stream tells of records that it drops or cuts."""

import numpy as np
import pytest

from espalier.data.chats.stream import ChatSource
from espalier.data.preference.pair_plan import PairPlan
from espalier.data.preference.pair_rows import PairSource
from espalier.data.prompts.stream import PromptSource
from espalier.data.stream.plan import Plan
from espalier.data.stream.row_stream import EvalStream, RowStream
from espalier.data.stream.rows import Source


class Train(RowStream):
    """The base class, with sources alone."""

    _locate = None

    def __init__(self, source):
        self._sources = (source,)


class HeldOut(EvalStream):
    def __init__(self, source):
        self._sources = (source,)


def source(kind=Source, *, of=Plan, segments=9, rows=2, first=None, policy="drop", **counts):
    """A source of one plan with these counts."""
    more = {"max_length": 128, "slots": 1, "read_only": ()} if of is PairPlan else {}
    fields = {
        "row_starts": np.arange(rows + 1),
        "records": np.arange(segments),
        "offsets": np.zeros(segments),
        "lengths": {"targets": np.full(segments, 10)},
        "row_lengths": {"targets": 64},
        "packing": "best_fit",
        "long_documents": policy,
        "counts": counts,
        "first": first or {},
        **more,
    }
    names = of.__dataclass_fields__
    plan = of(**{name: value for name, value in fields.items() if name in names})
    made = kind("pairs", None, plan)
    vars(made)["loss_tokens"] = 45  # read from the cache, of which there is none
    return made


def pairs(**counts):
    none = {"records": 1000, "prompt_too_long": 0, "same_when_truncated": 0, "truncated": 0}
    return source(PairSource, of=PairPlan, **{**none, **counts})


def test_nothing_is_told_of_data_that_are_read_whole():
    prompts = source(PromptSource, records=40, prompt_too_long=0)
    for each in (pairs(), prompts, source(records=40, long_records=3)):
        assert Train(each).notices() == HeldOut(each).notices() == []


@pytest.mark.parametrize(("lost", "name"), [(50, "too long"), (51, "WARNING")])
def test_pairs_that_are_too_long_are_told_with_the_remedy(lost, name):
    first = {"prompt_too_long": "x:1", "same_when_truncated": "x:2", "truncated": "x:3"}
    counts = {"prompt_too_long": lost - 10, "same_when_truncated": 10, "truncated": 300}
    (line,) = Train(pairs(**counts, first=first)).notices()
    assert line[0] == name
    for said in (
        "pairs: of 1,000 pairs, at max_length 128, ",
        f"{lost - 10} ({lost / 10 - 1:.1f}%) dropped, whose prompts leave no room (first: x:1), ",
        "10 (1.0%) dropped, whose completions are the same once they are cut (first: x:2), ",
        "300 (30.0%) cut at their ends (first: x:3)",
        "a larger MAX_LENGTH",
    ):
        assert said in line[1]
    cut = HeldOut(pairs(truncated=1, first=first))
    assert cut.notices()[0][1].startswith("pairs, held out: of 1,000 pairs")


@pytest.mark.parametrize(("lost", "name"), [(2, "too long"), (3, "WARNING")])
def test_prompts_that_are_too_long_are_told_with_the_remedy(lost, name):
    first = {"prompt_too_long": "x:7"}
    data = Train(source(PromptSource, records=40, prompt_too_long=lost, first=first))
    said = f"pairs: of 40 prompts, at MAX_PROMPT_LENGTH 64, {lost} ({lost / 40:.1%}) dropped (first: x:7)"
    assert data.notices() == [(name, f"{said}; a larger one drops fewer")]


@pytest.mark.parametrize(
    ("policy", "lost", "name", "what"),
    [
        ("drop", 2, "too long", "dropped"),
        ("drop", 3, "WARNING", "dropped"),
        ("truncate", 20, "too long", "cut at their ends"),
    ],
)
def test_documents_that_are_too_long_are_told(policy, lost, name, what):
    first = {"long_records": "x:7"}
    data = Train(source(records=40, long_records=lost, first=first, policy=policy))
    said = f"tokens (TASK_FEATURE_LENGTHS), {lost} ({lost / 40:.1%}) {what} (first: x:7)"
    assert data.notices() == [(name, f"pairs: of 40 documents, at {{'targets': 64}} {said}")]
    lengths = {"inputs": 512, "targets": 114}
    assert data.notices(lengths) == [(name, f"pairs: of 40 documents, at {lengths} {said}")]


def test_conversations_are_told_and_those_that_are_left_out():
    counts = {"records": 10, "truncated": 0, "too_long": 1, "nothing_learnt": 0}
    sizes = "pairs: 9 conversations in 2 rows, 90 tokens, of which 45 (50.0%) are learnt"
    (line,) = Train(source(ChatSource, **counts, first={"too_long": "x:7"})).notices()
    lost = "at 64 tokens (TASK_FEATURE_LENGTHS), 1 dropped, which are longer (first: x:7)"
    assert line == ("WARNING", f"{sizes}; {lost}")
    (line,) = Train(source(ChatSource, **{**counts, "too_long": 0})).notices()
    assert line == ("chats", sizes)
