"""Reads a recipe of Aya Expanse: recipe.yaml, the settings of all stages."""

import dataclasses
import math
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any, Literal

from data.aya_expanse import pool
from espalier.common import spelling

_MAX_BYTES = 1 << 20


class RecipeError(ValueError):
    """A recipe that is missing, malformed or incomplete."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of all stages.

    Attributes:
      base: run of the model before any stage.
      chats: folder with supervised data of each cluster, CLUSTER.jsonl.
      prompts: JSON lines with "prompt", "language" and, for translated ones, "origin": "translated".
      held_out: prompts on which the rounds are compared, of the same form.
      clusters: cluster -> its languages.
      shared: languages that all clusters have.
      teachers: pool of further teachers beside the models of the clusters, as for launch.prepare arbitrage; None for none.
      origin: prompts to use: native, translated or both.
      reward: of arbitrage and online rounds: exact_answer or checkpoint:DIR.
      judge: of the comparison of rounds, see launch.prepare arbitrage; None for the reward.
      language_of: see launch.prepare arbitrage.
      rounds: number of online rounds.
      samples: of each prompt in an online round.
      pair_gap: pairs of an online round whose rewards differ by no more are not trained on.
      steps: updates of the stages sft, arbitrage, preference and online.
      polish: updates after the first merge, on the data of all clusters at a tenth of the rate; 0 for none.
      form, keep_cut: see launch.prepare arbitrage.
      max_prompt_length, max_new_tokens: tokens of prompts, and of completions.
      batch_size: prompts at a time of a teacher.
      gin_files: read after those of each stage.
      bindings: NAME=VALUE of all trained stages.
    """

    base: str
    chats: str
    prompts: str
    held_out: str
    clusters: Mapping[str, list[str]]
    shared: list[str] = dataclasses.field(default_factory=lambda: ["en", "es", "fr"])
    teachers: str | None = None
    origin: Literal["native", "translated", "both"] = "native"
    reward: str = "exact_answer"
    judge: str | None = None
    language_of: str | None = None
    rounds: int = 3
    samples: int = 4
    pair_gap: float = 0.0
    steps: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"sft": 500, "arbitrage": 500, "preference": 200, "online": 100}
    )
    polish: int = 0
    form: Literal["messages", "prompt"] = "messages"
    keep_cut: bool = False
    max_prompt_length: int = 512
    max_new_tokens: int = 512
    batch_size: int = 32
    gin_files: list[str] = dataclasses.field(default_factory=list)
    bindings: list[str] = dataclasses.field(default_factory=list)

    def languages(self, cluster: str) -> list[str]:
        """Returns the languages of a cluster, with the shared ones."""
        return [*self.clusters[cluster], *self.shared]


_CHOICES = {"origin": ("native", "translated", "both"), "form": ("messages", "prompt")}
_TEXTS = (
    *("base", "chats", "prompts", "held_out", "teachers", "reward", "judge"),
    "language_of",
)
_NUMBERS = ("rounds", "polish", "samples", "max_prompt_length", "max_new_tokens", "batch_size")
_STAGES = ("sft", "arbitrage", "preference", "online")


def read(path: str) -> Recipe:
    """Returns the recipe in a YAML file.

    Raises:
      RecipeError: it is missing or malformed; the message names the key at fault.
      DataError: its pool of further teachers is.
    """
    import yaml

    file = pathlib.Path(path)
    if not file.is_file() or file.stat().st_size > _MAX_BYTES:
        raise RecipeError(f"{path} is no recipe: give a file recipe.yaml of at most 1 MB.")
    try:
        row = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(row, dict):
        raise RecipeError(f"{path} must be a mapping, such as base: RUN.")
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    for key in row:
        if key not in fields:
            raise RecipeError(
                f"{path}: unknown key {reprlib.repr(key)}; {spelling.nearest(key, fields)}"
            )
    for name, field in fields.items():
        needed = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if needed and name not in row:
            raise RecipeError(f"{path}: {name!r} is missing.")
    for name, value in row.items():
        if not _right(name, value):
            raise RecipeError(
                f"{path}: {name!r} is {reprlib.repr(value)}, which it cannot be; see launch/papers/aya_expanse/recipe.py."
            )
    recipe = Recipe(**row)
    if recipe.teachers is not None:
        names = pool.read(recipe.teachers).teachers
        if taken := [arm for arm in map(sft_arm, recipe.clusters) if arm in names]:
            raise RecipeError(
                f"{recipe.teachers}: {taken[0]!r} is the name of a cluster's model: rename the teacher."
            )
    return recipe


def sft_arm(cluster: str) -> str:
    """Returns the arm of a cluster's first model, which is also its name as a teacher."""
    return f"sft_{cluster}"


def _right(name: str, value: Any) -> bool:
    """Returns whether a key has a value of its type."""
    texts = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
    if name in _TEXTS:
        return isinstance(value, str) and bool(value)
    if name in _CHOICES:
        return value in _CHOICES[name]
    if name in _NUMBERS:
        return type(value) is int and value >= {"rounds": 0, "polish": 0, "samples": 2}.get(name, 1)
    if name == "pair_gap":
        return type(value) in (int, float) and 0 <= value < math.inf
    if name == "keep_cut":
        return isinstance(value, bool)
    if name == "clusters":
        return (
            isinstance(value, dict)
            and bool(value)
            and all(
                isinstance(key, str)
                and isinstance(languages, list)
                and all(isinstance(one, str) for one in languages)
                for key, languages in value.items()
            )
        )
    if name == "steps":
        return (
            isinstance(value, dict)
            and set(value) == set(_STAGES)
            and all(type(number) is int and number > 0 for number in value.values())
        )
    return texts
