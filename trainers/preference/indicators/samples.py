"""What indicators read and write: held-out pairs and prompts, the same at every evaluation, and files of outputs.

Outputs are of the policy at each evaluation, and of a competitor (the step-0 policy or another model).

    indicators/samples/<step>.jsonl

has a row for each prompt: "prompt" (ids), "prompt_text", "text", "tokens", "ended" ('eos' or 'length') and numbers. A
competitor's file has the same rows, or rows of `espalier generate`: "prompt" is then a text, or ids of
this run's vocabulary, and "text" the output.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from espalier.trainers.checkpoints import step_dir
from espalier.trainers.rewards.base import Completion
from espalier.trainers.telemetry import metric_writers

FOLDER = "indicators/samples"
Ids = Sequence[int]


class CompetitorError(ValueError):
    """The competitor's outputs are missing or malformed."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """Conversion between ids and texts.

    Attributes:
      vocabulary: a SeqIO vocabulary.
      ends: ids that end a completion.
    """

    vocabulary: Any
    ends: Collection[int]

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of all ids. SeqIO's `decode` would stop at the first EOS within a multi-turn prompt."""
        turns = itertools.groupby(ids, lambda id: id == self.vocabulary.eos_id)
        return "".join(self.vocabulary.decode(list(turn)) for is_end, turn in turns if not is_end)

    def completion(self, prompt: Sequence[int], tokens: Sequence[int]) -> Completion:
        """Returns generated tokens as a `Completion`, the input of a reward."""
        ended = bool(tokens) and tokens[-1] in self.ends
        text = tokens[:-1] if ended else tokens
        return Completion(prompt=tuple(prompt), tokens=tuple(text), ended=ended)

    def row(self, completion: Completion, **numbers: float) -> dict[str, Any]:
        """Returns a completion as a row of a file."""
        return {
            "prompt": list(completion.prompt),
            "prompt_text": self.text(completion.prompt),
            "text": self.text(completion.tokens),
            "tokens": list(completion.tokens),
            "ended": "eos" if completion.ended else "length",
            **{name: metric_writers.jsonable(value) for name, value in numbers.items()},
        }

    def read_row(self, row: Mapping[str, Any]) -> tuple[tuple[int, ...] | str, Completion]:
        """Returns (prompt as in the row: ids or text, completion); raises KeyError or TypeError for a malformed row."""
        prompt, ended = row["prompt"], row.get("ended", "eos") != "length"
        if isinstance(prompt, str):  # the row's tokens may be of another vocabulary
            tokens = tuple(map(int, self.vocabulary.encode(row["text"])))
            return prompt, Completion(prompt=(), tokens=tokens, ended=ended)
        ids = tuple(map(int, prompt))
        tokens = row["tokens"] if "tokens" in row else self.vocabulary.encode(row["text"])
        completion = self.completion(ids, tuple(map(int, tokens)))
        return ids, dataclasses.replace(completion, ended=ended)


def path_of(run: str | os.PathLike, step: int) -> pathlib.Path:
    """Returns the path of the file with the outputs of a step."""
    return pathlib.Path(run, FOLDER, f"{step}.jsonl")


def paths(run: str | os.PathLike) -> dict[int, pathlib.Path]:
    """Returns the files of a run by step."""
    files = pathlib.Path(run, FOLDER).glob("*.jsonl")
    return {int(path.stem): path for path in files if path.stem.isdigit()}


def write(run: str | os.PathLike, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes all outputs of a step, replacing earlier ones."""
    path = path_of(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    step_dir.write_file(path, "".join(lines).encode())


def competitor(
    path: str | os.PathLike, prompts: Sequence[Sequence[int]], texts: Texts
) -> list[Completion]:
    """Returns the competitor's output for each prompt: the first one if the file has several.

    Raises:
      CompetitorError: the file does not exist, a row cannot be read, or a prompt has no output.
    """
    if not os.path.exists(path):
        raise CompetitorError(
            f"The competitor's outputs, {path}, do not exist. A run writes the outputs of its policy at step 0 when it "
            "begins: start in another MODEL_DIR, or name a file by INDICATORS_COMPETITOR."
        )
    by_prompt: dict[tuple[int, ...] | str, Completion] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                key, completion = texts.read_row(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise CompetitorError(
                    f"{path}, line {number}: {type(error).__name__}: {error}. A row has 'prompt' (text or ids) and "
                    "'text' (or 'tokens', with a prompt of ids)."
                ) from None
            by_prompt.setdefault(key, completion)
    outputs = []
    for number, prompt in enumerate(prompts):
        output = by_prompt.get(tuple(prompt)) or by_prompt.get(texts.text(prompt))
        if output is None:
            raise CompetitorError(
                f"{path} has no output for prompt {number}, {texts.text(prompt)!r}: a competitor answers all "
                f"{len(prompts)} prompts, which are in {FOLDER}/0.jsonl of any run over these pairs."
            )
        outputs.append(dataclasses.replace(output, prompt=tuple(prompt)))
    return outputs


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


def read_held_out(
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
