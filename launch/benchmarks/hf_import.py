"""Time to load a bfloat16 checkpoint with the shapes of Llama 3.2 1B (2.5 GB), and to convert it to a run.

This project's `load` and transformers' `from_pretrained` alternate in fresh processes; the conversion runs alone. Both
sides read files that are in the page cache (warm) and files that are not (cold). At the end each side touches every page
of the weights, because weights that are only memory-mapped are not read yet: transformers maps files whose dtype is the
requested one, so a warm load copies nothing. Imports are not counted. `load` also transposes all kernels and stacks
them by layer.
"""

import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

from launch.benchmarks import pairs, peers

_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


_SIDES = ("ours", "transformers")


def run(*, rounds: int = 3) -> dict[str, Any]:
    """Alternates both sides `rounds` times, cold and then warm; then converts `rounds` times."""
    reports_by_case: dict[str, list[dict[str, Any]]] = {}
    module = [sys.executable, "-m", "launch.benchmarks.hf_import"]
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "source")
        size = write_checkpoint(source)
        commands = {
            "ours": [*module, "load", source],
            "transformers": peers.peer_command("load_torch.py", source),
        }
        for _ in range(rounds):
            for side in _SIDES:
                _evict(source)
                for cache in ("cold", "warm"):
                    reports_by_case.setdefault(f"{side}_{cache}", []).append(
                        peers.measured(commands[side])
                    )
        for i in range(rounds):
            target = os.path.join(folder, str(i))
            report = peers.measured([*module, "convert", source, target])
            reports_by_case.setdefault("convert", []).append(report)

    def ratio(cache: str, key: str) -> dict[str, Any]:
        ours, theirs = ([r[key] for r in reports_by_case[f"{side}_{cache}"]] for side in _SIDES)
        return pairs.ratio(theirs, ours)

    return {
        "checkpoint_mb": size / 1e6,
        "transformers_over_ours_seconds_cold": ratio("cold", "load_and_touch_s"),
        "transformers_over_ours_seconds_warm": ratio("warm", "load_and_touch_s"),
        "transformers_over_ours_peak": ratio("warm", "peak_mb"),
        **{
            side: {key: [r[key] for r in reports] for key in reports[0] if key != "versions"}
            for side, reports in reports_by_case.items()
        },
        "contended": any(
            r["other_load"] > peers.CONTENDED for rs in reports_by_case.values() for r in rs
        ),
        "peer_versions": reports_by_case["transformers_warm"][0]["versions"],
    }


def _evict(folder: str) -> None:
    """Evicts the files of a folder from the page cache."""
    for path in pathlib.Path(folder).iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_checkpoint(folder: str) -> int:
    """Writes the checkpoint, in two files, and returns the size of its weights."""
    import numpy as np

    from model.hf.families import family_of_config
    from model.hf.files.safetensors_files import SafetensorsWriter
    from model.hf.plan import FLOATS

    family = family_of_config(_CONFIG)
    bfloat16 = FLOATS["bfloat16"]
    tensors = {
        name: (bfloat16, shape)
        for name, shape in sorted(family.shapes(family.model(_CONFIG)).items())
    }
    os.mkdir(folder)
    pathlib.Path(folder, "config.json").write_text(json.dumps(_CONFIG))
    draws = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(bfloat16)
    with SafetensorsWriter(folder, tensors, shard_bytes=2 * 10**9) as writer:
        for name, (_, shape) in tensors.items():
            rows = shape if len(shape) == 1 else (min(shape[0], draws.size // shape[1]), shape[1])
            block = draws[: int(np.prod(rows))].reshape(rows)
            for row in range(0, shape[0], rows[0]):
                writer.write(name, block[: shape[0] - row], row)
        return sum(info.nbytes for info in writer.tensors.values())


def peak_bytes() -> int:
    """Returns the peak resident memory of this process in bytes, including touched pages of mapped files (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _measure(action: str, *arguments: str) -> dict[str, Any]:
    import jax
    import numpy as np

    from launch.weights.import_weights import import_hf
    from model.hf.load import load

    jax.device_put(np.zeros(1)).block_until_ready()  # The backend starts on first use.
    before, begin = peak_bytes(), time.perf_counter()
    report: dict[str, Any] = {}
    if action == "convert":
        import_hf(*arguments)
        report["seconds"] = time.perf_counter() - begin
    else:
        _, params = load(*arguments)
        arrays = jax.block_until_ready(jax.tree.leaves(params))
        report["load_s"] = time.perf_counter() - begin
        for array in arrays:
            np.asarray(array).reshape(-1).view(np.uint8)[::4096].sum()
        report["load_and_touch_s"] = time.perf_counter() - begin
        report["parameters"] = sum(array.size for array in arrays)
    peak = peak_bytes()
    return {**report, "peak_mb": peak / 1e6, "peak_over_start_mb": (peak - before) / 1e6}


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
