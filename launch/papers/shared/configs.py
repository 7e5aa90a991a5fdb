"""Pieces of the papers' sweep files."""

from collections.abc import Mapping
from typing import Any

import ml_collections

# Seeds below it were used to choose designs, margins and settings, so they judge no claim; nor do pilots, from 90 on.
FIRST_SEED = 10


def config(arms: Mapping[str, Any], **settings: Any) -> ml_collections.ConfigDict:
    """Returns a sweep with its arms in this order; `seeds` may be their number, as text too."""
    if isinstance(settings.get("seeds"), str | int):
        settings["seeds"] = seeds(settings["seeds"])
    return ml_collections.ConfigDict(
        {**settings, "arms": ml_collections.ConfigDict(dict(arms), sort_keys=False)}
    )


def seeds(number: int | str, *, after: int = 0) -> tuple[int, ...]:
    """Returns so many seeds that judge claims, `after` others that chose something."""
    first = FIRST_SEED + after
    return tuple(range(first, first + int(number)))


def arm(*gin_files: str, **settings: Any) -> dict[str, Any]:
    """Returns a trained arm with those settings that are not None, such as `parent` or `bindings`."""
    options = {key: value for key, value in settings.items() if value is not None}
    return {"gin_files": gin_files, **options}


def on_shares(shares: Mapping[str, float], steps: int, *bindings: str, **settings: Any) -> dict:
    """Returns an arm that trains on shares of sources for so many steps, without evaluations by default."""
    phases = f"stream.make_stream.phases=((0, {shares!r}),)"
    bindings = (f"TRAIN_STEPS={steps}", phases, *bindings)
    settings.setdefault("evaluations", ())
    return {"bindings": bindings, **{k: v for k, v in settings.items() if v is not None}}


def cooldown(steps: int, more: int) -> tuple[str, ...]:
    """Returns bindings that continue a cosine of `steps` with all of its state; the rate falls linearly in `more` updates."""
    return (
        "initial.InitialCheckpoint.scope='state'",
        "recipe.Recipe.learning_rate=@schedules.cooldown()",
        "schedules.cooldown.before=@schedules.cosine()",
        f"schedules.cooldown.start_step={steps}",
        f"schedules.cooldown.steps={more}",
        f"schedules.cosine.total_steps={steps}",
    )


def made(*words: str, evaluations: tuple[str, ...] = ()) -> dict:
    """Returns an arm that a command of this project makes: `python -m` and the words."""
    return {"made": ("{python}", "-m", *words), "evaluations": evaluations}


def data_root(data: str, **more: str) -> tuple[str, ...]:
    """Returns the bindings of a full-size sweep's folder of data, and of paths inside it."""
    places = {"DATA_ROOT": "", "TOKENIZER": "/tokenizer", **more}
    return tuple(f"{name}={data + place!r}" for name, place in places.items())


def domain_evaluations(tasks: tuple[str, ...], *flags: str) -> dict[str, Any]:
    """Returns the evaluations of a mixture's runs: losses on all domains, and the router's choices."""
    loss = (
        "{python}",
        "-m",
        "launch.evaluate",
        "loss",
        "--checkpoint={run}",
        "--trust_config",
        *flags,
    )
    return {
        "held_out": {"command": (*loss, "--json={json}")},
        "routing": {
            "call": "launch.evaluation.routing:routing",
            "arguments": {"tasks": tasks, "trust_config": True},
        },
    }
