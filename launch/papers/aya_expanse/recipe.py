"""The stages of Aya Expanse (arXiv 2412.04261), from cluster models to online rounds, with a merge after each.

  base -> SFT of each cluster -> arbitrage among these and further teachers -> SFT of each cluster on it -> merge (-> polish) -> DPO of each cluster on best
  against worst answers -> merge -> rounds of online DPO of each cluster, each with a merge -> indicators by language and round

Every stage of a cluster starts from the merge before it, which is also its frozen reference. The settings are in a file:

  espalier sweep --sweep launch/papers/aya_expanse/recipe.py:recipe.yaml --out runs/aya_expanse --workers 1
"""

import dataclasses
import math
import os
import reprlib
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

from espalier.common import spelling
from espalier.data.aya_expanse import pool
from espalier.launch.papers.shared import sweeps


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
      teachers: pool of further teachers beside the models of the clusters, as for espalier prepare arbitrage; None for none.
      origin: prompts to use: native, translated or both.
      reward: of arbitrage and online rounds: exact_answer or checkpoint:DIR.
      judge: of the comparison of rounds, see espalier prepare arbitrage; None for the reward.
      opponent: compared with the model of every round, beside the model that the rounds start from: a run, a Hugging Face
        directory, or a file that espalier generate wrote from the prompts in held_out; None for none.
      language_of: see espalier prepare arbitrage.
      rounds: number of online rounds.
      samples: of each prompt in an online round.
      pair_gap: pairs of an online round whose rewards differ by no more are not trained on.
      steps: updates of the stages sft, arbitrage, preference and online.
      dev: folder with texts of each language, LANGUAGE.jsonl, on whose loss the weights of every merge are searched; None for
        equal weights.
      measure, scores: instead of `dev`, a command and the numbers that it writes, see espalier merge search.
      trials: of each search.
      polish: updates after the first merge, on the data of all clusters at a tenth of the rate; 0 for none.
      form, keep_cut: see espalier prepare arbitrage.
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
    opponent: str | None = None
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
    dev: str | None = None
    measure: str | None = None
    scores: list[str] = dataclasses.field(default_factory=list)
    trials: int = 60
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
    *("base", "chats", "prompts", "held_out", "teachers", "reward", "judge", "opponent"),
    *("language_of", "dev", "measure"),
)
_NUMBERS = (
    *("rounds", "polish", "samples", "max_prompt_length", "max_new_tokens", "batch_size"),
    "trials",
)
_STAGES = ("sft", "arbitrage", "preference", "online")


def read(path: str) -> Recipe:
    """Returns the recipe in a YAML file.

    Raises:
      RecipeError: it is malformed; the message names the key at fault.
      DataError: it is missing or not YAML, or its pool of further teachers is malformed.
    """
    row = pool.content(path, kind="recipe")
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
    if (recipe.dev and recipe.measure) or bool(recipe.measure) != bool(recipe.scores):
        raise RecipeError(
            f"{path}: give either 'dev', or 'measure' with 'scores', or none of them."
        )
    if recipe.opponent is not None and not os.path.exists(recipe.opponent):
        raise RecipeError(
            f"{path}: the 'opponent' {recipe.opponent} does not exist: give a run, or a file of espalier generate."
        )
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


GIN = "t5x_configs/experiments/aya_expanse/"
REWARD_MODEL = "t5x_configs/methods/preference/reward_checkpoint.gin"
STAGE = "espalier.launch.papers.aya_expanse.stage"


def get_config(path: str) -> ml_collections.ConfigDict:
    recipe = read(path)
    if recipe.rounds and recipe.reward.startswith("judge:"):
        raise RecipeError(
            f"{path}: online rounds need an exact scorer or checkpoint:DIR as 'reward', not a judge; or set rounds: 0."
        )
    path = os.path.abspath(path)

    def stage(name: str, *words: str) -> dict:
        return sweeps.made(STAGE, name, f"--recipe={path}", "--to={run}", *words)

    def merge(arms: list[str]) -> dict:
        return stage("merge", "--runs", *(f"{{{arm}}}" for arm in arms))

    clusters = list(recipe.clusters)
    arms: dict[str, dict] = {"prompts": stage("prompts")}
    for cluster in clusters:
        chats = f"CHATS={os.path.join(recipe.chats, f'{cluster}.jsonl')!r}"
        arms[sft_arm(cluster)] = _trained(recipe, "sft", chats, first=True)
    teachers = [f"{{{sft_arm(cluster)}}}" for cluster in clusters]
    words = ("--seed={SEED}", "--prompts={prompts}", "--runs", *teachers)
    arms["arbitrage"] = stage("arbitrage", *words)
    for cluster in clusters:
        chats = f"CHATS='{{arbitrage}}/sft_{cluster}.jsonl'"
        arms[f"arbitrage_{cluster}"] = _trained(recipe, "arbitrage", chats, first=True)
    arms["merged"] = merge([f"arbitrage_{cluster}" for cluster in clusters])
    start = "merged"
    if recipe.polish:
        start = "polished"
        arms[start] = _trained(recipe, "polish", "CHATS='{arbitrage}/sft.jsonl'", parent="merged")
    for cluster in clusters:
        pairs = f"PAIRS='{{arbitrage}}/pairs_{cluster}.jsonl'"
        arms[f"dpo_{cluster}"] = _trained(recipe, "preference", pairs, parent=start)
    arms["merged_dpo"] = merge([f"dpo_{cluster}" for cluster in clusters])
    merged = [start, "merged_dpo"]
    for number in range(1, recipe.rounds + 1):
        for cluster in clusters:
            prompts = f"PROMPT_FILES='{{prompts}}/{cluster}.jsonl'"
            arms[f"round{number}_{cluster}"] = _trained(
                recipe, "online", prompts, parent=merged[-1]
            )
        merged.append(f"merged_round{number}")
        arms[merged[-1]] = merge([f"round{number}_{cluster}" for cluster in clusters])
    arms["rounds"] = stage("rounds", "--runs", *(f"{{{arm}}}" for arm in merged))
    return sweeps.config(arms)


def _trained(
    recipe: Recipe, stage: str, data: str, *, first: bool = False, parent: str | None = None
) -> dict:
    """Returns the arm of a trained stage; the first stages start from the base."""
    kind = {"sft": "sft", "arbitrage": "sft"}.get(stage, stage)
    files = [
        os.path.join(recipe.base, "model.json"),
        f"{GIN}{kind}.gin",
        f"{GIN}vocabulary_base.gin",
    ]
    steps = f"TRAIN_STEPS={recipe.polish if stage == 'polish' else recipe.steps[stage]}"
    bindings = [data, steps, f"BASE={recipe.base!r}", *recipe.bindings]
    if first:
        bindings.append(f"INITIAL_CHECKPOINT_PATH={recipe.base!r}")
    if kind == "online":
        bindings += [
            f"SAMPLES={recipe.samples}",
            f"PAIR_GAP={float(recipe.pair_gap)}",
            f"MAX_PROMPT_LENGTH={recipe.max_prompt_length}",
            f"MAX_NEW_TOKENS={recipe.max_new_tokens}",
        ]
        if recipe.reward.startswith("checkpoint:"):
            files.append(REWARD_MODEL)
            bindings.append(f"REWARD_CHECKPOINT={recipe.reward.removeprefix('checkpoint:')!r}")
    return sweeps.arm(*files, *recipe.gin_files, bindings=tuple(bindings), parent=parent)
