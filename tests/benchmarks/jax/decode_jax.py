"""This project's side of the generation benchmarks: the decoder that `launch.generate` uses."""

import json
import os
import pathlib
import sys
import time
from typing import Any


class Ours:
    """The operations; compiled programs are reused, so that the second call with the same arguments is warm."""

    def __init__(self, folder: str):
        from espalier.model.hf.load import load
        from espalier.model.transforms import layer_stack

        self._sizes = json.loads(pathlib.Path(folder, "case.json").read_bytes())
        model, params = load(os.path.join(folder, "model"))
        self._model = layer_stack.unrolled(model)
        self._params = layer_stack.unroll(params, model.config)
        self._decoders: dict[str, Any] = {}

    def generate(
        self,
        *,
        batch: int,
        length: int,
        new: int,
        policy: str = "full",
        settings: dict[str, Any] | None = None,
        tokens: bool = False,
    ) -> dict[str, Any]:
        """Generates greedily; returns tokens, and seconds of the whole call, its prefill and its decoding."""
        from espalier.model.kv_cache.policies import policy_named
        from espalier.trainers.decoding.decoder import Decoder, Stats
        from espalier.trainers.decoding.settings import Settings
        from tests.benchmarks import case

        key = json.dumps([batch, length, new, policy, settings])
        if key not in self._decoders:
            self._decoders[key] = Decoder(
                self._model,
                self._params,
                Settings(max_new_tokens=new),
                policy=policy_named(policy, **(settings or {})),
                batch_size=batch,
            )
        decoder = self._decoders[key]
        prompts = case.prompts(self._sizes, batch, length)
        decoder.stats = Stats()
        began = time.perf_counter()
        results = decoder(prompts)
        return {
            "seconds": time.perf_counter() - began,
            "prefill_seconds": decoder.stats.prefill_seconds,
            "decode_seconds": decoder.stats.decode_seconds,
            "cache_bytes": decoder.stats.cache_bytes,
            "tokens": [row.tokens for row in results] if tokens else None,
        }

    def compress(
        self, *, batch: int, length: int, new: int, policy: str, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns the seconds to make decoding caches from caches with the whole prompt, all layers together.

        "seconds" is the time of the policy; "copy_seconds" is that of the full cache, which only adds slots.
        """
        import jax
        import jax.numpy as jnp

        from espalier.model.kv_cache.policies import policy_named
        from espalier.trainers.snapkv import replay
        from tests.benchmarks import case

        tokens = jnp.asarray(case.prompts(self._sizes, batch, length), jnp.int32)
        lengths = jnp.full(batch, length, jnp.int32)
        recording = jax.jit(lambda params: replay.record(self._model, params, tokens, lengths))(
            self._params
        )

        def best(chosen: Any) -> float:
            read = jax.jit(lambda seen: replay.whole(self._model, chosen, seen))(recording)
            run = jax.jit(lambda states: [chosen.compress(s, length=new) for s in states])
            times = []
            for _ in range(6):
                began = time.perf_counter()
                jax.block_until_ready(run(read))
                times.append(time.perf_counter() - began)
            return min(times[1:])  # the first compiles

        return {
            "seconds": best(policy_named(policy, **settings)),
            "copy_seconds": best(policy_named("full")),
        }

    def peak_bytes(
        self, *, length: int, new: int, policy: str, settings: dict[str, Any], depth: int = 1
    ) -> dict[str, Any]:
        """Returns the bytes of one row's caches, from the shapes of its states, for `depth` times as many layers.

        "decode_bytes" is the size of all layers after the prefill. "bytes" is the peak: during the prefill only the
        current layer's cache is uncompressed (trainers/decoding/prefill.py).
        """
        from espalier.model.kv_cache.policies import policy_named
        from espalier.trainers.snapkv.replay import cache_bytes

        chosen = policy_named(policy, **settings)
        sizes = {"length": length, "room": new - 1, "depth": depth}
        size = cache_bytes(self._model, self._params, chosen, **sizes)
        return {"bytes": size["peak"], "decode_bytes": size["decode"]}


def side(folder: str) -> None:
    """Answers requests on standard input until it ends; see compare.Side."""
    operations = Ours(folder)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(operations, request.pop("op"))(**request)), flush=True)
