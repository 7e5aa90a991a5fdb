"""What a training run tells of its data that it does not read: rows of files, and what is too long for its rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.preference import tally
from trainers.batches import Stream

Line = tuple[str, str]  # name and text
MANY = 0.05  # the share of pairs or prompts that is not dropped without a warning
_CUT = {
    "prompt_too_long": "dropped, whose prompts leave no room",
    "same_when_truncated": "dropped, whose completions are the same once they are cut",
    "truncated": "cut at their ends",
}


def lines(
    registered: Mapping[str, Any], data: Stream, held_out: Sequence[Stream] = ()
) -> list[Line]:
    """Lines for the start of a run; those that are named WARNING tell of more than one pair or prompt in twenty.

    Args:
      registered: `data.tasks.summary()`: what was dropped and noted while files were read.
      data: what the run trains on.
      held_out: what it is evaluated on.
    """
    found = [
        line for task, facts in registered.get("tasks", {}).items() for line in _read(task, facts)
    ]
    for which, stream in [("", data), *((", held out", stream) for stream in held_out)]:
        summary = stream.summary()
        for source, facts in summary["sources"].items():
            if "pairs" in facts and any(facts[what] for what in _CUT):
                found.append(_pairs(f"{source}{which}", facts, summary["max_length"]))
            elif "prompts" in facts and facts["prompt_too_long"]:
                found.append(_prompts(f"{source}{which}", facts, summary["lengths"]["targets"]))
    return found


def _read(task: str, facts: Mapping[str, Any]) -> Iterator[Line]:
    """Of the files of a task: documents that filters dropped, or rows of preference data."""
    dropped, noted = facts.get("dropped", {}), facts.get("noted", {})
    documents = [
        f"{name} {count['documents']:,} documents ({count['bytes'] / 1e6:.1f} MB)"
        for name, count in dropped.items()
        if "documents" in count
    ]
    if documents:
        yield "dropped", f"{task}: {', '.join(documents)}"
    elif dropped:
        rows = sum(count["rows"] for count in dropped.values())
        share = rows / (rows + sum(facts["documents"].values()))
        yield _name("dropped", share), f"{task}: {tally.listed(dropped)}, {share:.1%} of all rows"
    if noted:
        yield "noted", f"{task}: {tally.listed(noted)}"


def _prompts(source: str, facts: Mapping[str, Any], max_length: int) -> Line:
    """Of a source of prompts: those that are too long."""
    count, records = facts["prompt_too_long"], facts["records"]
    return (
        _name("too long", count / records),
        f"{source}: of {records:,} prompts, at MAX_PROMPT_LENGTH {max_length}, {count:,} ({count / records:.1%}) dropped "
        f"(first: {facts['first']['prompt_too_long']}); a larger one keeps more",
    )


def _pairs(source: str, facts: Mapping[str, Any], max_length: int) -> Line:
    """Of a source of pairs: those that are too long."""
    records = facts["records"]
    parts = [
        f"{facts[what]:,} ({facts[what] / records:.1%}) {told} (first: {facts['first'][what]})"
        for what, told in _CUT.items()
        if facts[what]
    ]
    dropped = (facts["prompt_too_long"] + facts["same_when_truncated"]) / records
    return (
        _name("too long", dropped),
        f"{source}: of {records:,} pairs, at max_length {max_length}, {', '.join(parts)}; a larger MAX_LENGTH, with "
        "rows of twice that in TASK_FEATURE_LENGTHS, keeps more",
    )


def _name(name: str, dropped: float) -> str:
    return "WARNING" if dropped > MANY else name
