"""The quickstart's code-mix arms with three seeds, and two cooldowns that share the balanced runs.

espalier sweep --sweep launch/papers/code_mix/quickstart_sweep.py --out runs/code_mix_quickstart
"""

from ml_collections import ConfigDict

from espalier.launch.papers.shared import sweeps

_ARMS = "t5x_configs/experiments/code_mix/quickstart_"
_STEPS, _COOLDOWN = 240, 48
_BALANCED = {"english": 0.25, "docstrings": 0.25, "python": 0.25, "cpp": 0.25}
_COOLDOWN_BINDINGS = (
    f"TRAIN_STEPS={_STEPS + _COOLDOWN}",
    f"EVAL_PERIOD={_STEPS + _COOLDOWN}",
    *sweeps.cooldown(_STEPS, _COOLDOWN),
)


def _cooldown(shares: dict[str, float]) -> dict:
    # All of the state is taken, including the place in the data, so that earlier phases are listed too.
    phases = f"stream.make_stream.phases=((0, {_BALANCED!r}), ({_STEPS}, {shares!r}))"
    return {
        "parent": "balanced",
        "gin_files": (f"{_ARMS}balanced.gin",),
        "bindings": (*_COOLDOWN_BINDINGS, phases),
    }


def get_config() -> ConfigDict:
    text = {"english": 0.4, "docstrings": 0.4}
    arms = {
        "text": {"gin_files": (f"{_ARMS}text.gin",)},
        "balanced": {"gin_files": (f"{_ARMS}balanced.gin",)},
        "code_then_text": {"gin_files": (f"{_ARMS}code_then_text.gin",)},
        "cooldown_with_code": _cooldown({**text, "python": 0.1, "cpp": 0.1}),
        "cooldown_without_code": _cooldown({"english": 0.5, "docstrings": 0.5}),
    }
    return sweeps.config(arms, seeds=3)
