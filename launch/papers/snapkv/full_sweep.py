"""SnapKV at full size: LongBench with the whole cache, with SnapKV at three capacities and with H2O, as in table 1.

The folder of data after a colon has Hugging Face checkpoints in `models`, and the files of LongBench's data archive in
`eval/longbench`. Window 32 and max pooling over 7; prompts of more than 31,500 tokens or so lose their middle. To see the
commands:

  python -m launch.sweep --sweep launch/papers/snapkv/full_sweep.py:/data --out /runs/longbench --dry_run
"""

import ml_collections

from launch.papers.shared import sweeps

MODELS = (
    "LWM-Text-Chat-1M",
    "longchat-7b-v1.5-32k",
    "Mistral-7B-Instruct-v0.2",
    "Mixtral-8x7B-Instruct-v0.1",
)
MAX_LENGTH = 31_500 + 512  # with room for the longest answers
_SNAPKV = {"window": 32, "kernel": 7, "pooling": "max"}
POLICIES = {
    "full": ("full", {}),
    **{f"snapkv_{c}": ("snapkv", {"capacity": c, **_SNAPKV}) for c in (1024, 2048, 4096)},
    "h2o_4096": ("h2o", {"capacity": 4096, "window": 32}),
}


def get_config(data: str) -> ml_collections.ConfigDict:
    arms = {_arm(model): _converted(f"{data}/models/{model}") for model in MODELS}
    evaluations = {
        name: _longbench(f"{data}/eval", model_args(*policy)) for name, policy in POLICIES.items()
    }
    return sweeps.config(arms, seeds=(0,), evaluations=evaluations)


def _arm(model: str) -> str:
    return model.lower().replace("-", "_").replace(".", "p")


def model_args(policy: str, settings: dict) -> str:
    """Returns the --model_args of an evaluation with a cache policy."""
    cache = {f"cache_{name}": value for name, value in settings.items()}
    words = {"max_length": MAX_LENGTH, "cut": "middle", "cache_policy": policy, **cache}
    return ",".join(f"{name}={value}" for name, value in words.items())


def _converted(checkpoint: str) -> dict:
    words = ("launch.convert", f"--from_hf={checkpoint}", "--to={run}")
    return sweeps.made(*words, evaluations=tuple(POLICIES))


def _longbench(folder: str, arguments: str) -> dict:
    words = ("launch.evaluate", "harness", "--suite=snapkv", "--checkpoint={run}", "--json={json}")
    flags = (f"--data_dir={folder}", f"--model_args={arguments}")
    return {"command": ("{python}", "-m", *words, *flags)}
