"""What is checked of a run's configuration, data and parent before its first step.

Each raises ValueError that names the setting and what to do.
"""

from collections.abc import Mapping
from typing import Any

from trainers.batches import Stream
from trainers.checkpoints import restore
from trainers.objectives.base import Objective
from trainers.recipe import Program, Recipe


def numbers(**numbers: float) -> None:
    """All that must be positive, by macro."""
    bad = [f"{name} = {value}" for name, value in numbers.items() if value < 1]
    if bad:
        raise ValueError(f"{', '.join(bad)}: give 1 or more.")


def extras(recipe: Recipe, program: Program, meta: Mapping[str, Any]) -> None:
    """A reference or teacher is there and fits, as `StoredExtras.check` says."""
    objective = Objective.of(recipe.objective(model=recipe.model, num_sources=0))
    if objective.stored_extras is not None:
        objective.stored_extras.check(program.mesh, program.rules, meta)


def stream(recipe: Recipe, data: Stream) -> None:
    """The data is what the step is compiled for; an id beyond the embedding or classes would be clipped."""
    for name, ours, theirs in (
        ("batch_size", recipe.batch_size, data.batch_size),
        ("length", recipe.length, data.length),
    ):
        if ours != theirs:
            raise ValueError(
                f"The recipe's {name} is {ours}, but the training stream's is {theirs}: bind both to one "
                "macro (BATCH_SIZE, TASK_FEATURE_LENGTHS), as the files in t5x_configs/runs do."
            )
    if recipe.reads.unit == "tokens":
        vocabulary(recipe, data)
    else:
        _images(recipe, data)


def vocabulary(recipe: Recipe, data: Stream) -> None:
    """The model knows all ids of the data."""
    rows, size = recipe.model.config.vocab_size, data.summary()["vocabulary"]["size"]
    if size > rows:
        raise ValueError(
            f"The data's vocabulary has {size} entries, but the model's table only {rows} rows: set "
            "config.TransformerConfig.vocab_size to at least that (a multiple of 128 is fastest), or "
            "use the vocabulary the model was made for."
        )


def _images(recipe: Recipe, data: Stream) -> None:
    wanted = recipe.reads.arrays(1)["images"].shape[1:]
    found, classes = data.batch(0, 0, 1)["images"].shape[1:], data.summary()["num_classes"]
    if found != wanted:
        raise ValueError(
            f"The recipe's images are {list(wanted)}, but the training stream's are {list(found)}: bind "
            "both to IMAGE_SIZE and CHANNELS, as runs/classify.gin does."
        )
    if classes != recipe.model.config.num_classes:
        raise ValueError(
            f"The data have {classes} classes, but the model {recipe.model.config.num_classes}: set "
            "NUM_CLASSES to that of the data."
        )


def same_vocabulary(start: restore.Restored, meta: Mapping[str, Any]) -> None:
    """Other ids for the same words would train on without a sign of it."""
    if "vocabulary" not in meta:  # not of a language model
        return
    theirs = start.meta.get("vocabulary", meta["vocabulary"])
    if start.source == "initial" and theirs != meta["vocabulary"]:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH: {start.path} was trained with another vocabulary (digest "
            f"{theirs[:12]}) than this run's data has ({meta['vocabulary'][:12]}): use the vocabulary "
            "the checkpoint was trained with."
        )


def same_beginnings(recipe: Recipe, start: restore.Restored, meta: Mapping[str, Any]) -> None:
    """Prompts begin as the model's documents did; else it is asked in a way that it has never seen."""
    if recipe.reads.loss_per != "pairs" or start.source != "initial":
        return
    for key, macro in (("start_token", "DOCUMENT_START"), ("add_bos", "PROMPT_BOS")):
        theirs = start.meta.get(key, meta[key])
        if theirs != meta[key]:
            raise ValueError(
                f"INITIAL_CHECKPOINT_PATH: documents of {start.path} begin otherwise ({key} {theirs}) than this "
                f"run's prompts ({meta[key]}): set {macro} = {theirs}."
            )
