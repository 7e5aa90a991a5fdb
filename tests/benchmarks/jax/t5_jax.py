"""This project's side of the benchmark of T5: the recipe of `launch.train`, and the decoder of `launch.generate`."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from tests.benchmarks.jax import llama_jax

_SIZES = ("num_layers", "embed_dim", "num_heads", "head_dim", "mlp_dim", "vocab_size")


def side(folder: str, what: str, steps: str = "0") -> dict[str, Any] | None:
    """Trains on the files of t5.write and returns losses, times and memory, or serves requests; see compare.Side."""
    sizes = json.loads(pathlib.Path(folder, "case.json").read_bytes())
    if what == "train":
        params = llama_jax.peer_params(folder)
        return llama_jax.train(recipe_of(sizes), params, batches(folder), int(steps))
    ours = Ours(folder, sizes)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(ours, request.pop("op"))(**request)), flush=True)
    return None


def recipe_of(sizes: Mapping[str, Any]) -> Any:
    """Returns the recipe of a case, with the peer's optimiser."""
    bindings = {f"config.TransformerConfig.{name}": sizes[name] for name in _SIZES}
    bindings |= {"config.TransformerConfig.scan_layers": False, "DTYPE": "float32"}
    bindings["TASK_FEATURE_LENGTHS"] = {name: sizes[name] for name in ("inputs", "targets")}
    return llama_jax.recipe_with(sizes, "t5x_configs/models/t5_1_1_base.gin", (), bindings)


def batches(folder: str) -> list[dict[str, Any]]:
    """Returns the batches, one example to a row; targets are shifted right behind the start token 0."""
    import numpy as np

    inputs_NBS, targets_NBT = (
        np.load(os.path.join(folder, f"{name}.npy")) for name in ("inputs", "targets")
    )
    return [batch_of(*rows) for rows in zip(inputs_NBS, targets_NBT, strict=True)]


def batch_of(inputs_BS: Any, targets_BT: Any) -> dict[str, Any]:
    """Returns a batch of the examples [B, S] and [B, T]."""
    import numpy as np

    batch: dict[str, Any] = {
        "encoder_input_tokens": inputs_BS,
        "decoder_input_tokens": np.pad(targets_BT, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets_BT,
        "decoder_loss_weights": np.ones(targets_BT.shape, np.float32),
        "source_ids": np.zeros(len(targets_BT), np.int32),
    }
    for stack, rows in (("encoder", inputs_BS), ("decoder", targets_BT)):
        batch[f"{stack}_segment_ids"] = np.ones_like(rows)
        positions = np.arange(rows.shape[1], dtype=np.int32)
        batch[f"{stack}_positions"] = np.tile(positions, (len(rows), 1))
    return batch


class Ours:
    """The operations; compiled programs are reused, so that the second call with the same arguments is warm."""

    def __init__(self, folder: str, sizes: Mapping[str, Any]):
        from espalier.model.hf.load import load

        self._model, self._params = load(os.path.join(folder, "model"))
        self._sizes = sizes
        self._decoders: dict[tuple[int, int], Any] = {}

    def generate(
        self, *, batch: int, length: int, new: int, tokens: bool = False
    ) -> dict[str, Any]:
        """Generates greedily after inputs of `length` tokens; returns tokens and seconds of the call."""
        from espalier.trainers.decoding.decoder import Decoder
        from espalier.trainers.decoding.settings import Settings
        from tests.benchmarks import case

        if (batch, new) not in self._decoders:
            settings = Settings(max_new_tokens=new)
            self._decoders[batch, new] = Decoder(
                self._model, self._params, settings, batch_size=batch
            )
        prompts = case.prompts(self._sizes, batch, length)
        began = time.perf_counter()
        results = self._decoders[batch, new](prompts)
        return {
            "seconds": time.perf_counter() - began,
            "tokens": [row.tokens for row in results] if tokens else None,
        }
