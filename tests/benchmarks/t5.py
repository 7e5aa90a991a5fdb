"""A training step and greedy decoding of T5 1.1 against transformers, eager and compiled.

Both sides have the same weights and rows. Training is that of `train_step`, on inputs and targets; decoding is that of
`decode`, after the encoder has read the inputs. Of the peer, the faster of eager and torch.compile counts.
"""

import contextlib
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.benchmarks import case, compare, train_step

CASE: dict[str, Any] = {
    "num_layers": 4,  # of each stack
    "embed_dim": 256,
    "num_heads": 4,
    "head_dim": 64,
    "mlp_dim": 704,
    "vocab_size": 8192,
    "inputs": 256,
    "targets": 64,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.95,
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
}
BATCHES = (1, 8)
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "embed_dim": "d_model",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
}


def run(*, rounds: int = 5, steps: int = 15, repeats: int = 12) -> dict[str, Any]:
    """Alternates `rounds` processes of `steps` timed steps, then `repeats` calls that decode, for each size of a batch."""
    count = train_step.WARM_UP + steps
    with tempfile.TemporaryDirectory() as folder:
        commands = {side: command(side, folder, "train", count) for side in train_step.SIDES}
        write(folder, steps=count)
        reports = compare.alternate_processes(commands, rounds)
        with contextlib.ExitStack() as stack:
            sides = {
                side: stack.enter_context(compare.side(command(side, folder, "serve")))
                for side in train_step.SIDES
            }
            decoding = {f"batch_{batch}": _decode(sides, batch, repeats) for batch in BATCHES}
    seconds = train_step.medians(reports, "seconds", train_step.WARM_UP)
    return {
        "case": CASE,
        **train_step.speeds(seconds),
        **train_step.facts(
            reports, seconds, CASE["batch_size"] * (CASE["inputs"] + CASE["targets"])
        ),
        "other_load_cores": compare.each(reports, "other_load"),
        "decoding": decoding,
    }


def _decode(sides: Mapping[str, compare.Side], batch: int, repeats: int) -> dict[str, Any]:
    sizes = {"batch": batch, "length": CASE["inputs"], "new": CASE["targets"]}
    asks = {name: functools.partial(side.ask, "generate", **sizes) for name, side in sides.items()}
    first = {name: ask(tokens=True)["tokens"] for name, ask in asks.items()}  # compiles
    seconds = compare.each(compare.alternate(asks, repeats, warm_up=1), "seconds")
    return {
        "speed_over_best_peer": compare.ratio(train_step.least(seconds), seconds["ours"]),
        "tokens_per_second": {
            name: [round(batch * CASE["targets"] / s, 1) for s in values]
            for name, values in seconds.items()
        },
        "same_tokens": first["ours"] == first["eager"] == first["compiled"],
    }


def command(side: str, folder: str, what: str, *steps: int) -> list[str]:
    """Returns the command of a side: 'ours', or 'eager' or 'compiled' for the peer; `what` is 'train' or 'serve'.

    Raises:
      PeerError: the peer is not installed.
    """
    if side == "ours":
        return compare.ours("jax.t5_jax", folder, what, *steps)
    return compare.peer("torch/t5_torch.py", what, folder, side, *steps)


def write(folder: str, *, steps: int, sizes: Mapping[str, Any] = CASE) -> None:
    """Writes case.json, model/ in Hugging Face's layout, and inputs.npy and targets.npy [steps, B, tokens]."""
    rng = np.random.default_rng(0)
    pathlib.Path(folder, "case.json").write_text(json.dumps(dict(sizes)))
    case.write_model(os.path.join(folder, "model"), _config(sizes), _values(rng, sizes))
    for feature in ("inputs", "targets"):
        shape = (steps, sizes["batch_size"], sizes[feature])
        # Zipf-distributed ids without those of padding and end.
        ids = 2 + rng.zipf(1.2, shape) * 7919 % (sizes["vocab_size"] - 2)
        np.save(os.path.join(folder, f"{feature}.npy"), ids.astype(np.int32))


def _config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "num_decoder_layers": sizes["num_layers"],
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": False,
        "scale_decoder_outputs": False,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "dropout_rate": 0.0,
        "torch_dtype": "float32",
        **{name: sizes[ours] for ours, name in _HF_NAMES.items()},
    }


def _values(rng: np.random.Generator, sizes: Mapping[str, Any]) -> Any:
    """Returns the function that draws weights as T5 does: a head of unit logits, and queries for unscaled products."""
    width, hidden, head = sizes["embed_dim"], sizes["mlp_dim"], sizes["head_dim"]

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape)
        stds = {".q.": (width * head) ** -0.5, ".wo.": hidden**-0.5, "shared": 1.0}
        std = next((std for part, std in stds.items() if part in name), width**-0.5)
        return rng.normal(0, std, shape)

    return draw
