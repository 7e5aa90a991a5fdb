"""The stages of Aya Expanse (arXiv 2412.04261), from cluster models to online rounds, with a merge after each.

  base -> SFT of each cluster -> arbitrage among these and further teachers -> SFT of each cluster on it -> merge (-> polish) -> DPO of each cluster on best
  against worst answers -> merge -> rounds of online DPO of each cluster, each with a merge -> indicators by language and round

Every stage of a cluster starts from the merge before it, which is also its frozen reference. The settings are in a file:

  python -m launch.sweep --sweep launch/papers/aya_expanse/sweep.py:recipe.yaml --out runs/aya_expanse --workers 1
"""

import os

import ml_collections

from launch.papers.aya_expanse import recipe as recipes
from launch.papers.aya_expanse.recipe import Recipe, RecipeError
from launch.papers.shared import sweeps

GIN = "t5x_configs/experiments/aya_expanse/"
REWARD_MODEL = "t5x_configs/methods/preference/reward_checkpoint.gin"
STAGE = "launch.papers.aya_expanse.stage"


def get_config(path: str) -> ml_collections.ConfigDict:
    recipe = recipes.read(path)
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
        arms[recipes.sft_arm(cluster)] = _trained(recipe, "sft", chats, first=True)
    teachers = [f"{{{recipes.sft_arm(cluster)}}}" for cluster in clusters]
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
