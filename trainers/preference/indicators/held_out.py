"""The held-out pairs and prompts for indicators: the same ones at every evaluation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Ids = Sequence[int]


class Pair(NamedTuple):
    """Token ids of a pair; completions include the token that ends them."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


class PairStream(Protocol):
    """A held-out stream of pairs; data/preference/stream.py makes one."""

    def pairs(self) -> Iterable[tuple[str, Ids, Ids, Ids]]:
        """Digest, prompt, chosen and rejected of each pair, every pair once."""
        ...

    def summary(self) -> Mapping[str, Any]:
        """'kind' of the pairs, 'start_token', which the model reads before each prompt, and the 'vocabulary'."""
        ...


class HeldOut(NamedTuple):
    """Held-out data of all evaluations.

    Attributes:
      pairs: in the order of their digests.
      prompted: the first pair of each prompt that is continued.
      start: tokens read before a prompt, one or none.
      vocabulary: digest of the data's vocabulary.
    """

    pairs: list[Pair]
    prompted: list[Pair]
    start: tuple[int, ...]
    vocabulary: str

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [pair.prompt for pair in self.prompted]


def read(
    open_stream: Callable[..., PairStream],
    tasks: Sequence[str],
    *,
    num_pairs: int | None,
    num_prompts: int,
) -> HeldOut:
    """Held-out pairs of some tasks; of more than `num_pairs`, those with the first digests, whatever the order of files.

    Args:
      open_stream: called with (task=).
      tasks: their names.
      num_pairs: at most so many; None for all.
      num_prompts: at most so many, of these pairs and then of others.

    Raises:
      ValueError: no pairs, or examples that are not pairs.
    """
    by_digest: dict[str, Pair] = {}
    starts = set()
    for task in tasks:
        stream = open_stream(task=task)
        facts = stream.summary()
        if facts.get("kind", "paired") != "paired":
            raise ValueError(
                f"PreferenceIndicators.tasks: {task!r} holds single completions with labels. Name tasks of pairs "
                "that are held out, registered with kind = 'paired'."
            )
        starts.add(facts["start_token"])
        by_digest.update((digest, Pair(*map(_ids, ids))) for digest, *ids in stream.pairs())
    if not by_digest:
        raise ValueError(
            f"PreferenceIndicators.tasks = {list(tasks)}: no pairs are held out. Give the tasks validation_files, or "
            "a validation_fraction above 0."
        )
    if len(starts) > 1:
        raise ValueError(
            "PreferenceIndicators.tasks differ in their start_token: name tasks with the same one."
        )
    pairs = [by_digest[digest] for digest in sorted(by_digest)]
    first: dict[tuple[int, ...], Pair] = {}
    for pair in pairs:
        first.setdefault(pair.prompt, pair)
    (start,) = starts
    return HeldOut(
        pairs[:num_pairs],
        list(first.values())[:num_prompts],
        () if start is None else (int(start),),
        facts["vocabulary"]["digest"],
    )


def _ids(ids: Ids) -> tuple[int, ...]:
    return tuple(int(id) for id in ids)
