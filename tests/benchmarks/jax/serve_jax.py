"""This project's side of the benchmark of serving: the running batch of the server, and the decoder's batches beside it."""

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
        self._made: dict[Any, Any] = {}

    def running(self, *, requests: list, rows: int, prefixes: bool = True) -> dict[str, Any]:
        """Continues requests, each of which joins as soon as there is a row."""
        from espalier.trainers.decoding.prefixes import Prefixes
        from espalier.trainers.decoding.running import PREFIX_BYTES, RunningBatch
        from espalier.trainers.decoding.settings import Draw, Settings

        if rows not in self._made:
            settings = Settings(max_new_tokens=self._sizes["max_length"])
            self._made[rows] = RunningBatch(
                self._model,
                self._params,
                settings,
                sizes=(1, rows),
                longest=self._sizes["max_length"],
            )
        batch = self._made[rows]
        batch.prefixes = Prefixes(PREFIX_BYTES if prefixes else 0)  # nothing of an earlier call
        before = batch.prompt_tokens_read, _compiled(batch)
        tokens: list[list[int]] = [[] for _ in requests]
        waiting = list(range(len(requests)))[::-1]
        began, cpu = time.perf_counter(), time.process_time()
        while waiting or batch.keys:
            while waiting and len(batch.keys) < rows:
                i = waiting.pop()
                prompt, new = requests[i]
                draw = Draw(seed=0, temperature=0.0)
                joined = batch.join(i, prompt, draw, new, together=min(rows, len(waiting) + 1))
                tokens[i] += joined.tokens
            for i, news in batch.advance(16, leave=bool(waiting)).items():
                tokens[i] += news.tokens
        return {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            "tokens": tokens,
            "prompt_tokens_read": batch.prompt_tokens_read - before[0],
            "compiled": _compiled(batch) - before[1],
        }

    def batches(self, *, requests: list, rows: int) -> dict[str, Any]:
        """Continues as many requests at a time as there are rows, in their order; a batch ends with its longest request."""
        from espalier.trainers.decoding.buckets import bucket_length
        from espalier.trainers.decoding.decoder import Decoder
        from espalier.trainers.decoding.settings import Settings

        tokens: list[list[int]] = []
        began, cpu = time.perf_counter(), time.process_time()
        for first in range(0, len(requests), rows):
            batch = requests[first : first + rows]
            most = bucket_length(max(32, *(new for _, new in batch)))
            self._left = [new for _, new in batch]
            if ("batches", most) not in self._made:
                self._made["batches", most] = Decoder(
                    self._model,
                    self._params,
                    Settings(max_new_tokens=most),
                    batch_size=rows,
                    watch=self._watch,
                    watch_every=16,
                )
            decoder = self._made["batches", most]
            tokens += [row.tokens for row in decoder.stream([prompt for prompt, _ in batch])]
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        return {**seconds, "tokens": tokens}

    def _watch(self, i: int, _: int, made: list[int]) -> int | None:
        """Ends the row of request `i` of the batch at its length."""
        within = min(len(made), self._left[i])
        self._left[i] -= within
        return None if self._left[i] else within


def _compiled(batch: Any) -> int:
    """Returns the number of compiled programs of a RunningBatch."""
    return sum(program._cache_size() for program in batch._programs.values())


def side(folder: str) -> None:
    """Answers requests on standard input until it ends; see compare.Side."""
    operations = Ours(folder)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(operations, request.pop("op"))(**request)), flush=True)
