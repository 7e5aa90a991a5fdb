"""A first sweep: what code does to a tiny model of bytes, in phases that share their parents.

Text only, half code, half code and then text, and that with two cooldowns; two seeds. A few minutes on
two cores:

  espalier sweep --sweep launch/papers/code_mix/tiny_sweep.py --out runs/tiny_code_mix --workers 2
"""

from ml_collections import ConfigDict

from espalier.launch.papers.shared import sweeps

_STEPS, _COOLDOWN = 60, 12


def _shares(**shares: float) -> str:
    return f"stream.make_stream.phases=((0, {shares!r}),)"


_THEN_TEXT = {"english": 0.9, "python": 0.1}


def _cooldown(**shares: float) -> dict:
    return {
        "parent": "balanced_then_text",
        "bindings": (
            # The place in the data is taken too, so that earlier phases are listed too.
            f"stream.make_stream.phases=((0, {_THEN_TEXT!r}), ({_STEPS}, {shares!r}))",
            f"TRAIN_STEPS={_STEPS + _COOLDOWN}",
            *sweeps.cooldown(_STEPS, _COOLDOWN),
        ),
    }


def get_config() -> ConfigDict:
    arms = {
        "text": {"bindings": (_shares(english=1.0),)},
        "balanced": {"bindings": (_shares(english=0.5, python=0.5),)},
        # Parameters alone are taken: step, moments and schedule begin anew.
        "balanced_then_text": {
            "parent": "balanced",
            "bindings": (_shares(**_THEN_TEXT),),
        },
        "cooldown_with_code": _cooldown(english=0.8, python=0.2),
        "cooldown_without_code": _cooldown(english=1.0),
    }
    return sweeps.config(
        arms,
        seeds=2,
        gin_files=(
            "t5x_configs/models/tiny.gin",
            "t5x_configs/data/bytes.gin",
            "t5x_configs/runs/pretrain.gin",
        ),
        bindings=(
            "SOURCES=['english', 'python']",
            "BYTES_PER_SOURCE=500000",
            "MIXTURE_OR_TASK_NAME='all'",
            "TASK_FEATURE_LENGTHS={'targets': 128}",
            "BATCH_SIZE=16",
            f"TRAIN_STEPS={_STEPS}",
            "LEARNING_RATE=1e-2",
            "EVAL_STEPS=10",
            "train.train.eval_tasks=('english', 'python')",
        ),
    )
