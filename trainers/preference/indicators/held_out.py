"""The held-out pairs and prompts for indicators; they are the same at every evaluation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Ids = Sequence[int]


class Pair(NamedTuple):
    """Token ids of a pair; completions include their end token."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


class PairStream(Protocol):
    """A held-out stream of pairs; data/preference/stream.py makes one."""

    def pairs(self) -> Iterable[tuple[str, Ids, Ids, Ids]]:
        """Yields (digest, prompt, chosen, rejected) once for each pair."""

    def summary(self) -> Mapping[str, Any]:
        """Returns the 'kind' of the pairs, the 'start_token' before each prompt, and the 'vocabulary'."""


class HeldOut(NamedTuple):
    """Held-out data of all evaluations.

    Attributes:
      pairs: in the order of their digests.
      prompted: the first pair of each prompt from which the policy generates.
      start: tokens before a prompt: one start token or none.
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
    """Returns held-out pairs of tasks, selected in the order of their digests, so independently of the order of files.

    Args:
      open_stream: opens the pairs of a task; called with (task=).
      num_pairs: maximum number of pairs; None for all.
      num_prompts: maximum number of prompts, taken first from these pairs and then from the other pairs.

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
        by_digest.update(
            (digest, Pair(*(tuple(map(int, side)) for side in ids)))
            for digest, *ids in stream.pairs()
        )
    if not by_digest:
        raise ValueError(
            f"PreferenceIndicators.tasks = {list(tasks)}: no pairs are held out. Give the tasks validation_files, or "
            "a validation_fraction above 0."
        )
    if len(starts) > 1:
        raise ValueError(
            f"PreferenceIndicators.tasks have different start tokens {starts}: name tasks with the same one."
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
